"""A labelling page in a process of its own, with its store, for tests."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

from rlhf_jax.feedback import store as store_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Many annotators at one address, and cheap passwords.
SETTINGS = {
  'name_rate': '1000 per second',
  'address_rate': '1000 per second',
  'post_rate': '1000 per second',
  'hash_passes': 1,
  'hash_memory': 64,
}
ARABIC = 'ما هي أفضل طريقة لتعلم لغة جديدة؟'


@dataclasses.dataclass(frozen=True)
class Row:
  """A judgement with the texts of the completions in the place of their ids."""

  texts: frozenset
  shown: list
  answer: dict
  reason: str
  flags: list


class Page:
  """A server of the page.

  Attributes:
    url: URL of the database.
    store: The store, opened by the test itself.
    project: The project that is labelled.
    links: {annotator: token of the personal link}.
    process: The server's process.
    origin: Its address.
    log: File with all that it wrote to its standard output and error.
    options: Options of run_server.py.
  """

  def __init__(self, url, folder, *, name='animals', settings=None, policies=None, **project):
    """Opens the store and adds the project; `start` starts the server."""
    self.url, self.links = str(url), {}
    self.store = store_lib.Store.open(self.url)
    self.project = self.store.add_project(name, **project)
    self.log = pathlib.Path(folder) / 'server.log'
    self.origin, self.process = '', None
    self.options = {
      'url': self.url,
      'project': name,
      'port': 0,
      'settings': SETTINGS | (settings or {}),
      'policies': policies,
    }

  def start(self):
    """Starts the server, at the port it had before, and waits until it listens."""
    with self.log.open('a') as log:
      start = log.tell()
      self.process = subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).with_name('run_server.py'))]
        + [json.dumps(self.options)],
        env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=ROOT,
        text=True,
      )
    line = self.process.stdout.readline()
    assert line.startswith('listens on'), self.log.read_text()[start:]
    self.options['port'] = int(line.split()[-1])
    self.origin = f'http://127.0.0.1:{self.options["port"]}'

  def kill(self):
    """Kills the server at once, as a crash does."""
    self.process.send_signal(signal.SIGKILL)
    self._reap()

  def stop(self):
    """Stops the server and closes the store."""
    if self.process and self.process.poll() is None:
      self.process.terminate()
      try:
        self.process.wait(timeout=30)
      except subprocess.TimeoutExpired:
        self.process.kill()
    self._reap()
    self.store.close()

  def _reap(self):
    if self.process:
      self.process.wait()
      self.process.stdout.close()
      self.process = None

  def add_annotator(self, name, role='annotator'):
    """Adds an annotator and keeps the link."""
    annotator, self.links[name] = self.store.add_annotator(name, role=role)
    return annotator

  def add_tasks(self, name, kinds):
    """Adds tasks, in this order, that only one annotator may do.

    The completions are 'answer N of TASK', with different numbers N.

    Args:
      name: Name of the annotator.
      kinds: Kinds of tasks, or 'rtl' for a pair of answers to a prompt in Arabic.
    """
    annotator, rng = self.store.annotator(name), random.Random(name)
    for number, kind in enumerate(kinds):
      text = f'{ARABIC} {name} {number}' if kind == 'rtl' else f'Question {number} of {name}'
      prompt = self.store.add_prompt(self.project, text)
      count = {'rank': 4, 'best': 4}.get(kind, 2)
      completions = [
        self.store.add_completion(prompt, f'answer {value} of {name} {number}', policy=f'p{i}')
        for i, value in enumerate(rng.sample(range(100), count))
      ]
      kind = kind.replace('rtl', 'pair')
      self.store.add_task(
        self.project, kind, prompt, completions, annotator=annotator, priority=-number
      )

  def judgements(self, name, include_undone=False):
    """Returns the judgements of an annotator, oldest first, as `Row`s."""
    rows = self.store.judgements(self.project, include_undone=include_undone)
    return [_readable(row) for row in rows if row.annotator.name == name]


def _readable(judgement):
  text = {completion.id: completion.text for completion in judgement.task.completions}
  answer = dict(judgement.answer)
  for key in {'chosen', 'best'} & answer.keys():
    answer[key] = text[answer[key]]
  if 'ranking' in answer:
    answer['ranking'] = [{text[i] for i in group} for group in answer['ranking']]
  if 'rating' in answer:
    answer['rating'] = {text[int(i)]: value for i, value in answer['rating'].items()}
  return Row(
    frozenset(text.values()),
    [text[i] for i in judgement.shown],
    answer,
    judgement.reason,
    list(judgement.flags),
  )


@contextlib.contextmanager
def serve(folder, **options):
  """Yields a started `Page` over a store of SQLite in a folder."""
  page = Page(pathlib.Path(folder) / 'feedback.db', folder, **options)
  try:
    page.start()
    yield page
  finally:
    page.stop()


def sign_in(page, link):
  """Signs in by a personal link in the browser, and waits for the first page."""
  page.goto(f'/sign-in/{link}')
  page.get_by_role('button', name='Continue as').click()
  page.locator('#task-title').wait_for()


def wait_for_next(page, token):
  """Waits until the page shows another task than that of the form's token, or none."""
  page.locator(f'#task [name=token]:not([value="{token}"]), #main:not(:has(#task))').first.wait_for(
    state='attached'
  )

"""A small labelling page for tests, and a browser of it without JavaScript."""

import html.parser
import re

from starlette import testclient

from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback.page import app as app_lib
from rlhf_jax.feedback.page import settings as settings_lib

# Cheap hashes, so that tests are quick.
SETTINGS = settings_lib.Settings(hash_passes=1, hash_memory=8)
PROJECT = 'films'
POLICIES = 'secret-policy-one', 'secret-policy-two', 'secret-policy-three', 'secret-policy-four'


class Page:
  """A store with a project, annotators 'ann', 'ben' and the owner 'olga', and the application.

  Attributes:
    store: The store.
    project: The project.
    links: {name: token of the personal link}.
    app: The application.
  """

  def __init__(self, folder, settings=SETTINGS, lease_seconds=600.0):
    """Makes the store in a folder."""
    self.store = store_lib.Store.open(folder / 'feedback.db')
    self.project = self.store.add_project(
      PROJECT, instructions='Prefer the kinder answer.', lease_seconds=lease_seconds
    )
    self.links = {}
    for name, role in (('ann', 'annotator'), ('ben', 'annotator'), ('olga', 'owner')):
      _, self.links[name] = self.store.add_annotator(name, role=role)
    self.app = app_lib.create(self.store, self.project, settings=settings)

  def add(self, kind='pair', count=1, texts=('good', 'bad'), prompt='a film'):
    """Adds tasks; the texts are the answers, one of each policy."""
    completions = [{'text': text, 'policy': policy} for text, policy in zip(texts, POLICIES)]
    return self.store.add_tasks(
      self.project,
      [
        {'prompt': f'{prompt} {number}', 'kind': kind, 'completions': completions}
        for number in range(count)
      ],
    )

  def browser(self, name=None):
    """Returns a browser, signed in by the personal link of an annotator if a name is given."""
    browser = Browser(self.app)
    if name is not None:
      path = f'/sign-in/{self.links[name]}'
      browser.get(path)
      assert browser.post(path).status_code == 303
    return browser

  def judgements(self):
    """Returns the judgements that count."""
    return self.store.judgements(self.project)


class Browser(testclient.TestClient):
  """A browser that keeps cookies, and the form of the page that it shows."""

  def __init__(self, app, base_url='http://localhost'):
    super().__init__(app, base_url=base_url, follow_redirects=False, raise_server_exceptions=False)
    self.page, self.fields = '', {}

  def get(self, path, **options):
    """Loads a page."""
    response = super().get(path, **options)
    if 'text/html' in response.headers.get('content-type', ''):
      self.page, self.fields = response.text, fields(response.text)
    return response

  def post(self, path, fields=None, **options):
    """Sends a form with the hidden fields of the page and others."""
    return super().post(path, data=self.fields | (fields or {}), **options)

  def answer(self, value, **more):
    """Loads the next task and answers it; returns the response."""
    self.get('/')
    return self.post('/judge', {'answer': value} | more)


class _Fields(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = {}

  def handle_starttag(self, tag, attrs):
    """Keeps hidden fields; those of a later form replace those of an earlier one."""
    attrs = dict(attrs)
    if tag == 'input' and attrs.get('type') == 'hidden':
      self.found[attrs['name']] = attrs['value']


def fields(page):
  """Returns {name: value} of the hidden fields of a page."""
  parser = _Fields()
  parser.feed(page)
  return parser.found


def shown(page):
  """Returns the texts of the answers in the order displayed."""
  empty = '<span class="empty">[^<]*</span>'
  texts = re.findall(rf'<div class="text" dir="auto" hx-disable>(?:{empty}|([^<]*))</div>', page)
  return [html.unescape(text) for text in texts]

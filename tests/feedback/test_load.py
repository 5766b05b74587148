"""Load and crashes: no acknowledged judgement is lost or doubled, no task has too many answers.

The short cases run with the other tests; `pytest -m slow tests/feedback/test_load.py -s` is 50
annotators for two minutes on each database.
"""

import asyncio
import collections
import contextlib
import os
import shutil
import subprocess

import crowd as crowd_lib
import numpy as np
import pytest
import served

OVERLAP = 2
SHORT = {'annotators': 12, 'answers': 8, 'seconds': 300, 'thinking': 0.1, 'tasks': 60}
# 50 people who take 5 seconds for an answer, and as fast as the server can.
PEOPLE = {'annotators': 50, 'answers': 1000, 'seconds': 120, 'thinking': 5.0, 'tasks': 2000}
RUSH = {'annotators': 50, 'answers': 1000, 'seconds': 20, 'thinking': 0.0, 'tasks': 4000}
CASES = [
  pytest.param(SHORT, id='short'),
  pytest.param(PEOPLE, id='50 people', marks=pytest.mark.slow),
  pytest.param(RUSH, id='as fast as possible', marks=pytest.mark.slow),
]
P95 = 0.2  # seconds
LIMIT = 600  # seconds, of a test that hangs


@contextlib.contextmanager
def serve(url, folder, size):
  """Yields a server of a project with pairs of answers, and annotators."""
  page = served.Page(url, folder, overlap=OVERLAP)
  rows = [
    {
      'prompt': f'Question {number}',
      'completions': [{'text': f'{side} {number}', 'policy': side} for side in ('left', 'right')],
    }
    for number in range(size['tasks'])
  ]
  page.store.add_tasks(page.project, rows)
  for number in range(size['annotators']):
    page.add_annotator(f'annotator {number}')
  try:
    page.start()
    yield page
  finally:
    page.stop()


def crowd_of(page, size, **options):
  """Returns the annotators of a page."""
  numbers = size['answers'], size['seconds'], size['thinking']
  return crowd_lib.Crowd(page.origin, page.links, *numbers, **options)


def run(work):
  """Runs a coroutine, and stops it if it hangs."""
  asyncio.run(asyncio.wait_for(work, LIMIT))


def check(page, crowd):
  """Asserts that the store has the acknowledged judgements, each once, and no task too many."""
  rows = page.store.judgements(page.project)
  assert collections.Counter(row.reason for row in rows) == collections.Counter(crowd.acknowledged)
  assert all(row.reason.startswith(f'{row.annotator.name} ') for row in rows)
  answers = collections.Counter(row.task.id for row in rows)
  assert max(answers.values()) <= OVERLAP
  pairs = collections.Counter((row.task.id, row.annotator.id) for row in rows)
  assert max(pairs.values()) == 1


@pytest.mark.parametrize('size', CASES)
def test_under_load_nothing_is_lost_doubled_or_over_assigned(database_url, tmp_path, size, capsys):
  with serve(database_url, tmp_path, size) as page:
    crowd = crowd_of(page, size)
    run(crowd.work())
    check(page, crowd)
  assert not crowd.refused
  if size is SHORT:  # all that the annotators could do
    assert len(crowd.acknowledged) == size['annotators'] * size['answers']
    return
  p50, p95 = np.quantile(crowd.page_seconds, [0.5, 0.95])
  rate = len(crowd.acknowledged) / size['seconds']
  with capsys.disabled():
    print(f'\n{database_url[:6]}: {rate:.1f} judgements a second, ', end='')
    print(f'pages: median {1000 * p50:.0f} ms, p95 {1000 * p95:.0f} ms')
  if size is PEOPLE:
    assert p95 < P95
    assert rate > 8  # of the 10 a second of 50 people


async def _kill_and_restart(page, crowd, after):
  """Kills the server after so many judgements, while the annotators work, and restarts it."""
  work = asyncio.create_task(crowd.work())
  for enough in after:
    crowd.reached.clear()
    crowd.enough = enough
    await crowd.reached.wait()
    crowd.up.clear()
    page.kill()
    await asyncio.to_thread(page.start)
    crowd.up.set()
  await work


def test_what_was_acknowledged_survives_kill_9(database_url, tmp_path):
  with serve(database_url, tmp_path, SHORT) as page:
    crowd = crowd_of(page, SHORT)
    run(_kill_and_restart(page, crowd, after=(20, 60)))
    check(page, crowd)
  assert len(crowd.acknowledged) == SHORT['annotators'] * SHORT['answers']


@pytest.fixture
def small_disk(tmp_path):
  """Yields a folder on a file system of 16 MB."""
  if os.getuid() != 0 or shutil.which('mount') is None:
    pytest.skip('needs root, to mount a small file system')
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', str(folder)])
  if mount.returncode:
    pytest.skip('may not mount a file system here')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(folder):
  """Writes a file until the disk is full, and returns its path."""
  path = folder / 'filler'
  with contextlib.suppress(OSError), path.open('wb', buffering=0) as file:
    while True:
      file.write(bytes(4096))
  return path


async def _fill_and_empty(disk, crowd):
  """Fills the disk while the annotators work, and frees it after some were refused."""
  work = asyncio.create_task(crowd.work())
  await crowd.reached.wait()
  filler = await asyncio.to_thread(fill, disk)
  while len(crowd.refused) < 20:
    await asyncio.sleep(0.02)
  filler.unlink()
  await work


def test_a_full_disk_is_an_error_for_the_annotator_and_loses_nothing(small_disk, tmp_path):
  with serve(small_disk / 'feedback.db', tmp_path, SHORT) as page:
    crowd = crowd_of(page, SHORT, enough=20)
    run(_fill_and_empty(small_disk, crowd))
    check(page, crowd)
  assert len(crowd.acknowledged) == SHORT['annotators'] * SHORT['answers']
  for _, status, text in crowd.refused:
    assert status == 503
    assert 'Not saved' in text

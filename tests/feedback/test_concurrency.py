"""Several processes with several threads each label at once: nothing is doubled or lost."""

import collections
from concurrent import futures
import contextlib
import json
import os
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sa

from rlhf_jax.data import sources
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import database
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback import transfer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_threads_and_processes(database_url):
  """All make the new database at once, then six annotators want 30 tasks with an overlap of 2."""
  script = os.path.join(os.path.dirname(__file__), 'labeller.py')
  workers = [
    subprocess.Popen(
      [sys.executable, script, database_url, 'p', f'{number} a', f'{number} b'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'PYTHONPATH': ROOT},
    )
    for number in range(3)
  ]
  try:
    assert [worker.stdout.readline() for worker in workers] == ['ready\n'] * 3
    with store_lib.Store.open(database_url) as store:
      project = store.add_project('p', overlap=2)
      completions = [{'text': text, 'policy': text} for text in 'xy']
      store.add_tasks(project, [{'prompt': f'{i}', 'completions': completions} for i in range(30)])
      for worker in workers:
        worker.stdin.write('go\n')
        worker.stdin.flush()
      acknowledged = [i for worker in workers for i in json.loads(worker.stdout.readline())]
      assert [worker.wait() for worker in workers] == [0] * 3
      rows = store.judgements(project, include_undone=True)
      assert sorted(acknowledged) == [row.id for row in rows] and len(rows) == 60
      assert set(collections.Counter(row.task.id for row in rows).values()) == {2}
      assert len({(row.task.id, row.annotator.id) for row in rows}) == 60
      assert len({row.annotator.id for row in rows}) > 1
      with store.database.read() as session:
        assert set(session.scalars(sa.select(schema.Task.judged))) == {2}
        assert session.scalars(sa.select(schema.Lease)).all() == []
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()


class Meeting:
  """Makes imports wait for each other after their first record, if they can get there at once."""

  def __init__(self, monkeypatch, count):
    self._barrier, self._add, self._seen = threading.Barrier(count), transfer._add, set()
    monkeypatch.setattr(transfer, '_add', self._meet)

  def _meet(self, *arguments):
    self._add(*arguments)
    if threading.get_ident() not in self._seen:
      self._seen.add(threading.get_ident())
      with contextlib.suppress(threading.BrokenBarrierError):
        self._barrier.wait(timeout=1.0)


def comparisons(path, names):
  """Writes a file with a comparison by each annotator."""
  sources.write(
    path,
    [
      {'prompt': f'{i}', 'chosen': 'a', 'rejected': 'b', 'annotator': name}
      for i, name in enumerate(names)
    ],
  )
  return str(path)


@pytest.mark.parametrize(
  'projects, names, added',
  [
    ('pp', ('Ada', 'Bob'), [2, 2]),  # two files
    ('pp', ('Ada', 'Ada'), [0, 2]),  # one file twice, as the records are the same
    ('pq', ('Ada', 'Ada'), [2, 2]),
    ('pq', ('Ada', 'Bob'), [2, 2]),  # each waits for the name that the other has added
  ],
)
def test_imports_at_once(projects, names, added, database_url, tmp_path, monkeypatch):
  """Both imports add the annotators Ada and Bob, in the order in which their records name them."""
  orders = {'Ada': ('Ada', 'Bob'), 'Bob': ('Bob', 'Ada')}
  paths = [comparisons(tmp_path / f'{i}.jsonl', orders[name]) for i, name in enumerate(names)]
  with store_lib.Store.open(database_url) as store, futures.ThreadPoolExecutor() as pool:
    found = [store.add_project(name) for name in projects]
    Meeting(monkeypatch, 2)
    waiting = [pool.submit(transfer.add_comparisons, store, *pair) for pair in zip(found, paths)]
    done = [future.result() for future in waiting]
    assert sorted(one.added for one in done) == added
    assert [one.added + one.there for one in done] == [2, 2]
    assert sorted(person.name for person in store.annotators()) == ['Ada', 'Bob']
    total = sum(
      len(store.records(project)) for project in {one.name: one for one in found}.values()
    )
    assert total == sum(added)


class Pause:
  """Stops an import after its first record until `go` is set."""

  def __init__(self, monkeypatch):
    self.reached, self.go, self._add = threading.Event(), threading.Event(), transfer._add
    monkeypatch.setattr(transfer, '_add', self._pause)

  def _pause(self, *arguments):
    self._add(*arguments)
    if not self.reached.is_set():
      self.reached.set()
      assert self.go.wait(20)


def test_an_annotator_who_is_added_during_an_import(postgres, tmp_path, monkeypatch):
  """The import uses the row of a name that is taken after it has looked for it."""
  path = comparisons(tmp_path / 'x.jsonl', ['Ada', 'Bob'])
  with store_lib.Store.open(postgres()) as store, futures.ThreadPoolExecutor() as pool:
    lock = database.lock_annotators

    def lock_and_lose(session):
      lock(session)
      sign_up = lambda *_: pool.submit(store.add_annotator, 'Ada').result()
      sa.event.listen(session, 'before_flush', sign_up, once=True)
      monkeypatch.setattr(database, 'lock_annotators', lock)

    monkeypatch.setattr(database, 'lock_annotators', lock_and_lose)
    assert transfer.add_comparisons(store, store.add_project('p'), path).added == 2
    assert sorted(person.name for person in store.annotators()) == ['Ada', 'Bob']


def test_accounts_change_during_an_import(postgres, tmp_path, monkeypatch):
  """Nobody waits to sign up, and a new link for one of the annotators is no deadlock."""
  path = comparisons(tmp_path / 'x.jsonl', ['Ada', 'Bob', 'Cleo'])
  with store_lib.Store.open(postgres()) as store, futures.ThreadPoolExecutor() as pool:
    ada, _ = store.add_annotator('Ada')
    project, pause = store.add_project('p'), Pause(monkeypatch)
    imported = pool.submit(transfer.add_comparisons, store, project, path)
    assert pause.reached.wait(20)
    link = pool.submit(accounts.change, store.database, ada, token='link')
    pool.submit(store.add_annotator, 'Dan').result(timeout=20)
    pause.go.set()
    assert imported.result().added == 3
    link.result()
    assert sorted(person.name for person in store.annotators()) == ['Ada', 'Bob', 'Cleo', 'Dan']

"""Several processes with several threads each label at once: nothing is doubled or lost."""

import collections
import json
import os
import subprocess
import sys

import sqlalchemy as sa

from rlhf_jax.feedback import schema
from rlhf_jax.feedback import store as store_lib

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

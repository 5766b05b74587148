"""A pool of worker processes: the same rewards as in one process, and all kinds of failures."""

import os
import pathlib
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import pool

SOURCE = """
import os, signal, sys, time

def words(prompts, responses, *, response_tokens, metadata):
  (prompt,), (response,), (tokens,), (entry,) = prompts, responses, response_tokens, metadata
  return [entry['number'] + 10 * len(response.split()) + 100 * len(tokens) + 1000 * len(prompt)]

def per_token(prompts, responses, *, response_tokens, metadata):
  return [[token / 2 for token in tokens] for tokens in response_tokens]

def both_kinds(prompts, responses, *, response_tokens, metadata):
  return [response_tokens[0]] if metadata[0]['number'] == 1 else [1.0]

def process(prompts, responses):
  assert 'jax' not in sys.modules
  time.sleep(0.01)
  return [float(os.getpid())]

def fails(prompts, responses):
  for response in responses:
    if response == 'sleeps':
      time.sleep(60)
    if response == 'hangs in C':
      sum(range(10**12))
    if response == 'dies':
      os.kill(os.getpid(), signal.SIGSEGV)
    if response == 'raises':
      raise ValueError('not a number')
    if response == 'exits':
      os._exit(0)
    if response == 'is garbage':
      return ['good']
    if response == 'is infinite':
      return [float('inf')]
    if response == 'leaves a process':
      os.fork() or time.sleep(60)
      sum(range(10**12))
  return [float(len(response)) for response in responses]

def sleeps(prompts, responses):
  time.sleep(0.3)
  return [1.0]

def forever(prompts, responses):
  with open(responses[0], 'w') as file:
    file.write(str(os.getpid()))
  while True:
    time.sleep(60)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a folder with a user's module, which workers import."""
  folder = tmp_path_factory.mktemp('pool')
  (folder / 'mine_for_pool.py').write_text(SOURCE)
  (folder / 'broken_for_pool.py').write_text('def f(prompts, responses):\n  return [1.0]\n1 / 0\n')
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


def score(workers, responses, *, numbers=None, length=6):
  """Scores responses, whose tokens are 3, 4, ... for each word."""
  return workers.score(
    ['p' * (i + 1) for i in range(len(responses))],
    responses,
    response_tokens=[list(range(3, 3 + len(response.split()))) for response in responses],
    metadata=[{'number': i} for i in numbers or range(len(responses))],
    response_length=length,
  )


def test_rewards_come_in_order_and_from_all_workers(folder):
  workers = pool.Pool('mine_for_pool:words', 2)
  responses = [' '.join('w' * (i * 7 % 5)) for i in range(40)]
  scores, failed = score(workers, responses)
  counts = [i * 7 % 5 for i in range(40)]
  assert scores.dtype == np.float32 and not failed.any()
  assert scores.tolist() == [i + 110 * counts[i] + 1000 * (i + 1) for i in range(40)]
  workers.close()
  scores, _ = score(workers, responses[:3])  # new processes
  assert scores.tolist() == [1000.0, 1 + 220 + 2000, 2 + 440 + 3000]


def test_workers_have_no_jax_and_work_at_the_same_time(folder):
  workers = pool.Pool('mine_for_pool:process', 2)
  ids = set()
  for _ in range(100):  # one worker may score all while the other still imports
    ids |= set(score(workers, ['a'] * 4)[0].tolist())
    if len(ids) == 2:
      break
  assert len(ids) == 2 and os.getpid() not in ids


def test_rewards_per_token(folder):
  scores, _ = score(pool.Pool('mine_for_pool:per_token', 1), ['a b', '', 'a b c'])
  assert scores.tolist() == [[1.5, 2, 0, 0, 0, 0], [0] * 6, [1.5, 2, 2.5, 0, 0, 0]]
  with pytest.raises(errors.UserError, match='one number for some examples and rewards per token'):
    score(pool.Pool('mine_for_pool:both_kinds', 1), ['a b', 'a', 'c'])


FAILURES = {
  'sleeps': ['did not return within 0.3 seconds', '`time.sleep(60)`', 'config.reward.example_time'],
  'hangs in C': [
    'fails did not return within 0.3 seconds on example 1',
    'No signal could stop it, so its process was killed',
    'raise config.reward.example_timeout',
  ],
  'dies': ['a worker of the reward function fails was killed by signal 11 (SIGSEGV) on example 1'],
  'raises': ['fails raised ValueError: not a number', 'in fails: `raise ValueError'],
  'exits': ['fails called os._exit(0)'],
  'is garbage': ["fails returned 'good' for example 1", 'is a str'],
  'is infinite': ['fails returned inf for example 1', 'must be finite'],
}


@pytest.fixture(scope='module')
def failing(folder):
  return {
    how: pool.Pool(
      'mine_for_pool:fails', 1, example_timeout=0.3, on_error=pool.OnError(how, score=-2.5)
    )
    for how in pool.ON_ERROR
  }


@pytest.mark.parametrize('how', FAILURES)
def test_a_failure_stops_the_run_and_names_the_example(how, failing, monkeypatch):
  monkeypatch.setattr(pool, 'GRACE', 0.3 if how == 'hangs in C' else pool.GRACE)
  with pytest.raises(errors.UserError) as caught:
    score(failing['stop'], ['fine', how, 'fine'])
  for part in [*FAILURES[how], "example 1, prompt 'pp', response '" + how, functions.REMEDY]:
    assert part in str(caught.value), str(caught.value)
  assert '\n' not in str(caught.value)


def test_failures_are_skipped_or_scored_and_logged(failing, monkeypatch, caplog):
  monkeypatch.setattr(pool, 'GRACE', 0.3)
  responses = ['fine', *FAILURES, 'leaves a process', 'good']
  for how, value in (('skip', np.nan), ('score', -2.5)):
    scores, failed = score(failing[how], responses)
    np.testing.assert_array_equal(scores, np.float32([4, *[value] * 8, 4]))
    np.testing.assert_array_equal(failed, [False, *[True] * 8, False])
  assert 'failed for 8 of 10 examples, which are skipped; the first: ' in caplog.text
  assert 'which score -2.5; the first: the reward function fails did not' in caplog.text


def test_a_worker_that_is_killed_between_batches_is_replaced(failing):
  score(failing['stop'], ['fine'])
  [worker] = failing['stop']._workers
  worker._process.kill()
  worker._process.wait()
  assert score(failing['stop'], ['again'])[0].tolist() == [5.0]


def test_a_batch_has_a_time_limit_too(folder):
  workers = pool.Pool('mine_for_pool:sleeps', 1, limit=functions.Limit(1.0))
  with pytest.raises(
    errors.UserError, match=r'sleeps did not score 9 examples within 1 seconds with 1 workers \('
  ):
    score(workers, ['a'] * 9)


def test_a_module_that_fails_to_import_is_an_error(folder):
  for how in ('stop', 'skip'):
    workers = pool.Pool('broken_for_pool:f', 2, on_error=pool.OnError(how))
    with pytest.raises(errors.UserError, match='config.reward.function=.*ZeroDivisionError'):
      score(workers, ['a'])


def test_workers_end_with_the_run(folder, tmp_path):
  """Both at its end and if it is killed while one works."""
  code = textwrap.dedent("""
      import sys
      from rlhf_jax.rewards import pool
      workers = pool.Pool('mine_for_pool:forever', 1, example_timeout=None)
      print(workers._workers[0]._process.pid, flush=True)
      if sys.argv[1]:
        workers.score(['p'], [sys.argv[1]], response_tokens=[[]], metadata=[{}], response_length=1)
      """)
  root = pathlib.Path(__file__).resolve().parents[2]
  for path in ('', str(tmp_path / 'pid')):
    run = subprocess.Popen(
      [sys.executable, '-c', code, path],
      cwd=root,
      env=os.environ | {'PYTHONPATH': f'{folder}:{root}'},
      stdout=subprocess.PIPE,
      text=True,
    )
    pid = int(run.stdout.readline())
    end = time.monotonic() + 60
    while path and not os.path.exists(path) and time.monotonic() < end:
      time.sleep(0.05)
    if path:
      assert psutil.pid_exists(pid)
      run.kill()
    run.communicate(timeout=60)
    while psutil.pid_exists(pid) and time.monotonic() < end:
      time.sleep(0.05)
    assert not psutil.pid_exists(pid)

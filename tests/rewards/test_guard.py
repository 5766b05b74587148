"""Failures of a user's function give one line with their place, and restore the process."""

import asyncio
import functools
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS, RESPONSES = ['one', 'two', 'two'], ['a b', 'c', 'd e f']
BATCH = guard.Call(
  'the reward function mine', PROMPTS, RESPONSES, timeout=0.3, key='config.reward.timeout'
)
SOURCE = """
import asyncio, os, sys, time
def grade(how, response):
  if how == 'divides':
    return 1 / 0
  if how == 'exits':
    sys.exit(0)
  if how == 'exits at once':
    os._exit(0)
  if how == 'is cancelled':
    raise asyncio.CancelledError
  if how == 'sleeps':
    time.sleep(60)
  if how == 'is deep in a library':
    return deep([[[[how]]]])
def deep(x):
  import json
  return json.dumps(x, default=str, indent=object())
def score(how, responses):
  return [grade(how if response == 'c' else '', response) for response in responses]
def swallow(responses):
  while True:
    try:
      time.sleep(60)
    except:
      return [0.0]
"""


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
  """Writes a user's module to a file."""
  folder = tmp_path_factory.mktemp('mine')
  (folder / 'mine_for_guard.py').write_text(SOURCE)
  sys.path.insert(0, str(folder))
  yield importlib.import_module('mine_for_guard')
  sys.path.remove(str(folder))


ENDS = {
  'divides': [
    'mine raised ZeroDivisionError: division by zero, at ',
    'py:5 in grade: `return 1 / 0`',
    '--verbosity=1 shows the full traceback',
  ],
  'exits': ['mine called sys.exit(0), at ', 'py:7 in grade: `sys.exit(0)`', 'it must return'],
  'exits at once': ['mine called os._exit(0), at ', 'py:9 in grade: `os._exit(0)`'],
  'is cancelled': ['mine raised CancelledError', 'py:11 in grade'],
  'sleeps': [
    'mine did not return within 0.3 seconds, at ',
    'py:13 in grade: `time.sleep(60)`',
    'raise config.reward.timeout (None: no limit)',
  ],
}


@pytest.mark.parametrize('how', ENDS)
def test_every_end_is_one_line_with_the_users_frames_and_the_example(how, mine):
  with pytest.raises(errors.UserError) as caught:
    guard.run(functools.partial(mine.score, how, RESPONSES), BATCH)
  message = str(caught.value)
  for part in [
    *ENDS[how],
    'mine_for_guard.py:20 in score: `return [grade(',
    "with example 1, prompt 'two', response 'c'",
  ]:
    assert part in message, message
  assert '\n' not in message and 'guard.py:6' not in message and '<listcomp>' not in message


def test_deep_in_a_library_the_users_own_line_is_shown(mine):
  with pytest.raises(errors.UserError) as caught:
    guard.run(functools.partial(mine.score, 'is deep in a library', RESPONSES), BATCH)
  message = str(caught.value)
  assert 'mine_for_guard.py:18 in deep: `return json.dumps' in message
  assert 'json/encoder.py' in message.split('then')[-1] and 'example 1' in message


def test_the_example_has_the_prompt_of_the_frame_too():
  def grade(prompt, response):
    raise ValueError(prompt + response)

  call = guard.Call('mine', ['one', 'two'], ['same', 'same'])
  with pytest.raises(errors.UserError, match="with example 1, prompt 'two', response 'same'"):
    guard.run(lambda: grade('two', 'same'), call)
  with pytest.raises(
    errors.UserError, match="called with 2 prompts, the first 'one' with the response 'same'"
  ):
    guard.run(lambda: 1 / 0, call)


def test_ctrl_c_stays_ctrl_c():
  def interrupted():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    guard.run(interrupted, BATCH)


def test_a_bare_except_does_not_escape_the_limit(mine):
  with pytest.raises(errors.UserError, match='did not return within 0.3 seconds.*`time.sleep'):
    guard.run(lambda: mine.swallow(RESPONSES), BATCH)


def test_handler_timer_and_exit_are_restored():
  """An outer limit that passes during the call takes effect right after it."""
  rang, exit_now = [], os._exit
  before = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
  try:
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    assert guard.run(lambda: time.sleep(0.2) or 7, BATCH) == 7
    assert os._exit is exit_now
    time.sleep(0.05)
    assert len(rang) == 1
    assert guard.run(lambda: 7, BATCH) == 7
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
  finally:
    signal.signal(signal.SIGALRM, before)


def test_another_thread_has_no_signals_and_works():
  found = []
  thread = threading.Thread(target=lambda: found.append(guard.run(lambda: 7, BATCH)))
  thread.start()
  thread.join()
  assert found == [7]


def python(code):
  """Runs code in a process without JAX."""
  code = 'from rlhf_jax.rewards import guard\nimport os, sys, time\n' + textwrap.dedent(code)
  return subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60
  )


def test_a_forked_child_exits_and_code_that_no_signal_reaches_is_ended():
  """A loop in C that never checks for signals, so no handler runs."""
  done = python("""
      def forks():
        child = os.fork()
        if not child:
          os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      call = guard.Call('mine', timeout=0.2)
      print(guard.run(forks, call), flush=True)
      guard.GRACE = 0.3
      guard.run(lambda: sum(range(10**12)), call)
      """)
  assert done.stdout == '7\n' and done.returncode == 1
  assert 'Timeout (0:00:00.500000)!' in done.stderr and 'line 12 in <lambda>' in done.stderr


def test_the_run_goes_on_after_a_megabyte_another_folder_and_children_that_come_back():
  done = python("""
      def wild():
        print('x' * 2**20, flush=True)
        os.chdir('/')
        if not os.fork():
          return 'as a second run'
        if not os.fork():
          raise ValueError('as a second run')
        if not os.fork():
          sys.exit(3)
        return sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3))
      here = os.getcwd()
      print(guard.run(wild, guard.Call('mine', timeout=20)), os.getcwd() == here, flush=True)
      """)
  assert done.stdout == f'{"x" * 2**20}\n[1, 1, 3] True\n' and done.returncode == 0, done.stderr
  assert 'mine forked a process that returned: it must end with os._exit(status)' in done.stderr
  assert 'mine forked a process that raised ValueError: as a second run' in done.stderr


def wrong(prompts, responses):
  """A reward function that does not build a gold score from a path."""


def without_responses(prompts):
  """A function that cannot be called with responses."""


def gold_that_fails(prompt, response):
  del prompt
  return {'bad': 'much', 'nan': float('nan')}.get(response, 1.5)


number = 3


@pytest.mark.parametrize(
  'name, message',
  [
    (
      'without_responses',
      r'takes \(prompts\), but is called as f\(prompts, responses, response_tokens=..., '
      r'metadata=...\): too many positional arguments; write def f\(',
    ),
    ('number', 'is of type int: it must be a function'),
  ],
)
def test_a_wrong_signature_is_found_when_it_is_loaded(name, message):
  with pytest.raises(errors.UserError, match=f'config.reward.function=.*:{name}.* {message}'):
    functions.load_reward(f'{__name__}:{name}')
  assert functions.load_reward('tiny:good_words') is tiny.good_words


def test_gold_scores_are_guarded_too():
  gold = functions.load_gold(f'{__name__}:gold_that_fails')
  assert gold('p', 'fine') == 1.5
  for response, message in (
    ('bad', "returned 'much' for example 0, prompt 'p', response 'bad'.*is a str"),
    ('nan', 'returned nan for example 0.*must be finite'),
  ):
    with pytest.raises(errors.UserError, match=f'the gold score .*gold_that_fails {message}'):
      gold('p', response)
  with pytest.raises(
    errors.UserError,
    match=r'gold=.*wrong.* takes \(prompts, responses\), but is called as f\(gold_path\)',
  ):
    functions.load_gold(f'{__name__}:wrong', 'data')


def test_asyncio_still_works():
  """A cancellation that the function itself handles is not an error."""

  async def cancelled():
    task = asyncio.ensure_future(asyncio.sleep(5))
    task.cancel()
    return await asyncio.gather(task, return_exceptions=True)

  assert isinstance(guard.run(lambda: asyncio.run(cancelled()), BATCH)[0], asyncio.CancelledError)

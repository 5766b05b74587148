"""The clock that decides when to save, and signals that end a run without losing steps."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import pytest

from rlhf_jax import errors
from rlhf_jax import interrupts
from rlhf_jax import processes


@pytest.fixture
def now(monkeypatch):
  """Returns a clock that the test sets."""
  time = [0.0]
  monkeypatch.setattr(interrupts.time, 'monotonic', lambda: time[0])
  return time


def due_steps(clock, now, seconds_of_step, steps):
  """Returns the steps at which a clock is due, restarted at each as the loop does."""
  found = []
  for step in range(1, steps + 1):
    now[0] += seconds_of_step(step)
    if clock.due(step):
      found.append(step)
      clock.restart(step)
  return found


def test_one_process_looks_after_every_step(now):
  slow_once = lambda step: 1000.0 if step == 45 else 20.0
  assert due_steps(interrupts.Clock(10.0, 0), now, slow_once, 100) == [30, 45, 75]
  assert due_steps(interrupts.Clock(None, 0), now, slow_once, 100) == []


def test_the_first_process_decides_and_they_seldom_meet(now, monkeypatch):
  """Decisions of the main process give the same steps on a process with another clock."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  answers = []
  monkeypatch.setattr(
    processes, 'broadcast_scalar', lambda answer: answers.append(answer) or answer
  )
  first = due_steps(interrupts.Clock(10.0, 0), now, lambda step: 1.0, 2000)
  assert first == [600, 1200, 1800]
  assert len(answers) < 100
  told = iter(answers)
  monkeypatch.setattr(processes, 'broadcast_scalar', lambda answer: next(told))
  assert due_steps(interrupts.Clock(10.0, 0), now, lambda step: 7.0, 2000) == first


def script(body):
  """Starts a process that enters Signals and runs the body."""
  return subprocess.Popen(
    [
      sys.executable,
      '-c',
      textwrap.dedent("""
      import os, signal, sys, time
      from rlhf_jax import errors, interrupts, runtime
      signal.signal(signal.SIGTERM, interrupts.interrupt_now)  # as main does
      with interrupts.Signals() as signals:
        print('ready', flush=True)
      """)
      + textwrap.indent(textwrap.dedent(body), '  '),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


def test_a_second_ctrl_c_ends_at_once():
  process = script("""
      end = time.monotonic() + 60
      while not signals.should_stop() and time.monotonic() < end: time.sleep(0.01)
      print('asked', flush=True)
      time.sleep(60)
      """)
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == 'asked\n'
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=30)
  assert process.returncode == 130
  assert 'SIGINT: saving after this step; Ctrl-C again stops without saving' in said
  assert (
    said.splitlines()[-1] == 'stopped at once: the same command resumes from the last checkpoint'
  )


def test_a_child_that_the_run_forks_ends_as_it_would_without():
  process = script("""
      child = os.fork()
      if child == 0:
        time.sleep(60)
        os._exit(0)
      time.sleep(0.5)
      os.kill(child, signal.SIGTERM)
      print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signals.should_stop(), flush=True)
      """)
  said, _ = process.communicate(timeout=50)
  assert said == f'ready\n{-signal.SIGTERM} False\n'


def test_a_second_ctrl_c_in_a_notebook_interrupts_only_the_run():
  with interrupts.Signals():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_before_the_first_step_stops_the_run(tmp_path):
  with interrupts.Signals() as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(
      errors.Interrupted, match='stopped by SIGTERM after step 7, which is saved'
    ) as caught:
      signals.check(tmp_path, 7)
  assert caught.value.status == 143

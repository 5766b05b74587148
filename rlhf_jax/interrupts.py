"""When a run saves and stops: signals, and a clock, the same step on all processes."""

import itertools
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

from rlhf_jax import errors
from rlhf_jax import processes

LOOK_SECONDS = 30  # between two looks at the clock, at the pace so far
_PROCESS = os.getpid()
_PENDING = []
_CALLS = itertools.count(1)  # over all runs of the process: JAX wants numbers that grow


def end_now(number, _):
  """Handles SIGTERM where there is nothing to save."""
  if not _ours(number):
    return
  _PENDING.append(
    number
  )  # what is raised below may be ignored, as in a callback of the garbage collector
  raise errors.Interrupted(
    f'stopped by {signal.Signals(number).name}: the same command resumes', 128 + number
  )


def _ours(number):
  """Whether a signal is for this process; a child that it forked ends, as it would without a handler."""
  if os.getpid() == _PROCESS:
    return True
  signal.signal(number, signal.SIG_DFL)
  os.kill(os.getpid(), number)
  return False


def check(workdir):
  """Raises Interrupted where a signal came to any process; called by all of them between stages."""
  if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(
    next(_CALLS)
  ):
    raise errors.Interrupted(
      f'stopped by SIGTERM: the same command resumes {workdir}', 128 + signal.SIGTERM
    )


class Signals:
  """SIGTERM and Ctrl-C ask for a stop while this is entered; a second Ctrl-C ends at once.

  With several processes JAX tells all of them of a SIGTERM to any, and which step they all reach.
  """

  def __init__(self):
    self._signal, self._before = _PENDING[-1] if _PENDING else None, {}
    # In a notebook the process has more to lose than this run.
    self._alone = signal.getsignal(signal.SIGTERM) is end_now

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      # JAX has a handler of its own for SIGTERM where there are several processes.
      ours = (
        (signal.SIGINT,) if jax.distributed.is_initialized() else (signal.SIGINT, signal.SIGTERM)
      )
      self._before = {number: signal.signal(number, self._handle) for number in ours}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    if not _ours(number):
      return
    if self._signal == signal.SIGINT == number:
      if not self._alone:
        raise KeyboardInterrupt
      _write('stopped at once: the same command resumes from the last checkpoint')
      os._exit(128 + number)
    self._signal = number
    if jax.distributed.is_initialized():
      os.kill(os.getpid(), signal.SIGTERM)  # to all processes
    again = 'Ctrl-C again ends at once, without' if number == signal.SIGINT else 'then it ends'
    _write(f'{signal.Signals(number).name}: saving after this step; {again}')

  def stop(self):
    """Whether all processes have come to the step to stop after; called after every step."""
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(next(_CALLS))
    return self._signal is not None

  def interrupted(self, workdir, step):
    """What to raise when the step is saved, an errors.Interrupted."""
    number = self._signal or signal.SIGTERM
    return errors.Interrupted(
      f'stopped by {signal.Signals(number).name} after step {step}, which is saved in {workdir}: '
      'the same command resumes',
      128 + number,
    )

  def check(self, workdir, step):
    """Raises Interrupted where a signal has come before the next step."""
    if self.stop():
      raise self.interrupted(workdir, step)


def _write(line):
  """Writes a line to stderr past Python's buffers, which a signal may have interrupted."""
  os.write(2, f'\n{line}\n'.encode())


class Clock:
  """Says when some minutes have passed, by the first process's clock.

  All processes look at it after the same steps, some seconds apart at the pace so far, so that they
  seldom wait for each other.
  """

  def __init__(self, minutes, step):
    """Starts at `step`; minutes of None never pass."""
    self._seconds = None if minutes is None else 60 * minutes
    self.restart(step)

  def restart(self, step):
    """Starts anew at `step`."""
    self._begin, self._first, self._look = time.monotonic(), step, step + 1

  def due(self, step):
    """Whether the minutes have passed; called after every step, counted from 1."""
    if self._seconds is None or step < self._look:
      return False
    passed = time.monotonic() - self._begin
    pace = passed / (step - self._first)
    # One process can look after every step. Of several none waits long where steps become slower.
    wait = (
      1
      if jax.process_count() == 1
      else max(1, int(min((self._seconds - passed) / 2, LOOK_SECONDS) / pace))
    )
    wait = processes.broadcast_scalar(0 if passed >= self._seconds else wait)
    self._look = step + wait
    return wait == 0

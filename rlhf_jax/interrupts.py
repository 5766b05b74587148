"""Decides when a run saves and stops, at the same step on all processes: by signals or a clock."""

import itertools
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

from rlhf_jax import errors
from rlhf_jax import processes

CHECK_SECONDS = 30  # at most this long between two checks of the clock, at the speed so far
_PROCESS = os.getpid()
_PENDING = []  # signals that `interrupt_now` received
_CALLS = itertools.count(1)  # over all runs of the process, because JAX needs increasing numbers


def interrupt_now(number, _):
  """Handles SIGTERM while there is nothing to save."""
  if not _is_for_this_process(number):
    return
  # Python ignores the exception below in some places, such as callbacks of the garbage collector.
  _PENDING.append(number)
  raise errors.Interrupted(
    f'stopped by {signal.Signals(number).name}: the same command resumes', 128 + number
  )


def _is_for_this_process(number):
  """Returns whether this process set the handler; a forked child, which inherits it, ends here."""
  if os.getpid() == _PROCESS:
    return True
  signal.signal(number, signal.SIG_DFL)
  os.kill(os.getpid(), number)
  return False


def check(workdir):
  """Raises Interrupted if any process received SIGTERM; all processes call it between stages."""
  if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(
    next(_CALLS)
  ):
    raise errors.Interrupted(
      f'stopped by SIGTERM: the same command resumes {workdir}', 128 + signal.SIGTERM
    )


class Signals:
  """Context in which SIGTERM and Ctrl-C request a stop; a second Ctrl-C ends the process at once.

  If one of several processes receives SIGTERM, JAX chooses a step at which all of them stop.
  """

  def __init__(self):
    self._signal, self._before = _PENDING[-1] if _PENDING else None, {}
    # A notebook's process must survive, because it holds more than this run.
    self._may_exit = signal.getsignal(signal.SIGTERM) is interrupt_now

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      # With several processes, JAX has its own handler for SIGTERM.
      numbers = (
        (signal.SIGINT,) if jax.distributed.is_initialized() else (signal.SIGINT, signal.SIGTERM)
      )
      self._before = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    if not _is_for_this_process(number):
      return
    if self._signal == signal.SIGINT == number:
      if not self._may_exit:
        raise KeyboardInterrupt
      _write('stopped at once: the same command resumes from the last checkpoint')
      os._exit(128 + number)
    self._signal = number
    if jax.distributed.is_initialized():
      os.kill(os.getpid(), signal.SIGTERM)  # JAX tells all processes to stop
    again = 'Ctrl-C again stops without saving' if number == signal.SIGINT else 'then the run stops'
    _write(f'{signal.Signals(number).name}: saving after this step; {again}')

  def should_stop(self):
    """Returns whether to stop now; all processes call it after every step."""
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(next(_CALLS))
    return self._signal is not None

  def interrupted(self, workdir, step):
    """Returns the errors.Interrupted to raise after a step is saved."""
    number = self._signal or signal.SIGTERM
    return errors.Interrupted(
      f'stopped by {signal.Signals(number).name} after step {step}, which is saved in {workdir}: '
      'the same command resumes',
      128 + number,
    )

  def check(self, workdir, step):
    """Raises Interrupted if a stop was requested before the next step."""
    if self.should_stop():
      raise self.interrupted(workdir, step)


def _write(line):
  """Writes a line to stderr past Python's buffers, which a signal may have interrupted."""
  os.write(2, f'\n{line}\n'.encode())


class Clock:
  """A timer in minutes that goes off at the same step on all processes.

  The clock of the main process decides. All processes check it after the same steps, some seconds
  apart at the speed so far, so that they rarely wait for each other.
  """

  def __init__(self, minutes, step):
    """Starts the timer at `step`; with None for `minutes` it never goes off."""
    self._seconds = None if minutes is None else 60 * minutes
    self.restart(step)

  def restart(self, step):
    """Restarts the timer at `step`."""
    self._began, self._first_step, self._next_check = time.monotonic(), step, step + 1

  def due(self, step):
    """Returns whether the minutes have passed; called after every step, counted from 1."""
    if self._seconds is None or step < self._next_check:
      return False
    elapsed = time.monotonic() - self._began
    step_seconds = elapsed / (step - self._first_step)
    # A single process checks after every step. Several check after half of the remaining time at
    # the latest, so that they are not very late if steps become slower.
    wait = (
      1
      if jax.process_count() == 1
      else max(1, int(min((self._seconds - elapsed) / 2, CHECK_SECONDS) / step_seconds))
    )
    wait = processes.broadcast_scalar(0 if elapsed >= self._seconds else wait)
    self._next_check = step + wait
    return wait == 0

"""A pool of processes that call a reward function on the examples of a batch in parallel.

A worker scores one example at a time, within a time limit. If its Python code takes longer, a
signal interrupts it; if that is not possible, as in code in C, the process is killed and replaced.
A process that dies is replaced too.

Workers are fresh interpreters (worker.py). Libraries for such pools use `multiprocessing`, which is
not possible here: its workers either import the main module of the run again, and with it JAX, or
are forked, which a process with threads such as JAX's must not be.

Letters: n examples of a batch, R response length.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple
import weakref

from absl import logging
from jaxtyping import Bool, Float
import numpy as np

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard
from rlhf_jax.rewards import worker

GRACE = 2.0  # seconds after the time limit until a worker that no signal can stop is killed
TIMEOUT = 30.0  # default limit for an example in seconds
ON_ERROR = ('stop', 'skip', 'score')
ONE_REWARD = (
  "on_error='score' needs one reward per response, but rewards are per token. Use 'stop' or 'skip'."
)


class OnError(NamedTuple):
  """What happens to an example that cannot be scored.

  Attributes:
    how: one of ON_ERROR: 'stop' raises UserError, 'skip' makes its reward NaN, and 'score' makes
      it `score`.
    score: score of 'score'.
  """

  how: str = 'stop'
  score: float = 0.0


class Pool:
  """Processes that call one reward function."""

  def __init__(
    self,
    name: str,
    count: int,
    *,
    key: str = 'config.reward',
    limit: functions.Limit = functions.Limit(),
    arguments: Mapping | None = None,
    example_timeout: float | None = TIMEOUT,
    on_error: OnError = OnError(),
  ):
    """Starts the processes, without waiting for their imports.

    Args:
      name: 'package.module:function' of a reward function; see functions.py.
      count: Number of processes.
      key: Dotted name of the config block that holds the name, for messages.
      limit: Time limit of the import of the module, and of a batch.
      arguments: {keyword: value} that every call passes, or None.
      example_timeout: Time limit for an example in seconds; None for no limit.
      on_error: OnError.
    """
    self._what = f'the reward function {name.partition(":")[2]}'
    self._limit, self._on_error, self._count = limit, on_error, count
    self._setup = worker.Setup(
      name,
      f'{key}.function',
      dict(arguments or {}),
      functions.Limit(limit.seconds, limit.key),
      functions.Limit(example_timeout, f'{key}.example_timeout', limit.allow_nan),
    )
    self._workers = []
    weakref.finalize(self, _stop_all, self._workers)  # at the latest when the interpreter exits
    self._start()

  def _start(self):
    for one in [one for one in self._workers if one.idle and not one.running()]:
      self._workers.remove(one)  # killed from outside between two batches
    while len(self._workers) < self._count:
      self._workers.append(_Worker(self._setup, self._limit.seconds))

  def close(self) -> None:
    """Stops all processes; the next batch starts new ones."""
    _stop_all(self._workers)

  def score(
    self,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    response_tokens: Sequence[Sequence[int]],
    metadata: Sequence[Mapping],
    response_length: int,
  ) -> tuple[
    Float[np.ndarray, ' n'] | Float[np.ndarray, 'n {response_length}'], Bool[np.ndarray, ' n']
  ]:
    """Scores a batch.

    Args:
      prompts: n texts.
      responses: n texts.
      response_tokens: n lists of token ids.
      metadata: n dicts.
      response_length: R, width of the result for rewards per token.

    Returns:
      Rewards [n] float32, or [n, R] float32 for rewards per token, 0 after the end of each
      response; and which examples [n] could not be scored.

    Raises:
      UserError: The batch took too long, or an example cannot be scored and `on_error` is 'stop'.
        The message names the example.
    """
    limit = self._limit
    call = guard.Call(self._what, prompts, responses, limit.seconds, limit.key, functions.REMEDY)
    examples = [
      worker.Example(i, *example)
      for i, example in enumerate(zip(prompts, responses, response_tokens, metadata))
    ]
    try:
      rewards = self._map(examples, call)
    except BaseException:
      self.close()  # other workers still work on this batch
      raise
    failed = np.array([isinstance(reward, worker.Failure) for reward in rewards], bool)
    if failed.any():
      logging.warning(
        '%s failed for %d of %d examples, which %s; the first: %s',
        self._what,
        failed.sum(),
        len(rewards),
        'are skipped' if self._on_error.how == 'skip' else f'score {self._on_error.score:g}',
        rewards[failed.argmax()].text,
      )
    scores = _stack(rewards, response_length, self._on_error, call)
    returned = np.flatnonzero(~failed)
    functions.warn_about_nan(scores[returned], call, returned)
    return scores, failed

  def _map(self, examples, call):
    """Returns the reward of each example, or its worker.Failure; see `score`."""
    waiting, rewards = collections.deque(examples), {}
    end = time.monotonic() + (np.inf if call.timeout is None else call.timeout)
    while len(rewards) < len(examples):
      self._start()
      for one in self._workers:
        if one.idle and waiting:
          one.send(waiting.popleft())
      busy = [one for one in self._workers if not one.idle]
      due = min(end, *(one.due for one in busy))
      ready = multiprocessing.connection.wait(
        [one.connection for one in busy],
        None if due == np.inf else max(due - time.monotonic(), 0),
      )
      for one in busy:
        if one.connection in ready or one.due <= time.monotonic():
          example = one.example
          reward = one.receive(call) if one.connection in ready else one.expire(call)
          if not one.alive:
            self._workers.remove(one)
          if example is not None:
            rewards[example.index] = reward
          if isinstance(reward, worker.Failure) and (
            example is None or self._on_error.how == 'stop'
          ):
            raise errors.UserError(reward.text)
      if time.monotonic() > end:
        raise errors.UserError(
          f'{call.what} did not score {len(examples)} examples within {call.timeout:g} seconds '
          f'with {self._count} workers ({len(rewards)} are done). Raise {call.key} (None: no '
          f'limit). {call.remedy}'
        )
    return [rewards[i] for i in range(len(examples))]


class _Worker:
  """A worker process. It imports, works on `example` until `due`, or is idle."""

  def __init__(self, setup, timeout):
    """Starts the process.

    Args:
      setup: worker.Setup.
      timeout: Time limit of the import in seconds, or None.
    """
    self.connection, theirs = multiprocessing.Pipe()
    self._setup, self.example, self.idle, self.alive = setup, None, False, True
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, '-c', worker.PROGRAM, str(theirs.fileno()), *sys.path],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        start_new_session=True,  # Ctrl-C is for the run; and processes of a worker are stopped too
      )
    self.connection.send(setup)
    self.due = _due(timeout)

  def running(self):
    """Returns whether the process has not ended."""
    return self._process.poll() is None

  def send(self, example):
    """Sends an example to the process, which is idle."""
    self.example, self.idle, self.due = example, False, _due(self._setup.scoring.seconds)
    try:
      self.connection.send(example)
    except ConnectionError:  # the process has died; `receive` reports it
      pass

  def receive(self, call):
    """Returns the message of the process, or a worker.Failure if it has died."""
    try:
      message = self.connection.recv()
    except (EOFError, OSError):
      return self._died(call)
    if self.example is None and isinstance(message, worker.Failure):
      self.stop()
    self.example, self.idle, self.due = None, True, np.inf
    return message

  def _died(self, call):
    self.stop(wait=GRACE)
    code = self._process.returncode
    how = f'exited with status {code}' if code >= 0 else f'was killed by signal {-code}'
    if -code in set(signal.Signals):
      how += f' ({signal.Signals(-code).name})'
    return worker.Failure(f'a worker of {call.what} {how} {self._where(call)}. {call.remedy}')

  def expire(self, call):
    """Kills the process, which exceeded its time limit, and returns a worker.Failure."""
    self.stop()
    limit = self._setup.importing if self.example is None else self._setup.scoring
    return worker.Failure(
      f'{call.what} did not return within {limit.seconds:g} seconds {self._where(call)}. No signal '
      f'could stop it, so its process was killed. Make it faster, or raise {limit.key} (None: no '
      f'limit). {call.remedy}'
    )

  def _where(self, call):
    if self.example is None:
      return 'while it imported its module'
    return f'on {guard.describe_example(self.example.index, call)}'

  def stop(self, *, wait=0.0):
    """Ends the process and its children, after at most `wait` seconds to end by itself."""
    self.alive, self.idle = False, False
    self.connection.close()
    try:
      self._process.wait(wait)
    except subprocess.TimeoutExpired:
      pass
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    self._process.wait()


def _due(timeout):
  """Returns the time.monotonic() at which a worker is killed if its time limit starts now."""
  return np.inf if timeout is None else time.monotonic() + timeout + GRACE


def _stop_all(workers):
  while workers:
    workers.pop().stop()


def _stack(rewards, response_length, on_error, call):
  """Returns the rewards of a batch as an array; see `Pool.score`.

  Raises:
    UserError: Some rewards are numbers and others per token, or on_error.how is 'score' and rewards
      are per token.
  """
  good = [i for i, reward in enumerate(rewards) if not isinstance(reward, worker.Failure)]
  per_token = bool(good) and rewards[good[0]].ndim == 1
  scores = np.zeros((len(rewards), response_length) if per_token else len(rewards), np.float32)
  for i, reward in enumerate(rewards):
    if isinstance(reward, worker.Failure):
      if per_token and on_error.how == 'score':
        raise errors.UserError(f'{call.what}: {ONE_REWARD} {reward.text}')
      scores[i] = np.nan if on_error.how == 'skip' else on_error.score
    elif (reward.ndim == 1) != per_token:
      raise functions.refused(
        f'{call.what} returned one number for some examples and rewards per token for others, such '
        f'as {guard.describe_example(i, call)} and {guard.describe_example(good[0], call)}',
        call,
      )
    elif per_token:
      scores[i, : len(reward)] = reward
    else:
      scores[i] = reward
  return scores

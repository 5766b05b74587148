"""Live policies: answers of several policies, streamed, from a process of their own.

The process (live_worker.py) has JAX and the models; the page only waits for text, so its event loop
is never blocked. If the process dies, the answers that were being written fail with `Unavailable`,
and a new process is started.
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import multiprocessing
import os
import pathlib
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from absl import logging

from rlhf_jax import errors
from rlhf_jax.feedback import live_messages as messages

# What starts the process: `python -c PROGRAM FD PATH...` with the file descriptor of its connection
# and the entries of sys.path. As in rewards/pool.py, `multiprocessing` cannot start it.
PROGRAM = (
  'import sys; sys.path[:] = sys.argv[2:]; '
  'from rlhf_jax.feedback import live_worker; live_worker.main(int(sys.argv[1]))'
)
GRACE = 5.0  # seconds that the process has to end by itself
HUNG_SECONDS = 600.0  # a process that sends nothing for this long, not even Alive, is killed
MAX_SEED = 2**31


class Unavailable(errors.UserError):
  """The policies cannot answer now; asking again may help."""


class Refused(errors.UserError):
  """The policy cannot answer this request, for example because the conversation is too long."""


class Answer(AsyncIterator[str]):
  """One answer: an asynchronous iterator of pieces of text, which starts when it is first read.

  Attributes:
    policy: Name of the policy.
    text: Text so far.
    checkpoint: Path of the checkpoint or the model that answers; None before the first piece.
    sampling: {'temperature', 'top_k', 'top_p', 'max_new_tokens', 'seed'}; None before the first
      piece.
    finish: None until the answer is complete; then 'end', or 'length' if it was cut.
  """

  def __init__(self, policies: 'Policies', ask: messages.Ask, seconds: float):
    """Prepares an answer; see `Policies.stream`."""
    self.policy, self.text, self.finish = ask.policy, '', None
    self.checkpoint: str | None = None
    self.sampling: dict[str, Any] | None = None
    self._policies, self._ask, self._seconds = policies, ask, seconds
    self._inbox: asyncio.Queue | None = None
    self._loop: asyncio.AbstractEventLoop | None = None
    self._due = 0.0

  def __aiter__(self):
    return self

  async def __anext__(self):
    if self.finish:
      raise StopAsyncIteration
    if self._inbox is None:
      self._inbox, self._loop = asyncio.Queue(), asyncio.get_running_loop()
      self._due = self._loop.time() + self._seconds
      self._policies._begin(self, self._ask)
    try:
      return await self._next_piece()
    except TimeoutError:
      self._policies._expire(self._ask.id)
      raise Unavailable(
        f'the policy did not finish its answer within {self._seconds:g} seconds: ask again'
      ) from None
    except asyncio.CancelledError:
      await self.aclose()
      raise

  async def aclose(self):
    """Cancels the answer if it is not complete."""
    if self._inbox is not None and self.finish is None:
      self._policies._end(self._ask.id)

  async def _next_piece(self):
    while True:
      async with asyncio.timeout_at(self._due):
        message = await self._inbox.get()
      if isinstance(message, messages.Failed):
        raise message.error(message.text)
      if isinstance(message, messages.Begun):
        self.checkpoint, self.sampling = message.checkpoint, message.sampling
        continue
      self.text, self.finish = self.text + message.text, message.finish
      if message.text:
        return message.text
      if message.finish:
        raise StopAsyncIteration

  def _deliver(self, message):
    """Passes a message to the event loop that waits for it; called by the thread that reads."""
    try:
      self._loop.call_soon_threadsafe(self._inbox.put_nowait, message)
    except RuntimeError:  # the loop is closed
      pass


class Policies:
  """Serves policies to any number of event loops and threads, from a process of their own."""

  def __init__(
    self,
    folders: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike],
    *,
    max_concurrent: int = 8,
    max_waiting: int = 64,
    max_length: int = 1024,
    seconds: float = 120.0,
    chat_template: str | None = None,
  ):
    """Starts the process, which loads the policies; does not wait for it.

    Args:
      folders: Hugging Face folders, finished runs, or runs that are still training. Of these, the
        newest checkpoint answers. {name: folder}, or a list, where a name is the end of a path that
        tells it from the others: it may be another one when there are other folders.
      max_concurrent: Number of answers of a policy that are decoded at a time; others wait.
      max_waiting: Largest number of answers that are not complete, over all policies.
      max_length: Longest conversation with its answer, in tokens; at most the context of a model.
      seconds: Time limit of an answer.
      chat_template: Template of policies whose tokenizer has none: a name of data/chat.py, a path
        or Jinja text. None: such policies continue the messages, which are joined by line breaks.

    Raises:
      UserError: There are no folders, or a folder does not exist.
    """
    is_named = isinstance(folders, Mapping)
    paths = [pathlib.Path(one).resolve() for one in (folders.values() if is_named else folders)]
    errors.need(paths, 'there are no policies: name their folders')
    for path in paths:
      errors.need(path.is_dir(), f'{path}: no such folder; a live policy is a model or a run')
    errors.need(len(set(paths)) == len(paths), 'a folder of a policy is named twice')
    named = dict(zip(folders if is_named else names(paths), map(str, paths)))
    self._setup = messages.Setup(named, max_concurrent, max_length, chat_template)
    self._max_waiting, self._seconds = max_waiting, seconds
    self._lock = threading.RLock()
    self._answers: dict[int, Answer] = {}
    self._ids = itertools.count(1)
    self._worker: _Worker | None = None
    self._closed = False
    with self._lock:
      self._start()

  @property
  def names(self) -> list[str]:
    """Names of the policies, which Elo ranks."""
    return list(self._setup.folders)

  @property
  def folders(self) -> dict[str, str]:
    """{name: absolute path of the folder of the policy}."""
    return dict(self._setup.folders)

  @property
  def process_id(self) -> int:
    """Id of the process, for messages."""
    return self._worker.process.pid

  def stream(
    self,
    name: str,
    prompt: messages.Prompt,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    seed: int | None = None,
  ) -> Answer:
    """Returns an answer, whose pieces arrive as they are sampled.

    Args:
      name: Name of the policy.
      prompt: Text, or messages that end with one of the user.
      max_new_tokens: Longest answer in tokens; None for a quarter of the longest conversation, at
        most 128, so that a dialogue can have several turns.
      temperature: Temperature of sampling; 0 takes the most likely token.
      seed: Random seed; None for a random one.

    Raises:
      UserError: There is no policy of that name. Reading the answer raises Refused if the
        conversation is too long, Unavailable if the policies cannot answer now, and UserError if
        this one cannot be loaded.
    """
    errors.need(
      name in self._setup.folders,
      f'there is no policy {name!r}: the policies are {", ".join(self.names)}',
    )
    seed = secrets.randbelow(MAX_SEED) if seed is None else seed
    ask = messages.Ask(next(self._ids), name, prompt, max_new_tokens, temperature, seed)
    return Answer(self, ask, self._seconds)

  def close(self) -> None:
    """Ends the process; answers that are not complete fail."""
    with self._lock:
      self._closed, worker = True, self._worker
    if worker is not None:
      worker.stop()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  # What answers and the process call.

  def _start(self):
    """Starts the process; the caller has the lock, so that `_died` comes after it."""
    try:
      self._worker = _Worker(self._setup, self._receive, self._died)
    except OSError as error:  # too many open files or processes, or no memory
      raise Unavailable(
        f'the process of the policies cannot be started ({error.strerror}): ask again in a moment'
      ) from error

  def _begin(self, answer, ask):
    with self._lock:
      if self._closed:
        raise Unavailable('the policies are closed')
      if len(self._answers) >= self._max_waiting:
        raise Unavailable(
          f'the policies are busy with {len(self._answers)} answers: ask again in a moment'
        )
      if self._worker is None:
        self._start()
      self._answers[ask.id] = answer
      self._worker.outbox.put(ask)

  def _end(self, id):
    with self._lock:
      if self._answers.pop(id, None) is not None and self._worker is not None:
        self._worker.outbox.put(messages.Cancel(id))

  def _expire(self, id):
    """Cancels an answer that took too long; kills the process if it does not respond at all."""
    self._end(id)
    with self._lock:
      if self._worker is not None and time.monotonic() - self._worker.heard > HUNG_SECONDS:
        logging.error('the process of the policies does not respond and is killed')
        self._worker.process.kill()

  def _receive(self, message):
    with self._lock:
      answer = self._answers.get(message.id)
      if isinstance(message, messages.Failed) or getattr(message, 'finish', None):
        self._answers.pop(message.id, None)
    if answer is not None:
      answer._deliver(message)

  def _died(self, worker, status):
    """Reports to the answers that the process has ended, and starts another one."""
    how = f'ended with status {status}' if status >= 0 else f'was killed by signal {-status}'
    if -status in set(signal.Signals):
      how += f' ({signal.Signals(-status).name})'
    with self._lock:
      lost, self._answers = self._answers, {}
      self._worker = None
      reason = 'was closed' if self._closed else how
      for id, answer in lost.items():
        answer._deliver(
          messages.Failed(id, f'the process of the policies {reason}: ask again', Unavailable)
        )
      if self._closed:
        return
      logging.error('the process of the policies %s; %d answers are lost', how, len(lost))
      try:
        if worker.answered:  # otherwise it may fail again: the next request starts it
          self._start()
      except Unavailable as error:
        logging.error('%s', error)


class _Worker:
  """The process with its connection, a thread that reads from it and one that writes to it."""

  def __init__(self, setup, receive, died):
    """Starts the process; `receive(message)` and `died(self, status)` are called by a thread."""
    self._connection, theirs = multiprocessing.Pipe()
    with theirs:
      self.process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM, str(theirs.fileno()), *sys.path],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        # A training run may use the same accelerator.
        env={'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} | os.environ,
        start_new_session=True,  # Ctrl-C is for the page
      )
    self.outbox: queue.SimpleQueue = queue.SimpleQueue()
    self.outbox.put(setup)
    self.heard, self.answered = time.monotonic(), False
    self._writer = threading.Thread(target=self._write, daemon=True)
    self._reader = threading.Thread(target=self._read, args=(receive, died), daemon=True)
    self._writer.start()
    self._reader.start()

  def stop(self):
    """Ends the process, by force if it does not end by itself."""
    self.outbox.put(None)
    try:
      self.process.wait(GRACE)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self._reader.join()

  def _write(self):
    while True:
      message = self.outbox.get()
      try:
        self._connection.send(message)
      except OSError:  # the process has died, which the reader reports
        return
      if message is None:
        return

  def _read(self, receive, died):
    try:
      while True:
        message = self._connection.recv()
        self.heard = time.monotonic()
        if isinstance(message, messages.Alive):
          continue
        self.answered |= isinstance(message, messages.Begun)
        receive(message)
    except (EOFError, OSError):
      pass
    self.outbox.put(None)
    died(self, self.process.wait())
    self._writer.join()
    self._connection.close()


def names(paths: Sequence[pathlib.Path]) -> list[str]:
  """Returns the shortest ends of paths, of the same number of parts, that tell them apart."""
  for count in itertools.count(1):
    ends = ['/'.join(path.parts[-count:]) for path in paths]
    if len(set(ends)) == len(ends):
      return ends

"""The program of the process of live.py: decodes the answers of all policies.

A policy is loaded by a thread, while the others are decoded. Before a request, and every few
seconds when there are none, the folder of each policy is looked at: if there is a newer checkpoint,
it is loaded beside the old one. New requests wait for it, open ones finish with the old one.
"""

import concurrent.futures
import contextlib
import math
import multiprocessing.connection
import os
import pathlib
import queue
import sys
import threading
import time

from absl import logging

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax import runtime
from rlhf_jax.data import chat
from rlhf_jax.feedback import live
from rlhf_jax.feedback import live_messages as messages
from rlhf_jax.rewards import worker
from rlhf_jax.rollout import streaming

LOOK_SECONDS = 10.0  # between two looks for newer checkpoints without requests, or two Alive
RETRY_SECONDS = 60.0  # until a policy that cannot be loaded is tried again if nothing has changed
WARM_UP = [{'role': 'user', 'content': 'Hello'}]


def main(fd):
  """Answers requests until the page closes the connection.

  Args:
    fd: File descriptor of the connection. Its first message is the Setup.
  """
  threading.Thread(target=worker.exit_with_parent, args=(os.getppid(),), daemon=True).start()
  runtime.hide_library_logs()
  with multiprocessing.connection.Connection(fd) as connection:
    try:
      Server(connection.recv(), connection).run()
    except (EOFError, ConnectionError):  # the page has ended
      pass
  sys.stderr.flush()
  os._exit(0)  # without waiting for a thread that loads


def version(folder):
  """Returns what tells whether the parameters in a folder have changed; see TextPolicy.load."""
  try:
    return _version(pathlib.Path(folder))
  except OSError as error:  # not readable, or removed meanwhile: loading it says so
    return 'unreadable', str(error)


def _version(folder):
  finished = (folder / 'model').is_dir()
  if not finished and (folder / 'checkpoints').is_dir():
    names = os.listdir(folder / 'checkpoints')
    return max((int(name) for name in names if name.isdigit()), default=None)
  file = (folder / 'model' if finished else folder) / 'config.json'
  return ('model', file.stat().st_mtime_ns) if file.exists() else None


class Served:
  """A policy: streams of its newest parameters, and of older ones that have open requests."""

  def __init__(self, folder, setup, executor, wake):
    """Begins to load a policy.

    Args:
      folder: Its folder.
      setup: messages.Setup.
      executor: Executor of the thread that loads.
      wake: Function that is called when something has been loaded.
    """
    self.waiting: list[messages.Ask] = []
    self.checkpoint, self._streams = None, []  # the newest streams come last
    self._folder, self._setup, self._executor, self._wake = folder, setup, executor, wake
    self._loading, self._version, self._error = None, None, None
    self._retry = -math.inf  # time from when on it is loaded even if nothing has changed
    self.look()

  @property
  def busy(self):
    """Whether there are tokens to decode."""
    return any(streams.busy for streams in self._streams)

  def look(self):
    """Begins to load the newest parameters, unless they are loaded or were tried a moment ago."""
    if self._loading is not None:
      return
    found = version(self._folder)
    if found != self._version or time.monotonic() >= self._retry:
      self._loading = found, self._executor.submit(self._load)
      self._loading[1].add_done_callback(lambda _: self._wake())

  def settle(self):
    """Takes over what has been loaded.

    Returns:
      Streams for the requests in `waiting`, or the error because of which there are none; None
      while they must wait.
    """
    if self._loading is not None:
      found, future = self._loading
      if not future.done():
        return None
      self._loading, self._version, self._retry = None, found, math.inf
      self._error = future.exception()
      if self._error is None:
        self.checkpoint, streams = future.result()
        self._streams = [*(old for old in self._streams if old.busy), streams]
      elif self._streams:  # the older one answers until there is another
        logging.warning('%s: the newest checkpoint is not served: %s', self._folder, self._error)
      else:
        self._retry = time.monotonic() + RETRY_SECONDS
    return self._streams[-1] if self._streams else self._error

  def step(self):
    """Decodes a few tokens of every open request; returns what `Streams.step` does."""
    self._streams = [s for s in self._streams if s.busy or s is self._streams[-1]]
    return [result for streams in self._streams if streams.busy for result in streams.step()]

  def _load(self):
    """Returns (path of the checkpoint, Streams that have compiled their programs)."""
    policy = policy_lib.TextPolicy.load(self._folder)
    if self._setup.chat_template and not policy.tokenizer.chat_template:
      chat.use_template(policy.tokenizer, self._setup.chat_template)
    end = chat.turn_end(policy.tokenizer)
    streams = streaming.Streams(
      policy.model,
      policy.params,
      policy.tokenizer,
      rows=self._setup.max_concurrent,
      max_length=self._setup.max_length,
      stop=(end,) if end else (),
    )
    warm_up(streams)
    if policy.step is None:
      return str(policy.path or self._folder), streams
    return f'{self._folder}/checkpoints/{policy.step}', streams


def warm_up(streams):
  """Compiles the programs of a short request, so that the first annotator need not wait for it."""
  with contextlib.suppress(errors.UserError):  # a tokenizer without these letters, a tiny context
    streams.submit(chat.prompt_text(streams.tokenizer, WARM_UP), max_new_tokens=1)
    while streams.busy:
      streams.step()


class Server:
  """Reads requests, decodes, and sends text."""

  def __init__(self, setup, connection):
    """Begins to load all policies; see `main`."""
    self._connection, self._inbox = connection, queue.SimpleQueue()
    executor = concurrent.futures.ThreadPoolExecutor(1)
    self._served = {
      name: Served(folder, setup, executor, lambda: self._inbox.put('loaded'))
      for name, folder in setup.folders.items()
    }
    self._open = {}  # {id: (Streams, its request)}
    self._ids = {}  # {request: id}

  def run(self):
    """Runs until the connection is closed."""
    threading.Thread(target=self._read, daemon=True).start()
    said = -math.inf
    while True:
      if time.monotonic() - said >= LOOK_SECONDS:
        self._connection.send(messages.Alive())
        said = time.monotonic()
      for message in self._messages():
        if message is None:
          return
        self._handle(message)
      for served in self._served.values():
        self._start_waiting(served)
        for request, text in served.step():
          self._connection.send(messages.Piece(self._ids[request], text, request.finish))
          if request.finish:
            del self._open[self._ids.pop(request)]

  def _read(self):
    try:
      while True:
        self._inbox.put(self._connection.recv())
    except (EOFError, OSError):
      self._inbox.put(None)

  def _messages(self):
    """Yields all messages; without tokens to decode, waits for one, or looks for checkpoints."""
    if not any(served.busy for served in self._served.values()):
      try:
        yield self._inbox.get(timeout=LOOK_SECONDS)
      except queue.Empty:
        for served in self._served.values():
          served.look()
    while True:
      try:
        yield self._inbox.get_nowait()
      except queue.Empty:
        return

  def _handle(self, message):
    if isinstance(message, messages.Ask):
      served = self._served[message.policy]
      served.waiting.append(message)
      served.look()
    elif isinstance(message, messages.Cancel):
      for served in self._served.values():
        served.waiting = [ask for ask in served.waiting if ask.id != message.id]
      if message.id in self._open:
        streams, request = self._open.pop(message.id)
        streams.cancel(request)
        del self._ids[request]

  def _start_waiting(self, served):
    """Starts the requests that wait for a policy, if it is loaded."""
    streams = served.settle()
    if streams is None:
      return
    waiting, served.waiting = served.waiting, []
    for ask in waiting:
      if isinstance(streams, BaseException):
        logging.error('%s cannot be loaded: %s', ask.policy, streams)
        self._connection.send(messages.Failed(ask.id, str(streams)))
        continue
      try:
        self._start(ask, served.checkpoint, streams)
      except errors.UserError as error:
        self._connection.send(messages.Failed(ask.id, str(error), live.Refused))

  def _start(self, ask, checkpoint, streams):
    prompt = ask.prompt
    text = prompt if isinstance(prompt, str) else chat.prompt_text(streams.tokenizer, prompt)
    request = streams.submit(
      text, max_new_tokens=ask.max_new_tokens, temperature=ask.temperature, seed=ask.seed
    )
    self._open[ask.id], self._ids[request] = (streams, request), ask.id
    sampling = {
      'temperature': ask.temperature,
      'top_k': streams.settings.sampling.top_k,
      'top_p': streams.settings.sampling.top_p,
      'max_new_tokens': request.max_new_tokens,
      'seed': ask.seed,
    }
    self._connection.send(messages.Begun(ask.id, checkpoint, sampling))

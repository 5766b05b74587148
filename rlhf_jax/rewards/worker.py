"""The program of a worker process of pool.py: calls a reward function on one example at a time.

It imports no JAX, unless the module of the reward function does; that JAX then uses the CPU.
"""

import multiprocessing.connection
import os
import sys
import threading
import time
from typing import NamedTuple

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard

# What starts a worker: `python -c PROGRAM FD PATH...` with the file descriptor of its connection
# and the entries of sys.path.
PROGRAM = (
  'import sys; sys.path[:] = sys.argv[2:]; '
  'from rlhf_jax.rewards import worker; worker.main(int(sys.argv[1]))'
)
POLL_SECONDS = 1.0


class Setup(NamedTuple):
  """The first message to a worker.

  Attributes:
    name: 'package.module:function' of the reward function.
    key: config key that holds the name.
    arguments: {keyword: value} that every call passes.
    importing: functions.Limit, for the import of the module.
    scoring: functions.Limit, for the call on one example.
  """

  name: str
  key: str
  arguments: dict
  importing: functions.Limit
  scoring: functions.Limit


class Example(NamedTuple):
  """A message to a worker: an example to score.

  Attributes:
    index: index in the batch.
    prompt: text.
    response: text.
    response_tokens: token ids.
    metadata: other columns of the prompt's record.
  """

  index: int
  prompt: str
  response: str
  response_tokens: list[int]
  metadata: dict


class Failure(NamedTuple):
  """A message from a worker: why it cannot score an example, or why it cannot start."""

  text: str


def main(fd):
  """Sends None when the function is imported, and then its reward for each Example it receives.

  A reward is a float32 scalar, or [tokens of the response] for rewards per token. Any error is sent
  as a Failure.

  Args:
    fd: File descriptor of the connection to the pool. Its first message is the Setup.
  """
  threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
  with multiprocessing.connection.Connection(fd) as connection:
    try:
      setup = connection.recv()
      try:
        function = functions.load_reward(
          setup.name, key=setup.key, arguments=setup.arguments, limit=setup.importing
        )
      except errors.UserError as error:
        connection.send(Failure(str(error)))
        return
      connection.send(None)
      while True:
        connection.send(answer(function, connection.recv(), setup.scoring))
    except (EOFError, ConnectionError):  # the pool is closed
      sys.exit()


def answer(function, example, limit):
  """Returns the reward of one Example, or a Failure."""
  call = guard.Call(
    functions.describe(function),
    [example.prompt],
    [example.response],
    limit.seconds,
    limit.key,
    remedy=functions.REMEDY,
    first=example.index,
  )
  try:
    [reward] = functions.checked(
      function,
      call,
      response_tokens=[example.response_tokens],
      metadata=[example.metadata],
      response_length=len(example.response_tokens),
      allow_nan=limit.allow_nan,
    )
    return reward
  except errors.UserError as error:
    return Failure(str(error))


def exit_with_parent(parent):
  """Ends this process when its parent has ended, even while it scores an example."""
  while os.getppid() == parent:
    time.sleep(POLL_SECONDS)
  os._exit(1)

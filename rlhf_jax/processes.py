"""Several processes: which of them writes, what they agree on, and host work they share out.

All processes run the same program on the same host-side data, and only arrays on devices are
divided among them. What one of them decides by looking at a file, or at a clock, it has to tell
the others: a process that takes another branch leaves them waiting for ever.
"""

import pathlib
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from rlhf_jax import errors

VISIBLE_SECONDS = 60  # network file systems remember for a while that a file was not there


def first():
  """Whether this process is the one that writes files and speaks to the terminal."""
  return jax.process_index() == 0


def agree(answer):
  """The first process's answer, a bool, on all of them."""
  return bool(answer) if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def all_of(answer):
  """Whether the answer, a bool, is true on every process."""
  return bool(answer) if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(answer))))


def wait(name):
  """Returns when every process has come to the place called `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def wait_for_file(path):
  """Returns when every process sees a file that the first one has written.

  Raises:
    UserError: one of them does not: their working directories are not the same folder.
  """
  wait(f'written {path}')
  if jax.process_count() == 1:
    return
  path, end = pathlib.Path(path), time.monotonic() + VISIBLE_SECONDS
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.5)
  if not all_of(path.exists()):
    raise errors.UserError(
        f'{path.parent} is not the same folder on all {jax.process_count()} processes: --workdir has to lie on a '
        'file system that they share, such as NFS or a mounted bucket')


def host(array):
  """The whole of an array as NumPy on every process, wherever its shards are."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    if array.is_fully_replicated:
      return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def share_out(function, count):
  """Host work on `count` rows, each process doing a part of them and getting the results of all.

  Args:
    function: rows, int [m], to NumPy [m, ...]: of the same shape and dtype but for m on all processes.
      Where the rows do not divide, some of the last process's are asked for twice.
    count: n, at least 1.

  Returns:
    NumPy [n, ...], the same on all processes.
  """
  processes = jax.process_count()
  if processes == 1:
    return function(np.arange(count))
  size = -(-count // processes)
  mine = np.minimum(np.arange(size) + size * jax.process_index(), count - 1)
  return multihost_utils.process_allgather(function(mine), tiled=True)[:count]

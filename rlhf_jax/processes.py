"""Communication between the processes of a run: broadcasts, barriers, and division of host work.

All processes run the same program on the same host-side data; only arrays on devices are sharded
over them. A decision that depends on a file or a clock must be made by one process and broadcast:
a process that takes another branch leaves the others waiting forever.
"""

import pathlib
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax import errors

VISIBLE_SECONDS = 60  # network file systems cache for a while that a file does not exist


def is_main_process():
  """Returns whether this is process 0, which writes files and prints to the terminal."""
  return jax.process_index() == 0


def print_on_main(message):
  """Prints a line on the main process."""
  if is_main_process():
    print(message, flush=True)


def must_unroll():
  """Returns whether loops around collectives must be unrolled: on the CPUs of several processes.

  While such a loop runs, XLA's CPU runtime already executes later operations that do not need its
  results. Their collectives then interleave with those of the loop in an order that differs between
  processes. Gloo matches messages by their order alone, so a run crashes, hangs, or sums the wrong
  arrays.
  """
  return jax.process_count() > 1 and jax.default_backend() == 'cpu'


def scan(function, carry, xs):
  """Calls `jax.lax.scan` for a loop whose steps contain collectives; unrolls if `must_unroll()`."""
  return jax.lax.scan(function, carry, xs, unroll=must_unroll())


def sequence_after(xs, tree):
  """Returns `xs` with a data dependency on `tree`, for a loop that is too long to unroll.

  If `must_unroll()`, a loop that reads the result starts only after `tree` is computed.

  Args:
    xs: Pytree of integers that the loop reads.
    tree: Pytree of floats, computed with collectives outside the loop.
  """
  if not must_unroll():
    return xs
  # The compiler cannot know that this is 0.
  zero = jnp.isnan(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))
  return jax.tree.map(lambda x: x + zero.astype(x.dtype), xs)


def to_host(array):
  """Returns an array as NumPy on every process, gathered if it is sharded over processes."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return np.asarray(array)
  if not array.is_fully_replicated:
    mesh = array.sharding.mesh
    with jax.set_mesh(mesh):
      array = jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(array)
  return np.asarray(array.addressable_data(0))


def _same(x):
  return x


def all_gather(x):
  """Returns the arrays of all processes, which have one shape and dtype, as [processes, ...]."""
  x = np.asarray(x)[None]
  if jax.process_count() == 1:
    return x
  mesh = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ('processes', 'devices'))
  array_sharding = NamedSharding(mesh, P('processes'))
  return to_host(
    jax.make_array_from_process_local_data(array_sharding, x, (jax.process_count(), *x.shape[1:]))
  )


def broadcast_scalar(value):
  """Returns the value of the main process, a bool or an int, on all processes."""
  return all_gather(np.asarray(value, bool if isinstance(value, bool) else np.int32))[0].item()


def run_on_main_process(function):
  """Calls a function on the main process, while the others wait.

  Returns:
    The result of the function on the main process; None on the others.

  Raises:
    UserError: The function raised it; all processes raise it.
  """
  result, error = None, None
  if is_main_process():
    try:
      result = function()
    except errors.UserError as caught:
      error = caught
  if broadcast_scalar(error is not None):
    raise error or errors.UserError('')  # the main process prints the message
  return result


def all_true(value):
  """Returns whether a bool is true on every process."""
  return bool(all_gather(np.bool_(value)).all())


def barrier():
  """Waits until every process has called it."""
  all_true(True)


def wait_for_file(path):
  """Waits until every process sees a file that the main process has written.

  Raises:
    UserError: A process does not see it, because its workdir is another folder.
  """
  barrier()
  if jax.process_count() == 1:
    return
  path, end = pathlib.Path(path), time.monotonic() + VISIBLE_SECONDS
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.5)
  if not all_true(path.exists()):
    raise errors.UserError(
      f'{path.parent} is not the same folder on all {jax.process_count()} processes: --workdir '
      'must be on a file system that they share, such as NFS or a mounted bucket'
    )


def map_over_processes(function, count):
  """Computes `function(np.arange(count))` with the rows divided among the processes.

  Args:
    function: Function from row indices, int [m], to NumPy [m, ...]. Shape and dtype are the same on
      all processes. If `count` is not divisible, the last processes repeat the last row.
    count: Number of rows n, at least 1.

  Returns:
    NumPy array [n, ...], the same on all processes.
  """
  processes = jax.process_count()
  if processes == 1:
    return function(np.arange(count))
  size = -(-count // processes)
  rows = np.minimum(np.arange(size) + size * jax.process_index(), count - 1)
  return np.concatenate(all_gather(function(rows)))[:count]

"""Several processes: which of them writes, what it broadcasts, and host work divided among them.

All processes run the same program on the same host-side data, and only arrays on devices are
divided among them. What one of them decides by looking at a file, or at a clock, it has to tell
the others: a process that takes another branch leaves them waiting for ever.
"""

import pathlib
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax import errors

VISIBLE_SECONDS = 60  # network file systems remember for a while that a file was not there


def is_main_process():
  """Returns whether this process writes files and prints to the terminal: process 0."""
  return jax.process_index() == 0


def print_on_main(message):
  """Prints a line on the main process."""
  if is_main_process():
    print(message, flush=True)


def must_unroll():
  """Whether loops around collectives must be unrolled: on CPU devices of several processes.

  XLA's CPU runtime goes on behind such a loop before the loop has ended, with all that does not need
  its results. Other collectives then meet those of the loop in an order that differs from process to
  process, and Gloo tells messages apart by their order alone: a run ends, hangs or sums what does not
  belong together.
  """
  return jax.process_count() > 1 and jax.default_backend() == 'cpu'


def scan(function, carry, xs):
  """`jax.lax.scan` of a loop whose steps have collectives: unrolled if `must_unroll()` is true."""
  return jax.lax.scan(function, carry, xs, unroll=must_unroll())


def sequence_after(xs, tree):
  """Integers `xs` with a data dependency on `tree`, for a loop too long to unroll.

  If `must_unroll()` is true, a loop that reads the result starts only after `tree` is computed.

  Args:
    xs: pytree of integers that the loop reads.
    tree: pytree of floats: what has collectives besides the loop.
  """
  if not must_unroll():
    return xs
  # 0, which the compiler cannot know.
  zero = jnp.isnan(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))
  return jax.tree.map(lambda x: x + zero.astype(x.dtype), xs)


def to_host(array):
  """Returns a whole array as NumPy on every process, wherever its shards are."""
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
  """Returns the NumPy arrays of all processes, of one shape and dtype, as [processes, ...]."""
  x = np.asarray(x)[None]
  if jax.process_count() == 1:
    return x
  mesh = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ('processes', 'devices'))
  place = NamedSharding(mesh, P('processes'))
  return to_host(
    jax.make_array_from_process_local_data(place, x, (jax.process_count(), *x.shape[1:]))
  )


def broadcast_scalar(value):
  """Returns the main process's value, a bool or an int, on all processes."""
  return all_gather(np.asarray(value, bool if isinstance(value, bool) else np.int32))[0].item()


def run_on_main_process(function):
  """Calls a function on the main process; the others wait, and stop if it raises UserError.

  Returns:
    What the function returned on the main process; None on the others.
  """
  result, error = None, None
  if is_main_process():
    try:
      result = function()
    except errors.UserError as caught:
      error = caught
  if broadcast_scalar(error is not None):
    raise error or errors.UserError('')  # the main process prints why
  return result


def all_true(value):
  """Returns whether a bool is true on every process."""
  return bool(all_gather(np.bool_(value)).all())


def barrier():
  """Returns when every process has called it."""
  all_true(True)


def wait_for_file(path):
  """Returns when every process sees a file that the main process has written.

  Raises:
    UserError: one of them does not: their working directories are not the same folder.
  """
  barrier()
  if jax.process_count() == 1:
    return
  path, end = pathlib.Path(path), time.monotonic() + VISIBLE_SECONDS
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.5)
  if not all_true(path.exists()):
    raise errors.UserError(
      f'{path.parent} is not the same folder on all {jax.process_count()} processes: --workdir has to lie on a '
      'file system that they share, such as NFS or a mounted bucket'
    )


def map_over_processes(function, count):
  """Divides host work on `count` rows among the processes; each gets the results of all rows.

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
  own = np.minimum(np.arange(size) + size * jax.process_index(), count - 1)
  return np.concatenate(all_gather(function(own)))[:count]

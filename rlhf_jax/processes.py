"""Several processes: which of them writes, what they agree on, and host work they share out.

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


def first():
  """Whether this process is the one that writes files and speaks to the terminal."""
  return jax.process_index() == 0


def say(message):
  """Prints a line on the first process."""
  if first():
    print(message, flush=True)


def unrolled():
  """Whether loops around collectives are to be unrolled: on CPU devices of several processes.

  XLA's CPU runtime goes on behind such a loop before the loop has ended, with all that does not need
  its results. Other collectives then meet those of the loop in an order that differs from process to
  process, and Gloo tells messages apart by their order alone: a run ends, hangs or sums what does not
  belong together.
  """
  return jax.process_count() > 1 and jax.default_backend() == 'cpu'


def scan(function, carry, xs):
  """`jax.lax.scan` of a loop whose steps have collectives: unrolled where `unrolled` says so."""
  return jax.lax.scan(function, carry, xs, unroll=unrolled())


def after(xs, tree):
  """Integers `xs` with a data dependency on `tree`, for a loop too long to unroll.

  Where `unrolled` is true, a loop that reads the result starts only after `tree` is computed.

  Args:
    xs: pytree of integers that the loop reads.
    tree: pytree of floats: what has collectives besides the loop.
  """
  if not unrolled():
    return xs
  # 0, which the compiler cannot know.
  zero = jnp.isnan(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))
  return jax.tree.map(lambda x: x + zero.astype(x.dtype), xs)


def host(array):
  """The whole of an array as NumPy on every process, wherever its shards are."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return np.asarray(array)
  if not array.is_fully_replicated:
    mesh = array.sharding.mesh
    with jax.set_mesh(mesh):
      array = jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(array)
  return np.asarray(array.addressable_data(0))


def _same(x):
  return x


def gathered(x):
  """Every process's NumPy array, of one shape and dtype, as [processes, ...] on all of them."""
  x = np.asarray(x)[None]
  if jax.process_count() == 1:
    return x
  mesh = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ('processes', 'devices'))
  place = NamedSharding(mesh, P('processes'))
  return host(jax.make_array_from_process_local_data(place, x, (jax.process_count(), *x.shape[1:])))


def agree(answer):
  """The first process's answer, a bool or an int, on all of them."""
  return gathered(np.asarray(answer, bool if isinstance(answer, bool) else np.int32))[0].item()


def on_first(function):
  """Calls a function on the first process; the others wait, and stop where it raises UserError.

  Returns:
    What the function returned; None on the others.
  """
  result, error = None, None
  if first():
    try:
      result = function()
    except errors.UserError as found:
      error = found
  if agree(error is not None):
    raise error or errors.UserError('')  # the first says why
  return result


def all_of(answer):
  """Whether the answer, a bool, is true on every process."""
  return bool(gathered(np.bool_(answer)).all())


def wait():
  """Returns when every process has come here."""
  all_of(True)


def wait_for_file(path):
  """Returns when every process sees a file that the first one has written.

  Raises:
    UserError: one of them does not: their working directories are not the same folder.
  """
  wait()
  if jax.process_count() == 1:
    return
  path, end = pathlib.Path(path), time.monotonic() + VISIBLE_SECONDS
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.5)
  if not all_of(path.exists()):
    raise errors.UserError(
      f'{path.parent} is not the same folder on all {jax.process_count()} processes: --workdir has to lie on a '
      'file system that they share, such as NFS or a mounted bucket'
    )


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
  return np.concatenate(gathered(function(mine)))[:count]

"""Between the tensors of Hugging Face files and parameters on their devices, a few tensors at a time.

Nothing here is a model's: a parameter is described by its Source. A stack of layers is one array
on the devices and many tensors in the files; it passes through the host in steps of STEP_BYTES,
or of one layer where that is more.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax import processes

STEP_BYTES = 32 * 2**20


def read(tensors, source, shape, place, dtype):
  """Reads one parameter into its place.

  Args:
    tensors: hf_files.Tensors.
    source: the parameter's naming.Source.
    shape: of the parameter, with the leading axis of layers if it is a stack.
    place: its sharding; only what lies on devices of this process is read.
    dtype: of the parameter; other floating point is converted.

  Returns:
    A jax array.
  """
  step = _layers_at_once(shape, dtype) if source.stacked else shape[0]
  if step >= shape[0]:
    return _part(tensors, source, shape, 0, place, dtype)
  stack = jnp.zeros(shape, dtype, device=place)
  part_place = (
    NamedSharding(place.mesh, P(None, *place.spec[1:]))
    if isinstance(place, NamedSharding)
    else place
  )
  for first in range(0, shape[0], step):
    part_shape = (min(step, shape[0] - first), *shape[1:])
    stack = _put(place)(stack, _part(tensors, source, part_shape, first, part_place), first)
    stack.block_until_ready()  # Otherwise the reading runs ahead and its parts pile up.
  return stack


def layers(stack):
  """Yields the layers of a stack as numpy arrays, gathered from their devices a few at a time."""
  depth, step = stack.shape[0], _layers_at_once(stack.shape, stack.dtype)
  for first in range(0, depth, step):
    yield from processes.to_host(
      stack if step >= depth else _cut(stack, first, min(step, depth - first))
    )


def assemble(sources, parts):
  """The tensor of a file from the parameters that share it, or from the only one.

  Args:
    sources: their Sources.
    parts: a numpy array [inputs, outputs] or [outputs] for each.
  """
  whole = parts[0]
  if len(parts) > 1:
    whole = np.empty((*whole.shape[:-1], sum(part.shape[-1] for part in parts)), whole.dtype)
    for source, part in zip(sources, parts):
      done = 0
      for run in source.columns.runs(0, part.shape[-1]):
        whole[..., run] = part[..., done : done + run.stop - run.start]
        done += run.stop - run.start
  return _flip(whole) if sources[0].transpose else whole


def _layers_at_once(shape, dtype):
  return max(STEP_BYTES // (math.prod(shape[1:]) * jnp.dtype(dtype).itemsize), 1)


@functools.cache
def _put(place):
  """Function (stack, layers, first) -> stack with the layers written at `first`, in place."""

  def put(stack, part, first):
    return jax.lax.dynamic_update_slice_in_dim(stack, part.astype(stack.dtype), first, axis=0)

  return jax.jit(put, donate_argnums=0, out_shardings=place)


@functools.partial(jax.jit, static_argnames='count')
def _cut(stack, first, count):
  return jax.lax.dynamic_slice_in_dim(stack, first, count)


def _part(tensors, source, shape, first, place, dtype=None):
  """The jax array of a parameter's entries from `first` on along its leading axis, of the file's dtype or another."""
  found = {}

  def part(index):
    if repr(index) not in found:  # Devices that hold the same part share one reading.
      bounds = [slice(*entry.indices(size)[:2]) for entry, size in zip(index, shape)]
      bounds[0] = slice(bounds[0].start + first, bounds[0].stop + first)
      array = _slices(tensors, source, bounds)
      found[repr(index)] = array if dtype is None else array.astype(dtype, copy=False)
    return found[repr(index)]

  return jax.make_array_from_callback(shape, place, part)


def _slices(tensors, source, bounds):
  """The numpy array that one slice for each axis of a parameter selects."""
  numbers = range(bounds[0].start, bounds[0].stop) if source.stacked else [0]
  *inner, last = bounds[1:] if source.stacked else bounds
  indices = [(*inner, run) for run in source.columns.runs(last.start, last.stop)]
  indices = [index[::-1] for index in indices] if source.transpose else indices
  axis = 0 if source.transpose else len(inner)
  found = [
    tensors.read(source.name.format(layer=number), *indices, axis=axis) for number in numbers
  ]
  if not source.stacked:
    return found[0].T if source.transpose else found[0]
  stack = np.stack(found) if len(found) > 1 else found[0][None]
  return stack.swapaxes(1, 2) if source.transpose else stack


def _flip(array):
  """[inputs, outputs] -> contiguous [outputs, inputs]; in strips, because a cache does not hold the whole."""
  flipped = np.empty(array.shape[::-1], array.dtype)
  for first in range(0, len(array), 64):
    flipped[:, first : first + 64] = array[first : first + 64].T
  return flipped

"""Moves arrays between Hugging Face files and devices, a few tensors at a time.

This file knows no model: a parameter is described by its Source. A stack of layers is one array on
the devices and many tensors in the files. It passes through the host in chunks of STEP_BYTES, or of
one layer if a layer is larger.
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
  """Reads one parameter to its devices.

  Args:
    tensors: hf_files.Tensors.
    source: naming.Source of the parameter.
    shape: Shape of the parameter, with the leading axis of layers if it is a stack.
    place: Sharding of the parameter; only the shards of this process are read.
    dtype: Dtype of the parameter; other floating-point dtypes are converted.

  Returns:
    A JAX array.
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
    stack.block_until_ready()  # otherwise reading runs ahead and its chunks fill the memory
  return stack


def layers(stack):
  """Yields the layers of a stack as NumPy arrays, gathered from the devices a few at a time."""
  depth, step = stack.shape[0], _layers_at_once(stack.shape, stack.dtype)
  for first in range(0, depth, step):
    yield from processes.to_host(
      stack if step >= depth else _cut(stack, first, min(step, depth - first))
    )


def assemble(sources, parts):
  """Builds a tensor of a file from the parameters that it holds.

  Args:
    sources: Sources of the parameters, all with the same name.
    parts: The parameters, NumPy arrays [inputs, outputs] or [outputs].
  """
  tensor = parts[0]
  if len(parts) > 1:
    tensor = np.empty((*tensor.shape[:-1], sum(part.shape[-1] for part in parts)), tensor.dtype)
    for source, part in zip(sources, parts):
      done = 0
      for run in source.columns.runs(0, part.shape[-1]):
        tensor[..., run] = part[..., done : done + run.stop - run.start]
        done += run.stop - run.start
  return _transpose(tensor) if sources[0].transpose else tensor


def _layers_at_once(shape, dtype):
  return max(STEP_BYTES // (math.prod(shape[1:]) * jnp.dtype(dtype).itemsize), 1)


@functools.cache
def _put(place):
  """Returns a jitted function (stack, layers, first) -> stack that writes layers at `first`."""

  def put(stack, part, first):
    return jax.lax.dynamic_update_slice_in_dim(stack, part.astype(stack.dtype), first, axis=0)

  return jax.jit(put, donate_argnums=0, out_shardings=place)


@functools.partial(jax.jit, static_argnames='count')
def _cut(stack, first, count):
  return jax.lax.dynamic_slice_in_dim(stack, first, count)


def _part(tensors, source, shape, first, place, dtype=None):
  """Reads the part of a parameter that starts at `first` on its leading axis.

  Args:
    tensors, source, place: See `read`.
    shape: Shape of the part.
    first: Index of its first entry on the leading axis.
    dtype: Dtype of the result; None keeps the dtype of the file.
  """
  read_parts = {}

  def part(index):
    if repr(index) not in read_parts:  # devices with the same shard share one read
      bounds = [slice(*entry.indices(size)[:2]) for entry, size in zip(index, shape)]
      bounds[0] = slice(bounds[0].start + first, bounds[0].stop + first)
      array = _slices(tensors, source, bounds)
      read_parts[repr(index)] = array if dtype is None else array.astype(dtype, copy=False)
    return read_parts[repr(index)]

  return jax.make_array_from_callback(shape, place, part)


def _slices(tensors, source, bounds):
  """Reads part of a parameter, given one slice for each axis, as a NumPy array."""
  numbers = range(bounds[0].start, bounds[0].stop) if source.stacked else [0]
  *inner, last = bounds[1:] if source.stacked else bounds
  indices = [(*inner, run) for run in source.columns.runs(last.start, last.stop)]
  indices = [index[::-1] for index in indices] if source.transpose else indices
  axis = 0 if source.transpose else len(inner)
  arrays = [
    tensors.read(source.name.format(layer=number), *indices, axis=axis) for number in numbers
  ]
  if not source.stacked:
    return arrays[0].T if source.transpose else arrays[0]
  stack = np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
  return stack.swapaxes(1, 2) if source.transpose else stack


def _transpose(array):
  """Returns the contiguous transpose of a matrix, made in strips that fit the CPU's cache."""
  transposed = np.empty(array.shape[::-1], array.dtype)
  for first in range(0, len(array), 64):
    transposed[:, first : first + 64] = array[first : first + 64].T
  return transposed

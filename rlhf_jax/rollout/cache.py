"""Operations on key/value caches: repeat, select and copy sequences, and change the length.

A cache is the dict that a model's `prefill` returns and its `step` updates. All sequences share one
write index, and 'segments' marks the slots that hold a token of the sequence. The tokens of a
sequence may thus start at any slot, if they are contiguous and end at the index.

Letters: B batch, K key/value heads, S slots, H head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, PyTree

from rlhf_jax import sharding

Cache = dict[str, PyTree]
# Arrays [..., B, K, S, H]. In all other arrays of a cache, the batch axis is the first.
_STATES = ('k', 'v', 'cross_k', 'cross_v')
# Axis of the slots.
_SLOTS = {'k': -2, 'v': -2, 'segments': -1}


def _map(function, cache, *others):
  """Maps function(name, batch axis, leaf, *other leaves) over all arrays except the index."""

  def apply(name):
    return jax.tree.map(
      lambda x, *rest: function(name, x.ndim - 4 if name in _STATES else 0, x, *rest),
      cache[name],
      *(other[name] for other in others),
    )

  return {name: apply(name) for name in cache if name != 'index'}


def join(first: Cache, second: Cache) -> Cache:
  """Joins the caches of two models that read the same tokens: each entry becomes a pair."""
  pairs = {name: (first[name], second[name]) for name in first if name != 'index'}
  return pairs | {'index': first['index']}


def join_outputs(first: tuple, second: tuple) -> tuple:
  """Joins two (state, cache), what `prefill` and `step` return, to one; see `join`."""
  return (first[0], second[0]), join(first[1], second[1])


def split(cache: Cache) -> tuple[Cache, Cache]:
  """Returns the two caches that were joined."""
  return tuple(
    {name: x if name == 'index' else x[number] for name, x in cache.items()} for number in (0, 1)
  )


def empty(shapes: Cache, index: int) -> Cache:
  """Returns a cache without tokens.

  Args:
    shapes: Cache of ShapeDtypeStructs.
    index: Slot that the next step writes, an int.
  """
  zeros = _map(
    lambda name, axis, x: sharding.split_rows(jnp.zeros(x.shape, x.dtype), axis=axis), shapes
  )
  return zeros | {'index': jnp.int32(index)}


def grow(cache: Cache, count: int) -> Cache:
  """Returns the cache with `count` more empty slots at the end; `count` is an int."""

  def pad(name, axis, x):
    if name not in _SLOTS or not count:
      return x
    widths = [(0, 0)] * x.ndim
    widths[_SLOTS[name]] = (0, count)
    return jnp.pad(x, widths)

  return cache | _map(pad, cache)


def repeat(cache: Cache, count: int) -> Cache:
  """Repeats each sequence `count` times; the copies of a sequence are adjacent."""
  return cache | _map(
    lambda name, axis, x: sharding.split_rows(jnp.repeat(x, count, axis=axis), axis=axis), cache
  )


def take(cache: Cache, rows: Int[Array, ' B']) -> Cache:
  """Returns the cache of the sequences at indices `rows`."""
  return cache | _map(lambda name, axis, x: jnp.take(x, rows, axis=axis), cache)


def put(
  cache: Cache,
  row: Int[ArrayLike, ''],
  source: Cache,
  source_row: Int[ArrayLike, ''],
  length: int,
) -> Cache:
  """Replaces a sequence of a cache by one of another cache; it then ends at the cache's index.

  Args:
    cache: Cache with an index of at least `length`.
    row: Index of the sequence to replace, an int32 scalar.
    source: Cache of the same model, of any size, with an index of at least `length`.
    source_row: Index of the sequence to copy, an int32 scalar.
    length: Number of slots to copy, an int. All tokens of the sequence must be in the last `length`
      slots before the index of `source`.
  """

  def copy(name, axis, x, other):
    piece = jax.lax.dynamic_slice_in_dim(other, source_row, 1, axis)
    starts = [0] * x.ndim
    starts[axis] = row
    if name in _SLOTS:
      slots = x.ndim + _SLOTS[name]
      piece = jax.lax.dynamic_slice_in_dim(piece, source['index'] - length, length, slots)
      starts[slots] = cache['index'] - length
    if name == 'segments':  # Old keys and values need not be cleared.
      x = jax.lax.dynamic_update_slice_in_dim(x, jnp.zeros_like(x[:1]), row, 0)
    return jax.lax.dynamic_update_slice(x, piece, starts)

  return cache | _map(copy, cache, source)


def shift(cache: Cache, count: int) -> Cache:
  """Moves all sequences and the index by `count` slots, an int, to the left.

  The first `count` slots are lost.
  """

  def move(name, axis, x):
    if name not in _SLOTS:
      return x
    slots = x.ndim + _SLOTS[name]
    left = jax.lax.slice_in_dim(x, count, None, axis=slots)
    return jax.lax.dynamic_update_slice(x, left, [0] * x.ndim)

  return cache | _map(move, cache) | {'index': cache['index'] - count}

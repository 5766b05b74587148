"""Rows of key/value caches: repeated, selected, moved into other caches.

A cache is the dict that a model's `prefill` returns and its `step` goes on with. It has one write
index for all rows, and 'segments' say which slots hold a token of their row, so a row may end up
anywhere among the slots as long as its tokens stay side by side and end at the index.

Letters: B batch, K key/value heads, S slots, H head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, PyTree

from rlhf_jax import sharding

Cache = dict[str, PyTree]
# Arrays [..., B, K, S, H]; what a cache holds beside them has its rows in front.
_STATES = ('k', 'v', 'cross_k', 'cross_v')
# Axes of slots, from behind.
_SLOTS = {'k': -2, 'v': -2, 'segments': -1}


def _map(function, cache, *others):
  """Maps function(name, axis of rows, leaf, *leaves) over all but the index."""

  def apply(name):
    return jax.tree.map(
      lambda x, *rest: function(name, x.ndim - 4 if name in _STATES else 0, x, *rest),
      cache[name],
      *(other[name] for other in others),
    )

  return {name: apply(name) for name in cache if name != 'index'}


def empty(shapes: Cache, index: int) -> Cache:
  """A cache without tokens.

  Args:
    shapes: of a cache, as ShapeDtypeStructs.
    index: slot that the next step writes, an int.
  """
  zeros = _map(
    lambda name, axis, x: sharding.split_rows(jnp.zeros(x.shape, x.dtype), axis=axis), shapes
  )
  return zeros | {'index': jnp.int32(index)}


def grow(cache: Cache, count: int) -> Cache:
  """Room for `count` more tokens, an int, behind the others."""

  def pad(name, axis, x):
    if name not in _SLOTS or not count:
      return x
    widths = [(0, 0)] * x.ndim
    widths[_SLOTS[name]] = (0, count)
    return jnp.pad(x, widths)

  return cache | _map(pad, cache)


def repeat(cache: Cache, count: int) -> Cache:
  """Every row `count` times, the copies side by side."""
  return cache | _map(
    lambda name, axis, x: sharding.split_rows(jnp.repeat(x, count, axis=axis), axis=axis), cache
  )


def take(cache: Cache, rows: Int[Array, ' B']) -> Cache:
  """The rows at positions `rows`, an int32 vector."""
  return cache | _map(lambda name, axis, x: jnp.take(x, rows, axis=axis), cache)


def put(
  cache: Cache,
  row: Int[ArrayLike, ''],
  source: Cache,
  source_row: Int[ArrayLike, ''],
  length: int,
) -> Cache:
  """A row of another cache in place of a row of this one, ending at this one's index.

  Args:
    cache: whose index is at least `length`.
    row: which of its rows, an int32 scalar.
    source: another cache of the same model, of any size, whose index is at least `length`.
    source_row: which of its rows, an int32 scalar.
    length: slots to copy, an int; all tokens of the row are in the last `length` before the index.
  """

  def copy(name, axis, x, other):
    piece = jax.lax.dynamic_slice_in_dim(other, source_row, 1, axis)
    starts = [0] * x.ndim
    starts[axis] = row
    if name in _SLOTS:
      slots = x.ndim + _SLOTS[name]
      piece = jax.lax.dynamic_slice_in_dim(piece, source['index'] - length, length, slots)
      starts[slots] = cache['index'] - length
    if name == 'segments':  # What was in the row is gone; its keys and values may stay.
      x = jax.lax.dynamic_update_slice_in_dim(x, jnp.zeros_like(x[:1]), row, 0)
    return jax.lax.dynamic_update_slice(x, piece, starts)

  return cache | _map(copy, cache, source)


def shift(cache: Cache, count: int) -> Cache:
  """Everything moved `count` slots (an int) towards the first, the index too; what falls off is lost."""

  def move(name, axis, x):
    if name not in _SLOTS:
      return x
    slots = x.ndim + _SLOTS[name]
    left = jax.lax.slice_in_dim(x, count, None, axis=slots)
    return jax.lax.dynamic_update_slice(x, left, [0] * x.ndim)

  return cache | _map(move, cache) | {'index': cache['index'] - count}

"""Length buckets: sort responses by length, and truncate a computation to the longest in its batch.

Letters: B sequences, R response length, n sequences of a group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Shaped

from rlhf_jax import processes

MIN_BUCKET = 16  # positions; a smaller saving is not worth compiling another program


def bucket_lengths(length: int, max_buckets: int) -> list[int]:
  """Returns at most `max_buckets` lengths up to `length`, at least `MIN_BUCKET` apart."""
  count = min(max_buckets, max(length // MIN_BUCKET, 1))
  return [length * (bucket + 1) // count for bucket in range(count)]


def used_lengths(mask: Bool[ArrayLike, 'B R']) -> Int[Array, ' B']:
  """Returns the number of positions up to the last True of each row of `mask`, int32."""
  return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)


def order_by_length(mask: Bool[ArrayLike, 'B R'], group_size: int = 1) -> Int[Array, ' B']:
  """Returns the int32 indices that sort the sequences of `mask` from short to long.

  Args:
    mask: [B, R] bool, True at the positions in use.
    group_size: n; every n consecutive sequences stay together and are sorted by their longest.
  """
  longest = jnp.max(used_lengths(mask).reshape(-1, group_size), axis=1)
  return group_members(jnp.argsort(longest), group_size)


def group_members(groups: Int[ArrayLike, '*M G'], group_size: int) -> Int[Array, '*M B']:
  """Returns the indices of the sequences of groups that each have n consecutive sequences.

  Args:
    groups: [..., G] int32, indices of groups.
    group_size: n.

  Returns:
    [..., G n] int32: g n, g n + 1, ..., g n + n - 1 for each group g.
  """
  members = jnp.add.outer(groups * group_size, jnp.arange(group_size))
  return members.reshape(*groups.shape[:-1], -1)


def run_bucketed(
  function: Callable,
  batch: PyTree[Shaped[ArrayLike, 'B ...']],
  mask: Bool[ArrayLike, 'B R'],
  max_buckets: int,
) -> PyTree[Array]:
  """Calls `function(batch)` without the trailing positions that no sequence uses.

  The function is compiled for at most `max_buckets` lengths. The longest sequence selects one.

  Args:
    function: Function of the batch; its result's shapes must not depend on the response length.
    batch: Pytree of arrays [B, T, ...] whose last R positions are the response.
    mask: [B, R] bool, True at the positions in use.
    max_buckets: Largest number of lengths to compile for.

  Returns:
    The result of `function`.
  """
  length = mask.shape[1]
  # If loops must not contain collectives, branches must not either.
  buckets = bucket_lengths(length, 1 if processes.must_unroll() else max_buckets)

  def branch(bucket):
    truncate = lambda x: x[:, : x.shape[1] - (length - bucket)]
    return lambda batch: function(jax.tree.map(truncate, batch))

  if len(buckets) == 1:
    return function(batch)
  index = jnp.sum(jnp.max(used_lengths(mask)) > jnp.array(buckets[:-1]))
  return jax.lax.switch(index, [branch(bucket) for bucket in buckets], batch)


def pad_response(
  tree: PyTree[Shaped[ArrayLike, 'B ...']], count: int
) -> PyTree[Shaped[Array, 'B ...']]:
  """Appends `count` zeros along the response axis of every array [B, R, ...]."""
  return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2)), tree)

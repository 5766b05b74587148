"""Length buckets: responses sorted by length, and computations truncated to the longest of them.

Letters: B sequences, R response length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Shaped

from rlhf_jax import processes

MIN_BUCKET = 16  # positions that make another program worth its compilation


def bucket_lengths(length: int, max_buckets: int) -> list[int]:
  """At most `max_buckets` lengths, at least `MIN_BUCKET` apart; the last one is `length`."""
  count = min(max_buckets, max(length // MIN_BUCKET, 1))
  return [length * (bucket + 1) // count for bucket in range(count)]


def used_lengths(mask: Bool[ArrayLike, 'B R']) -> Int[Array, ' B']:
  """The number of positions up to the last True of a mask [B, R]; [B] int32."""
  return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)


def order_by_length(mask: Bool[ArrayLike, 'B R']) -> Int[Array, ' B']:
  """The indices [B] int32 that sort the sequences of a mask [B, R] from short to long."""
  return jnp.argsort(used_lengths(mask))


def run_bucketed(
  function: Callable,
  batch: PyTree[Shaped[ArrayLike, 'B ...']],
  mask: Bool[ArrayLike, 'B R'],
  max_buckets: int,
) -> PyTree[Array]:
  """`function(batch)` without the positions at the end that no sequence uses.

  The function is compiled for each of a few lengths. The longest sequence selects one.

  Args:
    function: of the batch; the shapes of its result do not depend on the response length.
    batch: pytree of arrays [B, T, ...] that end with the positions of the response.
    mask: [B, R] bool, the positions that count.
    max_buckets: the largest number of lengths to compile for.

  Returns:
    The result of `function`.
  """
  length = mask.shape[1]
  # Where no loop may have collectives in it, no branch has any either.
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
  """Appends `count` zeros to the responses of arrays [B, r, ...]."""
  return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2)), tree)

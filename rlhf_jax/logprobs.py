"""Hidden states to log-probabilities and entropy of given tokens, in chunks.

Letters: B batch, T sequence length, D width, V vocabulary. Large [B, T, V] logits are never
held: a scan unembeds a few positions of every sequence at a time, and the backward pass recomputes
them. Logits that fit in one chunk are kept instead.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, UInt8

from rlhf_jax import processes
from rlhf_jax import sharding

Unembed = Callable[[Float[Array, '... D']], Float[Array, '... V']]
CHUNK = 2**25  # logits held at a time on each device: 128 MiB in float32


def _in_chunks(rows_fn, arrays, vocab, chunk):
  """Maps `rows_fn` over arrays [B, T, ...] in slices of T whose logits fill one chunk.

  T is sliced, not B, so that every device works on its own sequences in each chunk.
  """
  batch, length = arrays[0].shape[:2]
  at_once = max(math.prod(sharding.shards()) * chunk // (batch * vocab), 1)
  if length <= at_once:
    return rows_fn(*arrays)
  chunks = -(-length // at_once)
  size = -(-length // chunks)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2))
    return sharding.split_rows(
      jnp.moveaxis(x.reshape((batch, chunks, size) + x.shape[2:]), 1, 0), axis=1
    )

  out = processes.scan(
    lambda _, xs: (None, jax.checkpoint(rows_fn)(*xs)), None, [split(x) for x in arrays]
  )[1]
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], out)


def _vocab(unembed, hidden):
  return jax.eval_shape(unembed, hidden).shape[-1]


def token_logprobs(
  unembed: Unembed,
  hidden: Float[ArrayLike, 'B T D'],
  targets: Int[ArrayLike, 'B T'],
  *,
  temperature: float | Float[Array, ''] = 1.0,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """Computes the log-probability of each target and the entropy of its distribution.

      logp = logits[target] - logsumexp(logits),  logits = unembed(hidden) / temperature

  Args:
    unembed: function from hidden [..., D] to float32 logits [..., V].
    hidden: [B, T, D] states; each predicts the target at its own position.
    targets: [B, T] int32.
    temperature: temperature that divides the logits.
    chunk: number of logits held at a time on each device.

  Returns:
    logprobs [B, T] float32 and entropy [B, T] float32, in nats.
  """

  def rows(h, y):
    return _logprob_and_entropy(unembed(h) / temperature, y)

  return _in_chunks(rows, [hidden, targets], _vocab(unembed, hidden), chunk)


def masked_token_logprobs(
  unembed: Unembed,
  hidden: Float[ArrayLike, 'B T D'],
  targets: Int[ArrayLike, 'B T'],
  allowed: UInt8[ArrayLike, 'B T M'],
  *,
  temperature: float | Float[Array, ''] = 1.0,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T'], Float[Array, 'B T']]:
  """Computes log-probabilities and entropies as `token_logprobs`, among the allowed tokens only.

  Args:
    unembed, hidden, targets, temperature, chunk: see `token_logprobs`.
    allowed: [B, T, M] uint8, M = ceil(V / 8), one bit per token (jnp.packbits). A position that
      allows no token has no mask.

  Returns:
    logprobs [B, T] float32, -inf for a target that is not allowed; entropy [B, T] float32; and the
    log-probabilities [B, T] float32 without the masks.
  """
  vocab = _vocab(unembed, hidden)

  def rows(h, y, bits):
    logits = unembed(h) / temperature
    mask = jnp.unpackbits(bits, axis=-1, count=vocab).astype(bool)
    mask |= ~jnp.any(mask, axis=-1, keepdims=True)
    raw, _ = _logprob_and_entropy(logits, y)
    return *_logprob_and_entropy(logits, y, mask), raw

  return _in_chunks(rows, [hidden, targets, allowed], vocab, chunk)


def _logprob_and_entropy(logits, targets, mask=None):
  """Returns log-probabilities of targets [...] and entropies [...] of logits [..., V].

  Tokens outside the mask have probability 0; no infinity reaches the backward pass.
  """
  # Subtract the maximum, so that rounding loses neither term of a peaked distribution's entropy.
  visible = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
  logits = logits - jax.lax.stop_gradient(jnp.max(visible, axis=-1, keepdims=True))
  if mask is not None:
    logits = jnp.where(mask, logits, 0.0)
  weights = jnp.exp(logits)
  if mask is not None:
    weights = jnp.where(mask, weights, 0.0)
  total = jnp.sum(weights, axis=-1)
  pick = lambda x: jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
  logprobs = pick(logits) - jnp.log(total)
  if mask is not None:
    logprobs = jnp.where(pick(mask), logprobs, -jnp.inf)
  return logprobs, jnp.log(total) - jnp.sum(weights * logits, axis=-1) / total


def cross_entropy(
  unembed: Unembed,
  hidden: Float[ArrayLike, 'B T D'],
  targets: Int[ArrayLike, 'B T'],
  *,
  chunk: int = CHUNK,
) -> Float[Array, 'B T']:
  """Computes the negative log-likelihood of each target, in nats, without the entropy."""
  picked, logsumexp = picked_and_logsumexp(unembed, hidden, targets, chunk=chunk)
  return logsumexp - picked


def picked_and_logsumexp(
  unembed: Unembed,
  hidden: Float[ArrayLike, 'B T D'],
  targets: Int[ArrayLike, 'B T'],
  *,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """Returns the logit of each target, and the logsumexp of all logits at its position."""

  def rows(h, y):
    logits = unembed(h)
    picked = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
    return picked, jax.nn.logsumexp(logits, axis=-1)

  return _in_chunks(rows, [hidden, targets], _vocab(unembed, hidden), chunk)


def compare(
  function: Callable[[Float[Array, '... V'], Float[Array, '... V']], PyTree[Float[Array, '...']]],
  unembed: Unembed,
  hidden: Float[ArrayLike, 'B T D'],
  other_unembed: Unembed,
  other_hidden: Float[ArrayLike, 'B T E'],
  *,
  temperature: float | Float[Array, ''] = 1.0,
  chunk: int = CHUNK,
) -> PyTree[Float[Array, 'B T']]:
  """Computes a function of the distributions of two models at each position, in chunks.

  Args:
    function: function from the logits of both models, [..., V] each, to arrays [...].
    unembed: unembedding of the first model.
    hidden: [B, T, D] states of the first model.
    other_unembed: unembedding of the second model, with the same vocabulary.
    other_hidden: [B, T, E] states of the second model.
    temperature: temperature that divides both logits.
    chunk: number of logits of each model held at a time on each device.

  Returns:
    The results of `function`, [B, T] each.
  """

  def rows(h, g):
    return function(unembed(h) / temperature, other_unembed(g) / temperature)

  return _in_chunks(rows, [hidden, other_hidden], _vocab(unembed, hidden), chunk)


def full_kl(
  unembed: Unembed,
  hidden: Float[ArrayLike, 'B T D'],
  ref_unembed: Unembed,
  ref_hidden: Float[ArrayLike, 'B T E'],
  *,
  temperature: float | Float[Array, ''] = 1.0,
  chunk: int = CHUNK,
) -> Float[Array, 'B T']:
  """Computes KL(policy || reference) over the whole vocabulary for each token.

  Args:
    unembed, hidden: of the policy; see `compare`.
    ref_unembed, ref_hidden: of the reference.
    temperature, chunk: see `compare`.

  Returns:
    [B, T] float32, nats.
  """

  def kl(logits, ref_logits):
    logp, ref = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(ref_logits, axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - ref), axis=-1)

  return compare(kl, unembed, hidden, ref_unembed, ref_hidden, temperature=temperature, chunk=chunk)


def fisher_dot(
  unembed: Callable[[PyTree, Float[Array, '... D']], Float[Array, '... V']],
  params: PyTree,
  hidden: Float[ArrayLike, 'B T D'],
  params_tangent: PyTree,
  hidden_tangent: Float[ArrayLike, 'B T D'],
  *,
  temperature: float | Float[Array, ''] = 1.0,
  chunk: int = CHUNK,
) -> Float[Array, 'B T']:
  """Computes a number per token whose gradient is a product with its Fisher matrix.

  With u = J v, the derivative of the logits along a direction v, and p = softmax(logits):

      <sg(w), logits>,  w = (diag(p) - p p^T) u

  where sg stops the gradient. Its gradient J^T w is J^T (diag(p) - p p^T) J v, the product of v and
  the Fisher matrix of the token's distribution; see Schraudolph 2002, §3
  (https://doi.org/10.1162/08997660260028683).

  Args:
    unembed: function from parameters and states [..., D] to float32 logits [..., V].
    params: parameters of `unembed`.
    hidden: [B, T, D] states.
    params_tangent: v, for `params`.
    hidden_tangent: [B, T, D], derivative of the states along v.
    temperature: temperature that divides the logits.
    chunk: number of logits held at a time on each device.

  Returns:
    [B, T] float32.
  """

  def rows(h, dh):
    scaled = lambda params, h: unembed(params, h) / temperature
    logits, u = jax.jvp(scaled, (params, h), (params_tangent, dh))
    p = jax.nn.softmax(logits, axis=-1)
    w = p * (u - jnp.sum(p * u, axis=-1, keepdims=True))
    return jnp.sum(jax.lax.stop_gradient(w) * logits, axis=-1)

  vocab = _vocab(functools.partial(unembed, params), hidden)
  return _in_chunks(rows, [hidden, hidden_tangent], vocab, chunk)

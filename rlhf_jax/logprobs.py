"""Hidden states to log-probabilities and entropy of given tokens, in chunks.

Letters: B batch, T sequence length, D width, V vocabulary. The [B, T, V] logits are never
held: a scan unembeds `chunk` rows at a time, and the backward pass unembeds them again.
"""

import jax
import jax.numpy as jnp

from rlhf_jax import sharding

CHUNK = 2048  # rows of D of a shard unembedded at once: 2048 x V float32 is the largest temporary


def _in_chunks(rows_fn, arrays, chunk):
  """Maps `rows_fn` over arrays [B, T, ...] flattened to rows, `chunk` rows of every shard at a time.

  A chunk of one shard's rows would be unembedded by all devices together, who then add up logits.
  """
  batch, length = arrays[0].shape[:2]
  shards = sharding.row_shards(batch)
  rows = batch * length // shards
  flat = [a.reshape((shards, rows) + a.shape[2:]) for a in arrays]
  joined = lambda a: sharding.split_rows(a.reshape((-1,) + a.shape[2:]))
  if rows <= chunk:
    out = jax.checkpoint(rows_fn)(*map(joined, flat))
    return jax.tree.map(lambda x: x.reshape(batch, length), out)
  chunks = -(-rows // chunk)
  size = -(-rows // chunks)
  padding = chunks * size - rows
  flat = [jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2)) for a in flat]
  split = [a.reshape((shards, chunks, size) + a.shape[2:]).swapaxes(0, 1) for a in flat]
  out = jax.lax.map(lambda xs: jax.checkpoint(rows_fn)(*map(joined, xs)), split)
  whole = lambda x: x.reshape(chunks, shards, size).swapaxes(0, 1).reshape(shards, -1)[:, :rows]
  return jax.tree.map(lambda x: whole(x).reshape(batch, length), out)


def token_logprobs(unembed, hidden, targets, *, temperature=1.0, chunk=CHUNK):
  """Log-probability of each target and entropy of the distribution it is drawn from.

      logp = logits[target] - logsumexp(logits),  logits = unembed(hidden) / temperature

  Args:
    unembed: function from hidden [n, D] to float32 logits [n, V].
    hidden: [B, T, D] states, each of which predicts the target of its own slot.
    targets: [B, T] int32.
    temperature: what the logits are divided by.
    chunk: rows unembedded at once.

  Returns:
    logprobs [B, T] float32 and entropy [B, T] float32, in nats.
  """
  def rows(h, y):
    # Not logsumexp minus the mean logit: that loses the entropy of a peaked distribution.
    logp = jax.nn.log_softmax(unembed(h) / temperature, axis=-1)
    picked = jnp.take_along_axis(logp, y[:, None], axis=-1)[:, 0]
    return picked, -jnp.sum(jnp.exp(logp) * logp, axis=-1)
  return _in_chunks(rows, [hidden, targets], chunk)


def cross_entropy(unembed, hidden, targets, *, chunk=CHUNK):
  """Negative log-likelihood of each target, [B, T] float32 nats; no entropy is computed."""
  def rows(h, y):
    logits = unembed(h)
    picked = jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
  return _in_chunks(rows, [hidden, targets], chunk)


def full_kl(unembed, hidden, ref_unembed, ref_hidden, *, temperature=1.0, chunk=CHUNK):
  """KL(policy || reference) over the whole vocabulary, per token.

  Args:
    unembed: the policy's unembedding.
    hidden: [B, T, D] of the policy.
    ref_unembed: the reference's unembedding.
    ref_hidden: [B, T, D'] of the reference.
    temperature: what both logits are divided by.
    chunk: rows unembedded at once.

  Returns:
    [B, T] float32, nats.
  """
  def rows(h, g):
    logp = jax.nn.log_softmax(unembed(h) / temperature, axis=-1)
    ref = jax.nn.log_softmax(ref_unembed(g) / temperature, axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - ref), axis=-1)
  return _in_chunks(rows, [hidden, ref_hidden], chunk)

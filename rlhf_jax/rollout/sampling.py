"""Samples tokens from logits: temperature, top-k, top-p, end tokens, log-probabilities.

Letters: B batch, R response length, T prompt and response length, V vocabulary, M = ceil(V / 8).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt8

from rlhf_jax import errors
from rlhf_jax import types

BLOCK = 128  # tokens per block; about the square root of the vocabulary size


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling settings. Frozen, so that they can be a static argument of a jitted function.

  Attributes:
    max_new_tokens: R, response length.
    temperature: Divisor of the logits; 0 selects the most likely token.
    top_k: Number of most likely tokens to keep; 0 keeps all.
    top_p: Probability of the smallest set of most likely tokens to keep; 1 keeps all.
    eos_id: Token id that ends a response, or None.
    pad_id: Token id of padding after the end.
    ignore_eos: Whether to continue up to `max_new_tokens` after the EOS and stop tokens.
    min_new_tokens: Number of tokens before the EOS and stop tokens are allowed.
    stop_tokens: Token ids that end a response as the EOS does. They are part of the response.

  Raises:
    UserError: `min_new_tokens` exceeds `max_new_tokens`.
  """

  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  eos_id: int | None = None
  pad_id: int = 0
  ignore_eos: bool = False
  min_new_tokens: int = 0
  stop_tokens: tuple[int, ...] = ()

  def __post_init__(self):
    if self.min_new_tokens > self.max_new_tokens:
      raise errors.UserError(
        f'min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}: '
        'lower it'
      )

  @property
  def end_tokens(self) -> tuple[int, ...]:
    """Ids of the EOS and the stop tokens, a tuple without duplicates."""
    eos = () if self.eos_id is None else (self.eos_id,)
    return tuple(dict.fromkeys(eos + tuple(self.stop_tokens)))


def is_in(tokens: Int[ArrayLike, '*shape'], ids: tuple[int, ...]) -> Bool[Array, '*shape']:
  """Returns whether each token is one of `ids`."""
  return jnp.isin(tokens, jnp.array(ids, jnp.int32))


def ends_response(token: Int[ArrayLike, ' B'], sampling: Sampling) -> Bool[Array, ' B']:
  """Returns whether each sampled token ends its response, [B] bool."""
  return is_in(token, () if sampling.ignore_eos else sampling.end_tokens)


def ended(rollout: types.Rollout, sampling: Sampling) -> Bool[Array, ' B']:
  """Returns whether each response contains the EOS or a stop token, [B] bool.

  Returns True for all if there are no end tokens. Does not consider stop strings; see
  `stops.truncate_at_strings`.

  Args:
    rollout: Rollout.
    sampling: Sampling of the rollout.
  """
  response = rollout.tokens[:, -rollout.response_mask.shape[1] :]
  if not sampling.end_tokens:
    return jnp.ones(response.shape[0], bool)
  return jnp.any(is_in(response, sampling.end_tokens) & rollout.response_mask, axis=1)


def mask_end_tokens(
  logits: Float[ArrayLike, 'B V'],
  index: Int[ArrayLike, ''] | Int[ArrayLike, ' B'],
  sampling: Sampling,
) -> Float[ArrayLike, 'B V']:
  """Sets the logits of EOS and stop tokens to -inf in responses shorter than `min_new_tokens`.

  See MinNewTokensLengthLogitsProcessor of transformers and min_tokens of vLLM.

  Args:
    logits: [B, V] float32.
    index: Number of tokens that each response already has, int32 scalar or [B].
    sampling: Sampling.

  Returns:
    [B, V] float32.
  """
  if not sampling.min_new_tokens or not sampling.end_tokens:
    return logits
  early = jnp.broadcast_to(index, logits.shape[:1]) < sampling.min_new_tokens
  end_tokens = is_in(jnp.arange(logits.shape[1]), sampling.end_tokens)
  return jnp.where(early[:, None] & end_tokens[None], -jnp.inf, logits)


def filter_logits(
  logits: Float[ArrayLike, 'B V'], *, temperature: float, top_k: int, top_p: float
) -> Float[Array, 'B V']:
  """Returns the logits of the distribution to sample from, -inf for tokens that are filtered out.

  Nucleus filtering follows Holtzman et al. 2020 (https://arxiv.org/abs/1904.09751): a token is kept
  if the total probability of more likely tokens is below `top_p`, so the most likely token is
  always kept. All tokens that tie at a threshold are kept.

  Args:
    logits: [B, V] float32.
    temperature: Positive divisor of the logits.
    top_k: Number of tokens to keep; 0 keeps all.
    top_p: Probability to keep; 1 keeps all.

  Returns:
    [B, V] float32.
  """
  logits = logits / temperature
  if top_k and top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1.0:
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < top_p
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  return logits


def sample(
  keys: Key[Array, ' B'],
  logits: Float[ArrayLike, 'B V'],
  sampling: Sampling,
  index: Int[ArrayLike, ''] | Int[ArrayLike, ' B'] = 0,
) -> tuple[Int[Array, ' B'], Float[Array, ' B']]:
  """Samples one token for each response.

  Args:
    keys: [B] random keys, one per response, so that a token does not depend on other responses.
    logits: [B, V] float32, unfiltered.
    sampling: Sampling.
    index: Number of tokens that each response already has, int32 scalar or [B].

  Returns:
    (tokens [B] int32, logprobs [B] float32 under the filtered distribution, 0 if greedy).
  """
  logits = mask_end_tokens(logits, index, sampling)
  if sampling.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, jnp.zeros(tokens.shape, jnp.float32)
  logits = filter_logits(
    logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
  )
  return _inverse_cdf_sample(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys), logits)


def allowed(
  logits: Float[ArrayLike, 'B V'],
  sampling: Sampling,
  index: Int[ArrayLike, ''] | Int[ArrayLike, ' B'] = 0,
) -> UInt8[Array, 'B M']:
  """Returns the tokens that `sample` may return, one bit each; see `sample` for the arguments.

  Returns:
    [B, M] uint8, M = ceil(V / 8), packed by jnp.packbits.
  """
  logits = mask_end_tokens(logits, index, sampling)
  logits = filter_logits(
    logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
  )
  return jnp.packbits(logits > -jnp.inf, axis=-1)


def _inverse_cdf_sample(uniform, logits):
  """Samples tokens by inverting the cumulative distribution: first a block, then a token in it.

  Needs two uniform numbers per response. The Gumbel trick needs one per token of the vocabulary,
  which costs more than unembedding. Sums within blocks also keep float32 exact enough for large
  vocabularies.

  Args:
    uniform: [B, 2] float32 in [0, 1).
    logits: [B, V] float32; tokens with -inf are never sampled.

  Returns:
    (tokens [B] int32, logprobs [B] float32).
  """
  batch, vocab = logits.shape
  logits = jnp.pad(logits, ((0, 0), (0, -vocab % BLOCK)), constant_values=-jnp.inf)
  blocks = logits.reshape(batch, -1, BLOCK)
  top = jnp.max(logits, axis=-1)
  masses = jnp.sum(jnp.exp(blocks - top[:, None, None]), axis=-1)
  block, mass = _first_above(uniform[:, 0], masses)
  within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  slot, _ = _first_above(uniform[:, 1], jnp.exp(within - top[:, None]))
  picked = jnp.take_along_axis(within, slot[:, None], axis=-1)[:, 0]
  return block * BLOCK + slot, picked - top - jnp.log(mass)


def _first_above(uniform, weights):
  """Returns (first index [B] whose cumulative weight exceeds uniform * sum, sum of weights [B]).

  Never returns an index of weight 0. Because sums are rounded, the cumulative weight of the last
  index of positive weight may be an ulp below the sum and exceed nothing if `uniform` is close to
  1. Then that index is returned.
  """
  index = jnp.arange(weights.shape[-1])[None]
  total, positive = jnp.cumsum(weights, axis=-1), weights > 0
  last = jnp.max(jnp.where(positive, index, 0), axis=-1, keepdims=True)
  above = (total > uniform[:, None] * total[:, -1:]) & positive
  return jnp.argmax(above | (index == last), axis=-1).astype(jnp.int32), total[:, -1]

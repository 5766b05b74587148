"""From logits to tokens: temperature, top-k, top-p, what ends responses, logprobs of the choice.

Letters: B batch, R response length, T prompt and response length, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from rlhf_jax import errors
from rlhf_jax import types

BLOCK = 128  # tokens of a block; about the square root of a vocabulary


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How responses are drawn. Frozen, so that it can be a static argument of a jitted function.

  Attributes:
    max_new_tokens: R, response length.
    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the smallest set of likeliest tokens whose probability reaches p; 1 keeps all.
    eos_id: the token that ends a response; None for none.
    pad_id: what fills the positions after the end.
    ignore_eos: go on to `max_new_tokens` whatever is sampled, stop tokens too.
    min_new_tokens: tokens before the first that may be the EOS or a stop token.
    stop_tokens: ids that end a response as the EOS does; they stay in it.

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
  """Which tokens, an array of any shape, are one of `ids`, a tuple; bool of the same shape."""
  return jnp.isin(tokens, jnp.array(ids, jnp.int32))


def ends_response(token: Int[ArrayLike, ' B'], sampling: Sampling) -> Bool[Array, ' B']:
  """Which tokens drawn last, [B] int32, end their response while sampling; [B] bool."""
  return is_in(token, () if sampling.ignore_eos else sampling.end_tokens)


def ended(rollout: types.Rollout, sampling: Sampling) -> Bool[Array, ' B']:
  """Which responses ended by themselves, with the EOS or a stop token; [B] bool.

  With `ignore_eos`, which of them hold such a token. All of them where nothing can end a response.
  Stop strings are a matter of text, which `stops.truncate_at_strings` reports.

  Args:
    rollout: Rollout.
    sampling: the Sampling it was drawn with.
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
  """Logits with -inf at the EOS and the stop tokens of responses shorter than `min_new_tokens`.

  As transformers' MinNewTokensLengthLogitsProcessor and vLLM's min_tokens do.

  Args:
    logits: [B, V] float32.
    index: tokens that each response has already, int32 scalar or [B].
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
  """Logits of the distribution that is sampled from; what is filtered out is -inf.

  Nucleus filtering follows Holtzman et al. 2020 (https://arxiv.org/abs/1904.09751): a token
  stays while the probability before it, in falling order, is below `top_p`, so the likeliest
  always stays. Ties at a threshold all stay.

  Args:
    logits: [B, V] float32.
    temperature: positive.
    top_k: 0 keeps all.
    top_p: 1 keeps all.

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
  """Draws one token for each response.

  Args:
    keys: [B] random keys, one a response, so that a draw does not depend on its neighbours.
    logits: [B, V] float32, unfiltered.
    sampling: Sampling.
    index: tokens that each response has already, int32 scalar or [B].

  Returns:
    tokens [B] int32 and logprobs [B] float32 under the filtered distribution (0 if greedy).
  """
  logits = mask_end_tokens(logits, index, sampling)
  if sampling.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, jnp.zeros(tokens.shape, jnp.float32)
  logits = filter_logits(
    logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
  )
  return _inverse_cdf_sample(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys), logits)


def _inverse_cdf_sample(uniform, logits):
  """Tokens drawn by inverting the cumulative distribution, first to a block of tokens, then within it.

  Two uniforms a row, where the Gumbel trick needs one for each token, which costs more than
  unembedding does. Sums within blocks also keep float32 exact enough for large vocabularies.

  Args:
    uniform: [B, 2] float32 in [0, 1).
    logits: [B, V] float32; -inf is never drawn.

  Returns:
    tokens [B] int32 and logprobs [B] float32.
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
  """The first index [B] whose cumulative weight exceeds `uniform` of the sum, and the sum [B].

  An index of weight 0 is never the first. Sums are rounded: the cumulative weight of the last index
  of positive weight may be an ulp short of the sum over all, and exceed nothing where
  `uniform` is next to 1. That index is taken then.
  """
  index = jnp.arange(weights.shape[-1])[None]
  total, positive = jnp.cumsum(weights, axis=-1), weights > 0
  last = jnp.max(jnp.where(positive, index, 0), axis=-1, keepdims=True)
  above = (total > uniform[:, None] * total[:, -1:]) & positive
  return jnp.argmax(above | (index == last), axis=-1).astype(jnp.int32), total[:, -1]

"""From logits to tokens: temperature, top-k, top-p, and the log-probability of the choice.

Letters: B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How responses are drawn. Frozen, so that it can be a static argument of a jitted function.

  Attributes:
    max_new_tokens: R, response slots.
    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the smallest set of likeliest tokens whose probability reaches p; 1 keeps all.
    eos_id: the token that ends a response; None for none.
    pad_id: what fills the slots after the end.
    ignore_eos: go on to `max_new_tokens` whatever is sampled.
  """
  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  eos_id: int | None = None
  pad_id: int = 0
  ignore_eos: bool = False


def filter_logits(logits, *, temperature, top_k, top_p):
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
    falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probs = jax.nn.softmax(falling, axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < top_p
    smallest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  return logits


def sample(keys, logits, sampling):
  """One token a row.

  Args:
    keys: [B] random keys, one a row, so that a row's draw does not depend on its neighbours.
    logits: [B, V] float32, unfiltered.
    sampling: Sampling.

  Returns:
    tokens [B] int32 and logprobs [B] float32 under the filtered distribution (0 if greedy).
  """
  if sampling.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, jnp.zeros(tokens.shape, jnp.float32)
  logits = filter_logits(logits, temperature=sampling.temperature,
                         top_k=sampling.top_k, top_p=sampling.top_p)
  tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
  picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens, picked - jax.nn.logsumexp(logits, axis=-1)

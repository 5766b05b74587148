"""A model that samples only among the tokens that a masking policy finds likely (NLPO).

The masking policy is an earlier copy of the policy. It reads the same tokens, beside the policy,
with a cache of its own. The loops of `decode` and `engine` see one model, whose states, caches and
parameters are pairs, and whose logits of masked tokens are -inf.

Letters: B batch, P prompt length, R response length, V vocabulary, M = ceil(V / 8) bytes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from rlhf_jax import sharding
from rlhf_jax.models import base
from rlhf_jax.rollout import cache as cache_lib
from rlhf_jax.rollout import guided
from rlhf_jax.rollout import sampling


def allowed_tokens(
  logits: Float[ArrayLike, 'B V'], *, top_p: float, min_tokens: int, always: tuple[int, ...]
) -> Bool[Array, 'B V']:
  """Returns the tokens that a masking policy allows.

  A token is allowed if the total probability of more likely tokens is below `top_p`, so the token
  that crosses `top_p` is; or if it is among the `min_tokens` most likely; or if it is in `always`.
  See Ramamurthy et al. 2022, §4 (https://arxiv.org/abs/2210.01241), and RL4LMs,
  `MaskLogitsProcessorCasualLM`. Its class for encoder-decoders keeps `min_tokens` + 1. RL4LMs
  breaks ties by the order of its sort; here all tokens that tie at a threshold are allowed.

  Args:
    logits: [B, V] float32, of the masking policy, at temperature 1.
    top_p: probability mass; 1 allows all tokens.
    min_tokens: number of tokens that are always allowed, the most likely ones.
    always: ids of other tokens that are always allowed, such as special tokens.
  """
  vocab = logits.shape[-1]
  allowed = sampling.filter_logits(logits, temperature=1.0, top_k=0, top_p=top_p) > -jnp.inf
  if min_tokens:
    kth = jax.lax.top_k(logits, min(min_tokens, vocab))[0][:, -1:]
    allowed |= logits >= kth
  return allowed | sampling.is_in(jnp.arange(vocab), always)[None]


@dataclasses.dataclass(frozen=True)
class MaskedModel:
  """The policy and its masking policy as one model; static under jit.

  Has the part of base.LanguageModel that samplers use. Parameters are {'policy': ..., 'masking':
  ...}, states are pairs, and the caches are joined name by name.

  Attributes:
    model: Model of both policies.
    top_p, min_tokens, always: see `allowed_tokens`.
  """

  model: base.LanguageModel
  top_p: float
  min_tokens: int
  always: tuple[int, ...]

  @property
  def config(self) -> Any:
    """The family's Config."""
    return self.model.config

  @property
  def mask_bytes(self) -> int:
    """M, bytes of the mask of a position."""
    return -(-self.model.vocab_size // 8)

  @property
  def encoder_decoder(self) -> bool:
    """Whether an encoder reads the prompt."""
    return self.model.encoder_decoder

  @property
  def rules(self) -> Any:
    """Sharding rules of the parameters."""
    return self.model.rules

  def with_max_length(self, length: int) -> 'MaskedModel':
    """See base.LanguageModel."""
    return dataclasses.replace(self, model=self.model.with_max_length(length))

  def unstack(self, params: PyTree) -> PyTree:
    """See base.LanguageModel."""
    return {name: self.model.unstack(tree) for name, tree in params.items()}

  def prefill(self, params, tokens, mask, response_length):
    """See base.LanguageModel."""
    read = lambda name: self.model.prefill(params[name], tokens, mask, response_length)
    return cache_lib.join_outputs(read('policy'), read('masking'))

  def step(self, params, token, active, cache):
    """See base.LanguageModel."""
    read = lambda name, cache: self.model.step(params[name], token, active, cache)
    policy_cache, masking_cache = cache_lib.split(cache)
    return cache_lib.join_outputs(read('policy', policy_cache), read('masking', masking_cache))

  def unembed(self, params, hidden):
    """Computes logits [B, V] of the policy, -inf for tokens that are not allowed."""
    policy_hidden, masking_hidden = hidden
    # Not sharded over 'tensor', for the reason given in `Scheduler.sample_token` of `engine`.
    masking_logits = sharding.split_rows(self.model.unembed(params['masking'], masking_hidden))
    allowed = allowed_tokens(
      masking_logits,
      top_p=self.top_p,
      min_tokens=self.min_tokens,
      always=self.always,
    )
    return jnp.where(allowed, self.model.unembed(params['policy'], policy_hidden), -jnp.inf)


# What the decode loops can run.
Decodable = base.LanguageModel | MaskedModel | guided.GuidedModel

"""A model that samples in favour of tokens with high Q (ILQL).

The policy's logits are perturbed by two Q functions, heads on the policy's own hidden states or on
those of a second backbone, which reads the same tokens with a cache of its own. The loops of
`decode` and `engine` see one model.

Letters: B batch, V vocabulary, D width.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rlhf_jax.models import base
from rlhf_jax.models import heads
from rlhf_jax.rollout import cache as cache_lib


def guided_logits(
  logits: Float[Array, 'B V'], q1: Float[Array, 'B V'], q2: Float[Array, 'B V']
) -> Float[Array, 'B V']:
  """Adds beta * min(Q1, Q2) to logits, up to a constant per position.

  Snell et al. 2022, §4.3 (https://arxiv.org/abs/2206.11871), samples from log pi + beta (Q - V). V
  is the same for all tokens, so it changes neither the probabilities nor their order and is not
  needed. The largest Q is subtracted instead: next to a large constant, float32 would round away
  small differences.

  XLA may compute a sum of a product twice, once with a fused multiply-add. The top-k filter would
  then compare numbers that differ in the last bit, and drop the k-th token. So nothing is
  multiplied here.

  Args:
    logits: [B, V] float32 of the policy.
    q1, q2: [B, V] float32, beta times the value of each next token.
  """
  q = jnp.minimum(q1, q2)
  return logits + (q - jnp.max(q, axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class GuidedModel:
  """A policy and its Q functions as one model; static under jit.

  Has the part of base.LanguageModel that samplers use. Parameters are {'policy': ..., 'q1': ...,
  'q2': ...} and, if the Q functions have a backbone of their own, 'backbone'. Then states are
  pairs, and the caches are joined name by name.

  Attributes:
    model: Model of the policy, and of the backbone.
    beta: 0 or more. 0 is the policy; a large number chooses the token of the highest Q.
    separate: Whether the Q functions have a backbone of their own.
  """

  model: base.LanguageModel
  beta: float
  separate: bool = False

  @property
  def config(self) -> Any:
    """The family's Config."""
    return self.model.config

  @property
  def encoder_decoder(self) -> bool:
    """Whether an encoder reads the prompt."""
    return self.model.encoder_decoder

  @property
  def rules(self) -> Any:
    """Sharding rules of the parameters."""
    return self.model.rules

  def with_max_length(self, length: int) -> 'GuidedModel':
    """See base.LanguageModel."""
    return dataclasses.replace(self, model=self.model.with_max_length(length))

  def unstack(self, params: PyTree) -> PyTree:
    """See base.LanguageModel; also multiplies the Q heads by beta, with the bias as a last row."""

    def scaled(head):
      down = head['down']
      kernel = jnp.concatenate([down['kernel'], down['bias'][None]])
      return head | {'down': {'kernel': self.beta * kernel}}

    return {
      name: scaled(tree) if name in ('q1', 'q2') else self.model.unstack(tree)
      for name, tree in params.items()
    }

  def prefill(self, params, tokens, mask, response_length):
    """See base.LanguageModel."""
    read = lambda name: self.model.prefill(params[name], tokens, mask, response_length)
    if not self.separate:
      return read('policy')
    return cache_lib.join_outputs(read('policy'), read('backbone'))

  def step(self, params, token, active, cache):
    """See base.LanguageModel."""
    read = lambda name, cache: self.model.step(params[name], token, active, cache)
    if not self.separate:
      return read('policy', cache)
    policy_cache, q_cache = cache_lib.split(cache)
    return cache_lib.join_outputs(read('policy', policy_cache), read('backbone', q_cache))

  def unembed(self, params, hidden):
    """Computes the guided logits [B, V], with parameters from `unstack`."""
    policy_hidden, q_hidden = hidden if self.separate else (hidden, hidden)

    def q(head):
      features = heads.mlp_features(head, q_hidden)
      features = jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)
      kernel = head['down']['kernel'].astype(features.dtype)
      return jnp.matmul(features, kernel, preferred_element_type=jnp.float32)

    logits = self.model.unembed(params['policy'], policy_hidden)
    return guided_logits(logits, q(params['q1']), q(params['q2']))

"""The forward passes over finished responses: log-probabilities, entropies and values.

Policy, critic and reference read the same sequences. Every algorithm calls these functions, before
its update and in its loss.

Letters: B batch, P prompt length, R response length, T = P + R, D width.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from rlhf_jax import logprobs as logprobs_lib
from rlhf_jax import types
from rlhf_jax.models import base
from rlhf_jax.models import heads
from rlhf_jax.models import trainable


class Models(NamedTuple):
  """The models of an algorithm, without parameters; static under jit.

  Attributes:
    policy: Model of the policy.
    critic: Model of a critic with a backbone; None if the value head reads the policy's hidden
      states, or if there is no critic.
    critic_shared: whether the critic is adapters on the frozen weights of the policy.
  """

  policy: base.LanguageModel
  critic: base.LanguageModel | None = None
  critic_shared: bool = False

  def with_max_length(self, length: int) -> 'Models':
    """Returns the models for sequences of up to `length` tokens, even in truncated batches."""
    critic = self.critic and self.critic.with_max_length(length)
    return self._replace(policy=self.policy.with_max_length(length), critic=critic)


class Outputs(NamedTuple):
  """Outputs of policy and critic on responses, [B, R] float32.

  Attributes:
    logprobs: log-probabilities of the tokens, among those that could be sampled if the batch has
      masks.
    entropy: entropy of the same distribution.
    values: values of the critic; None without a critic.
    raw_logprobs: log-probabilities among all tokens; None without masks.
  """

  logprobs: Float[Array, 'B R']
  entropy: Float[Array, 'B R']
  values: Float[Array, 'B R'] | None = None
  raw_logprobs: Float[Array, 'B R'] | None = None


class Fixed(NamedTuple):
  """Quantities that do not change during an update.

  Attributes:
    frozen_states: [B, T, D] outputs of the frozen lower layers; None if there are none.
    ref_logprobs: [B, R] float32, log-probabilities by the reference; None without a reference.
    full_kl: [B, R] float32, KL over the whole vocabulary; None unless Forward.full_kl.
  """

  frozen_states: Float[Array, 'B T D'] | None
  ref_logprobs: Float[Array, 'B R'] | None
  full_kl: Float[Array, 'B R'] | None


@dataclasses.dataclass(frozen=True)
class Forward:
  """The forward passes of an update, as functions of the trained parameters and a batch.

  Attributes:
    models: Models.
    frozen: {'policy': frozen parameters of the policy, 'reference': reference parameters that are
      not already among the policy's frozen parameters, including its adapters}. Without a reference
      there is no 'reference'.
    temperature: temperature of the sampler, which divides the logits.
    full_kl: whether to compute the KL over the whole vocabulary.
  """

  models: Models
  frozen: dict[str, PyTree]
  temperature: float
  full_kl: bool = False

  def outputs(
    self,
    params: dict[str, PyTree],
    batch: types.Rollout | types.Experience,
    frozen_states: Float[Array, 'B T D'] | None = None,
  ) -> Outputs:
    """Runs policy and critic on finished responses.

    Args:
      params: trained parameters, {'policy': ..., 'critic': {'head': ..., 'backbone': ...}}; the
        critic and its backbone are optional.
      batch: Rollout or Experience.
      frozen_states: [B, T, D], see Fixed.

    Returns:
      Outputs.
    """
    length, policy = batch.response_mask.shape[1], self._policy(params)
    states = self.models.policy.response_states(
      policy, batch.tokens, batch.mask, length, frozen_states
    )
    unembed = functools.partial(self.models.policy.unembed, policy)
    targets = batch.tokens[:, -length:]
    if batch.allowed is None:
      logprobs, entropy = logprobs_lib.token_logprobs(
        unembed, states, targets, temperature=self.temperature
      )
      outputs = Outputs(logprobs, entropy)
    else:
      logprobs, entropy, raw = logprobs_lib.masked_token_logprobs(
        unembed, states, targets, batch.allowed, temperature=self.temperature
      )
      outputs = Outputs(logprobs, entropy, raw_logprobs=raw)
    if 'critic' not in params:
      return outputs
    if self.models.critic is not None:
      frozen_policy, frozen_states = (
        (self.frozen['policy'], frozen_states) if self.models.critic_shared else ({}, None)
      )
      critic = trainable.merge(frozen_policy, params['critic']['backbone'])
      states = self.models.critic.response_states(
        critic, batch.tokens, batch.mask, length, frozen_states
      )
    return outputs._replace(values=heads.apply_scalar(params['critic']['head'], states))

  def fixed(self, params: dict[str, PyTree], batch: types.Rollout) -> Fixed:
    """Computes what does not change during the update.

    Args:
      params: trained parameters before the update.
      batch: Rollout.
    """
    frozen_states = self._frozen_states(params, batch)
    if 'reference' not in self.frozen:
      return Fixed(frozen_states, None, None)
    length = batch.response_mask.shape[1]
    model = self.models.policy
    if not trainable.has_adapters(self.frozen['reference']):
      model = dataclasses.replace(model, lora=None)
    reference = trainable.merge(self.frozen['policy'], self.frozen['reference'])
    states = model.response_states(reference, batch.tokens, batch.mask, length, frozen_states)
    unembed = functools.partial(model.unembed, reference)
    ref_logprobs, _ = logprobs_lib.token_logprobs(
      unembed, states, batch.tokens[:, -length:], temperature=self.temperature
    )
    if not self.full_kl:
      return Fixed(frozen_states, ref_logprobs, None)
    policy = self._policy(params)
    policy_states = self.models.policy.response_states(
      policy, batch.tokens, batch.mask, length, frozen_states
    )
    return Fixed(
      frozen_states,
      ref_logprobs,
      logprobs_lib.full_kl(
        functools.partial(self.models.policy.unembed, policy),
        policy_states,
        unembed,
        states,
        temperature=self.temperature,
      ),
    )

  def policy_kl(
    self,
    old_params: dict[str, PyTree],
    params: dict[str, PyTree],
    batch: types.Rollout | types.Experience,
    frozen_states: Float[Array, 'B T D'] | None = None,
  ) -> Float[Array, 'B R']:
    """Computes KL(old policy || policy) over the whole vocabulary, in nats per response token.

    Args:
      old_params, params: trained parameters of the two policies, {'policy': ...}.
      batch, frozen_states: see `outputs`.
    """
    model, both = self.models.policy, (self._policy(old_params), self._policy(params))
    length = batch.response_mask.shape[1]
    states = [
      model.response_states(policy, batch.tokens, batch.mask, length, frozen_states)
      for policy in both
    ]
    old_unembed, unembed = (functools.partial(model.unembed, policy) for policy in both)
    return logprobs_lib.full_kl(
      old_unembed, states[0], unembed, states[1], temperature=self.temperature
    )

  def fisher_product(
    self,
    params: dict[str, PyTree],
    vector: dict[str, PyTree],
    batch: types.Rollout | types.Experience,
    weights: Float[Array, 'B R'],
    frozen_states: Float[Array, 'B T D'] | None = None,
  ) -> dict[str, PyTree]:
    """Multiplies a vector by the weighted sum of the Fisher matrices of response tokens.

    The Fisher matrix of a token is the Hessian of `policy_kl` by `params` at the old parameters. In
    terms of the Jacobian J of the logits it is J^T (diag(p) - p p^T) J, and is multiplied from
    right to left. Attention must support forward-mode differentiation, so it is the plain one.

    Args:
      params: trained parameters of the policy, {'policy': ...}.
      vector: tree like `params`.
      batch, frozen_states: see `outputs`.
      weights: [B, R] weights of the tokens.

    Returns:
      Tree like `params`.
    """
    model, length = self.models.policy.with_plain_attention(), batch.response_mask.shape[1]

    def states(params):
      return model.response_states(
        self._policy(params), batch.tokens, batch.mask, length, frozen_states
      )

    def dot(params, hidden, hidden_tangent):
      unembed = lambda params, hidden: model.unembed(self._policy(params), hidden)
      per_token = logprobs_lib.fisher_dot(
        unembed, params, hidden, vector, hidden_tangent, temperature=self.temperature
      )
      return jnp.sum(weights * per_token)

    vector = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
    hidden, derivative = jax.linearize(states, params)
    unembed_part, gradient = jax.grad(dot, argnums=(0, 1))(params, hidden, derivative(vector))
    (backbone_part,) = jax.linear_transpose(derivative, params)(gradient)
    return jax.tree.map(jnp.add, unembed_part, backbone_part)

  def _policy(self, params):
    return trainable.merge(self.frozen['policy'], params['policy'])

  def _frozen_states(self, params, batch):
    """Returns the outputs [B, T, D] of the frozen lower layers; None if there are none."""
    if 'top' not in params['policy']:
      return None
    return jax.lax.stop_gradient(
      self.models.policy.run_frozen_layers(
        self._policy(params), batch.tokens, types.positions_from_mask(batch.mask), batch.mask
      )
    )


@functools.partial(jax.jit, static_argnames=('model',))
def response_logprobs(
  params: PyTree,
  rollout: types.Rollout,
  temperature: float | Float[ArrayLike, ''],
  *,
  model: base.LanguageModel,
) -> Float[Array, ' B']:
  """Computes the log-probability of each response, summed over its tokens, [B] float32.

  Args:
    params: All parameters of `model`.
    rollout: Rollout.
    temperature: Positive number that divides the logits.
    model: Model.
  """
  response_length = rollout.response_mask.shape[1]
  states = model.response_states(params, rollout.tokens, rollout.mask, response_length)
  values, _ = logprobs_lib.token_logprobs(
    functools.partial(model.unembed, params),
    states,
    rollout.tokens[:, -response_length:],
    temperature=temperature,
  )
  return jnp.sum(jnp.where(rollout.response_mask, values, 0.0), axis=1)

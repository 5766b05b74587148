"""What a PPO update learns from: log-probabilities, values, rewards and advantages of a scored rollout.

Letters: B batch, P prompt length, R response length, T = P + R, D width.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import logprobs as logprobs_lib
from rlhf_jax import types
from rlhf_jax.models import heads
from rlhf_jax.models import trainable


class Outputs(NamedTuple):
  """What policy and critic make of a rollout: each [B, R] float32."""
  logprobs: Any
  entropy: Any
  values: Any


class Fixed(NamedTuple):
  """What stays the same over the epochs of an update.

  Attributes:
    trunk: [B, T, D] states below the trained layers, where only the top ones are trained; else None.
    ref_logprobs: [B, R] float32 of the reference.
    full_kl: [B, R] float32, KL over the whole vocabulary, where the settings ask for it; else None.
  """
  trunk: Any
  ref_logprobs: Any
  full_kl: Any


@struct.dataclass
class Experience:
  """A scored rollout, ready for the update. Slots outside the masks hold zeros.

  Attributes:
    tokens: [B, T] int32.
    mask: [B, T] bool.
    response_mask: [B, R] bool, slots with a policy loss.
    step_mask: [B, R] bool, slots with a value loss: those and the one the score is paid on.
    logprobs: [B, R] float32 of the behaviour policy.
    ref_logprobs: [B, R] float32 of the reference.
    values: [B, R] float32 of the critic before the update.
    advantages: [B, R] float32.
    returns: [B, R] float32.
    trunk: [B, T, D] states below the trained layers, the same in all epochs, where only the top
      ones are trained; else None.
  """
  tokens: Any
  mask: Any
  response_mask: Any
  step_mask: Any
  logprobs: Any
  ref_logprobs: Any
  values: Any
  advantages: Any
  returns: Any
  trunk: Any


def evaluate(params, frozen, rows, trunk, *, models, temperature):
  """Policy and critic on a batch of finished responses.

  Args:
    params: {'policy': ..., 'critic': {'head': ..., 'backbone': ... if there is one}}.
    frozen: see ppo.train_step.
    rows: Rollout or Experience.
    trunk: [B, T, D], see Experience.
    models: ppo.Models.
    temperature: what logits are divided by.

  Returns:
    Outputs.
  """
  slots = rows.response_mask.shape[1]
  policy = trainable.join(frozen['shared'], params['policy'])
  states = models.policy.response_states(policy, rows.tokens, rows.mask, slots, trunk)
  logprobs, entropy = logprobs_lib.token_logprobs(
      functools.partial(models.policy.unembed, policy), states, rows.tokens[:, -slots:],
      temperature=temperature)
  if models.critic is not None:
    shared, trunk = (frozen['shared'], trunk) if models.critic_shared else ({}, None)
    critic = trainable.join(shared, params['critic']['backbone'])
    states = models.critic.response_states(critic, rows.tokens, rows.mask, slots, trunk)
  return Outputs(logprobs, entropy, heads.apply_scalar(params['critic']['head'], states))


def _reference(params, frozen, rows, trunk, *, models, settings):
  """Reference log-probabilities [B, R], and the full KL where that is asked for."""
  slots = rows.response_mask.shape[1]
  model = dataclasses.replace(models.policy, lora=None)
  reference = trainable.join(frozen['shared'], frozen['reference'])
  states = model.response_states(reference, rows.tokens, rows.mask, slots, trunk)
  unembed = functools.partial(model.unembed, reference)
  ref_logprobs, _ = logprobs_lib.token_logprobs(
      unembed, states, rows.tokens[:, -slots:], temperature=settings.temperature)
  if settings.kl_estimator != 'full':
    return ref_logprobs, None
  policy = trainable.join(frozen['shared'], params['policy'])
  policy_states = models.policy.response_states(policy, rows.tokens, rows.mask, slots, trunk)
  return ref_logprobs, logprobs_lib.full_kl(
      functools.partial(models.policy.unembed, policy), policy_states, unembed, states,
      temperature=settings.temperature)


def shared_trunk(params, frozen, rows, *, models):
  """States [B, T, D] below the trained layers; None where all layers are trained or adapted."""
  if 'top' not in params['policy']:
    return None
  policy = trainable.join(frozen['shared'], params['policy'])
  return jax.lax.stop_gradient(models.policy.trunk(
      policy, rows.tokens, types.positions_from_mask(rows.mask), rows.mask))


def fixed_passes(params, frozen, rows, *, models, settings):
  """Fixed of a rollout.

  Args:
    params: of policy and critic before the update.
    frozen: see ppo.train_step.
    rows: Rollout.
    models: ppo.Models.
    settings: Settings.
  """
  trunk = shared_trunk(params, frozen, rows, models=models)
  return Fixed(trunk, *_reference(params, frozen, rows, trunk, models=models, settings=settings))


def make_experience(state, rollout, scores, fixed, outputs, *, settings):
  """Turns a scored rollout into advantages and returns.

  Args:
    state: TrainState before the update.
    rollout: Rollout.
    scores: [B] float32, or [B, R] for rewards per token.
    fixed: Fixed.
    outputs: Outputs of policy and critic before the update.
    settings: Settings.

  Returns:
    Experience, the 'reward_moments' [3] and 'kl_coef' of the next TrainState, and the iteration's metrics.
  """
  logprobs, entropy, values = outputs
  response_mask = rollout.response_mask
  step_mask = (response_mask if scores.ndim == 2 else
               adv.step_mask(response_mask, settings.score_position))
  gap = adv.masked_mean(jnp.abs(rollout.logprobs - logprobs), response_mask)
  if settings.behaviour == 'sampler':
    logprobs = rollout.logprobs
  logprobs = jnp.where(response_mask, logprobs, 0.0)
  ref_logprobs = jnp.where(response_mask, fixed.ref_logprobs, 0.0)
  values = jnp.where(step_mask, values, 0.0)
  kl = fixed.full_kl if settings.kl_estimator == 'full' else adv.kl_estimate(
      logprobs, ref_logprobs, settings.kl_estimator)

  paid, moments = final_scores(scores, rollout, state.reward_moments, settings)
  kl_coef = state.kl_coef if settings.kl_in == 'reward' else 0.0
  rewards = adv.token_rewards(
      paid, kl, kl_coef, response_mask, position=settings.score_position)
  if settings.whiten_rewards:
    rewards = adv.whiten(rewards, step_mask, shift_mean=False,
                         unbiased=settings.whiten_unbiased)
  advantages, returns = adv.gae(rewards, values, gamma=settings.gamma, lam=settings.lam)
  if settings.whiten_advantages == 'batch':
    advantages = adv.whiten(advantages, response_mask, unbiased=settings.whiten_unbiased)
  experience = Experience(
      tokens=rollout.tokens, mask=rollout.mask, response_mask=response_mask,
      step_mask=step_mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values,
      advantages=advantages, returns=returns, trunk=fixed.trunk)
  metrics = describe(experience, rollout, paid, entropy, state.kl_coef, settings)
  next_coef = adv.next_kl_coef(
      state.kl_coef, logprobs - ref_logprobs, response_mask, controller=settings.kl_controller,
      target=settings.kl_target, horizon=settings.kl_horizon)
  return experience, {'reward_moments': moments, 'kl_coef': next_coef}, metrics | {'policy/sampler_gap': gap}


def has_eos(rollout, eos_id):
  """Which responses [B] ended by themselves; all of them where there is no EOS."""
  response = rollout.tokens[:, -rollout.response_mask.shape[1]:]
  if eos_id is None:
    return jnp.ones(response.shape[0], bool)
  return jnp.any((response == eos_id) & rollout.response_mask, axis=1)


def final_scores(scores, rollout, moments, settings):
  """Scores as they are paid: scaled, clipped, and after the missing-EOS rule.

  Returns:
    Scores of the same shape and the new running moments [3].
  """
  if settings.scale_scores:
    totals = scores if scores.ndim == 1 else jnp.sum(
        jnp.where(rollout.response_mask, scores, 0.0), axis=1)
    moments = adv.update_moments(moments, totals)
    scores = scores / adv.running_std(moments)
  if settings.clip_scores:
    scores = jnp.clip(scores, -settings.clip_scores, settings.clip_scores)
  if scores.ndim == 1:
    scores = adv.apply_missing_eos(
        scores, has_eos(rollout, settings.eos_id),
        mode=settings.missing_eos, value=settings.missing_eos_value)
  return scores, moments


def describe(experience, rollout, scores, entropy, kl_coef, settings):
  """Metrics of a rollout: sums per response averaged over responses, masks applied."""
  mask, steps = experience.response_mask, experience.step_mask
  batch = mask.shape[0]
  per_response = lambda x: adv.masked_sum(x, mask) / batch
  kl = per_response(experience.logprobs - experience.ref_logprobs)
  score = jnp.mean(scores) if scores.ndim == 1 else per_response(scores)
  error = adv.masked_var(experience.returns - experience.values, steps)
  variance = adv.masked_var(experience.returns, steps)
  return {
      'objective/kl': kl,
      'objective/kl_per_token': adv.masked_mean(
          experience.logprobs - experience.ref_logprobs, mask),
      'objective/kl_coef': kl_coef,
      'objective/entropy': per_response(entropy),
      'objective/scores': score,
      'objective/rlhf_reward': score - kl_coef * kl,
      'value/explained_variance': 1.0 - error / jnp.maximum(variance, 1e-8),
      'returns/mean': adv.masked_mean(experience.returns, steps),
      'returns/var': variance,
      'response/length': jnp.sum(mask) / batch,
      'response/eos_rate': jnp.mean(has_eos(rollout, settings.eos_id)),
  }

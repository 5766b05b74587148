"""REINFORCE with the batch's mean score as the baseline (Williams 1992), a user's own algorithm.

Put this file beside your configs, and set config.algorithm = 'my_reinforce'.

Letters: B batch, R response length.
"""

import functools

import jax.numpy as jnp

from rlhf_jax import advantages
from rlhf_jax import config as config_lib
from rlhf_jax import experience
from rlhf_jax import update
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config

validate = on_policy_config.validate


def config(preset=''):
  """The keys that on-policy algorithms share; one pass over each rollout, no presets."""
  defaults = on_policy_config.config('my_reinforce', on_policy_config.Settings)
  defaults.rl.epochs = 1
  return config_lib.apply_preset(defaults, {}, preset)


def prepare(outputs, fixed, *, state, rollout, scores, settings):
  """Scores [B] to advantages [B, R]: score - kl_coef KL, minus its mean over the batch."""
  mask, extra = rollout.response_mask, state.extra
  batch = experience.make_experience(outputs, fixed, rollout, mask, behaviour=settings.behaviour)
  postprocessed, moments = settings.rules.apply(scores, rollout, extra['reward_moments'])
  metrics = experience.rollout_metrics(
    batch, rollout, scores, postprocessed, outputs, extra['kl_coef'], settings.rules
  )
  kl = jnp.sum(batch.logprobs - batch.ref_logprobs, axis=1)
  returns = postprocessed - extra['kl_coef'] * kl
  batch = batch.replace(advantages=jnp.where(mask, (returns - jnp.mean(returns))[:, None], 0.0))
  return batch, extra | {'reward_moments': moments}, metrics


def loss(outputs, batch, counts):
  """-A log p, summed over tokens and averaged over sequences."""
  per_token = -batch.advantages * outputs.logprobs
  total = advantages.masked_sum(per_token, batch.response_mask) / counts.sequences
  return total, {'policy/loss': total}


def objective(state, rollout, scores, *, settings):
  """What is this algorithm's own: how scores become advantages, and the loss."""
  ready = functools.partial(prepare, state=state, rollout=rollout, scores=scores, settings=settings)
  return update.Objective(ready, rollout.response_mask, loss)


def create(config, mesh):
  """The learner that the loop runs."""
  return on_policy.create(
    config, mesh, on_policy_config.Settings, functools.partial(on_policy.train_step, objective)
  )

"""REINFORCE leave-one-out: the other responses to a prompt are the baseline; no critic.

See Ahmadian et al. 2024 (https://arxiv.org/abs/2402.14740). A whole response is one action: the KL
of the response is subtracted from its score, and the importance ratio is that of the probabilities
of whole responses. With one update per rollout the ratio is 1, and the gradient is that of
REINFORCE.

The defaults are those of TRL 1.12's RLOOTrainer, which clips the ratio; the paper has no clip.
Difference from TRL: a response whose score is not a number is left out of the mean loss, not only
without an advantage.

Letters: B batch, n responses per prompt, R response length.
"""

import dataclasses
import functools

import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import experience as experience_lib
from rlhf_jax import losses
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(on_policy_config.Settings):
  """Static settings of an RLOO train step. The first only changes a default of the base class.

  Attributes:
    normalize_advantages: scale the advantages to mean 0 and standard deviation 1 over the responses
      of the batch.
  """

  epochs: int = 1
  normalize_advantages: bool = False


def config(preset=''):
  """Returns the default config of RLOO, which has no presets; see ppo.config."""
  defaults = on_policy_config.config('rloo', Settings)
  defaults.sampling.samples, defaults.optim.learning_rate = 2, 1e-6
  return config_lib.apply_preset(defaults, {}, preset)


def validate(config, device_count):
  """Validates a config of RLOO; see ppo.validate."""
  on_policy_config.validate(config, device_count)
  on_policy_config.validate_without_critic(config, groups=True)


def compute_advantages(scores, valid, *, settings):
  """Computes the advantages [B] of responses.

  Args:
    scores: [B] float32, with the KL subtracted.
    valid: [B] bool, responses that count.
    settings: Settings.
  """
  advantages = adv.leave_one_out_advantages(scores, settings.samples, kept=valid)
  if not settings.normalize_advantages:
    return advantages
  deviation = jnp.sqrt(adv.masked_var(advantages, valid, unbiased=True))
  centred = advantages - adv.masked_mean(advantages, valid)
  return jnp.where(valid, centred / (deviation + 1e-4), 0.0)


def prepare(outputs, fixed, *, state, rollout, scores, settings):
  """Computes advantages from a scored rollout; see ppo.prepare."""
  mask, extra = rollout.response_mask, state.extra
  experience = experience_lib.make_experience(
    outputs, fixed, rollout, mask, behaviour=settings.behaviour
  )
  scores = experience_lib.totals(scores, mask)
  postprocessed, moments = settings.rules.apply(scores, rollout, extra['reward_moments'])
  metrics = experience_lib.rollout_metrics(
    experience, rollout, scores, postprocessed, outputs, extra['kl_coef'], settings.rules
  )
  if settings.kl_in == 'reward' and settings.kl_coef:
    kl = on_policy.kl_penalty(experience, fixed, settings.kl_estimator)
    postprocessed -= settings.kl_coef * jnp.sum(kl, axis=1, where=mask)
  advantages = compute_advantages(
    postprocessed, experience_lib.not_skipped(scores, mask), settings=settings
  )
  experience = experience.replace(advantages=jnp.where(mask, advantages[:, None], 0.0))
  return experience, extra | {'reward_moments': moments}, metrics


def loss(outputs, experience, counts, *, settings):
  """Computes a microbatch's part of the minibatch's mean clipped loss; see ppo.loss.

  mean over responses of -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
  ratio = exp(sum over tokens of log p - log p_old)
  """
  mask = experience.response_mask
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  log_ratio = losses.log_ratio(logprobs, experience.logprobs, mask, level='sequence_sum')
  policy = losses.clipped_policy_loss(log_ratio, experience.advantages, **settings.clips)
  # Every token has its response's loss, so the mean over the tokens of a response is that loss.
  return on_policy.total_loss(policy, outputs, experience, counts, 'sequence', settings)


objective = on_policy.objective_of(prepare, loss)
train_step = functools.partial(on_policy.train_step, objective)


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'rloo'`; see on_policy.create."""
  return on_policy.create(config, mesh, Settings, train_step, reference=config.rl.kl_coef > 0)

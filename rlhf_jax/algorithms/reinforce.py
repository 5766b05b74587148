"""REINFORCE: -A log p of the sampled responses, with a baseline and without a critic.

Williams 1992 (https://doi.org/10.1007/BF00992696). Presets change it to REINFORCE++ and to
REINFORCE++ with a baseline (Hu et al. 2025, https://arxiv.org/abs/2501.03262).

The advantage of a token is its return minus a baseline; whitening is optional. The return is that
of the token (the discounted rewards from that token on, with the KL penalty of each token) or of
the whole response.

Variances divide by n as in OpenRLHF; verl divides by n - 1. If a mask has holes, such as the tokens
of an environment between two turns, verl restarts the return at a hole, so that earlier turns get
none of the later rewards; we skip the holes.

Letters: B batch, R response length.
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
from rlhf_jax.algorithms import wiring

BASELINES = ('none', 'batch', 'moving', 'group')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(on_policy_config.Settings):
  """Static settings of a REINFORCE train step. The first only changes a default of the base class.

  Attributes:
    returns: 'token': the discounted rewards from each token on; 'sequence': the sum of all rewards
      of the response, for each of its tokens.
    gamma: discount per token of the returns of tokens.
    baseline: what is subtracted from the returns: their mean over the 'batch', its 'moving' average
      over earlier batches, the mean of the 'group' of responses to a prompt, or 'none'.
    baseline_decay: decay of the moving average per train step.
    whiten_advantages: scale the advantages to mean 0 and variance 1 over the tokens of the batch.
    clip: use PPO's clipped loss in place of -A log p.
    normalize: what the loss is averaged over: 'token', 'sequence', or 'constant' (max_new_tokens
      per sequence). See losses.token_weights.
  """

  epochs: int = 1
  returns: str = 'token'
  gamma: float = 1.0
  baseline: str = 'batch'
  baseline_decay: float = 0.9
  whiten_advantages: bool = False
  clip: bool = False
  normalize: str = 'constant'


# Hu et al. 2025, version 9. The values are those of OpenRLHF's examples: 1,024 responses, in one
# pass of 8 minibatches, or of one minibatch if the baseline is the group's.
PRESETS = {
  'reinforce_plus_plus': {
    'optim.learning_rate': 5e-7,
    'rl.minibatches': 8,
    'rl.kl_coef': 1e-4,
    'rl.baseline': 'none',
    'rl.whiten_advantages': True,
    'rl.clip': True,
    'rl.normalize': 'token',
  },
  'reinforce_plus_plus_baseline': {
    'optim.learning_rate': 5e-7,
    'sampling.samples': 8,
    'rl.kl_coef': 1e-5,
    'rl.kl_in': 'loss',
    'rl.kl_estimator': 'k2',
    'rl.returns': 'sequence',
    'rl.baseline': 'group',
    'rl.whiten_advantages': True,
    'rl.clip': True,
    'rl.normalize': 'token',
  },
}


def config(preset=''):
  """Returns the default config of REINFORCE, changed by a preset; see ppo.config."""
  return config_lib.apply_preset(on_policy_config.config('reinforce', Settings), PRESETS, preset)


def validate(config, device_count):
  """Validates a config of REINFORCE; see ppo.validate."""
  on_policy_config.validate(config, device_count)
  on_policy_config.validate_without_critic(config, groups=config.rl.baseline == 'group')
  need, rl = config_lib.need, config.rl
  config_lib.one_of(config, 'rl.returns', ('token', 'sequence'))
  config_lib.one_of(config, 'rl.baseline', BASELINES)
  for key in ('gamma', 'baseline_decay'):
    need(0 <= rl[key] <= 1, f'config.rl.{key}={rl[key]} must be in [0, 1]')
  need(
    rl.clip or rl.epochs == 1,
    f'config.rl.epochs={rl.epochs} needs config.rl.clip=True: -A log p is for responses of the '
    'current policy; set config.rl.epochs to 1, or clip the ratio',
  )
  need(
    rl.baseline != 'group' or rl.returns == 'sequence',
    f"config.rl.baseline='group' needs config.rl.returns='sequence', not {rl.returns!r}: the mean "
    'of a group is one number per response',
  )


def compute_advantages(rewards, mask, moving, *, settings):
  """Computes the advantages of tokens from their rewards.

  Args:
    rewards: [B, R] float32.
    mask: [B, R] bool.
    moving: float32 scalar, average of the mean return over earlier steps; NaN before the first.
    settings: Settings.

  Returns:
    Advantages [B, R], the mean return of the batch (of its tokens, or of its responses if
    settings.returns='sequence'), the baseline [] (with group baselines, their mean), and the
    next moving average.
  """
  used, sequence = jnp.any(mask, axis=1), settings.returns == 'sequence'
  if sequence:
    returns = jnp.sum(jnp.where(mask, rewards, 0.0), axis=1)
  else:
    returns = adv.discounted_returns(rewards, mask, gamma=settings.gamma)
  mean = adv.masked_mean(returns, used if sequence else mask)
  before, decay = jnp.where(jnp.isnan(moving), mean, moving), settings.baseline_decay
  after = jnp.where(jnp.any(used), decay * before + (1 - decay) * mean, moving)
  baseline = {'none': 0.0, 'batch': mean, 'moving': before, 'group': mean}[settings.baseline]
  advantages = returns - baseline
  if settings.baseline == 'group':
    advantages = adv.group_advantages(returns, settings.samples, scale='none', kept=used)
  advantages = jnp.where(mask, advantages[:, None] if sequence else advantages, 0.0)
  if settings.whiten_advantages:
    advantages = adv.whiten(advantages, mask)
  return advantages, mean, baseline, after


def prepare(outputs, fixed, *, state, rollout, scores, settings):
  """Computes advantages from a scored rollout; see ppo.prepare."""
  mask, extra = rollout.response_mask, state.extra
  experience = experience_lib.make_experience(
    outputs, fixed, rollout, mask, behaviour=settings.behaviour
  )
  postprocessed, moments = settings.rules.apply(scores, rollout, extra['reward_moments'])
  metrics = experience_lib.rollout_metrics(
    experience, rollout, scores, postprocessed, outputs, extra['kl_coef'], settings.rules
  )
  kl = jnp.zeros(mask.shape)
  if settings.kl_in == 'reward' and settings.kl_coef:
    kl = on_policy.kl_penalty(experience, fixed, settings.kl_estimator)
  rewards = adv.token_rewards(postprocessed, kl, settings.kl_coef, mask, position='eos')
  advantages, mean, baseline, moving = compute_advantages(
    rewards, mask, extra['baseline'], settings=settings
  )
  metrics |= {
    'returns/mean': mean,
    'returns/baseline': jnp.asarray(baseline, jnp.float32),
  }
  extra = extra | {'reward_moments': moments, 'baseline': moving}
  return experience.replace(advantages=advantages), extra, metrics


def loss(outputs, experience, counts, *, settings):
  """Computes a microbatch's part of the minibatch's mean loss; see ppo.loss."""
  mask = experience.response_mask
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  policy = losses.ppo_policy_loss(
    logprobs, experience.logprobs, experience.advantages, **settings.clips
  )
  if not settings.clip:
    policy = -experience.advantages * logprobs, jnp.zeros_like(logprobs), policy[2]
  return on_policy.total_loss(policy, outputs, experience, counts, settings.normalize, settings)


objective = on_policy.objective_of(prepare, loss)
train_step = functools.partial(on_policy.train_step, objective)


def first_extra(settings):
  """Returns the initial TrainState.extra, with a moving baseline that has no value yet."""
  return wiring.first_extra(settings) | {'baseline': jnp.float32(jnp.nan)}


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'reinforce'`; see on_policy.create."""
  reference = config.rl.kl_coef > 0
  return on_policy.create(
    config, mesh, Settings, train_step, reference=reference, extra=first_extra
  )

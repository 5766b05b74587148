"""Proximal policy optimization of a language model on scores with a KL penalty.

See Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), Stiennon et al. 2020
(https://arxiv.org/abs/2009.01325) and Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155).
Where they differ there is a key of `config.rl`; the presets below set these keys.

One iteration is a rollout, scoring, and a train step: the forward passes of forward.py, `prepare`
(rewards with the KL penalty, GAE), and update.py's epochs and minibatches of `loss`.

Letters: B batch, R response length.
"""

import dataclasses
import functools

import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import experience as experience_lib
from rlhf_jax import losses
from rlhf_jax import update
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(on_policy_config.Settings):
  """Static settings of a PPO train step, in addition to those of all on-policy algorithms.

  Attributes:
    kl_controller: 'fixed', 'adaptive' or 'adaptive_per_token'; see advantages.next_kl_coef.
    kl_target: target KL: nats per response for 'adaptive', per token for 'adaptive_per_token'.
    kl_horizon: responses over which 'adaptive' corrects the coefficient.
    gamma: discount per token.
    lam: lambda of GAE.
    value_clip: largest distance of a value from the old value in the loss; None: no clipping.
    vf_coef: weight of the value loss.
    score_position: position that gets the score: the 'last' of all, the one 'after_end' of the
      response, or its last token, 'eos'; see advantages.score_index.
    whiten_rewards: scale rewards to unit variance; their mean stays.
    whiten_advantages: whiten advantages over the 'batch', over each 'minibatch', or 'none'.
    whiten_unbiased: divide variances by n - 1 instead of n.
  """

  kl_controller: str = 'fixed'
  kl_target: float = 6.0
  kl_horizon: float = 10_000.0
  gamma: float = 1.0
  lam: float = 0.95
  value_clip: float | None = 0.2
  vf_coef: float = 0.1
  score_position: str = 'eos'
  whiten_rewards: bool = False
  whiten_advantages: str = 'batch'
  whiten_unbiased: bool = False


# Values that each preset changes. docs/presets.md has the source line of each value, and our
# deliberate differences. Values that depend on the task keep their defaults: lengths, steps, and
# the batch size of presets with one minibatch.
PRESETS = {
  # lm-human-preferences (https://arxiv.org/abs/1909.08593), train_policy.py and its launch.py.
  'openai2019': {
    'optim.name': 'tf_adam',
    'optim.learning_rate': 1e-5,
    'optim.schedule': 'linear',
    'optim.eps': 1e-5,
    'rl.epochs': 4,
    'rl.minibatches': 1,
    'rl.kl_coef': 0.15,
    'rl.kl_controller': 'adaptive',
    'rl.kl_target': 6.0,
    'sampling.temperature': 0.7,
    'rl.response': 'raw',
    'rl.score_position': 'last',
    'rl.missing_eos': 'replace',
    'rl.missing_eos_value': -1.0,
    'rl.whiten_rewards': True,
    'rl.whiten_advantages': 'minibatch',
    'rl.behaviour': 'sampler',
    'critic.kind': 'trunk',
  },
  # The N implementation details, TL;DR (https://arxiv.org/abs/2403.17031), ppo.py.
  'n_plus': {
    'optim.learning_rate': 3e-6,
    'optim.schedule': 'linear',
    'optim.eps': 1e-5,
    'optim.weight_decay': 0.01,
    'rl.epochs': 4,
    'rl.minibatches': 1,
    'rl.kl_coef': 0.05,
    'sampling.temperature': 0.7,
    'rl.score_position': 'after_end',
    'rl.missing_eos': 'replace',
    'rl.missing_eos_value': -1.0,
    'rl.behaviour': 'sampler',
    'critic.kind': 'separate',
  },
  # TRL 1.12, trl.experimental.ppo.
  'trl': {
    'optim.learning_rate': 3e-6,
    'optim.schedule': 'linear',
    'rl.epochs': 4,
    'rl.minibatches': 1,
    'rl.kl_coef': 0.05,
    'sampling.temperature': 0.7,
    'rl.score_position': 'after_end',
    'rl.missing_eos': 'none',
    'rl.behaviour': 'sampler',
    'rl.whiten_unbiased': True,
    'critic.kind': 'separate',
  },
  # trlX, default_ppo_config.
  'trlx': {
    'optim.learning_rate': 3e-5,
    'optim.schedule': 'constant',
    'optim.b2': 0.95,
    'optim.weight_decay': 1e-6,
    'batch_size': 128,
    'rl.epochs': 4,
    'rl.minibatches': 4,
    'rl.kl_coef': 0.001,
    'sampling.temperature': 1.0,
    'rl.vf_coef': 1.0,
    'rl.score_position': 'eos',
    'rl.missing_eos': 'none',
    'rl.clip_scores': 10.0,
    'rl.whiten_advantages': 'minibatch',
    'rl.whiten_unbiased': True,
    'critic.kind': 'trunk',
  },
  # Ouyang et al. 2022, appendices C.4 and E.9 (https://arxiv.org/abs/2203.02155).
  'instructgpt': {
    'optim.learning_rate': 8.05e-6,
    'critic.learning_rate': 9e-6,
    'optim.schedule': 'constant',
    'optim.warmup_steps': 10,
    'optim.warmup_from': 0.1,
    'optim.b2': 0.95,
    'optim.ema': 0.992,
    'batch_size': 512,
    'rl.epochs': 1,
    'rl.minibatches': 8,
    'rl.kl_coef': 0.02,
    'sampling.temperature': 1.0,
    'rl.score_position': 'eos',
    'rl.missing_eos': 'none',
    'rl.ptx_coef': 27.8,
    'ptx.batch_size': 8 * 512,
    'critic.kind': 'separate',
  },
}


def config(preset=''):
  """Returns the default config of PPO, changed by a preset.

  Args:
    preset: Name in PRESETS, or '' for the defaults.

  Returns:
    ConfigDict.

  Raises:
    UserError: The preset is unknown.
  """
  defaults = on_policy_config.config('ppo', Settings)
  defaults.critic = on_policy_config.critic()
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of PPO; see on_policy_config.validate."""
  on_policy_config.validate(config, device_count)
  on_policy_config.validate_critic(config)
  need, rl = config_lib.need, config.rl
  for key in ('gamma', 'lam'):
    need(0 <= rl[key] <= 1, f'config.rl.{key}={rl[key]} must be in [0, 1]')
  config_lib.optional_positive(rl, 'rl.', ('value_clip',))
  config_lib.optional_positive(config.critic, 'critic.', ('learning_rate',))
  need(rl.vf_coef >= 0, f'config.rl.vf_coef={rl.vf_coef} must be 0 or positive')
  config_lib.one_of(config, 'rl.kl_controller', adv.KL_CONTROLLERS)
  config_lib.one_of(config, 'rl.score_position', adv.SCORE_POSITIONS)
  config_lib.one_of(config, 'rl.whiten_advantages', ('batch', 'minibatch', 'none'))
  need(
    rl.kl_controller == 'fixed' or min(rl.kl_coef, rl.kl_target, rl.kl_horizon) > 0,
    f'with config.rl.kl_controller={rl.kl_controller!r}, config.rl.kl_coef, config.rl.kl_target '
    'and config.rl.kl_horizon must be positive',
  )
  need(
    (rl.score_position == 'last') == (rl.response == 'raw'),
    "config.rl.score_position='last' and config.rl.response='raw' must be set together: the last "
    'position is a token of the response only if sampling goes past the EOS',
  )


def prepare(outputs, fixed, *, state, rollout, scores, step_mask, settings):
  """Computes advantages and returns from a scored rollout.

  Args:
    outputs: forward.Outputs of policy and critic before the update.
    fixed: forward.Fixed.
    state: TrainState before the update.
    rollout: Rollout.
    scores: [B] float32, or [B, R] for rewards per token.
    step_mask: [B, R] bool, positions that count in the return.
    settings: Settings.

  Returns:
    Experience, `extra` of the next TrainState, and metrics.
  """
  kl_coef = state.extra['kl_coef']
  whiten = functools.partial(adv.whiten, unbiased=settings.whiten_unbiased)
  experience = experience_lib.make_experience(
    outputs, fixed, rollout, step_mask, behaviour=settings.behaviour
  )
  kl = on_policy.kl_penalty(experience, fixed, settings.kl_estimator)
  postprocessed, moments = settings.rules.apply(scores, rollout, state.extra['reward_moments'])
  rewards = adv.token_rewards(
    postprocessed,
    kl,
    kl_coef if settings.kl_in == 'reward' else 0.0,
    rollout.response_mask,
    position=settings.score_position,
  )
  if settings.whiten_rewards:
    rewards = whiten(rewards, step_mask, shift_mean=False)
  advantages, returns = adv.gae(rewards, experience.values, gamma=settings.gamma, lam=settings.lam)
  if settings.whiten_advantages == 'batch':
    advantages = whiten(advantages, rollout.response_mask)
  experience = experience.replace(advantages=advantages, returns=returns)
  metrics = experience_lib.rollout_metrics(
    experience, rollout, scores, postprocessed, outputs, kl_coef, settings.rules
  )
  next_coef = adv.next_kl_coef(
    kl_coef,
    experience.unmasked_logprobs - experience.ref_logprobs,
    rollout.response_mask,
    controller=settings.kl_controller,
    target=settings.kl_target,
    horizon=settings.kl_horizon,
  )
  return experience, {'kl_coef': next_coef, 'reward_moments': moments}, metrics


def loss(outputs, experience, counts, *, kl_coef, settings):
  """Computes a microbatch's part of the minibatch's mean clipped losses.

  Args:
    outputs: forward.Outputs of the current policy and critic.
    experience: Experience of the microbatch.
    counts: update.Counts of the minibatch.
    kl_coef: float32 scalar, used if the KL penalty is in the loss.
    settings: Settings.

  Returns:
    Scalar loss, and metrics that are summed over microbatches.
  """
  mask, steps = experience.response_mask, experience.step_mask
  policy, policy_clipped, ratio = losses.ppo_policy_loss(
    jnp.where(mask, outputs.logprobs, 0.0),
    experience.logprobs,
    experience.advantages,
    **settings.clips,
  )
  value, value_clipped = losses.ppo_value_loss(
    outputs.values, experience.values, experience.returns, clip=settings.value_clip
  )
  total, metrics = actor_critic_loss(
    policy, value, outputs, experience, counts, kl_coef=kl_coef, settings=settings
  )
  return total, metrics | {
    'policy/clipfrac': adv.masked_sum(policy_clipped, mask) / counts.tokens,
    'policy/ratio': adv.masked_sum(ratio, mask) / counts.tokens,
    'value/clipfrac': adv.masked_sum(value_clipped, steps) / counts.steps,
  }


def actor_critic_loss(policy, value, outputs, experience, counts, *, kl_coef, settings):
  """Adds the losses of policy and critic, the entropy bonus and a KL penalty in the loss.

  Args:
    policy: [B, R] float32, policy loss of each token.
    value: [B, R] float32, value loss of each position.
    outputs, experience, counts, kl_coef, settings: see `loss`.

  Returns:
    Scalar loss, and the metrics that do not depend on the form of the losses.
  """
  mask, steps = experience.response_mask, experience.step_mask
  mean = lambda x: adv.masked_sum(x, mask) / counts.tokens
  step_mean = lambda x: adv.masked_sum(x, steps) / counts.steps
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  policy_loss, value_loss = mean(policy), step_mean(value)
  total = policy_loss + settings.vf_coef * value_loss
  if settings.entropy_coef:  # JAX would differentiate the entropy even if multiplied by 0.
    total -= settings.entropy_coef * mean(outputs.entropy)
  if settings.kl_in == 'loss':
    total += kl_coef * mean(
      adv.kl_estimate(logprobs, experience.ref_logprobs, settings.kl_estimator)
    )
  return total, {
    'policy/loss': policy_loss,
    'policy/approxkl': 0.5 * mean(jnp.square(logprobs - experience.logprobs)),
    'policy/entropy_per_token': mean(outputs.entropy),
    'value/loss': value_loss,
    'value/mean': step_mean(outputs.values),
  }


def whiten_minibatch(experience, *, settings):
  """Whitens the advantages of a minibatch if `whiten_advantages` is 'minibatch'."""
  if settings.whiten_advantages != 'minibatch':
    return experience
  return experience.replace(
    advantages=adv.whiten(
      experience.advantages, experience.response_mask, unbiased=settings.whiten_unbiased
    )
  )


def objective(state, rollout, scores, *, settings):
  """Returns PPO's update.Objective for a scored rollout; see on_policy.train_step."""
  step_mask = rollout.response_mask
  if scores.ndim == 1:
    step_mask = adv.step_mask(step_mask, settings.score_position)
    step_mask &= experience_lib.not_skipped(scores, rollout.response_mask)[:, None]
  return update.Objective(
    prepare=functools.partial(
      prepare, state=state, rollout=rollout, scores=scores, step_mask=step_mask, settings=settings
    ),
    step_mask=step_mask,
    loss=functools.partial(loss, kl_coef=state.extra['kl_coef'], settings=settings),
    minibatch=functools.partial(whiten_minibatch, settings=settings),
  )


train_step = functools.partial(on_policy.train_step, objective)


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'ppo'`; see on_policy.create."""
  return on_policy.create(config, mesh, Settings, train_step)

"""Group relative policy optimization: a prompt's other responses are the baseline; no critic.

GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300) is the default. Presets change it to
Dr. GRPO (https://arxiv.org/abs/2503.20783), DAPO (https://arxiv.org/abs/2503.14476),
GSPO (https://arxiv.org/abs/2507.18071), CISPO (https://arxiv.org/abs/2506.13585) or
SAPO (https://arxiv.org/abs/2511.20347).

Differences from TRL: it multiplies the KL in the loss by the ratio, averages the loss of 'dapo'
over the tokens of the whole rollout, and keeps groups of equal scores. We do none of these.
DAPO samples new groups in place of those with equal scores until the batch is full; we do so up to
`rl.max_resamples` times, and leave out those that remain.

Letters: B batch, n responses per prompt, R response length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import experience as experience_lib
from rlhf_jax import losses
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.rollout import resampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(on_policy_config.Settings):
  """Static settings of a GRPO train step. The first four only change defaults of the base class.

  Attributes:
    scale: Divisor of the advantages: the standard deviation of the scores of the 'group' or of
      the 'batch', or 'none'. See advantages.group_advantages.
    normalize: What the loss is averaged over: 'token', 'sequence', or 'constant' (max_new_tokens
      per sequence). See losses.token_weights.
    loss: 'clip': PPO's clipped loss; 'cispo': -A log p with clipped importance weights; 'sapo': a
      smooth gate in place of the clip. See losses.cispo_loss and losses.sapo_loss.
    tau_positive: How fast the gate of 'sapo' closes for positive advantages.
    tau_negative: The same for others.
    ratio: Level of the importance ratio: 'token', 'sequence' or 'sequence_token'. See
      losses.log_ratio.
    drop_equal_groups: Whether to leave out prompts whose responses all have the same score (DAPO).
    max_resamples: How many times at most to sample again, with other prompts, so that no group of
      equal scores is left (DAPO); see rollout/resampling.py.
    overlong: Fraction of max_new_tokens over which a length penalty falls to -1 (DAPO); None for no
      penalty.
  """

  epochs: int = 1
  kl_coef: float = 0.04
  kl_estimator: str = 'k3'
  kl_in: str = 'loss'
  scale: str = 'group'
  normalize: str = 'sequence'
  loss: str = 'clip'
  tau_positive: float = 1.0
  tau_negative: float = 1.05
  ratio: str = 'token'
  drop_equal_groups: bool = False
  max_resamples: int = 0
  overlong: float | None = None

  @property
  def resampling(self):
    """Returns the resampling.Resampling that replaces groups of equal scores."""
    if not self.max_resamples:
      return None
    is_wasted = jax.jit(functools.partial(has_equal_scores, settings=self))
    return resampling.Resampling(is_wasted, self.max_resamples)


PRESETS = {
  'deepseekmath': {'sampling.samples': 64},
  'dr_grpo': {'rl.kl_coef': 0.0, 'rl.scale': 'none', 'rl.normalize': 'constant'},
  'dapo': {
    'sampling.samples': 16,
    'rl.minibatches': 16,
    'rl.kl_coef': 0.0,
    'rl.clip_high': 0.28,
    'rl.normalize': 'token',
    'rl.drop_equal_groups': True,
    'rl.max_resamples': 9,
    'rl.overlong': 0.2,
  },
  'gspo': {
    'rl.minibatches': 4,
    'rl.kl_coef': 0.0,
    'rl.ratio': 'sequence',
    'rl.clip_low': 3e-4,
    'rl.clip_high': 4e-4,
  },
  # MiniMax-M1, §3.1: 16 updates per rollout, no lower clip, and DAPO's dynamic sampling, penalty
  # of long responses and mean over tokens. It gives no value of the upper clip; 5 is that of
  # ScaleRL (https://arxiv.org/abs/2510.13786), which TRL recommends too.
  'cispo': {
    'sampling.samples': 16,
    'rl.minibatches': 16,
    'rl.kl_coef': 0.0,
    'rl.loss': 'cispo',
    'rl.clip_low': 1.0,
    'rl.clip_high': 4.0,
    'rl.normalize': 'token',
    'rl.drop_equal_groups': True,
    'rl.max_resamples': 9,
    'rl.overlong': 0.2,
  },
  'sapo': {'rl.minibatches': 4, 'rl.kl_coef': 0.0, 'rl.loss': 'sapo'},
}


def config(preset=''):
  """Returns the default config of GRPO, changed by a preset; see ppo.config."""
  defaults = on_policy_config.config('grpo', Settings)
  defaults.sampling.samples, defaults.optim.learning_rate = 8, 1e-6
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of GRPO; see ppo.validate."""
  on_policy_config.validate(config, device_count)
  on_policy_config.validate_without_critic(config, groups=True)
  overlong = config.rl.overlong
  for key, choices in (
    ('scale', adv.GROUP_SCALES),
    ('loss', losses.POLICY_LOSSES),
    ('ratio', losses.RATIO_LEVELS),
    ('kl_estimator', adv.KL_ESTIMATORS[:4]),
  ):
    config_lib.one_of(config, f'rl.{key}', choices)
  config_lib.need(
    min(config.rl.tau_positive, config.rl.tau_negative) > 0,
    f'config.rl.tau_positive={config.rl.tau_positive} and config.rl.tau_negative='
    f'{config.rl.tau_negative} must be positive',
  )
  config_lib.need(
    config.rl.max_resamples >= 0 and (config.rl.drop_equal_groups or not config.rl.max_resamples),
    f'config.rl.max_resamples={config.rl.max_resamples} must be 0, or positive with '
    'config.rl.drop_equal_groups=True, which leaves out the groups that remain equal',
  )
  config_lib.need(
    overlong is None or 0 < overlong <= 1 and config.rl.response == 'truncated',
    f"config.rl.overlong={overlong} must be None, or in (0, 1] with config.rl.response='truncated'",
  )


def has_equal_scores(rollout, scores, *, settings):
  """Returns which responses [B] are in a group whose scores are equal, or all skipped as NaN."""
  rollout, _ = experience_lib.skip_nan(rollout, scores, rules=settings.rules)
  mask = rollout.response_mask
  scores = experience_lib.totals(scores, mask)
  # A group's scores stay equal or unequal whatever the running moments are that scale them.
  postprocessed, _ = settings.rules.apply(scores, rollout, jnp.zeros(3))
  valid = experience_lib.not_skipped(scores, mask)
  return adv.equal_groups(postprocessed, settings.samples, valid)


def prepare(outputs, fixed, *, state, rollout, scores, settings):
  """Computes advantages from a scored rollout; see ppo.prepare."""
  mask, n = rollout.response_mask, settings.samples
  experience = experience_lib.make_experience(
    outputs, fixed, rollout, mask, behaviour=settings.behaviour
  )
  extra, scores = state.extra, experience_lib.totals(scores, mask)
  postprocessed, moments = settings.rules.apply(scores, rollout, extra['reward_moments'])
  valid = experience_lib.not_skipped(scores, mask)
  equal = adv.equal_groups(postprocessed, n, valid)
  if settings.overlong:
    length = settings.max_new_tokens
    postprocessed += adv.overlong_penalty(
      jnp.sum(mask, axis=1), max_length=length, cache=settings.overlong * length
    )
  metrics = experience_lib.rollout_metrics(
    experience, rollout, scores, postprocessed, outputs, extra['kl_coef'], settings.rules
  )
  if settings.kl_in == 'reward' and settings.kl_coef:
    kl = adv.kl_estimate(experience.logprobs, experience.ref_logprobs, settings.kl_estimator)
    postprocessed -= settings.kl_coef * jnp.sum(kl, axis=1)
  advantages = adv.group_advantages(postprocessed, n, scale=settings.scale, kept=valid)
  keep = mask & ~equal[:, None] if settings.drop_equal_groups else mask
  advantages = jnp.where(keep, advantages[:, None], 0.0)
  experience = experience.replace(response_mask=keep, step_mask=keep, advantages=advantages)
  metrics['groups/equal'] = jnp.mean(equal)
  return experience, extra | {'reward_moments': moments}, metrics


def loss(outputs, experience, counts, *, settings):
  """Computes a microbatch's part of the minibatch's mean clipped loss; see ppo.loss."""
  mask = experience.response_mask
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  log_ratio = losses.log_ratio(logprobs, experience.logprobs, mask, level=settings.ratio)
  advantages = experience.advantages
  if settings.loss == 'cispo':
    policy = losses.cispo_loss(
      logprobs, log_ratio, advantages, clip_low=settings.clip_low, clip_high=settings.clip_high
    )
  elif settings.loss == 'sapo':
    policy = losses.sapo_loss(
      log_ratio,
      advantages,
      tau_positive=settings.tau_positive,
      tau_negative=settings.tau_negative,
    )
  else:
    policy = losses.clipped_policy_loss(log_ratio, advantages, **settings.clips)
  return on_policy.total_loss(policy, outputs, experience, counts, settings.normalize, settings)


objective = on_policy.objective_of(prepare, loss)
train_step = functools.partial(on_policy.train_step, objective)


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'grpo'`; see on_policy.create."""
  return on_policy.create(config, mesh, Settings, train_step, reference=config.rl.kl_coef > 0)

"""Rejection sampling: supervised fine-tuning on the policy's own best responses; no critic.

Each iteration samples n responses to each prompt, keeps those with high scores, and maximizes their
likelihood, averaged over their tokens:

    L = -mean over tokens of kept responses of log pi(y_t)  (+ kl_coef KL)

`keep` is 'best' for the best responses to each prompt, as RAFT (Dong et al. 2023, algorithm 1,
https://arxiv.org/abs/2304.06767) and the rejection sampling of Llama 2 (§3.2.3,
https://arxiv.org/abs/2307.09288) have it; or 'percentile' for those above a threshold that rises
over iterations, as in ReST (Gulcehre et al. 2023, https://arxiv.org/abs/2308.08998) and trlX's RFT.

With kl_in='reward' the KL penalty is subtracted from the scores before the selection, as in RAFT;
with 'loss' it is part of the loss. Differences from trlX: it samples once per `improve_steps`
iterations and removes duplicates, we sample in every iteration; it moves thresholds by 0.001 to
leave out the lowest scores, we leave out the lowest score of the batch.

Letters: B batch, n responses per prompt, R response length.
"""

import dataclasses
import functools

import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import experience as experience_lib
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config

KEEP = ('best', 'percentile')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(on_policy_config.Settings):
  """Static settings of a rejection sampling train step. The first four only change defaults.

  Attributes:
    keep: which responses are kept: the 'best' to each prompt, or those with at least a 'percentile'
      of the scores of their prompt.
    keep_count: number of responses to each prompt that 'best' keeps.
    start_percentile: first threshold, a fraction of the scores of each prompt.
    end_percentile: the threshold rises towards this fraction.
    improve_steps: iterations over which it rises, before it starts again.
  """

  epochs: int = 1
  kl_coef: float = 0.0
  kl_estimator: str = 'k3'
  kl_in: str = 'loss'
  keep: str = 'best'
  keep_count: int = 1
  start_percentile: float = 0.7
  end_percentile: float = 0.95
  improve_steps: int = 4


PRESETS = {
  # trlX, RFTConfig in trlx/trainer/accelerate_rft_trainer.py, whose values are the defaults above.
  'trlx': {'rl.keep': 'percentile', 'sampling.samples': 32},
}


def config(preset=''):
  """Returns the default config of rejection sampling, changed by a preset; see ppo.config."""
  defaults = on_policy_config.config('rejection_sampling', Settings)
  defaults.sampling.samples = 8
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of rejection sampling; see ppo.validate."""
  on_policy_config.validate(config, device_count)
  on_policy_config.validate_without_critic(config, groups=False)
  need, rl, samples = config_lib.need, config.rl, config.sampling.samples
  need(
    samples > 1,
    f'config.sampling.samples={samples} must be at least 2: the best of them are kept',
  )
  config_lib.one_of(config, 'rl.keep', KEEP)
  config_lib.one_of(config, 'rl.kl_estimator', adv.KL_ESTIMATORS[:4])
  need(
    0 < rl.keep_count < samples,
    f'config.rl.keep_count={rl.keep_count} must be from 1 to config.sampling.samples - 1 '
    f'= {samples - 1}',
  )
  need(
    0 <= rl.start_percentile <= rl.end_percentile <= 1,
    f'config.rl.start_percentile={rl.start_percentile} and config.rl.end_percentile='
    f'{rl.end_percentile} must be fractions from 0 to 1, the first not above the second',
  )
  need(rl.improve_steps > 0, f'config.rl.improve_steps={rl.improve_steps} must be at least 1')


def prepare(outputs, fixed, *, state, rollout, scores, settings):
  """Selects the responses; see ppo.prepare. Their tokens have advantage 1 and are the mask."""
  mask, n, extra = rollout.response_mask, settings.samples, state.extra
  experience = experience_lib.make_experience(
    outputs, fixed, rollout, mask, behaviour=settings.behaviour
  )
  scores = experience_lib.totals(scores, mask)
  postprocessed, moments = settings.rules.apply(scores, rollout, extra['reward_moments'])
  metrics = experience_lib.rollout_metrics(
    experience, rollout, scores, postprocessed, outputs, extra['kl_coef'], settings.rules
  )
  penalized = postprocessed
  if settings.kl_in == 'reward' and settings.kl_coef:
    kl = adv.kl_estimate(experience.logprobs, experience.ref_logprobs, settings.kl_estimator)
    penalized -= settings.kl_coef * jnp.sum(kl, axis=1)
  present = jnp.any(mask, axis=1)
  if settings.keep == 'best':
    kept = adv.best_of_groups(penalized, n, settings.keep_count, present)
  else:
    rise = (settings.end_percentile - settings.start_percentile) / settings.improve_steps
    percentile = settings.start_percentile + rise * (state.step % settings.improve_steps)
    kept = adv.from_percentile(penalized, n, percentile, present)
  keep = mask & kept[:, None]
  experience = experience.replace(
    response_mask=keep, step_mask=keep, advantages=keep.astype(jnp.float32)
  )
  metrics |= {
    'kept/fraction': jnp.mean(kept),
    'kept/scores': adv.masked_mean(postprocessed, kept),
  }
  return experience, extra | {'reward_moments': moments}, metrics


def loss(outputs, experience, counts, *, settings):
  """Computes a microbatch's part of the minibatch's mean loss; see ppo.loss."""
  mask = experience.response_mask
  mean = lambda x: adv.masked_sum(x, mask) / counts.tokens
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  total = policy_loss = mean(-experience.advantages * logprobs)
  if settings.entropy_coef:
    total -= settings.entropy_coef * mean(outputs.entropy)
  if settings.kl_in == 'loss' and settings.kl_coef:
    total += settings.kl_coef * mean(
      adv.kl_estimate(logprobs, experience.ref_logprobs, settings.kl_estimator)
    )
  return total, {
    'policy/loss': policy_loss,
    'policy/approxkl': 0.5 * mean(jnp.square(logprobs - experience.logprobs)),
    'policy/entropy_per_token': mean(outputs.entropy),
  }


objective = on_policy.objective_of(prepare, loss)
train_step = functools.partial(on_policy.train_step, objective)


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'rejection_sampling'`; see on_policy.create."""
  return on_policy.create(config, mesh, Settings, train_step, reference=config.rl.kl_coef > 0)

"""Online direct preference optimization: a reward ranks fresh responses, DPO learns from the pairs.

See Guo et al. 2024 (https://arxiv.org/abs/2402.04792), algorithm 1, with the reward in place of
their annotator, and Rafailov et al. 2023, eq. 7 (https://arxiv.org/abs/2305.18290). Of the
responses to each prompt, the one with the highest score is preferred to the one with the lowest:

    L = -log sigmoid(beta (log pi(y+) / pi_ref(y+) - log pi(y-) / pi_ref(y-))),  beta = kl_coef

There is no critic. Differences from TRL 1.12's OnlineDPOTrainer: two responses with equal scores
are no pair and are left out, where TRL prefers the first; more than two responses per prompt are
possible; the log-probabilities of policy and reference are those at the sampling temperature.

Letters: B batch, R response length, n responses per prompt, G = B / n prompts.
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
  """Static settings of an online DPO train step. The first two only change defaults.

  Attributes:
    kl_coef: beta, the strength of the KL penalty that the loss implies.
    loss: 'sigmoid' (DPO), 'robust', 'hinge' or 'ipo'; see losses.reference_loss.
    label_smoothing: probability that a preference is wrong, for 'sigmoid' and 'robust'.
  """

  epochs: int = 1
  kl_coef: float = 0.1
  loss: str = 'sigmoid'
  label_smoothing: float = 0.0

  @property
  def schedule(self):
    """Returns the update.Schedule, in which the responses to a prompt stay together."""
    return dataclasses.replace(super().schedule, group_size=self.samples)


PRESETS = {
  'ipo': {'rl.loss': 'ipo'},
  # TRL 1.12, trl.experimental.online_dpo.
  'trl': {
    'optim.learning_rate': 5e-7,
    'optim.schedule': 'linear',
    'rl.kl_coef': 0.1,
    'sampling.samples': 2,
    'sampling.temperature': 0.9,
  },
}


def config(preset=''):
  """Returns the default config of online DPO, changed by a preset; see ppo.config."""
  defaults = on_policy_config.config('online_dpo', Settings)
  defaults.sampling.samples, defaults.optim.learning_rate = 2, 1e-6
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of online DPO; see ppo.validate."""
  on_policy_config.validate(config, device_count)
  need, rl, samples = config_lib.need, config.rl, config.sampling.samples
  need(
    samples > 1,
    f'config.sampling.samples={samples} must be at least 2: the best and the worst of them are the '
    'pair that DPO learns from',
  )
  need(
    rl.kl_coef > 0, f'config.rl.kl_coef={rl.kl_coef} must be positive: it is the beta of the loss'
  )
  need(
    rl.importance_cap is None,
    f'config.rl.importance_cap={rl.importance_cap} must be None: the loss of a pair has no '
    'importance weights',
  )
  config_lib.one_of(config, 'rl.loss', losses.DPO_LOSSES)
  need(
    0 <= rl.label_smoothing < 0.5,
    f'config.rl.label_smoothing={rl.label_smoothing} must be in [0, 0.5)',
  )
  config_lib.divides(
    samples,
    config.batch_size // rl.minibatches,
    'sampling.samples',
    'batch_size / config.rl.minibatches',
  )
  if config.microbatch_size:
    config_lib.divides(samples, config.microbatch_size, 'sampling.samples', 'microbatch_size')


def prepare(outputs, fixed, *, state, rollout, scores, settings):
  """Picks the pair of each prompt; see ppo.prepare.

  Returns:
    Experience whose advantages are 1 at the tokens of better responses and -1 at those of worse
    ones, and whose masks are empty for all others; `extra` of the next TrainState; and metrics.
  """
  mask, n, extra = rollout.response_mask, settings.samples, state.extra
  experience = experience_lib.make_experience(
    outputs, fixed, rollout, mask, behaviour=settings.behaviour
  )
  scores = experience_lib.totals(scores, mask)
  postprocessed, moments = settings.rules.apply(scores, rollout, extra['reward_moments'])
  pair = adv.best_and_worst(postprocessed, n, jnp.any(mask, axis=1))
  metrics = experience_lib.rollout_metrics(
    experience, rollout, scores, postprocessed, outputs, extra['kl_coef'], settings.rules
  )
  keep = mask & (pair != 0)[:, None]
  experience = experience.replace(
    response_mask=keep, step_mask=keep, advantages=jnp.where(keep, pair[:, None], 0.0)
  )
  pairs = jnp.sum(pair > 0)
  metrics |= {
    'groups/equal': 1.0 - pairs * n / len(pair),
    'objective/scores_margin': jnp.sum(pair * postprocessed) / jnp.maximum(pairs, 1),
  }
  return experience, extra | {'reward_moments': moments}, metrics


def loss(outputs, experience, counts, *, settings):
  """Computes a microbatch's part of the minibatch's mean loss over pairs; see ppo.loss."""
  mask, side = experience.response_mask, experience.advantages

  def response_logprobs(logprobs):
    """Sums [B, R] over the tokens of the better and of the worse response, [G] each."""
    tokens = [jnp.where(mask & (side == sign), logprobs, 0.0) for sign in (1.0, -1.0)]
    return [jnp.sum(x.reshape(-1, settings.samples * x.shape[1]), axis=1) for x in tokens]

  chosen, rejected = response_logprobs(outputs.logprobs)
  ref_chosen, ref_rejected = response_logprobs(experience.ref_logprobs)
  chosen_reward = settings.kl_coef * (chosen - ref_chosen)
  rejected_reward = settings.kl_coef * (rejected - ref_rejected)
  per_pair = losses.reference_loss(
    chosen - ref_chosen - (rejected - ref_rejected),
    kind=settings.loss,
    beta=settings.kl_coef,
    label_smoothing=settings.label_smoothing,
  )
  has_pair = jnp.any(mask.reshape(len(chosen), -1), axis=1)
  mean = lambda x: adv.masked_sum(x, has_pair) * 2 / counts.sequences  # two sequences per pair
  by_token = lambda x: adv.masked_sum(x, mask) / counts.tokens
  total = mean(per_pair)
  return total, {
    'policy/loss': total,
    'policy/approxkl': 0.5 * by_token(jnp.square(outputs.logprobs - experience.logprobs)),
    'policy/entropy_per_token': by_token(outputs.entropy),
    'rewards/chosen': mean(chosen_reward),
    'rewards/rejected': mean(rejected_reward),
    'rewards/margins': mean(chosen_reward - rejected_reward),
    'rewards/accuracies': mean((chosen_reward > rejected_reward).astype(jnp.float32)),
    'logps/chosen': mean(chosen),
    'logps/rejected': mean(rejected),
  }


objective = on_policy.objective_of(prepare, loss)
train_step = functools.partial(on_policy.train_step, objective)


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'online_dpo'`; see on_policy.create."""
  return on_policy.create(config, mesh, Settings, train_step)

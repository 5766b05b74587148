"""Trust region policy optimization: a natural-gradient step with a bound on the KL.

See Schulman et al. 2015 (https://arxiv.org/abs/1502.05477). Rewards, advantages and returns are
those of ppo.py. The step of the policy maximizes

    sum_t ratio_t A_t / tokens   subject to   sum_t KL(pi_old || pi)_t / tokens < max_kl

where the KL is over the whole vocabulary. Its direction solves (F + damping I) x = g for the Fisher
matrix F of the whole batch, and a line search shrinks it until both conditions hold. If that fails,
the policy stays as it was. Then the critic takes `epochs` passes with the optimizer of
`config.optim`; the policy has no optimizer and no learning rate.

Constants are those of RL4LMs and stable-baselines3-contrib. Differences from them: F is applied as
J^T (diag(p) - p p^T) J instead of the second derivative of the KL, which is the same at the old
policy; the KL is from the old policy to the new one, as in the paper, where they take the reverse;
the critic's loss has a factor 1/2.

Letters: B batch, R response length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import forward as forward_lib
from rlhf_jax import losses
from rlhf_jax import optim
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import trust_region
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(ppo.Settings):
  """Static settings of a TRPO train step. The first two only change defaults.

  Attributes:
    epochs: passes of the critic over each rollout, in `minibatches` optimizer steps each.
    value_clip: largest distance of a value from the old value in the loss; None: no clipping.
    max_kl: bound of the mean KL from the old policy to the new one, in nats per token.
    cg_steps: most products with the Fisher matrix, each a forward and backward pass over the batch.
    cg_damping: multiple of the identity that is added to the Fisher matrix.
    line_search_steps: attempts of the line search.
    line_search_shrink: factor of the step after each failed attempt.
  """

  epochs: int = 10
  value_clip: float | None = None
  max_kl: float = 0.01
  cg_steps: int = 15
  cg_damping: float = 0.1
  line_search_steps: int = 10
  line_search_shrink: float = 0.8

  @property
  def region(self):
    """Returns the trust_region.Region of these settings."""
    return trust_region.Region(
      max_kl=self.max_kl,
      cg_steps=self.cg_steps,
      cg_damping=self.cg_damping,
      shrink=self.line_search_shrink,
      attempts=self.line_search_steps,
    )


PRESETS = {
  # RL4LMs, rl4lms/algorithms/trpo/trpo.py; its batch_size of 128 is that of the critic.
  'rl4lms': {
    'optim.learning_rate': 1e-3,
    'rl.gamma': 0.99,
    'rl.lam': 0.95,
    'rl.whiten_unbiased': True,
  },
}


def config(preset=''):
  """Returns the default config of TRPO, changed by a preset; see ppo.config."""
  defaults = on_policy_config.config('trpo', Settings)
  defaults.critic = on_policy_config.critic()
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of TRPO; see ppo.validate."""
  ppo.validate(config, device_count)
  need, rl = config_lib.need, config.rl
  for key in ('max_kl', 'cg_steps', 'line_search_steps'):
    need(rl[key] > 0, f'config.rl.{key}={rl[key]} must be positive')
  need(rl.cg_damping >= 0, f'config.rl.cg_damping={rl.cg_damping} must be 0 or positive')
  need(
    0 < rl.line_search_shrink < 1,
    f'config.rl.line_search_shrink={rl.line_search_shrink} must be above 0 and below 1',
  )
  config_lib.one_of(config, 'rl.behaviour', ('forward', 'sampler'))
  config_lib.one_of(config, 'rl.whiten_advantages', ('batch', 'none'))
  config_lib.one_of(config, 'rl.kl_in', ('reward',))
  for key in ('entropy_coef', 'ptx_coef'):
    need(rl[key] == 0, f'config.rl.{key}={rl[key]}: the surrogate of TRPO has no such term; use 0')


def value_loss(outputs, experience, counts, *, settings):
  """Computes a microbatch's part of the mean loss of the critic; see ppo.loss."""
  mean = lambda x: adv.masked_sum(x, experience.step_mask) / counts.steps
  loss, clipped = losses.ppo_value_loss(
    outputs.values, experience.values, experience.returns, clip=settings.value_clip
  )
  metrics = {'value/clipfrac': mean(clipped), 'value/mean': mean(outputs.values)}
  return mean(loss), metrics | {'value/loss': mean(loss)}


def critic_steps(params, opt_state, experience, key, *, forward, optimizer, settings):
  """Trains the critic for some epochs of minibatches.

  Args:
    params: Trained parameters of the critic.
    opt_state: State of `optimizer`.
    experience: Experience of the whole batch.
    key: Random key of the order of minibatches.
    forward: forward.Forward whose frozen parameters include all of the policy.
    optimizer: Optax optimizer.
    settings: Settings.

  Returns:
    New parameters, new optimizer state, and metrics.
  """
  schedule = settings.schedule
  objective = update.Objective(
    None, experience.step_mask, functools.partial(value_loss, settings=settings)
  )

  def minibatch(carry, order):
    params, opt_state = carry
    rows = sharding.shard_rows(jax.tree.map(lambda x: x[order], experience))
    gradients, metrics = update.minibatch_gradients(
      {'policy': {}, 'critic': params},
      rows,
      forward=forward,
      objective=objective,
      schedule=schedule,
    )
    params, opt_state, norms = optim.apply(
      {'critic': params}, {'critic': opt_state}, gradients, {'critic': optimizer}
    )
    return (params['critic'], opt_state['critic']), metrics | norms

  orders = update.minibatch_orders(key, len(experience.tokens), schedule)
  carry, metrics = jax.lax.scan(minibatch, (params, opt_state), orders)
  return *carry, jax.tree.map(jnp.mean, metrics)


def train_step(state, frozen, rollout, scores, ptx, *, models, optimizers, settings):
  """Updates policy and critic on one scored rollout; see on_policy.train_step."""
  del ptx  # validate refuses it
  models = models.with_max_length(rollout.tokens.shape[1])
  forward = forward_lib.Forward(
    models, frozen, settings.temperature, full_kl=settings.kl_estimator == 'full'
  )
  goal = ppo.objective(state, rollout, scores, settings=settings)
  if settings.importance_cap:
    goal = on_policy.weigh_by_importance(goal, rollout, cap=settings.importance_cap)
  fixed, outputs = update.before_update(
    state.params, rollout, goal.step_mask, forward=forward, schedule=settings.schedule
  )
  experience, extra, metrics = goal.prepare(outputs, fixed)
  if settings.importance_cap:
    experience = experience.replace(advantages=experience.advantages * experience.importance)
  # With several processes on CPUs, what has loops must wait for all that communicates before it.
  experience = experience.replace(tokens=processes.sequence_after(experience.tokens, metrics))
  policy, policy_state, policy_metrics = trust_region.policy_step(
    state.params['policy'],
    state.opt_state['policy'],
    experience,
    forward=forward,
    optimizer=optimizers['policy'],
    schedule=settings.schedule,
    region=settings.region,
  )
  all_frozen = frozen | {'policy': trainable.merge(frozen['policy'], policy)}
  experience = experience.replace(
    tokens=processes.sequence_after(experience.tokens, policy_metrics)
  )
  critic, critic_state, critic_metrics = critic_steps(
    state.params['critic'],
    state.opt_state['critic'],
    experience,
    types.step_keys(state)[1],
    forward=dataclasses.replace(forward, frozen=all_frozen),
    optimizer=optimizers['critic'],
    settings=settings,
  )
  state = state.replace(
    step=state.step + 1,
    params={'policy': policy, 'critic': critic},
    opt_state={'policy': policy_state, 'critic': critic_state},
    extra=extra,
  )
  return state, metrics | policy_metrics | critic_metrics


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'trpo'`; see on_policy.create."""
  optimizer = optim.direct(master_dtype=config.optim.master_dtype, ema=config.optim.ema or 0.0)
  return on_policy.create(config, mesh, Settings, train_step, policy_optimizer=optimizer)

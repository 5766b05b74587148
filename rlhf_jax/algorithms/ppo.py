"""Proximal policy optimization of a language model against scores and a KL penalty.

Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), Stiennon et al. 2020
(https://arxiv.org/abs/2009.01325), Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155).
The choices these make differently are in ppo_settings.py.

One iteration is a rollout, scoring, and `train_step` below: the forward passes of forward.py,
`prepare` (rewards with the KL penalty, GAE), and update.py's epochs and minibatches of `loss`.

Letters: B batch, R response length.
"""

import functools

import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import experience as experience_lib
from rlhf_jax import forward as forward_lib
from rlhf_jax import learner
from rlhf_jax import losses
from rlhf_jax import sharding
from rlhf_jax import update
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import ppo_settings
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft


def prepare(outputs, fixed, *, state, rollout, scores, step_mask, settings):
  """Turns a scored rollout into advantages and returns.

  Args:
    outputs: forward.Outputs of policy and critic before the update.
    fixed: forward.Fixed.
    state: TrainState before the update.
    rollout: Rollout.
    scores: [B] float32, or [B, R] for rewards per token.
    step_mask: [B, R] bool, positions that take part in the return.
    settings: Settings.

  Returns:
    Experience, `extra` of the next TrainState, and the iteration's metrics.
  """
  kl_coef, whiten = state.extra['kl_coef'], functools.partial(adv.whiten, unbiased=settings.whiten_unbiased)
  experience, gap = experience_lib.begin(
      outputs, fixed, rollout, step_mask, behaviour=settings.behaviour)
  kl = fixed.full_kl if settings.kl_estimator == 'full' else adv.kl_estimate(
      experience.logprobs, experience.ref_logprobs, settings.kl_estimator)
  paid, moments = settings.rules.apply(scores, rollout, state.extra['reward_moments'])
  rewards = adv.token_rewards(
      paid, kl, kl_coef if settings.kl_in == 'reward' else 0.0, rollout.response_mask,
      position=settings.score_position)
  if settings.whiten_rewards:
    rewards = whiten(rewards, step_mask, shift_mean=False)
  advantages, returns = adv.gae(
      rewards, experience.values, gamma=settings.gamma, lam=settings.lam)
  if settings.whiten_advantages == 'batch':
    advantages = whiten(advantages, rollout.response_mask)
  experience = experience.replace(advantages=advantages, returns=returns)
  metrics = experience_lib.describe(experience, rollout, paid, outputs, kl_coef, settings.rules)
  next_coef = adv.next_kl_coef(
      kl_coef, experience.logprobs - experience.ref_logprobs, rollout.response_mask,
      controller=settings.kl_controller, target=settings.kl_target, horizon=settings.kl_horizon)
  extra = {'kl_coef': next_coef, 'reward_moments': moments}
  return experience, extra, metrics | {'policy/sampler_gap': gap}


def loss(outputs, experience, counts, *, kl_coef, settings):
  """The clipped losses of a microbatch, as its share of the whole minibatch's mean.

  Args:
    outputs: forward.Outputs of the policy and critic that are trained.
    experience: Experience of the microbatch.
    counts: update.Counts of the minibatch.
    kl_coef: float32 scalar, used where the KL is in the loss.
    settings: Settings.

  Returns:
    Scalar loss, and metrics that add up over microbatches.
  """
  mask, steps = experience.response_mask, experience.step_mask
  mean = lambda x: adv.masked_sum(x, mask) / counts.tokens
  step_mean = lambda x: adv.masked_sum(x, steps) / counts.steps
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  policy, policy_clipped, ratio = losses.ppo_policy_loss(
      logprobs, experience.logprobs, experience.advantages, clip_low=settings.clip_low,
      clip_high=settings.clip_high, dual_clip=settings.dual_clip)
  value, value_clipped = losses.ppo_value_loss(
      outputs.values, experience.values, experience.returns, clip=settings.value_clip)
  policy_loss, value_loss = mean(policy), step_mean(value)
  total = policy_loss + settings.vf_coef * value_loss
  if settings.entropy_coef:  # A zero would be differentiated all the same.
    total -= settings.entropy_coef * mean(outputs.entropy)
  if settings.kl_in == 'loss':
    total += kl_coef * mean(
        adv.kl_estimate(logprobs, experience.ref_logprobs, settings.kl_estimator))
  return total, {
      'policy/loss': policy_loss,
      'policy/approxkl': 0.5 * mean(jnp.square(logprobs - experience.logprobs)),
      'policy/clipfrac': mean(policy_clipped),
      'policy/ratio': mean(ratio),
      'policy/entropy': mean(outputs.entropy),
      'value/loss': value_loss,
      'value/clipfrac': step_mean(value_clipped),
      'value/mean': step_mean(outputs.values),
  }


def whiten_minibatch(experience, *, settings):
  """Experience with its advantages whitened, where that is done by minibatch."""
  if settings.whiten_advantages != 'minibatch':
    return experience
  return experience.replace(advantages=adv.whiten(
      experience.advantages, experience.response_mask, unbiased=settings.whiten_unbiased))


def objective(state, rollout, scores, step_mask, *, settings):
  """PPO's update.Objective for a rollout; the arguments are those of `prepare`."""
  return update.Objective(
      prepare=functools.partial(prepare, state=state, rollout=rollout, scores=scores,
                                step_mask=step_mask, settings=settings),
      loss=functools.partial(loss, kl_coef=state.extra['kl_coef'], settings=settings),
      minibatch=functools.partial(whiten_minibatch, settings=settings))


def step_mask_of(rollout, scores, settings):
  """Positions that take part in the return, [B, R] bool."""
  if scores.ndim == 2:
    return rollout.response_mask
  return adv.step_mask(rollout.response_mask, settings.score_position)


def train_step(state, frozen, rollout, scores, ptx, *, models, optimizers, settings):
  """One PPO iteration after the rollout. To be jitted with `state` donated.

  Args:
    state: TrainState with params and opt_state {'policy': ..., 'critic': ...}, and extra
      {'kl_coef': scalar, 'reward_moments': [3]}, float32.
    frozen: {'shared': parameters of the policy that are not trained, 'reference': the
      reference's that are not among them}.
    rollout: Rollout of B sequences, sampled from `state.params['policy']`.
    scores: [B] float32, or [B, R] for rewards per token.
    ptx: LMBatch whose rows are shared out over the minibatches, or None.
    models: forward.Models.
    optimizers: {'policy': optax optimizer, 'critic': optax optimizer}.
    settings: Settings.

  Returns:
    The next TrainState and metrics, scalars.
  """
  models = models.reaching(rollout.tokens.shape[1])
  forward = forward_lib.Forward(
      models, frozen, settings.temperature, full_kl=settings.kl_estimator == 'full')
  step_mask = step_mask_of(rollout, scores, settings)
  goal = objective(state, rollout, scores, step_mask, settings=settings)
  if ptx is not None:
    goal = goal._replace(extra_batch=ptx, extra_gradients=functools.partial(
        sft.ptx_gradients, frozen=frozen['shared'], model=models.policy, coef=settings.ptx_coef))
  return update.run(state, rollout, step_mask, forward=forward, objective=goal,
                    optimizers=optimizers, schedule=settings.schedule)


def make_settings(config, eos_id):
  """Settings of a config."""
  toggles = {name: config.ppo[name] for name in config.ppo if name != 'kl_coef'}
  return ppo_settings.Settings(
      microbatch_size=config.microbatch_size, temperature=config.sampling.temperature,
      end_tokens=() if eos_id is None else (eos_id,), **toggles)


def create(config, mesh):
  """The learner of `config.algorithm = 'ppo'`.

  Args:
    config: see `config.ppo()`.
    mesh: device mesh.

  Returns:
    learner.Learner.

  Raises:
    UserError: data, models and config do not fit together.
  """
  tokenizer = setup.load_tokenizer(config)
  model, policy = setup.load_policy(config.model, tokenizer, mesh, config.seed)
  if config.reward.model:
    score, scored = on_policy.reward_model_scorer(config, tokenizer, mesh)
  else:
    score, scored = on_policy.function_scorer(config, tokenizer, mesh), None
  model, policy, shared = setup.divide(config, model, policy, mesh)
  actor = on_policy.Actor(config, tokenizer, model, shared, score, mesh)
  frozen = {'shared': shared,
            'reference': on_policy.load_reference(config, mesh, model, policy)}
  critic_model, critic = on_policy.make_critic(
      config, tokenizer, mesh, model, policy, shared, scored)
  models = forward_lib.Models(model, critic_model, critic_shared=config.critic.kind == 'adapters')
  settings = make_settings(config, tokenizer.eos_token_id)
  steps = setup.train_steps(config, actor.rows)
  updates = steps * settings.epochs * settings.minibatches
  optimizers = {
      'policy': setup.make_optimizer(config.optim, updates),
      'critic': setup.make_optimizer(
          config.optim, updates, learning_rate=config.critic.learning_rate, exported=False)}
  state = setup.new_state(
      config.seed, {'policy': policy, 'critic': critic}, optimizers, mesh, model.rules,
      extra={'kl_coef': jnp.float32(config.ppo.kl_coef), 'reward_moments': jnp.zeros(3)})
  step = setup.jit_step(functools.partial(
      train_step, models=models, optimizers=optimizers,
      settings=settings), state)
  iterators = {'prompts': actor.iterator}
  if config.ptx.batch_size:
    iterators['ptx'] = sft.ptx_iterator(config, tokenizer, model)

  def next_batch(state, *, timed):
    rollout, scores, metrics = actor(state, timed=timed)
    ptx = sharding.put_rows(next(iterators['ptx']), mesh) if 'ptx' in iterators else None
    return (frozen, rollout, scores, ptx), metrics

  return learner.Learner(
      state=state, steps=steps, iterators=iterators, next_batch=next_batch, train_step=step,
      evaluate=lambda state: {}, export=setup.policy_exporter(model, tokenizer, shared),
      model=model, model_name='policy', tokenizer=tokenizer, samples=actor.samples)

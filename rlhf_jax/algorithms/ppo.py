"""Proximal policy optimization of a language model against scores and a KL penalty.

Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), Stiennon et al. 2020
(https://arxiv.org/abs/2009.01325), Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155).
The choices these make differently are in ppo_settings.py.

One iteration is `rollout` (decode.py), scoring, and `train_step` below, which holds all the
rest: log-probabilities of behaviour policy and reference, values, rewards, GAE, then a scan
over epochs and minibatches of the clipped losses.

Letters: B batch, P prompt length, R response length, T = P + R, D width.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import learner
from rlhf_jax import logprobs as logprobs_lib
from rlhf_jax import losses
from rlhf_jax import optim
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import ppo_settings
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.models import heads
from rlhf_jax.models import trainable


class Models(NamedTuple):
  """Static handles.

  Attributes:
    policy: Model.
    critic: Model; None where the value head sits on the policy's hidden states.
    critic_shared: whether the critic is adapters on the weights the policy's are on.
  """
  policy: Any
  critic: Any = None
  critic_shared: bool = False


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
    frozen: see `train_step`.
    rows: Rollout or Experience.
    trunk: [B, T, D], see Experience.
    models: Models.
    temperature: what logits are divided by.

  Returns:
    logprobs, entropy and values, each [B, R] float32.
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
  return logprobs, entropy, heads.apply_scalar(params['critic']['head'], states)


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


def by_rows(fn, tree, rows):
  """Maps `fn` over a batch `rows` rows at a time; 0 takes it whole."""
  batch = jax.tree.leaves(tree)[0].shape[0]
  if not rows or rows >= batch:
    return fn(tree)
  split = jax.tree.map(lambda x: x.reshape((-1, rows) + x.shape[1:]), tree)
  out = jax.lax.scan(lambda _, rows: (None, fn(rows)), None, split, unroll=processes.unrolled())[1]
  return jax.tree.map(lambda x: x.reshape((batch,) + x.shape[2:]), out)


def make_experience(state, frozen, rollout, scores, *, models, settings):
  """Turns a scored rollout into advantages and returns.

  Args:
    state: TrainState before the update.
    frozen: see `train_step`.
    rollout: Rollout.
    scores: [B] float32, or [B, R] for rewards per token.
    models: Models.
    settings: Settings.

  Returns:
    Experience, new reward moments [3], and the iteration's metrics.
  """
  def forward(rows):
    trunk = shared_trunk(state.params, frozen, rows, models=models)
    return trunk, evaluate(
        state.params, frozen, rows, trunk, models=models, temperature=settings.temperature), \
        _reference(state.params, frozen, rows, trunk, models=models, settings=settings)

  trunk, (logprobs, entropy, values), (ref_logprobs, full_kl) = by_rows(
      forward, rollout, settings.microbatch_size)
  response_mask = rollout.response_mask
  step_mask = (response_mask if scores.ndim == 2 else
               adv.step_mask(response_mask, settings.score_position))
  gap = adv.masked_mean(jnp.abs(rollout.logprobs - logprobs), response_mask)
  if settings.behaviour == 'sampler':
    logprobs = rollout.logprobs
  logprobs = jnp.where(response_mask, logprobs, 0.0)
  ref_logprobs = jnp.where(response_mask, ref_logprobs, 0.0)
  values = jnp.where(step_mask, values, 0.0)
  kl = full_kl if settings.kl_estimator == 'full' else adv.kl_estimate(
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
      advantages=advantages, returns=returns, trunk=trunk)
  metrics = describe(experience, rollout, paid, entropy, state.kl_coef, settings)
  return experience, moments, metrics | {'policy/sampler_gap': gap}


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


def loss(params, rows, frozen, counts, kl_coef, *, models, settings):
  """The clipped losses of a microbatch, as its share of the whole minibatch's mean.

  Args:
    params: policy and critic.
    frozen: see `train_step`.
    rows: Experience of the microbatch.
    counts: slots with a policy loss and with a value loss in the whole minibatch.
    kl_coef: float32 scalar, used where the KL is in the loss.
    models: Models.
    settings: Settings.

  Returns:
    Scalar loss, and metrics that add up over microbatches.
  """
  tokens, steps = counts
  logprobs, entropy, values = evaluate(
      params, frozen, rows, rows.trunk, models=models, temperature=settings.temperature)
  mask = rows.response_mask
  mean = lambda x: adv.masked_sum(x, mask) / tokens
  logprobs = jnp.where(mask, logprobs, 0.0)
  policy, policy_clipped, ratio = losses.ppo_policy_loss(
      logprobs, rows.logprobs, rows.advantages, clip_low=settings.clip_low,
      clip_high=settings.clip_high, dual_clip=settings.dual_clip)
  value, value_clipped = losses.ppo_value_loss(
      values, rows.values, rows.returns, clip=settings.value_clip)
  policy_loss = mean(policy)
  value_loss = adv.masked_sum(value, rows.step_mask) / steps
  total = policy_loss + settings.vf_coef * value_loss
  if settings.entropy_coef:  # A zero would be differentiated all the same.
    total -= settings.entropy_coef * mean(entropy)
  if settings.kl_in == 'loss':
    total += kl_coef * mean(
        adv.kl_estimate(logprobs, rows.ref_logprobs, settings.kl_estimator))
  return total, {
      'policy/loss': policy_loss,
      'policy/approxkl': 0.5 * mean(jnp.square(logprobs - rows.logprobs)),
      'policy/clipfrac': mean(policy_clipped),
      'policy/ratio': mean(ratio),
      'policy/entropy': mean(entropy),
      'value/loss': value_loss,
      'value/clipfrac': adv.masked_sum(value_clipped, rows.step_mask) / steps,
      'value/mean': adv.masked_sum(values, rows.step_mask) / steps,
  }


def gradients(params, rows, frozen, ptx, kl_coef, *, models, settings):
  """Gradients of one minibatch, summed over its microbatches, the ptx mix included.

  Args:
    params: policy and critic.
    rows: Experience of the minibatch.
    frozen: see `train_step`.
    ptx: LMBatch of pretraining rows, or None.
    kl_coef: float32 scalar.
    models: Models.
    settings: Settings.

  Returns:
    Gradients shaped like `params`, and metrics.
  """
  if settings.whiten_advantages == 'minibatch':
    rows = rows.replace(advantages=adv.whiten(
        rows.advantages, rows.response_mask, unbiased=settings.whiten_unbiased))
  counts = (jnp.maximum(jnp.sum(rows.response_mask), 1),
            jnp.maximum(jnp.sum(rows.step_mask), 1))
  grad_fn = jax.grad(functools.partial(
      loss, frozen=frozen, counts=counts, kl_coef=kl_coef, models=models, settings=settings),
      has_aux=True)
  grads, metrics = optim.accumulate(grad_fn, params, rows, settings.microbatch_size)
  if ptx is not None:
    ptx_loss, ptx_grads = jax.value_and_grad(sft.mean_loss)(
        params['policy'], frozen['shared'], ptx, model=models.policy)
    grads = grads | {'policy': jax.tree.map(
        lambda g, h: g + settings.ptx_coef * h, grads['policy'], ptx_grads)}
    metrics = metrics | {'ptx/loss': ptx_loss}
  return grads, metrics


def train_step(state, frozen, rollout, scores, ptx, *, models, optimizers, settings):
  """One PPO iteration after the rollout. To be jitted with `state` donated.

  Args:
    state: TrainState with params and opt_state {'policy': ..., 'critic': ...}.
    frozen: {'shared': parameters of the policy that are not trained, 'reference': the
      reference's that are not among them}.
    rollout: Rollout of B rows, sampled from `state.params['policy']`.
    scores: [B] float32, or [B, R] for rewards per token.
    ptx: LMBatch whose rows are shared out over the minibatches, or None.
    models: Models.
    optimizers: {'policy': optax optimizer, 'critic': optax optimizer}.
    settings: Settings.

  Returns:
    The next TrainState and metrics, scalars.
  """
  experience, moments, summary = make_experience(
      state, frozen, rollout, scores, models=models, settings=settings)
  kl_coef = adv.next_kl_coef(
      state.kl_coef, experience.logprobs - experience.ref_logprobs,
      experience.response_mask, controller=settings.kl_controller,
      target=settings.kl_target, horizon=settings.kl_horizon)
  experience = experience.replace(tokens=processes.after(experience.tokens, (kl_coef, moments, summary)))
  batch = experience.tokens.shape[0]
  if ptx is not None:
    ptx = jax.tree.map(
        lambda x: x.reshape((settings.minibatches, -1) + x.shape[1:]), ptx)

  def minibatch(carry, xs):
    params, opt_state = carry
    order, ptx_rows = xs
    rows = sharding.shard_rows(jax.tree.map(lambda x: x[order], experience))
    grads, metrics = gradients(
        params, rows, frozen, ptx_rows, state.kl_coef, models=models, settings=settings)
    params, opt_state, norms = optim.apply(params, opt_state, grads, optimizers)
    return (params, opt_state), metrics | norms

  def epoch(carry, key):
    order = jax.random.permutation(key, batch).reshape(settings.minibatches, -1)
    return jax.lax.scan(minibatch, carry, (order, ptx))

  keys = jax.random.split(types.step_keys(state)[1], settings.epochs)
  (params, opt_state), metrics = jax.lax.scan(
      epoch, (state.params, state.opt_state), keys)
  metrics = jax.tree.map(jnp.mean, metrics) | summary | {
      'policy/first_ratio': metrics['policy/ratio'][0, 0]}
  return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state, kl_coef=kl_coef,
      reward_moments=moments), metrics


def make_settings(config, eos_id):
  """Settings of a config."""
  toggles = {name: config.ppo[name] for name in config.ppo if name != 'kl_coef'}
  return ppo_settings.Settings(
      microbatch_size=config.microbatch_size, temperature=config.sampling.temperature,
      eos_id=eos_id, **toggles)


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
  models = Models(model, critic_model, critic_shared=config.critic.kind == 'adapters')
  settings = make_settings(config, tokenizer.eos_token_id)
  steps = setup.train_steps(config, actor.rows)
  updates = steps * settings.epochs * settings.minibatches
  optimizers = {
      'policy': setup.make_optimizer(config.optim, updates),
      'critic': setup.make_optimizer(
          config.optim, updates, learning_rate=config.critic.learning_rate, exported=False)}
  state = setup.new_state(config, {'policy': policy, 'critic': critic}, optimizers, mesh,
                          model.rules, kl_coef=config.ppo.kl_coef)
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

"""Proximal policy optimization of a language model against scores and a KL penalty.

Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), Stiennon et al. 2020
(https://arxiv.org/abs/2009.01325), Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155).
The choices these make differently are in ppo_settings.py.

One iteration is `rollout` (decode.py), scoring, and `train_step` below, which holds all the
rest: log-probabilities of behaviour policy and reference, values, rewards, GAE (all these in
ppo_experience.py), and a scan over epochs and minibatches of the clipped losses.

Letters: B batch, P prompt length, R response length, T = P + R, D width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import learner
from rlhf_jax import lengths
from rlhf_jax import losses
from rlhf_jax import optim
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import ppo_experience as experience_lib
from rlhf_jax.algorithms import ppo_settings
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft


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

  def reaching(self, length):
    """The same for rows of T = `length`, of which some slots may be cut."""
    critic = self.critic and self.critic.reaching(length)
    return self._replace(policy=self.policy.reaching(length), critic=critic)


def passes(params, frozen, rollout, *, models, settings):
  """Forward passes over a rollout before the first update, a microbatch at a time.

  Args:
    params: of policy and critic.
    frozen: see `train_step`.
    rollout: Rollout.
    models: Models.
    settings: Settings.

  Returns:
    Fixed, and Outputs; None for these where the first epoch gives them, see `learn_whole`.
  """
  size, whole = settings.microbatch_size, takes_whole(settings, rollout)
  batch, slots = rollout.response_mask.shape

  def forward(rows):
    fixed = experience_lib.fixed_passes(params, frozen, rows, models=models, settings=settings)
    outputs = None if whole else experience_lib.evaluate(
        params, frozen, rows, fixed.trunk, models=models, temperature=settings.temperature)
    return lengths.fill((fixed, outputs), slots - rows.response_mask.shape[1])

  if not in_microbatches(settings, rollout):
    return forward(rollout)
  mask = adv.step_mask(rollout.response_mask, settings.score_position)
  order = lengths.order(mask)
  split = jax.tree.map(lambda x: x[order].reshape((-1, size) + x.shape[1:]), (rollout, mask))
  out = jax.lax.scan(lambda _, part: (None, lengths.cut(forward, *part, settings.length_buckets)), None, split,
                     unroll=processes.unrolled())[1]
  return jax.tree.map(lambda x: x.reshape((batch,) + x.shape[2:])[jnp.argsort(order)], out)


def in_microbatches(settings, rows):
  """Whether forward and backward passes are over some of these rows at a time."""
  return 0 < settings.microbatch_size < rows.tokens.shape[0]


def takes_whole(settings, rollout):
  """Whether an epoch is one forward and backward pass over all rows."""
  return settings.minibatches == 1 and not in_microbatches(settings, rollout)


def loss(outputs, rows, counts, kl_coef, settings):
  """The clipped losses of a microbatch, as its share of the whole minibatch's mean.

  Args:
    outputs: Outputs of the policy and critic that are trained.
    rows: Experience of the microbatch.
    counts: slots with a policy loss and with a value loss in the whole minibatch.
    kl_coef: float32 scalar, used where the KL is in the loss.
    settings: Settings.

  Returns:
    Scalar loss, and metrics that add up over microbatches.
  """
  tokens, steps = counts
  mask = rows.response_mask
  mean = lambda x: adv.masked_sum(x, mask) / tokens
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  policy, policy_clipped, ratio = losses.ppo_policy_loss(
      logprobs, rows.logprobs, rows.advantages, clip_low=settings.clip_low,
      clip_high=settings.clip_high, dual_clip=settings.dual_clip)
  value, value_clipped = losses.ppo_value_loss(
      outputs.values, rows.values, rows.returns, clip=settings.value_clip)
  policy_loss = mean(policy)
  value_loss = adv.masked_sum(value, rows.step_mask) / steps
  total = policy_loss + settings.vf_coef * value_loss
  if settings.entropy_coef:  # A zero would be differentiated all the same.
    total -= settings.entropy_coef * mean(outputs.entropy)
  if settings.kl_in == 'loss':
    total += kl_coef * mean(
        adv.kl_estimate(logprobs, rows.ref_logprobs, settings.kl_estimator))
  return total, {
      'policy/loss': policy_loss,
      'policy/approxkl': 0.5 * mean(jnp.square(logprobs - rows.logprobs)),
      'policy/clipfrac': mean(policy_clipped),
      'policy/ratio': mean(ratio),
      'policy/entropy': mean(outputs.entropy),
      'value/loss': value_loss,
      'value/clipfrac': adv.masked_sum(value_clipped, rows.step_mask) / steps,
      'value/mean': adv.masked_sum(outputs.values, rows.step_mask) / steps,
  }


def as_minibatch(rows, settings):
  """Experience with its advantages whitened where that is done by minibatch, and `counts` of `loss`."""
  if settings.whiten_advantages == 'minibatch':
    rows = rows.replace(advantages=adv.whiten(
        rows.advantages, rows.response_mask, unbiased=settings.whiten_unbiased))
  return rows, (jnp.maximum(jnp.sum(rows.response_mask), 1), jnp.maximum(jnp.sum(rows.step_mask), 1))


def gradients(params, rows, frozen, kl_coef, *, models, settings):
  """Gradients of one minibatch, summed over its microbatches of rows of like length.

  Args:
    params: policy and critic.
    rows: Experience of the minibatch.
    frozen: see `train_step`.
    kl_coef: float32 scalar.
    models: Models.
    settings: Settings.

  Returns:
    Gradients shaped like `params`, and metrics.
  """
  rows, counts = as_minibatch(rows, settings)

  def microbatch(params, rows):
    outputs = experience_lib.evaluate(params, frozen, rows, rows.trunk, models=models, temperature=settings.temperature)
    return loss(outputs, rows, counts, kl_coef, settings)

  grad = jax.grad(microbatch, has_aux=True)
  if not in_microbatches(settings, rows):
    return grad(params, rows)

  def cut(params, rows):
    return lengths.cut(functools.partial(grad, params), rows, rows.step_mask, settings.length_buckets)

  order = lengths.order(rows.step_mask)
  rows = sharding.shard_rows(jax.tree.map(lambda x: x[order], rows))
  return optim.accumulate(cut, params, rows, settings.microbatch_size)


def mix_in_pretraining(grads, metrics, params, frozen, ptx, *, models, settings):
  """Gradients and metrics with those of the language modelling loss on LMBatch `ptx`, if there is one."""
  if ptx is None:
    return grads, metrics
  ptx_loss, ptx_grads = jax.value_and_grad(sft.mean_loss)(
      params['policy'], frozen['shared'], ptx, model=models.policy)
  policy = jax.tree.map(lambda g, h: g + settings.ptx_coef * h, grads['policy'], ptx_grads)
  return grads | {'policy': policy}, metrics | {'ptx/loss': ptx_loss}


def learn_whole(state, frozen, rollout, ptx, fixed, score, *, models, optimizers, settings):
  """The epochs, where each is one minibatch in one piece.

  The first epoch starts from the parameters that the experience is made with. So its forward pass
  is the one that gives the experience, too.

  Args:
    state, frozen, rollout, ptx, models, optimizers, settings: see `train_step`.
    fixed: Fixed.
    score: `make_experience` as a function of the Outputs before the update.

  Returns:
    (params, opt_state), what `score` gives but for the Experience, and metrics of each update.
  """
  def epoch(carry, first):
    params, opt_state, before = carry

    def whole(params):
      outputs = experience_lib.evaluate(
          params, frozen, rollout, fixed.trunk, models=models, temperature=settings.temperature)
      behaviour = jax.tree.map(lambda new, old: jnp.where(first, new, old), jax.lax.stop_gradient(outputs), before)
      experience, *described = score(behaviour)
      rows, counts = as_minibatch(experience, settings)
      total, metrics = loss(outputs, rows, counts, state.kl_coef, settings)
      return total, (metrics, behaviour, described)

    grads, (metrics, before, described) = jax.grad(whole, has_aux=True)(params)
    grads, metrics = mix_in_pretraining(grads, metrics, params, frozen, ptx, models=models, settings=settings)
    params, opt_state, norms = optim.apply(params, opt_state, grads, optimizers)
    return (params, opt_state, before), (metrics | norms, described)

  nothing = experience_lib.Outputs(*[jnp.zeros(rollout.response_mask.shape)] * 3)
  (params, opt_state, _), (metrics, described) = jax.lax.scan(
      epoch, (state.params, state.opt_state, nothing), jnp.arange(settings.epochs) == 0)
  return (params, opt_state), jax.tree.map(lambda x: x[-1], described), metrics


def learn_in_minibatches(state, frozen, experience, ptx, *, models, optimizers, settings):
  """The epochs, over shuffled minibatches of an Experience; see `train_step`.

  Returns:
    (params, opt_state), and metrics of each update.
  """
  if ptx is not None:
    ptx = jax.tree.map(
        lambda x: x.reshape((settings.minibatches, -1) + x.shape[1:]), ptx)

  def minibatch(carry, xs):
    params, opt_state = carry
    order, ptx_rows = xs
    rows = sharding.shard_rows(jax.tree.map(lambda x: x[order], experience))
    grads, metrics = gradients(params, rows, frozen, state.kl_coef, models=models, settings=settings)
    grads, metrics = mix_in_pretraining(grads, metrics, params, frozen, ptx_rows, models=models, settings=settings)
    params, opt_state, norms = optim.apply(params, opt_state, grads, optimizers)
    return (params, opt_state), metrics | norms

  def epoch(carry, key):
    order = jax.random.permutation(key, experience.tokens.shape[0]).reshape(settings.minibatches, -1)
    return jax.lax.scan(minibatch, carry, (order, ptx))

  keys = jax.random.split(types.step_keys(state)[1], settings.epochs)
  return jax.lax.scan(epoch, (state.params, state.opt_state), keys)


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
  models = models.reaching(rollout.tokens.shape[1])
  static = dict(models=models, optimizers=optimizers, settings=settings)
  fixed, outputs = passes(state.params, frozen, rollout, models=models, settings=settings)
  score = functools.partial(experience_lib.make_experience, state, rollout, scores, fixed, settings=settings)
  if takes_whole(settings, rollout):
    learned, (moved, summary), metrics = learn_whole(state, frozen, rollout, ptx, fixed, score, **static)
  else:
    experience, moved, summary = score(outputs)
    experience = experience.replace(tokens=processes.after(experience.tokens, (moved, summary)))
    learned, metrics = learn_in_minibatches(state, frozen, experience, ptx, **static)
  params, opt_state = learned
  metrics = jax.tree.map(jnp.mean, metrics) | summary | {
      'policy/first_ratio': metrics['policy/ratio'].reshape(-1)[0]}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state, **moved), metrics


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

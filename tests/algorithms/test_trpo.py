"""TRPO: an update by hand with an explicit Fisher matrix, its bounds, its parts, learning."""

import functools

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import errors
from rlhf_jax import forward as forward_lib
from rlhf_jax import models
from rlhf_jax import optim
from rlhf_jax import sharding
from rlhf_jax import trust_region
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import trpo
from rlhf_jax.models import heads
import tiny

P, R, B, V, T = 3, 32, 8, 11, 0.7
LLAMA = {
  'family': 'llama',
  'vocab_size': V,
  'hidden_size': 4,
  'intermediate_size': 6,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'max_position_embeddings': P + R,
  'tie_word_embeddings': True,
  'initializer_range': 0.4,
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def settings_of(**changes):
  base = dict(
    microbatch_size=0,
    temperature=T,
    samples=1,
    max_new_tokens=R,
    end_tokens=(2,),
    end_after=0,
    kl_coef=0.1,
    epochs=3,
    cg_steps=300,
  )
  return trpo.Settings(**base | changes)


@functools.cache
def episode():
  """A rollout of ragged responses, scores, a policy, its reference and a critic."""
  rng = np.random.default_rng(0)
  mask = np.arange(R) < np.array([3, 20, 9, 2, 32, 5, 4, 6])[:, None]
  rollout = types.Rollout(
    tokens=jnp.asarray(rng.integers(4, V, (B, P + R)), jnp.int32),
    mask=jnp.asarray(np.concatenate([np.ones((B, P), bool), mask], axis=1)),
    response_mask=jnp.asarray(mask),
    logprobs=jnp.zeros((B, R)),
  )
  model = models.create(LLAMA)
  critic = {
    'backbone': model.init(jax.random.key(3)),
    'head': heads.init_scalar(jax.random.key(4), model.width, scale='normal'),
  }
  params = {'policy': model.init(jax.random.key(1)), 'critic': critic}
  move = lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape)
  frozen = {'policy': {}, 'reference': jax.tree.map(move, params['policy'])}
  return rollout, jnp.float32(rng.normal(size=B)), model, params, frozen


@functools.cache
def train_step(settings, ema=0.0):
  """One step from `episode`; returns the state before it, the state after it, and metrics."""
  rollout, scores, model, params, frozen = episode()
  optimizers = {'policy': optim.direct(ema=ema), 'critic': optax.adam(1e-3, eps=1e-3)}
  state = types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(0),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    extra={'kl_coef': jnp.float32(0.1), 'reward_moments': jnp.zeros(3)},
  )
  step = functools.partial(
    trpo.train_step,
    models=forward_lib.Models(model, critic=model),
    optimizers=optimizers,
    settings=settings,
  )
  return state, *jax.jit(step)(state, frozen, rollout, scores, None)


def logprobs_of(model, params, rollout):
  """[B, R, V], from the logits of the whole sequences."""
  positions = types.positions_from_mask(rollout.mask)
  hidden, _ = model.forward(params, rollout.tokens, positions, rollout.mask)
  return jax.nn.log_softmax(model.unembed(params, hidden)[:, P - 1 : -1] / T)


@functools.cache
def by_hand():
  """The step's size, direction [n] and gradient [n], and functions of its surrogate and KL."""
  rollout, scores, model, params, frozen = episode()
  vector, back = ravel_pytree(params['policy'])
  mask, tokens = np.asarray(rollout.response_mask), rollout.tokens[:, P:, None]
  count = mask.sum()
  everything = jax.jit(lambda vector: logprobs_of(model, back(vector), rollout))
  chosen = lambda vector: jnp.take_along_axis(everything(vector), tokens, axis=-1)[..., 0]
  advantages = advantages_by_hand(model, params, frozen, rollout, scores, chosen(vector))
  old, old_chosen = np.asarray(everything(vector), np.float64), chosen(vector)
  surrogate = lambda v: (
    jnp.sum(jnp.where(mask, jnp.exp(chosen(v) - old_chosen) * advantages, 0.0)) / count
  )
  kl = lambda v: np.sum(mask * np.sum(np.exp(old) * (old - everything(v)), axis=-1)) / count
  gradient = np.asarray(jax.grad(surrogate)(vector), np.float64)
  jacobian = np.asarray(jax.jacfwd(everything)(vector), np.float64)
  fisher = np.zeros((len(vector), len(vector)))
  for i, t in zip(*np.nonzero(mask)):  # the expectation of the outer product of the score
    fisher += jacobian[i, t].T @ (np.exp(old[i, t])[:, None] * jacobian[i, t]) / count
  damped = fisher + 0.1 * np.eye(len(vector))
  direction = np.linalg.solve(damped, gradient)
  size = np.sqrt(2 * 0.01 / (direction @ damped @ direction))
  return size, direction, gradient, surrogate, kl


def advantages_by_hand(model, params, frozen, rollout, scores, logprobs):
  """GAE with lambda 0.95 of -0.1 KL, and the score on the last token; whitened over tokens."""
  mask = np.asarray(rollout.response_mask)
  reference = logprobs_of(model, frozen['reference'], rollout)
  kl = logprobs - jnp.take_along_axis(reference, rollout.tokens[:, P:, None], axis=-1)[..., 0]
  states = model.response_states(params['critic']['backbone'], rollout.tokens, rollout.mask, R)
  values = np.where(mask, heads.apply_scalar(params['critic']['head'], states), 0.0)
  advantages = np.zeros((B, R))
  for i in range(B):
    last, ahead = np.flatnonzero(mask[i])[-1], 0.0
    for t in reversed(range(R)):
      reward = (-0.1 * kl[i, t] if mask[i, t] else 0.0) + (scores[i] if t == last else 0.0)
      after = values[i, t + 1] if t + 1 < R else 0.0
      ahead = reward + after - values[i, t] + 0.95 * ahead
      advantages[i, t] = ahead
  real = advantages[mask]
  return np.where(mask, (advantages - real.mean()) / np.sqrt(real.var() + 1e-8), 0.0)


def test_an_update_is_the_one_by_hand():
  """In microbatches of two sequences, cut to 16 or 32 tokens."""
  size, direction, gradient, surrogate, kl = by_hand()
  before, after, metrics = train_step(settings_of(microbatch_size=2))
  old, new = (ravel_pytree(state.params['policy'])[0] for state in (before, after))
  k = int(metrics['trust_region/attempts'])
  for attempt in range(k):
    tried = old + 0.8**attempt * size * direction
    good = surrogate(tried) > surrogate(old) and kl(tried) < 0.01
    assert good == (attempt == k - 1)
  close(new, tried)
  close(metrics['trust_region/kl'], kl(new), atol=1e-7)
  close(metrics['trust_region/improvement'], surrogate(new) - surrogate(old))
  close(metrics['trust_region/step_size'], size * 0.8 ** (k - 1))
  close(metrics['policy/grad_norm'], np.linalg.norm(gradient))
  close(metrics['policy/update_norm'], np.linalg.norm(new - old))
  assert metrics['trust_region/accepted'] == 1 and metrics['trust_region/residual'] < 1e-5


def test_the_critic_takes_its_epochs_with_adam():
  """Against optax, full batches: the loss is half the mean square over real tokens."""
  rollout, _, model, params, _ = episode()
  before, after, metrics = train_step(settings_of(microbatch_size=2))
  mask, critic = rollout.response_mask, params['critic']
  values = lambda critic: heads.apply_scalar(
    critic['head'], model.response_states(critic['backbone'], rollout.tokens, rollout.mask, R)
  )
  # The returns are the advantages before whitening plus the values.
  forward = forward_lib.Forward(forward_lib.Models(model, critic=model), episode()[4], T)
  goal = trpo.ppo.objective(before, rollout, episode()[1], settings=settings_of())
  fixed, outputs = update.before_update(
    params, rollout, goal.step_mask, forward=forward, schedule=settings_of().schedule
  )
  returns = goal.prepare(outputs, fixed)[0].returns
  loss = lambda critic: 0.5 * jnp.sum(mask * (values(critic) - returns) ** 2) / jnp.sum(mask)
  optimizer = optax.adam(1e-3, eps=1e-3)
  opt_state, seen, gradients = optimizer.init(critic), [], jax.jit(jax.value_and_grad(loss))
  for _ in range(3):
    value, gradient = gradients(critic)
    updates, opt_state = optimizer.update(gradient, opt_state)
    critic = optax.apply_updates(critic, updates)
    seen.append(value)
  jax.tree.map(close, after.params['critic'], critic)
  close(metrics['value/loss'], np.mean(seen))


def test_a_rejected_step_restores_the_last_bit():
  """With negative damping the KL is larger than its quadratic model, and its only attempt fails."""
  settings = settings_of(max_kl=1e-4, cg_damping=-0.5, cg_steps=1, line_search_steps=1)
  before, after, metrics = train_step(settings, 0.9)
  assert metrics['trust_region/accepted'] == 0 and metrics['trust_region/attempts'] == 1
  assert metrics['policy/update_norm'] == 0
  for part in ('params', 'opt_state'):
    old, new = (jax.tree.leaves(getattr(state, part)['policy']) for state in (before, after))
    for a, b in zip(old, new, strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert after.step == 1 and metrics['critic/update_norm'] > 0
  assert trust_region.Region() == trpo.Settings(**vars(settings_of(cg_steps=15))).region


def test_accepted_steps_respect_the_bound_and_learn_good_words(world):
  config = tiny.on_policy(trpo.config(), world)
  config.batch_size, config.rl.max_kl, config.critic.kind = 64, 0.05, 'trunk'
  config.rl.cg_steps, config.rl.kl_coef = 5, 0.01
  _, _, history, _ = tiny.train(trpo, config, 15)
  for metrics in history:
    if metrics['trust_region/accepted']:
      assert 0 < metrics['trust_region/kl'] < 0.05 and metrics['trust_region/improvement'] > 0
  assert sum(metrics['trust_region/accepted'] for metrics in history) > 10
  scores = [float(metrics['objective/scores']) for metrics in history]
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores


def trained(config):
  """State before and after 2 steps, and the metrics of both."""
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    first = jax.device_get(trpo.create(config, mesh)[1].params)
  _, state, history, _ = tiny.train(trpo, config, 2)
  return first, jax.device_get(state.params), history


@pytest.mark.slow
def test_adapters_share_the_trunk_with_the_critic(world):
  """Only the adapters of the last layer are trained, and the critic has adapters of its own."""
  config = tiny.on_policy(trpo.config(), world)
  config.rl.update({'epochs': 2, 'minibatches': 2, 'cg_steps': 3})
  config.model.unfrozen_layers, config.microbatch_size = 1, 4
  config.model.lora.targets, config.critic.kind = (('.*', 2, 4.0),), 'adapters'
  first, last, history = trained(config)
  assert set(first['policy']) == {'top'} and set(first['critic']) == {'head', 'backbone'}
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, last)
  assert min(jax.tree.leaves(moved)) > 0, moved
  assert all(metrics['trust_region/accepted'] == 1 for metrics in history)
  assert all(np.isfinite(x).all() for metrics in history for x in metrics.values())


def test_invalid_settings_are_named(world):
  for values, message in (
    ({'rl.max_kl': 0.0}, 'config.rl.max_kl=0.0'),
    ({'rl.cg_steps': 0}, 'config.rl.cg_steps=0'),
    ({'rl.cg_damping': -0.1}, 'config.rl.cg_damping=-0.1'),
    ({'rl.line_search_shrink': 1.0}, 'config.rl.line_search_shrink=1.0'),
    ({'rl.entropy_coef': 0.1}, 'config.rl.entropy_coef=0.1'),
    ({'rl.kl_in': 'loss'}, "config.rl.kl_in='loss'"),
    ({'rl.whiten_advantages': 'minibatch'}, "config.rl.whiten_advantages='minibatch'"),
    ({'rl.behaviour': 'minibatch'}, "config.rl.behaviour='minibatch'"),
  ):
    config = tiny.on_policy(trpo.config(), world)
    config.update_from_flattened_dict(values)
    with pytest.raises(errors.UserError, match=message):
      trpo.validate(config, 1)

"""A2C: RL4LMs' loss, gradients and optimizer, complete updates by hand, learning."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_ppo_by_hand as by_hand

import references
import references_ppo
from rlhf_jax import errors
from rlhf_jax import forward
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import a2c
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import setup
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'rl4lms.npz')
SETTINGS = a2c.Settings(
  microbatch_size=0, temperature=1.0, samples=1, max_new_tokens=4, end_tokens=(), end_after=0
)


def golden_loss(params):
  """Computes our loss on RL4LMs' 12 tokens, in rows of 3 and 4 tokens with masked ones between."""
  mask = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1]], bool)
  assert mask.sum() == len(GOLDEN['a2c/actions'])

  def spread(tokens, fill):
    return jnp.full(mask.shape, fill).at[mask].set(tokens)

  logits, values = (x['x'] for x in params)
  logprobs = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(logprobs, GOLDEN['a2c/actions'][:, None], axis=1)[:, 0]
  entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=1)
  experience = types.Experience(
    tokens=None,
    mask=None,
    response_mask=mask,
    step_mask=mask,
    logprobs=spread(jax.lax.stop_gradient(chosen), 0.0),
    advantages=spread(GOLDEN['a2c/advantages'], 7.0),
    returns=spread(GOLDEN['a2c/returns'], 7.0),
  )
  outputs = forward.Outputs(spread(chosen, -3.0), spread(entropy, 9.0), spread(values, 5.0))
  return a2c.loss(outputs, experience, update.Counts(12, 12, 4), kl_coef=0.0, settings=SETTINGS)


def test_loss_gradients_and_three_steps_are_those_of_rl4lms():
  config = a2c.config()
  config.optim.learning_rate = 7e-4
  optimizers = [setup.make_optimizer(config.optim, 10) for _ in range(2)]
  params = [{'x': jnp.asarray(GOLDEN[f'a2c/{name}'])} for name in ('logits', 'values')]
  states = [tx.init(x) for tx, x in zip(optimizers, params)]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  for step in range(3):
    (total, metrics), gradients = jax.value_and_grad(golden_loss, has_aux=True)(params)
    if not step:
      close(total, GOLDEN['a2c/loss'])
      close(metrics['policy/loss'], GOLDEN['a2c/policy_loss'])
      close(metrics['value/loss'], GOLDEN['a2c/value_loss'])
      close(gradients[0]['x'], GOLDEN['a2c/logits_gradient'])
      close(gradients[1]['x'], GOLDEN['a2c/values_gradient'])
      close([metrics['policy/ratio'], metrics['policy/approxkl']], [1, 0])
    for i, tx in enumerate(optimizers):
      changes, states[i] = tx.update(gradients[i], states[i], params[i])
      params[i] = optax.apply_updates(params[i], changes)
  close(params[0]['x'], GOLDEN['a2c/new_logits'])
  close(params[1]['x'], GOLDEN['a2c/new_values'])


@pytest.mark.parametrize('kind', ['separate', 'trunk'])
def test_two_iterations_agree(kind):
  """PPO by hand gives A2C: with one minibatch the ratio is 1, its gradient -A, and 2 c/2 = c."""
  hand = references_ppo.SETTINGS | dict(
    coef=0.05,
    critic=kind,
    epochs=1,
    minibatches=1,
    gamma=0.99,
    lam=1.0,
    vf_coef=1.0,  # of half the square
    value_clip=0.0,
    whiten_advantages='none',
    behaviour='forward',
    entropy_coef=0.01,
    controller='adaptive_per_token',
    target=0.5,
  )
  config = a2c.config()
  config.optim.update({'learning_rate': by_hand.RATE, 'clip_norm': None})
  config.critic.kind = kind
  config.rl.update(
    {'entropy_coef': 0.01, 'kl_controller': 'adaptive_per_token', 'kl_target': 0.5, 'kl_coef': 0.05}
  )
  optimizer = setup.make_optimizer(config.optim, 2)
  static = dict(
    models=forward.Models(by_hand.LastToken(), by_hand.LastToken() if kind == 'separate' else None),
    optimizers={'policy': optimizer, 'critic': optimizer},
    settings=a2c.Settings.of(config, (by_hand.EOS,)),
  )
  rng = np.random.default_rng(5)
  params, reference = by_hand.make_params(rng, kind)
  state = by_hand.make_state(config, params, static['optimizers'])
  train_step = jax.jit(functools.partial(a2c.train_step, **static))
  mine, coef = by_hand.flat(params), hand['coef']
  rmsprop = references.RMSProp(decay=0.99, eps=1e-5, tensorflow=False)
  for _ in range(2):
    episodes = by_hand.make_episodes(rng, raw=False, dense=None, params=mine)
    mine, coef, expected = references_ppo.iteration(
      mine,
      {f'policy/{k}': v.astype(np.float64) for k, v in reference.items()},
      episodes,
      coef,
      settings=hand,
      adam=rmsprop,
      rates=iter([by_hand.RATE]),
      orders=by_hand.epoch_orders(state, 1),
      scale=references.RunningScale(),
    )
    state, metrics = train_step(
      state, {'policy': {}, 'reference': reference}, *by_hand.make_rollout(rng, episodes), None
    )
    for name, value in by_hand.flat(state.params).items():
      np.testing.assert_allclose(value, mine[name], rtol=0, atol=1e-5, err_msg=name)
    for name in ('objective/kl', 'value/mean', 'returns/mean', 'policy/entropy_per_token'):
      np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(metrics['value/loss'], 2 * expected['value/loss'], rtol=2e-5)
    np.testing.assert_allclose(state.extra['kl_coef'], coef, rtol=1e-6)


def test_defaults_are_those_of_rl4lms():
  config = a2c.config()
  assert (
    dataclasses.asdict(SETTINGS).items()
    >= {
      'epochs': 1,
      'minibatches': 1,
      'gamma': 0.99,
      'lam': 1.0,
      'vf_coef': 0.5,
      'entropy_coef': 0.0,
      'whiten_advantages': 'none',
    }.items()
  )
  assert (config.optim.name, config.optim.b2, config.optim.eps) == ('rmsprop', 0.99, 1e-5)
  assert config.optim.clip_norm == 0.5


def test_a_second_pass_is_an_error(world):
  config = tiny.on_policy(a2c.config(), world)
  build.validate(config, 1)
  config.rl.epochs = 2
  with pytest.raises(errors.UserError, match='config.rl.epochs=2 must be 1'):
    build.validate(config, 1)


def test_it_learns_to_use_good_words(world):
  """With the critic on the policy's hidden states, and two minibatches in one pass."""
  config = tiny.on_policy(a2c.config(), world)
  config.critic.kind, config.batch_size, config.rl.minibatches = 'trunk', 64, 4
  config.optim.learning_rate, config.rl.kl_coef = 0.01, 0.01
  _, _, history, _ = tiny.train(a2c, config, 20)
  scores = [float(metrics['objective/scores']) for metrics in history]
  assert abs(history[0]['objective/kl']) < 1e-4
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores

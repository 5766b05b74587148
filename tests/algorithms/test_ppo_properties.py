"""PPO from its config learns with each kind of critic and reward; its state and its random keys."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import heads
import tiny

ITERATIONS = 20
MODEL = models.create(tiny.LLAMA)


def good_tokens(prompts, responses, *, response_tokens, metadata):
  """Returns 1/6 for each token among w0 .. w29, so 6 tokens sum to the fraction of good tokens."""
  del prompts, responses, metadata
  return [[float(4 <= token < 34) / 6 for token in row] for row in response_tokens]


def first_token(prompts, responses, *, response_tokens, metadata):
  """Returns scores that differ between responses and increase with the first token."""
  del prompts, responses, metadata
  return [3.0 + 0.5 * row[0] for row in response_tokens]


def learning(world, critic, function):
  config = tiny.ppo(world)
  config.critic.kind = critic
  config.reward.function = function
  config.batch_size, config.optim.learning_rate = 64, 0.01
  config.rl.kl_coef = 0.01
  return config


@pytest.mark.parametrize(
  'critic, function',
  [
    ('separate', 'tiny:good_words'),
    ('trunk', 'tiny:good_words'),
    ('separate', f'{__name__}:good_tokens'),
  ],
  ids=['its own critic', 'critic on the trunk', 'rewards per token'],
)
def test_it_learns_to_use_good_words(critic, function, world):
  config = learning(world, critic, function)
  _, state, history, _ = tiny.train(ppo, config, ITERATIONS)
  assert ('backbone' in state.params['critic']) == (critic == 'separate')
  scores = [float(metrics['objective/scores']) for metrics in history]
  assert abs(history[0]['objective/kl']) < 1e-4  # policy and reference are equal
  assert history[-1]['objective/kl'] > 0.05
  assert np.mean(scores[:2]) < 0.65, scores
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores
  assert all(metrics['policy/sampler_gap'] < 1e-4 for metrics in history)
  assert float(state.extra['kl_coef']) == pytest.approx(
    config.rl.kl_coef
  )  # 'fixed' does not change
  np.testing.assert_array_equal(state.extra['reward_moments'], np.zeros(3))  # scores are not scaled


@pytest.mark.parametrize('shape, rows', [({}, 5), ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8)])
def test_a_few_rows_at_a_time_sample_the_same(shape, rows, world):
  mesh = sharding.make_mesh(shape, devices=devices.first(8 if shape else 1))
  found = []
  with jax.set_mesh(mesh):
    for max_concurrent in (0, rows):
      config = tiny.ppo(world)
      config.sampling.max_concurrent = max_concurrent
      learner, state = ppo.create(config, mesh)
      batch, _ = learner.next_batch(state, timed=False)
      _, rollout, scores, _ = batch
      found.append(jax.device_get((rollout, scores)))
      found[-1] += (jax.device_get(learner.train_step(state, *batch)[1]),)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


def test_the_state_carries_the_kl_coefficient_and_the_moments_of_the_scores(world):
  config = tiny.ppo(world)
  config.reward.function = f'{__name__}:first_token'
  config.rl.update(
    {
      'scale_scores': True,
      'kl_controller': 'adaptive',
      'kl_target': 0.05,
      'kl_horizon': 100.0,
      'kl_coef': 0.2,
    }
  )
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  seen, coef = [], 0.2
  with jax.set_mesh(mesh):
    learner, state = ppo.create(config, mesh)
    for step in range(3):
      batch, _ = learner.next_batch(state, timed=False)
      scores = np.asarray(batch[2], np.float64)
      seen.extend(scores)
      state, metrics = learner.train_step(state, *batch)
      np.testing.assert_allclose(metrics['objective/kl_coef'], coef, rtol=1e-5)
      # Scores are divided by the standard deviation of all scores so far, including these.
      np.testing.assert_allclose(
        metrics['objective/postprocessed_scores'], scores.mean() / np.std(seen, ddof=1), rtol=1e-4
      )
      np.testing.assert_allclose(
        state.extra['reward_moments'],
        [len(seen), np.mean(seen), np.var(seen) * len(seen)],
        rtol=1e-4,
      )
      error = np.clip(float(metrics['objective/kl']) / 0.05 - 1, -0.2, 0.2)
      coef *= 1 + error * config.batch_size / 100
      np.testing.assert_allclose(state.extra['kl_coef'], coef, rtol=1e-5)
      assert state.step == step + 1
  assert coef != pytest.approx(0.2, rel=0.01)


def test_each_step_has_keys_of_its_own(world):
  """With equal prompts and parameters, only another step gives another rollout."""
  state = types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(0),
    params={},
    opt_state={},
    extra={'kl_coef': 0.0, 'reward_moments': None},
  )
  keys = [jax.random.key_data(types.step_keys(state.replace(step=jnp.int32(i)))) for i in range(30)]
  assert len({tuple(row) for row in np.concatenate(keys).tolist()}) == 60
  mesh, prompts = sharding.make_mesh({}, devices=jax.devices()[:1]), []
  with jax.set_mesh(mesh):
    learner, state = ppo.create(tiny.ppo(world), mesh)
    batch, _ = learner.next_batch(state, timed=False)
    first = jax.device_get(batch[1])
    for step in (0, 1):
      again, state = ppo.create(tiny.ppo(world), mesh)  # its iterator starts with the same prompts
      state = state.replace(step=jnp.int32(step))
      rollout = jax.device_get(again.next_batch(state, timed=False)[0][1])
      prompts.append(rollout.tokens[:, :6])
      same = (rollout.tokens == first.tokens).all(axis=1)
      assert same.all() if step == 0 else same.mean() < 0.2
  np.testing.assert_array_equal(prompts[0], prompts[1])


def assert_same_run(state, history, other_state, other_history):
  """Compares the final parameters and the metrics of every step, up to rounding."""
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other_state.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
  for a, b in zip(history, other_history, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_microbatches_are_the_full_batch_with_pretraining_mixed_in(world):
  config = tiny.ppo(world)
  tiny.mix_in_pretraining(config, world)
  config.optim.eps = 1e-4  # with 1e-8 Adam amplifies the rounding of small gradients
  _, whole, expected, _ = tiny.train(ppo, config, 2)
  config.microbatch_size = 2
  _, parts, found, _ = tiny.train(ppo, config, 2)
  assert_same_run(whole, expected, parts, found)
  assert all(metrics['ptx/loss'] > 1 for metrics in expected)


@pytest.mark.parametrize('critic, unfrozen', [('separate', None), ('trunk', 1)])
def test_an_epoch_in_one_piece_is_one_of_microbatches(critic, unfrozen, world):
  """The first epoch's forward pass gives the experience; with microbatches an earlier pass does."""
  config = tiny.ppo(world)
  config.critic.kind, config.model.unfrozen_layers = critic, unfrozen
  config.rl.update({'epochs': 3, 'minibatches': 1, 'whiten_advantages': 'minibatch'})
  config.optim.eps = 1e-4
  _, whole, expected, _ = tiny.train(ppo, config, 3)
  config.microbatch_size = 4
  _, parts, found, _ = tiny.train(ppo, config, 3)
  assert_same_run(whole, expected, parts, found)


def test_pretraining_rows_pull_the_policy_towards_them(world):
  """PPO-ptx lowers the loss on the pretraining examples."""
  config = tiny.ppo(world)
  tiny.mix_in_pretraining(config, world)
  _, _, mixed, _ = tiny.train(ppo, config, 12)
  config.rl.ptx_coef = 1e-6
  _, _, barely, _ = tiny.train(ppo, config, 12)
  assert mixed[0]['ptx/loss'] < barely[0]['ptx/loss'] + 0.1
  assert mixed[-1]['ptx/loss'] < barely[-1]['ptx/loss'] - 0.3


def test_a_reward_per_token_on_the_last_one_is_a_score(world):
  """Rewards per token that are 0 except at the last real token train like a score at that token."""
  config = tiny.ppo(world)
  config.rl.update({'missing_eos': 'subtract', 'missing_eos_value': 2.0})
  settings = ppo.Settings.of(config, (tiny.EOS,))
  policy = MODEL.init(jax.random.key(1))
  params = {
    'policy': policy,
    'critic': {'head': heads.init_scalar(jax.random.key(2), MODEL.width, scale='normal')},
  }
  frozen = {'policy': {}, 'reference': jax.tree.map(lambda x: 1.1 * x, policy)}
  lengths = np.array([1, 6, 3, 5, 2, 6, 4, 6])
  response_mask = np.arange(6)[None] < lengths[:, None]
  mask = np.concatenate([np.ones((8, 3), bool), response_mask], axis=1)
  tokens = np.random.default_rng(0).integers(4, tiny.VOCAB, mask.shape).astype(np.int32)
  tokens[np.arange(4), 2 + lengths[:4]] = tiny.EOS  # the others lack an EOS, which costs score
  rollout = jax.tree.map(
    jnp.asarray,
    types.Rollout(tokens, mask, response_mask, np.zeros(response_mask.shape, np.float32)),
  )
  scores = np.random.default_rng(1).normal(size=8).astype(np.float32)
  dense = np.zeros(response_mask.shape, np.float32)
  dense[np.arange(8), lengths - 1] = scores

  def update(scores):
    step = lambda state, scores, optimizers: ppo.train_step(
      state,
      frozen,
      rollout,
      scores,
      None,
      models=forward.Models(MODEL),
      optimizers=optimizers,
      settings=settings,
    )
    state, metrics = tiny.one_step(step, params, jnp.asarray(scores))
    return jax.device_get((state.params, metrics))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    update(scores),
    update(dense),
  )

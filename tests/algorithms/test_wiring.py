"""The parts of an on-policy run that its config determines: parameters, length, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import wiring
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import heads
from rlhf_jax.models import hf
import tiny


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh({}, devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def others(tmp_path_factory):
  """Returns a policy and a reward model with other parameters than the world's."""
  folder, model = tmp_path_factory.mktemp('others'), models.create(tiny.LLAMA)
  new = heads.init_scalar(jax.random.key(32), model.width, scale='normal')
  for name, head in (('policy', None), ('reward', new)):
    tokenizer = tiny.write_tokenizer(folder / name)
    hf.save(folder / name, model, model.init(jax.random.key(31)), tokenizer=tokenizer, head=head)
  return folder


@pytest.fixture(scope='module')
def made(world, others, mesh):
  """Creates PPO with a reference, a reward model, two samples per prompt, and an evaluator."""
  config = tiny.ppo(world)
  config.reference = str(others / 'policy')
  config.reward.update({'function': None, 'model': f'{world}/reward'})
  config.sampling.samples, config.steps, config.data.epochs = 2, None, 1.0
  config.evals = {'prompts': tiny.evals(world)['prompts']}
  with jax.set_mesh(mesh):
    yield ppo.create(config, mesh)


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_reference_is_the_one_of_the_config(made, world, others):
  learner, state = made
  (frozen, *_), _ = learner.next_batch(state, timed=False)
  assert_equal(frozen['reference'], hf.load(others / 'policy')[1])
  assert_equal(state.params['policy'], hf.load(world / 'model')[1])


def test_evaluations_start_from_the_policy_and_not_from_the_reference(made):
  learner, state = made
  assert learner.evaluators['prompts'](state)['kl'] == pytest.approx(0.0, abs=1e-6)


def test_the_critic_starts_from_the_reward_model(made, world):
  assert_equal(made[1].params['critic'], hf.load_reward(world / 'reward')[1])


def test_the_critic_starts_from_its_own_folder_if_set(world, others, mesh):
  config = tiny.ppo(world)
  config.reward.update({'function': None, 'model': f'{world}/reward'})
  config.critic.path = str(others / 'reward')
  with jax.set_mesh(mesh):
    _, state = ppo.create(config, mesh)
  assert_equal(state.params['critic'], hf.load_reward(others / 'reward')[1])


def test_an_epoch_is_all_samples_of_all_prompts(made):
  assert made[0].steps == 40 * 2 / 16  # prompts, samples of each, samples of a step


def rates(optimizer, count):
  """Returns the learning rates of an Adam: its steps if the gradient is always 1."""
  params = {'w': jnp.zeros(())}
  state, found = optimizer.init(params), []
  for _ in range(count):
    updates, state = optimizer.update({'w': jnp.ones(())}, state, params)
    found.append(-float(updates['w']))
  return found


def test_schedules_end_at_the_last_update_and_the_critic_has_its_learning_rate(world, mesh):
  # 2 steps of 2 epochs of 2 minibatches: the second step starts after 4 of 8 updates.
  config = tiny.ppo(world)
  config.optim.update({'schedule': 'linear', 'learning_rate': 0.5})
  config.critic.learning_rate = 2.0
  optimizers = wiring.wire(config, mesh, hf.load(world / 'model', mesh=mesh), steps=2).optimizers
  for name, peak in (('policy', 0.5), ('critic', 2.0)):
    found = rates(optimizers[name], 8)
    np.testing.assert_allclose([found[0], found[4]], [peak, peak / 2], rtol=1e-4)
    assert found[7] > 0


def test_a_token_ends_responses_from_its_first_position_on(world):
  """w5 counts from the third position, so of w1 w5 w2 w5 and w1 w5 w2 w3 the first has ended."""
  config = tiny.ppo(world)
  config.rl.response = 'raw'
  config.sampling.update({'truncate_at': 'w5', 'truncate_after': 2})
  ends = on_policy_config.end_tokens(config, tokenizers.load(world / 'tokenizer'))
  tokens = jnp.array([[tiny.BOS, 5, 9, 6, 9], [tiny.BOS, 5, 9, 6, 7]])
  mask = jnp.ones(tokens.shape, bool)
  rollout = types.Rollout(tokens, mask, mask[:, 1:], None)
  assert ppo.Settings.of(config, *ends).rules.ended(rollout).tolist() == [True, False]


def test_evaluators_sample_like_the_run_except_for_their_own_keys(world, mesh):
  config = tiny.ppo(world)
  config.sampling.update({'temperature': 0.7, 'top_k': 9, 'max_new_tokens': 6})
  tokenizer = tokenizers.load(world / 'tokenizer')
  context = setup.policy_context(config, models.create(tiny.LLAMA), tokenizer, mesh, {}, {})
  sampling, _ = evaluators.make_sampling({'max_new_tokens': 4}, context)
  assert (sampling.temperature, sampling.top_k, sampling.max_new_tokens) == (0.7, 9, 4)

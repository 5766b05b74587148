"""A PPO update of a real model does not depend on padding, on its contents, or on jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import heads
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import sampling
import tiny

B, P, R = 8, 5, 6
MODEL = models.create(tiny.LLAMA)
SAMPLING = sampling.Sampling(max_new_tokens=R, temperature=0.7, eos_id=tiny.EOS)


@pytest.fixture(scope='module')
def settings(world):
  """Returns settings: one epoch, two minibatches, temperature 0.7, advantages whitened in each."""
  config = tiny.ppo(world)
  config.sampling.temperature = 0.7
  config.rl.update(
    {
      'epochs': 1,
      'whiten_advantages': 'minibatch',
      'entropy_coef': 0.01,
      'missing_eos': 'replace',
      'kl_controller': 'adaptive',
    }
  )
  return ppo.Settings.of(config, (tiny.EOS,))


@pytest.fixture(scope='module')
def episode():
  """Returns parameters, a perturbed reference, and a ragged rollout with scores."""
  policy = MODEL.init(jax.random.key(1))
  policy['embed']['embedding'] = policy['embed']['embedding'].at[tiny.EOS].mul(3.0)
  keys = iter(jax.random.split(jax.random.key(2), 100))
  reference = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), policy)
  mask = np.arange(P)[None] >= P - np.array([1, 5, 3, 2, 4, 5, 1, 3])[:, None]
  tokens = np.where(mask, np.random.default_rng(0).integers(4, tiny.VOCAB, (B, P)), tiny.PAD)
  prompts = types.Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
  rollout = jax.jit(functools.partial(decode.generate, model=MODEL, sampling=SAMPLING))(
    policy, prompts, jax.random.key(17)
  )
  lengths = np.asarray(rollout.response_mask).sum(1)
  assert lengths.min() < R and lengths.max() == R
  head = heads.init_scalar(jax.random.key(4), MODEL.width, scale='normal')
  return (
    {'policy': policy, 'critic': {'head': head}},
    reference,
    rollout,
    jax.random.normal(jax.random.key(5), (B,)),
  )


def update(episode, settings, rollout=None, jit=True):
  """Returns the new parameters and metrics."""
  params, reference, first, scores = episode
  step = functools.partial(ppo.train_step, models=forward.Models(MODEL), settings=settings)
  state, metrics = tiny.one_step(
    step, params, {'policy': {}, 'reference': reference}, rollout or first, scores, None, jit=jit
  )
  return jax.device_get((state.params, metrics))


@pytest.fixture(scope='module')
def expected(episode, settings):
  return update(episode, settings)


def assert_close(found, expected, atol):
  for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)
  assert found[1].keys() == expected[1].keys()
  for name, value in expected[1].items():
    np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=10 * atol, err_msg=name)


def test_the_first_ratio_is_one_at_another_temperature(expected):
  """Sampler, behaviour policy and loss divide the logits by the same temperature."""
  _, metrics = expected
  np.testing.assert_allclose(metrics['policy/first_ratio'], 1.0, rtol=0, atol=1e-6)
  assert metrics['policy/sampler_gap'] < 1e-5
  assert abs(metrics['policy/ratio'] - 1) > 1e-6  # in the second minibatch
  assert metrics['objective/kl'] != 0


def test_contents_of_padding_change_nothing(episode, settings, expected):
  rollout = episode[2]
  garbage = jax.random.randint(jax.random.key(9), rollout.tokens.shape, 0, tiny.VOCAB)
  dirty = rollout.replace(
    tokens=jnp.where(rollout.mask, rollout.tokens, garbage),
    logprobs=jnp.where(rollout.response_mask, rollout.logprobs, -50.0),
  )
  assert (dirty.tokens != rollout.tokens).sum() > 10
  for a, b in zip(*map(jax.tree.leaves, (update(episode, settings, dirty), expected))):
    np.testing.assert_array_equal(a, b)


def test_wider_left_padding_changes_nothing(episode, settings, expected):
  rollout = episode[2]
  pad = lambda x: jnp.pad(x, ((0, 0), (4, 0)))
  wide = rollout.replace(tokens=pad(rollout.tokens), mask=pad(rollout.mask))
  assert_close(update(episode, settings, wide), expected, 1e-6)


@pytest.mark.slow
def test_without_jit_it_is_the_same(episode, settings, expected):
  assert_close(update(episode, settings, jit=False), expected, 1e-6)

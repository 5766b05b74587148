"""REINFORCE: advantages and losses against loops on random ragged input, presets, learning."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import forward
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import reinforce
import tiny

B, R, N = 8, 6, 4
BASE = dict(
  microbatch_size=0, temperature=1.0, samples=N, max_new_tokens=9, end_tokens=(), end_after=0
)


def random_batch(seed):
  """Returns a generator and a mask with holes, one of its rows empty."""
  rng = np.random.default_rng(seed)
  mask = (np.arange(R) < rng.integers(1, R + 1, B)[:, None]) & (rng.random((B, R)) < 0.8)
  mask[:, 0] |= ~mask.any(axis=1)
  mask[3] = False
  return rng, mask


def loops(rewards, mask, moving, s):
  """Computes advantages, baseline and next moving average, one response at a time."""
  used = [i for i in range(B) if mask[i].any()]
  if s.returns == 'token':
    returns = references.discounted_returns(rewards, mask, gamma=s.gamma)
    mean = references.mean(references.real(returns, mask))
  else:
    totals = {i: sum(float(r) for r in rewards[i][mask[i]]) for i in used}
    returns, mean = np.zeros((B, R)), references.mean(list(totals.values()))
    for i, total in totals.items():
      returns[i] = total
  before = mean if np.isnan(moving) else moving
  baseline = {'none': 0.0, 'batch': mean, 'moving': before, 'group': mean}[s.baseline]
  advantages = np.zeros((B, R))
  for i, t in np.argwhere(mask):
    group = [totals[j] for j in used if j // N == i // N] if s.baseline == 'group' else [baseline]
    advantages[i, t] = returns[i, t] - references.mean(group)
  if s.whiten_advantages:
    advantages = references.whiten(advantages, mask, shift_mean=True, bessel=False)
  return advantages, baseline, s.baseline_decay * before + (1 - s.baseline_decay) * mean


@pytest.mark.parametrize(
  'returns, baseline',
  [
    pair
    for pair in itertools.product(('token', 'sequence'), reinforce.BASELINES)
    if pair != ('token', 'group')
  ],
)
def test_advantages_agree_with_loops(returns, baseline):
  for seed, whiten in enumerate((False, True)):
    settings = reinforce.Settings(
      **BASE, returns=returns, baseline=baseline, gamma=0.9, whiten_advantages=whiten
    )
    rng, mask = random_batch(seed)
    rewards = np.where(mask, rng.normal(size=(B, R)), np.nan).astype(np.float32)
    for moving in (np.float32(np.nan), np.float32(0.7)):
      advantages, _, found, after = reinforce.compute_advantages(
        jnp.asarray(rewards), jnp.asarray(mask), moving, settings=settings
      )
      expected = loops(rewards, mask, moving, settings)
      for a, b in zip((advantages, found, after), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_moving_average_ignores_a_batch_without_responses():
  settings = reinforce.Settings(**BASE, baseline='moving')
  empty = jnp.zeros((B, R), bool)
  for moving in (np.nan, 0.7):
    after = reinforce.compute_advantages(
      jnp.zeros((B, R)), empty, jnp.float32(moving), settings=settings
    )[3]
    np.testing.assert_equal(float(after), float(np.float32(moving)))


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('normalize', ['token', 'sequence', 'constant'])
def test_loss_and_gradient_agree_with_loops(normalize, clip):
  settings = reinforce.Settings(
    **BASE, clip=clip, normalize=normalize, kl_in='loss', kl_estimator='k2', kl_coef=0.3
  )
  rng, mask = random_batch(7)
  draw = lambda: np.where(mask, rng.uniform(-3, 0, (B, R)), np.nan).astype(np.float32)
  logprobs, old, ref = draw(), draw(), draw()
  old, ref = np.where(mask, old, 0), np.where(mask, ref, 0)
  advantages = np.where(mask, rng.normal(size=(B, R)), 0).astype(np.float32)
  batch = types.Experience(
    None, None, mask, mask, logprobs=old, ref_logprobs=ref, advantages=advantages
  )
  counts = update.Counts(mask.sum(), mask.sum(), mask.any(axis=1).sum())
  value, gradient = jax.value_and_grad(
    lambda x: reinforce.loss(
      forward.Outputs(x, jnp.zeros((B, R))), batch, counts, settings=settings
    )[0]
  )(jnp.asarray(logprobs))
  loss, slope = np.zeros((B, R)), np.zeros((B, R))
  for i, t in np.argwhere(mask):
    p, q, a = float(logprobs[i, t]), float(old[i, t]), float(advantages[i, t])
    loss[i, t], slope[i, t] = -a * p, -a
    if clip:
      loss[i, t], _, _, slope[i, t] = references.policy_loss(p, q, a, clip_low=0.2, clip_high=0.2)
    loss[i, t] += 0.3 * (p - float(ref[i, t])) ** 2 / 2
    slope[i, t] += 0.3 * (p - float(ref[i, t]))
    responses = mask.any(axis=1).sum()
    weight = {
      'token': 1 / mask.sum(),
      'sequence': 1 / (responses * mask[i].sum()),
      'constant': 1 / (responses * 9),
    }[normalize]
    loss[i, t], slope[i, t] = weight * loss[i, t], weight * slope[i, t]
  np.testing.assert_allclose(value, loss.sum(), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-5)


def config_of(world, preset=''):
  config = tiny.on_policy(reinforce.config(preset), world)
  config.optim.learning_rate = 0.01
  return config


@pytest.mark.parametrize('preset', reinforce.PRESETS)
def test_presets_train(preset, world):
  config = config_of(world, preset)
  config.rl.minibatches = min(config.rl.minibatches, 4)
  _, state, history, _ = tiny.train(reinforce, config, 2)
  assert set(state.params) == {'policy'}
  for metrics in history:
    assert all(np.isfinite(value).all() for value in metrics.values())
    np.testing.assert_allclose(metrics['policy/first_ratio'], 1.0, rtol=0, atol=1e-6)
    assert (abs(metrics['policy/ratio'] - 1) > 1e-6) == (config.rl.minibatches > 1)


def test_it_learns_to_use_good_words(world):
  config = config_of(world)
  config.batch_size, config.rl.baseline, config.rl.kl_coef = 64, 'moving', 0.01
  _, state, history, _ = tiny.train(reinforce, config, 20)
  scores, means, baselines = (
    [float(metrics[name]) for metrics in history]
    for name in ('objective/scores', 'returns/mean', 'returns/baseline')
  )
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores
  moving = means[0]  # there is no earlier step
  for mean, baseline in zip(means, baselines):
    assert baseline == pytest.approx(moving, abs=1e-5)
    moving = 0.9 * moving + 0.1 * mean
  assert float(state.extra['baseline']) == pytest.approx(moving, abs=1e-5)

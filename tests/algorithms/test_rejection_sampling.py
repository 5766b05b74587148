"""Rejection sampling: which responses are kept, the loss by a loop, and that it learns."""

import types as python_types

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages
from rlhf_jax import errors
from rlhf_jax import forward
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import rejection_sampling
import tiny

N, R = 4, 5
BASE = dict(
  microbatch_size=0, temperature=1.0, samples=N, max_new_tokens=R, end_tokens=(), end_after=0
)


def random_scores(seed, equal_groups=False):
  """Returns scores of 6 groups with ties, which of them are present, and the lowest score."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 4, 6 * N).astype(np.float32)
  if equal_groups:
    scores = np.repeat(rng.integers(0, 2, 6), N).astype(np.float32)
  return scores, rng.random(6 * N) < 0.8


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('count', [1, 2, 3])
def test_the_best_of_each_group(seed, count):
  scores, present = random_scores(seed)
  expected = np.zeros(len(scores), bool)
  for group in np.arange(len(scores)).reshape(-1, N):
    ranked = sorted((i for i in group if present[i]), key=lambda i: (-scores[i], i))
    expected[ranked[:count]] = True
  found = advantages.best_of_groups(scores, N, count, present)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('percentile', [0.0, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize('equal_groups', [False, True])
def test_from_a_percentile_of_each_group(seed, percentile, equal_groups):
  scores, present = random_scores(seed, equal_groups)
  lowest = scores[present].min()
  expected = np.zeros(len(scores), bool)
  for group in np.arange(len(scores)).reshape(-1, N):
    group = group[present[group]]
    if len(group):
      threshold = np.quantile(scores[group], percentile)
      expected[group] = (scores[group] >= threshold) & (scores[group] > lowest)
  found = advantages.from_percentile(scores, N, percentile, present)
  np.testing.assert_array_equal(found, expected)


def test_equal_scores_are_all_kept():
  scores = np.full(2 * N, 0.3, np.float32)
  present = np.arange(2 * N) > 0
  found = advantages.from_percentile(scores, N, 0.9, present)
  np.testing.assert_array_equal(found, present)


def prepared(step=0, **settings):
  """Returns a random ragged rollout with holes, its scores, and results of `prepare` and `loss`."""
  rng = np.random.default_rng(3)
  mask = rng.random((3 * N, R)) < 0.7
  draw = lambda: np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
  rollout = types.Rollout(np.zeros(mask.shape, np.int32), mask, mask, draw())
  old, new, ref = draw(), draw(), draw()
  scores = rng.normal(size=len(mask)).astype(np.float32)
  settings = rejection_sampling.Settings(**BASE | settings)
  extra = {'kl_coef': jnp.float32(settings.kl_coef), 'reward_moments': jnp.zeros(3)}
  state = types.TrainState(jnp.int32(step), None, {}, {}, extra)
  goal = rejection_sampling.objective(state, rollout, jnp.asarray(scores), settings=settings)
  zeros = jnp.zeros(mask.shape)
  fixed = forward.Fixed(None, jnp.asarray(ref), None)
  experience, _, metrics = goal.prepare(forward.Outputs(jnp.asarray(old), zeros), fixed)
  tokens = max(int(np.asarray(experience.response_mask).sum()), 1)
  counts = update.Counts(tokens, tokens, len(mask))
  loss, _ = goal.loss(forward.Outputs(jnp.asarray(new), zeros), experience, counts)
  return python_types.SimpleNamespace(**locals())


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'keep_count': 2, 'kl_coef': 0.3},
    {'kl_coef': 2.0, 'kl_in': 'reward', 'kl_estimator': 'k1'},
  ],
  ids=str,
)
def test_the_loss_is_that_of_the_kept_tokens(settings):
  p = prepared(**settings)
  coef = settings.get('kl_coef', 0.0)
  in_reward = settings.get('kl_in') == 'reward'
  selected = p.scores - coef * ((p.old - p.ref).sum(1) if in_reward else 0)
  terms, kept = [], []
  for group in np.arange(len(p.scores)).reshape(-1, N):
    for i in sorted(group, key=lambda i: -selected[i])[: settings.get('keep_count', 1)]:
      kept.append(i)
      for t in np.flatnonzero(p.mask[i]):
        gap = float(p.ref[i, t] - p.new[i, t])
        k3 = 0.0 if in_reward else np.exp(gap) - 1 - gap
        terms.append(-p.new[i, t] + coef * k3)
  assert p.loss == pytest.approx(np.mean(terms), rel=1e-5)
  assert p.metrics['kept/fraction'] == pytest.approx(len(kept) / len(p.scores))
  assert p.metrics['kept/scores'] == pytest.approx(np.mean(p.scores[kept]), rel=1e-5)


def test_the_threshold_rises_as_in_trlx():
  """0.7, 0.7625, 0.825, 0.8875 and again from 0.7: percentile_delta is (0.95 - 0.7) / 4."""
  for step, percentile in [(0, 0.7), (1, 0.7625), (3, 0.8875), (4, 0.7), (7, 0.8875)]:
    p = prepared(step, keep='percentile')
    thresholds = np.repeat(np.quantile(p.scores.reshape(-1, N), percentile, axis=1), N)
    kept = np.asarray(p.experience.response_mask).any(1)
    np.testing.assert_array_equal(kept, p.mask.any(1) & (p.scores >= thresholds))


def test_it_learns_to_use_good_words(world):
  config = tiny.rejection_sampling(world)
  config.batch_size, config.optim.learning_rate = 64, 0.01
  _, state, history, _ = tiny.train(rejection_sampling, config, 20)
  scores = [float(metrics['objective/scores']) for metrics in history]
  assert set(state.params) == {'policy'} and 'objective/kl' not in history[0]
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores
  assert all(m['kept/scores'] >= m['objective/scores'] for m in history)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'sampling.samples': 1}, 'config.sampling.samples=1 must be at least 2'),
    ({'rl.keep': 'worst'}, 'config.rl.keep'),
    ({'rl.keep_count': 4}, 'config.rl.keep_count=4 must be from 1 to .* = 3'),
    ({'rl.start_percentile': 0.99}, 'config.rl.start_percentile=0.99'),
    ({'rl.improve_steps': 0}, 'config.rl.improve_steps=0'),
  ],
)
def test_wrong_values_are_errors(changes, message, world):
  config = tiny.rejection_sampling(world)
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=message):
    build.validate(config, 1)

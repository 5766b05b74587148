"""Best-of-n for every n, against the mean over all subsets of the samples."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.evaluation import best_of_n

SCORES = np.random.default_rng(0).normal(size=(2, 3, 5)).round(1)


@pytest.mark.parametrize('n', range(1, 6))
def test_the_mean_over_all_subsets(n):
  """Scores of the sample with the highest proxy score in each of the C(5, n) subsets."""
  proxy, gold = SCORES
  found = np.take_along_axis(gold, np.argsort(proxy, axis=1), axis=1) @ best_of_n.weights(n, 5)
  for row in range(3):
    subsets = list(itertools.combinations(range(5), n))
    best = [max(subset, key=lambda i: proxy[row, i]) for subset in subsets]
    assert found[row] == pytest.approx(np.mean(gold[row, best]))


@pytest.mark.parametrize('n', [1, 512, 6_000, 12_600])
def test_thousands_of_samples(n):
  """Scores 1 to N: the expected best of n is n (N + 1) / (n + 1)."""
  weights, count = best_of_n.weights(n, 12_600), 12_600
  assert weights.sum() == pytest.approx(1)
  assert weights @ np.arange(1, count + 1) == pytest.approx(n * (count + 1) / (n + 1))


def test_the_curve_from_one_sample_to_all():
  proxy, gold = SCORES
  points = best_of_n.curve(proxy, gold)
  assert [point['n'] for point in points] == [1, 2, 4, 5]
  assert [point['kl'] for point in points] == pytest.approx(
    [0, math.log(2) - 1 / 2, math.log(4) - 3 / 4, math.log(5) - 4 / 5]
  )
  assert points[0]['gold'] == pytest.approx(gold.mean())
  assert points[0]['gold_se'] == pytest.approx(gold.mean(axis=1).std(ddof=1) / math.sqrt(3))
  assert points[-1]['proxy'] == pytest.approx(proxy.max(axis=1).mean())
  assert points[-1]['gold'] == pytest.approx(gold[range(3), proxy.argmax(axis=1)].mean())


def test_of_equal_scores_the_first_sample_is_the_best():
  [_, last] = best_of_n.curve(np.ones((1, 2)), np.array([[3.0, 4.0]]))
  assert last['gold'] == 3.0


def test_without_gold_scores():
  assert best_of_n.curve(SCORES[0])[0].keys() == {'n', 'kl', 'proxy'}


def test_the_kl_is_a_bound_that_is_reached_without_equal_samples():
  """The exact KL of best-of-n with k equally likely samples and different scores."""
  for n, k in ((2, 4), (3, 50)):
    best = np.diff((np.arange(k + 1) / k) ** n)
    exact = np.sum(best * np.log(best * k))
    assert exact < best_of_n.kl(n)
  assert exact == pytest.approx(best_of_n.kl(3), abs=0.05)

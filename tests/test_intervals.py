"""Standard errors and intervals over prompts: by hand, against an analytic formula, and by coverage."""

import math

import numpy as np
import pytest

from rlhf_jax import intervals
from rlhf_jax.evaluation import winrate
from rlhf_jax.feedback import elo

G, EACH = 40, 8  # prompts, and samples of each


def clustered(rng, *, between=1.0, within=1.0):
  """Values [G * EACH] whose samples share an effect of their prompt, and the prompts."""
  effects = rng.normal(0, between, G)
  values = effects[:, None] + rng.normal(0, within, (G, EACH))
  return values.reshape(-1), [f'p{i}' for i in range(G) for _ in range(EACH)]


def test_standard_error_by_hand():
  # Mean 3; sums of deviations of a: -2 + 0 = -2, of b: 1 + 1 = 2. sqrt(2 / 1 * (4 + 4)) / 4 = 1.
  assert intervals.standard_error([1, 3, 4, 4], ['a', 'a', 'b', 'b']) == pytest.approx(1.0)
  # The order of samples does not matter.
  assert intervals.standard_error([4, 1, 4, 3], ['b', 'a', 'b', 'a']) == pytest.approx(1.0)
  # No prompt twice, and one prompt alone: s / sqrt(n), s^2 = (4 + 0 + 1 + 1) / 3 = 2.
  for prompts in (None, ['a', 'b', 'c', 'd'], ['a'] * 4):
    assert intervals.standard_error([1, 3, 4, 4], prompts) == pytest.approx(math.sqrt(2) / 2)
  assert math.isnan(intervals.standard_error([1.0]))


def test_the_bootstrap_agrees_with_the_analytic_clustered_error():
  values, prompts = clustered(np.random.default_rng(1))
  low, high = intervals.bootstrap(values, prompts, resamples=4000)
  analytic = intervals.standard_error(values, prompts)
  assert (high - low) / (2 * 1.96) == pytest.approx(analytic, rel=0.08)
  # Taking the samples for independent makes it too small by the design effect, 1 + 7 rho = 4.5.
  assert analytic / intervals.standard_error(values) == pytest.approx(math.sqrt(4.5), rel=0.2)


def test_uneven_groups_agree_with_the_analytic_error_too():
  rng = np.random.default_rng(2)
  prompts = np.repeat(np.arange(60), rng.integers(1, 9, 60)).tolist()
  values = rng.normal(size=60)[prompts] + rng.normal(size=len(prompts))
  low, high = intervals.bootstrap(values, prompts, resamples=4000)
  assert (high - low) / (2 * 1.96) == pytest.approx(intervals.standard_error(values, prompts), rel=0.1)


def test_the_bootstrap_interval_is_the_binomial_one_and_repeats():
  values = np.arange(400) < 300
  low, high = intervals.bootstrap(values, resamples=2000)
  # 0.75 ± 1.96 sqrt(0.75 * 0.25 / 400) = 0.75 ± 0.0424
  assert low == pytest.approx(0.7076, abs=0.006)
  assert high == pytest.approx(0.7924, abs=0.006)
  assert (low, high) == intervals.bootstrap(values, resamples=2000)


def covered(make, truth, runs):
  """The share of runs whose interval holds the truth."""
  found = [make(np.random.default_rng(seed)) for seed in range(runs)]
  return np.mean([low <= truth <= high for low, high in found])


def test_intervals_of_shared_prompts_hold_the_mean_as_often_as_they_say():
  of = lambda prompts: lambda rng: intervals.bootstrap(*prompts(*clustered(rng)), resamples=200)
  assert covered(of(lambda values, prompts: (values, prompts)), 0.0, 200) > 0.88
  assert covered(of(lambda values, prompts: (values, None)), 0.0, 200) < 0.75


def wins(rng):
  """Scores against a baseline of 0 that win 62 % of the time, alike for the samples of a prompt."""
  values, prompts = clustered(rng, between=2.0)
  return values + math.sqrt(5) * 0.3055, np.zeros_like(values), prompts  # P(N(0, 5) > -0.683) = 0.62


def test_win_rates_of_shared_prompts_hold_the_rate_as_often_as_they_say():
  def interval(rng, shared):
    scores, baseline, prompts = wins(rng)
    found = winrate.win_rate(scores, baseline, prompts=prompts if shared else None)
    return found.low, found.high

  assert covered(lambda rng: interval(rng, True), 0.62, 60) > 0.86
  assert covered(lambda rng: interval(rng, False), 0.62, 60) < 0.75


def test_a_clean_sweep_of_few_prompts_is_a_few_trials():
  sweep = winrate.win_rate([1.0] * 80, [0.0] * 80, prompts=['a', 'b', 'c', 'd'] * 20)
  assert (sweep.low, sweep.high) == winrate.wilson(4, 4)
  # Prompts that are alike among themselves leave the interval of independent pairs.
  even = winrate.win_rate([1.0, -1.0] * 20, [0.0] * 40, prompts=np.repeat(range(20), 2).tolist())
  assert (even.low, even.high) == winrate.wilson(20, 40)


def test_ratings_from_prompts_against_the_analytic_error():
  """Without shared prompts they are those of `ratings`; with them wider by the design effect."""
  scores, baseline, prompts = wins(np.random.default_rng(3))
  won = {('new', 'base'): winrate.outcomes(scores, baseline)}
  [first, second] = [elo.ratings_of_outcomes(won, p, anchor='base')['new']
                     for p in (list(range(len(prompts))), prompts)]
  w = winrate.win_rate(scores, baseline)
  plain = elo.ratings([elo.Match('new', 'base', w.wins, w.draws, w.losses)], anchor='base')['new']
  assert first.elo == second.elo == pytest.approx(plain.elo, abs=1e-6)
  assert first.se == pytest.approx(plain.se, rel=0.1)
  # d elo = 400 / ln 10 / (p (1 - p)) d p.
  error = intervals.standard_error(won['new', 'base'], prompts)
  assert second.se == pytest.approx(
      elo.POINTS_PER_LOGIT * error / (w.rate * (1 - w.rate)), rel=0.12)
  assert second.low < second.elo - 1.5 * second.se and second.high > second.elo + 1.5 * second.se
  assert second.se > 1.8 * first.se


def test_the_anchor_has_no_error():
  won = {('a', 'b'): np.array([1, 0.5, 0, 1.0]), ('b', 'c'): np.array([0, 0, 1, 1.0]),
         ('a', 'c'): np.array([1, 1, 0, 0.5])}
  found = elo.ratings_of_outcomes(won, ['p', 'p', 'q', 'r'], anchor='b', resamples=50)
  assert found['b'] == elo.Rating(1000.0, 1000.0, 1000.0, 0.0) and found['a'].se > 0

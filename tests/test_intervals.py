"""Standard errors and intervals over prompts: by hand, against other formulas, and coverage."""

import itertools
import math
import pathlib

import numpy as np
import pytest
from scipy import optimize
from scipy import stats

from benchmarks import coverage
from rlhf_jax import intervals
from rlhf_jax.evaluation import winrate
from rlhf_jax.feedback import elo

G, EACH = 40, 8  # prompts, and samples of each
PAGE = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'intervals.md'


def test_standard_error_by_hand():
  # Mean 3; sums of deviations of a: -2 + 0 = -2, of b: 1 + 1 = 2. sqrt(2 / 1 * (4 + 4)) / 4 = 1.
  assert intervals.standard_error([1, 3, 4, 4], ['a', 'a', 'b', 'b']) == pytest.approx(1.0)
  # The order of samples does not matter.
  assert intervals.standard_error([4, 1, 4, 3], ['b', 'a', 'b', 'a']) == pytest.approx(1.0)
  # No prompt twice, and one prompt alone: s / sqrt(n), s^2 = (4 + 0 + 1 + 1) / 3 = 2.
  for prompts in (None, ['a', 'b', 'c', 'd'], ['a'] * 4):
    assert intervals.standard_error([1, 3, 4, 4], prompts) == pytest.approx(math.sqrt(2) / 2)
  assert math.isnan(intervals.standard_error([1.0]))


def wilson(p, n, z):
  """Computes (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)."""
  centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  scale = 1 + z**2 / n
  return pytest.approx(((centre - half) / scale, (centre + half) / scale), abs=1e-9)


@pytest.mark.parametrize('wins, losses', [(8, 2), (1, 0), (0, 7), (20, 0), (300, 100)])
def test_without_draws_a_rate_has_wilsons_interval(wins, losses):
  values = [1] * wins + [0] * losses
  low, high = intervals.rate(values)
  assert (low, high) == wilson(wins / len(values), len(values), 1.96)
  assert 0 <= low <= high <= 1 and (high == 1) == (not losses) and (low == 0) == (not wins)


def test_with_draws_it_is_tangos():
  # Fagerland, Lydersen and Laake 2014 (https://doi.org/10.1002/sim.6148), airway data: 1 and 7 of
  # 21 pairs are discordant; the interval of the difference of shares is -0.517 to -0.026.
  low, high = intervals.rate([1] + [0] * 7 + [0.5] * 13)
  assert (2 * low - 1, 2 * high - 1) == pytest.approx((-0.517, -0.026), abs=5e-4)
  # All drawn: n (2 p - 1)^2 = z^2 (2 p - 1) (1 - (2 p - 1)), so 2 p - 1 = z^2 / (n + z^2).
  side = 1.96**2 / (20 + 1.96**2) / 2
  assert intervals.rate([0.5] * 20) == pytest.approx((0.5 - side, 0.5 + side), abs=1e-9)


@pytest.mark.parametrize('wins, draws, losses', [(3, 5, 2), (0, 9, 1), (12, 30, 8), (40, 4, 0)])
def test_the_ends_of_an_interval_are_at_1_96_standard_errors(wins, draws, losses):
  """At each end p, with the most likely fractions of that win rate by numerical search."""
  n = wins + draws + losses
  mean = (wins + draws / 2) / n
  for p in intervals.rate([1] * wins + [0.5] * draws + [0] * losses):
    if p in (0, 1):
      continue

    def likelihood(lost, p=p):
      shares = lost + 2 * p - 1, 2 - 2 * p - 2 * lost, lost
      return -sum(
        k * math.log(max(share, 1e-300)) for k, share in zip((wins, draws, losses), shares) if k
      )

    lost = optimize.minimize_scalar(
      likelihood, bounds=(max(0, 1 - 2 * p), 1 - p), method='bounded', options={'xatol': 1e-12}
    ).x
    variance = (
      (lost + 2 * p - 1) * (1 - p) ** 2 + (2 - 2 * p - 2 * lost) * (0.5 - p) ** 2 + lost * p**2
    )
    assert abs(mean - p) / math.sqrt(variance / n) == pytest.approx(1.96, abs=1e-3)


def clustered(rng, *, between=1.0, within=1.0):
  """Returns values [G * EACH] whose samples share an effect of their prompt, and the prompts."""
  effects = rng.normal(0, between, G)
  values = effects[:, None] + rng.normal(0, within, (G, EACH))
  return values.reshape(-1), [f'p{i}' for i in range(G) for _ in range(EACH)]


def test_shared_prompts_lower_the_number_of_samples_that_count():
  values, prompts = clustered(np.random.default_rng(1), between=2.0)
  won = values > -0.5
  p, error = won.mean(), intervals.standard_error(won, prompts)
  assert intervals.rate(won, prompts) == wilson(
    p, p * (1 - p) / error**2, stats.t.ppf(0.975, G - 1)
  )
  # The order of samples does not matter; treated as independent, they give too small an error.
  order = np.random.default_rng(0).permutation(won.size)
  assert intervals.rate(won[order], [prompts[i] for i in order]) == pytest.approx(
    intervals.rate(won, prompts), abs=1e-9
  )
  assert np.ptp(intervals.rate(won, prompts)) > 2 * np.ptp(intervals.rate(won))


def test_samples_that_are_all_alike_are_as_many_as_prompts():
  prompts = ['a', 'b', 'c', 'd'] * 20
  assert intervals.rate([1.0] * 80, prompts) == wilson(1.0, 4, stats.t.ppf(0.975, 3))
  # If all prompts have the same mean, the effective size is the number of samples.
  even = np.repeat(range(20), 2).tolist()
  assert intervals.rate([1.0, 0.0] * 20, even) == wilson(0.5, 40, stats.t.ppf(0.975, 19))


def games(policies, *, samples=EACH, seed=3):
  """Returns the outcomes of policies on G prompts, later ones better, and the prompts."""
  rng = np.random.default_rng(seed)
  scores, _ = coverage.answers_of(rng, G, samples, policies, 0.0)
  scores = scores.reshape(-1, policies) + 0.4 * np.arange(policies)
  pairs = list(itertools.combinations(range(policies), 2))
  return (
    {pair: winrate.outcomes(*scores[:, pair].T, tolerance=0.2) for pair in pairs},
    np.repeat(np.arange(G), samples).tolist(),
  )


def test_ratings_of_two_policies_have_the_error_of_their_win_rate():
  won, prompts = games(2)
  for owners, z in ((list(range(len(prompts))), 1.96), (prompts, stats.t.ppf(0.975, G - 1))):
    found = elo.ratings_of_outcomes(won, owners, anchor=0, prior_draws=0)[1]
    p, error = won[0, 1].mean(), intervals.standard_error(won[0, 1], owners)
    # d elo = 400 / ln 10 / (p (1 - p)) d p.
    assert found.se == pytest.approx(elo.POINTS_PER_LOGIT * error / (p * (1 - p)), rel=1e-6)
    assert found.high - found.elo == found.elo - found.low == pytest.approx(z * found.se)


@pytest.mark.parametrize('anchor', [0, None])
def test_ratings_have_the_errors_of_a_bootstrap_of_prompts(anchor):
  won, prompts = games(4)
  found = elo.ratings_of_outcomes(won, prompts, anchor=anchor)
  rng, drawn = np.random.default_rng(0), []
  for _ in range(300):
    rows = (rng.integers(G, size=G)[:, None] * EACH + np.arange(EACH)).reshape(-1)
    matches = [elo.Match(*pair, x[rows].sum(), 0, (1 - x[rows]).sum()) for pair, x in won.items()]
    drawn.append([rating.elo for rating in elo.ratings(matches, anchor=anchor).values()])
  errors = [rating.se for rating in found.values()]
  np.testing.assert_allclose(errors, np.std(drawn, axis=0), rtol=0.15, atol=1e-6)
  assert (errors[0] == 0) == (anchor == 0)


def test_a_policy_that_won_every_game_has_an_error():
  sweep = elo.ratings_of_outcomes({('a', 'b'): np.ones(20)}, list(range(20)), anchor='b')['a']
  # Odds 20.5 to 0.5: p = 41/42, I = 21 p (1 - p) = 0.4881. u of a prompt 1 - p = 1/42:
  # 20/19 * 20/42^2 + (1/42^2 + (41/42)^2) / 4 = 0.2503; se = 173.72 sqrt(0.2503) / 0.4881 = 178.
  assert sweep.se == pytest.approx(178.1, abs=0.2) and sweep.low < 1400 < sweep.high
  one = elo.ratings_of_outcomes({('a', 'b'): np.ones(1)}, ['p'], anchor='b')
  assert one == elo.ratings([elo.Match('a', 'b', 1, 0, 0)], anchor='b')


CASES = [
  case
  for case in coverage.cases()
  if case[:3]
  in (
    ('accuracy', 20, 'K = 2'),
    ('accuracy', 10, 'K = 9'),
    ('win rate', 10, '16 a prompt'),
    ('win rate', 100, '1 a prompt, 9 of 10 draws'),
    ('Elo', 20, '2 policies, 4 a prompt'),
    ('Elo', 10, '4 policies, 4 a prompt'),
    ('Elo', 20, '6 policies, 1 a prompt'),
    ('gold score', 10, '4 a prompt'),
  )
]


@pytest.mark.parametrize(
  'simulate',
  [case[3] for case in CASES],
  ids=[f'{name} {prompts} {words}' for name, prompts, words, _ in CASES],
)
def test_intervals_have_their_nominal_coverage(simulate):
  """95 % of 600, within 2.5 standard errors of 0.9 %."""
  assert 0.928 <= coverage.coverage(simulate, 600)[0] <= 0.972


@pytest.mark.slow
def test_the_full_table_is_that_of_the_page():
  shown = [
    line.strip('| ').split(' | ')
    for line in PAGE.read_text().splitlines()
    if line.startswith('| ') and '%' in line
  ]
  found = coverage.table(coverage.RUNS)
  assert [row[:3] for row in found] == [row[:3] for row in shown]
  for *words, held, _ in found:
    assert 93 <= float(held.split()[0]) <= 97, (words, held)
  for row, other in zip(found, shown, strict=True):
    assert float(row[3].split()[0]) == pytest.approx(float(other[3].split()[0]), abs=0.3)


def test_the_interval_of_probabilities_is_wilsons_of_their_mean():
  """Values between 0 and 1 give the interval of wins and losses with the same mean."""
  assert intervals.rate([0.9, 0.1, 0.7, 0.3, 0.75, 0.25]) == pytest.approx(
    intervals.rate([1, 1, 1, 0, 0, 0])
  )

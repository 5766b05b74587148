"""Coverage of the intervals in tables and reports, by simulation.

    python -m benchmarks.coverage [RUNS]

prints the table of docs/intervals.md. Each case draws new parameters (quality of the policies,
accuracy of the reward model) and data RUNS times, and counts how often the 95 % interval contains
the true value, which is computed from the parameters. Responses to one prompt are correlated.

Letters: G prompts, S samples or rankings per prompt, K responses per ranking.
"""

import functools
import itertools
import sys

import numpy as np
from scipy import stats

from rlhf_jax import intervals
from rlhf_jax.evaluation import winrate
from rlhf_jax.feedback import elo
from rlhf_jax.rewards import calibration

RUNS = 4000
SHARED = 0.5  # fraction of the variance that the responses to one prompt share
HEADER = ['Interval', 'Prompts', 'Data', 'Coverage', 'Width']


def accuracy(rng, prompts, rankings, answers, ties):
  """Simulates the pair accuracy of a reward model on K-way rankings.

  True scores and model scores are normal, with a correlation that is drawn for each prompt because
  some prompts are harder. Scores that differ by less than `ties` are ties, which count as wrong.

  Returns:
    [(low, high)], and [true value].
  """
  hardest, easiest = np.sort(rng.uniform(0, 0.98, 2))
  shape = (prompts, rankings, answers)
  correlation = rng.uniform(hardest, easiest, prompts)[:, None, None]
  quality = rng.normal(size=shape)
  scores = correlation * quality + np.sqrt(1 - correlation**2) * rng.normal(size=shape)
  better, worse = zip(*itertools.combinations(range(answers), 2))
  gaps = scores[..., list(better)] - scores[..., list(worse)]
  gaps *= np.sign(quality[..., list(better)] - quality[..., list(worse)])
  gaps[np.abs(gaps) < ties] = 0
  owners = np.repeat(np.arange(prompts), gaps[0].size).tolist()
  found = calibration.pairwise(gaps.reshape(-1), np.zeros(gaps.size), prompts=owners)
  # For a true difference d > 0, a gap is normal with mean r d and variance 2 (1 - r^2).
  r = np.linspace(hardest, easiest, 33)[:, None]
  d = np.sqrt(2) * stats.norm.ppf(0.5 + (np.arange(400) + 0.5) / 800)
  truth = stats.norm.cdf((r * d - ties) / np.sqrt(2 * (1 - r**2))).mean(axis=1)
  return [(found.accuracy_low, found.accuracy_high)], [np.trapezoid(truth, r[:, 0]) / np.ptp(r)]


def answers_of(rng, prompts, samples, policies, spread):
  """Draws true means [policies] and scores [G, S, policies] with random effects of prompts.

  Returns:
    Scores, and true means.
  """
  means = rng.normal(0, spread, policies)
  effects = np.sqrt(SHARED) * rng.normal(size=(prompts, 1, policies))
  noise = np.sqrt(1 - SHARED) * rng.normal(size=(prompts, samples, policies))
  return means + effects + noise, means


def win_rate(rng, prompts, samples, draws):
  """Simulates the win rate of a policy; a difference of at most `draws` in scores is a draw."""
  scores, means = answers_of(rng, prompts, samples, 2, 0.7)
  first, second = scores.reshape(-1, 2).T
  owners = np.repeat(np.arange(prompts), samples).tolist()
  found = winrate.win_rate(first, second, tolerance=draws, prompts=owners)
  return [(found.low, found.high)], [chance(means[0] - means[1], draws)]


def chance(difference, draws):
  """Computes the true win rate of a policy whose mean score is higher by `difference`."""
  wins, losses = stats.norm.cdf((np.array([1, -1]) * difference - draws) / np.sqrt(2))
  return 0.5 + (wins - losses) / 2


def ratings(rng, prompts, samples, policies, draws):
  """Simulates Elo ratings relative to the first policy. All matches use the same responses."""
  scores, means = answers_of(rng, prompts, samples, policies, 0.7)
  flat = scores.reshape(-1, policies)
  pairs = list(itertools.combinations(range(policies), 2))
  outcomes = {(a, b): winrate.outcomes(flat[:, a], flat[:, b], tolerance=draws) for a, b in pairs}
  owners = np.repeat(np.arange(prompts), samples).tolist()
  found = elo.ratings_of_outcomes(outcomes, owners, anchor=0)
  # The Bradley-Terry ratings of the true win rates, the limit for infinite data.
  wins = [(a, b, chance(means[a] - means[b], draws)) for a, b in pairs]
  truth = elo.ratings([elo.Match(a, b, w, 0, 1 - w) for a, b, w in wins], anchor=0, prior_draws=0)
  return (
    [(found[i].low, found[i].high) for i in range(1, policies)],
    [truth[i].elo for i in range(1, policies)],
  )


def gold(rng, prompts, samples, skewed):
  """Simulates the mean gold score ± Student's t quantile times the standard error of tables."""
  effects, noise = rng.normal(size=(prompts, 1)), rng.normal(size=(prompts, samples))
  values = np.sqrt(SHARED) * effects + np.sqrt(1 - SHARED) * noise
  values, mean = (np.exp(values / 2), np.exp(1 / 8)) if skewed else (values, 0.0)
  owners = np.repeat(np.arange(prompts), samples)
  error = intervals.standard_error(values.reshape(-1), owners.tolist())
  half = stats.t.ppf(0.975, prompts - 1) * error
  return [(values.mean() - half, values.mean() + half)], [mean]


def cases():
  """Returns [(interval, prompts, description of the data, simulation)] for the table's rows."""
  rows = []

  def add(simulate, name, prompts, description, **settings):
    simulation = functools.partial(simulate, prompts=prompts, **settings)
    rows.append((name, prompts, description, simulation))

  for answers, prompts in itertools.product((2, 4, 9), (10, 20, 100)):
    add(accuracy, 'accuracy', prompts, f'K = {answers}', rankings=1, answers=answers, ties=0.0)
  add(accuracy, 'accuracy', 20, 'K = 2, 8 pairs a prompt', rankings=8, answers=2, ties=0.0)
  add(accuracy, 'accuracy', 20, 'K = 4, ties', rankings=1, answers=4, ties=0.5)
  add(accuracy, 'accuracy', 20, 'K = 9, 2 rankings a prompt, ties', rankings=2, answers=9, ties=0.5)
  for samples, prompts in itertools.product((1, 4, 16), (10, 20, 100)):
    add(win_rate, 'win rate', prompts, f'{samples} a prompt', samples=samples, draws=0.0)
  for prompts, samples in ((20, 1), (20, 4), (100, 1), (100, 4)):
    add(
      win_rate, 'win rate', prompts, f'{samples} a prompt, half draws', samples=samples, draws=1.1
    )
  for prompts, samples in ((100, 1), (100, 4)):
    add(
      win_rate,
      'win rate',
      prompts,
      f'{samples} a prompt, 9 of 10 draws',
      samples=samples,
      draws=2.7,
    )
  for policies, (prompts, samples) in itertools.product(range(2, 7), ((20, 1), (20, 4), (100, 1))):
    add(
      ratings,
      'Elo',
      prompts,
      f'{policies} policies, {samples} a prompt',
      samples=samples,
      policies=policies,
      draws=0.0,
    )
  add(ratings, 'Elo', 10, '4 policies, 4 a prompt', samples=4, policies=4, draws=0.0)
  add(ratings, 'Elo', 50, '4 policies, half draws', samples=1, policies=4, draws=1.1)
  add(ratings, 'Elo', 50, '6 policies, half draws, 4 a prompt', samples=4, policies=6, draws=1.1)
  for prompts, samples in ((5, 1), (10, 4), (100, 4)):
    add(gold, 'gold score', prompts, f'{samples} a prompt', samples=samples, skewed=False)
  add(gold, 'gold score', 50, 'skewed, 4 a prompt', samples=4, skewed=True)
  return rows


def coverage(simulate, runs, seed=0):
  """Returns the fraction of intervals that contain the true value, and their median width."""
  rng = np.random.default_rng(seed)
  covered, widths = [], []
  for _ in range(runs):
    for (low, high), truth in zip(*simulate(rng), strict=True):
      covered.append(low <= truth <= high)
      widths.append(high - low)
  return float(np.mean(covered)), float(np.median(widths))


def table(runs):
  """Returns the rows of the table, lists of strings."""
  rows = []
  for name, prompts, description, simulate in cases():
    fraction, width = coverage(simulate, runs)
    rows.append([name, str(prompts), description, f'{100 * fraction:.1f} %', f'{width:.3g}'])
  return rows


def main(runs=RUNS):
  print('| ' + ' | '.join(HEADER) + ' |\n' + '|---' * len(HEADER) + '|')
  for row in table(runs):
    print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))

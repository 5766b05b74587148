"""Win rate of one policy over another on the same prompts."""

import dataclasses
import math

import numpy as np

from rlhf_jax import intervals
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WinRate:
  """Wins, draws and losses of a policy, its win rate in [0, 1] and the 95 % interval of that."""

  wins: int
  draws: int
  losses: int
  rate: float
  low: float
  high: float


def wilson(successes, trials, *, z=1.96):
  """Wilson's interval of a proportion.

  (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n), with p = successes / n, n = trials.
  See Wilson 1927 (https://doi.org/10.1080/01621459.1927.10502953).

  Args:
    successes: number, halves allowed.
    trials: positive number.
    z: standard normal quantile; 1.96 for 95 %.

  Returns:
    (low, high), within [0, 1].
  """
  p = successes / trials
  centre = p + z**2 / (2 * trials)
  half = z * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
  scale = 1 + z**2 / trials
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def win_rate(scores, baseline, *, tolerance=0.0, prompts=None):
  """How often a policy's response scores higher than the baseline's to the same prompt.

  rate = (wins + draws / 2) / pairs; the interval is Wilson's with draws as half successes. Where
  several pairs share a prompt it also covers the one from resampling prompts; and if all pairs end
  alike, so that resampling shows nothing, Wilson's is of as many trials as there are prompts.

  Args:
    scores: [pairs] scores of the policy's responses.
    baseline: [pairs] scores of the baseline's responses to the same prompts.
    tolerance: a difference of at most this is a draw.
    prompts: of the pairs, see intervals.groups; None for all different.

  Raises:
    UserError: no pairs, different lengths, or a score that is NaN.
  """
  won = outcomes(scores, baseline, tolerance=tolerance)
  wins, losses = int((won == 1).sum()), int((won == 0).sum())
  rate, shared = float(won.mean()), intervals.shared(prompts)
  trials = len(set(prompts)) if shared and won.min() == won.max() else won.size
  low, high = wilson(rate * trials, trials)
  if shared:
    by_prompt = intervals.bootstrap(won, prompts)
    low, high = min(low, by_prompt[0]), max(high, by_prompt[1])
  return WinRate(wins, won.size - wins - losses, losses, rate, low, high)


def outcomes(scores, baseline, *, tolerance=0.0):
  """1 for a win, 0.5 for a draw, 0 for a loss: [pairs] float; see `win_rate`."""
  scores, baseline = np.asarray(scores, float), np.asarray(baseline, float)
  if scores.ndim != 1 or scores.shape != baseline.shape or not scores.size:
    raise UserError(
      f'win rate: needs two equally long lists of scores, got {scores.shape} and {baseline.shape}'
    )
  if np.isnan(scores).any() or np.isnan(baseline).any():
    raise UserError('win rate: a score is NaN')
  # Not subtracted where equal, so that two infinite scores draw instead of giving NaN.
  difference = np.subtract(scores, baseline, out=np.zeros_like(scores), where=scores != baseline)
  return 0.5 + 0.5 * (difference > tolerance) - 0.5 * (difference < -tolerance)

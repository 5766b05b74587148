"""Win rate of one policy over another on the same prompts."""

import dataclasses

import numpy as np

from rlhf_jax import intervals
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WinRate:
  """Wins, draws and losses of a policy, its win rate in [0, 1], and its 95 % interval."""

  wins: int
  draws: int
  losses: int
  rate: float
  low: float
  high: float


def win_rate(scores, baseline, *, tolerance=0.0, prompts=None):
  """Computes how often a policy's response scores higher than the baseline's to the same prompt.

  rate = (wins + draws / 2) / pairs; see intervals.rate for the interval.

  Args:
    scores: [pairs] scores of the policy's responses.
    baseline: [pairs] scores of the baseline's responses to the same prompts.
    tolerance: Largest difference in scores that is a draw.
    prompts: Prompts of the pairs; see intervals.groups. None if they all differ.

  Raises:
    UserError: If there are no pairs, the lengths differ, or a score is NaN.
  """
  return of_outcomes(outcomes(scores, baseline, tolerance=tolerance), prompts)


def of_outcomes(won, prompts=None):
  """Computes the WinRate of matches.

  Args:
    won: [pairs] floats in [0, 1]: 1 for a win, 0.5 for a draw, 0 for a loss. Other values, from a
      judge that returns probabilities, count as draws.
    prompts: Prompts of the pairs; see intervals.groups. None if they all differ.
  """
  wins, losses = int((won == 1).sum()), int((won == 0).sum())
  low, high = intervals.rate(won, prompts)
  return WinRate(wins, won.size - wins - losses, losses, float(won.mean()), low, high)


def outcomes(scores, baseline, *, tolerance=0.0):
  """Returns outcomes [pairs], float: 1 for a win, 0.5 for a draw, 0 for a loss; see `win_rate`."""
  scores, baseline = np.asarray(scores, float), np.asarray(baseline, float)
  if scores.ndim != 1 or scores.shape != baseline.shape or not scores.size:
    raise UserError(
      'win rate: the two lists of scores must have the same length of at least 1, but their shapes '
      f'are {scores.shape} and {baseline.shape}'
    )
  if np.isnan(scores).any() or np.isnan(baseline).any():
    raise UserError('win rate: a score is NaN')
  # Equal scores are not subtracted, so two equal infinite scores are a draw and not NaN.
  difference = np.subtract(scores, baseline, out=np.zeros_like(scores), where=scores != baseline)
  return 0.5 + 0.5 * (difference > tolerance) - 0.5 * (difference < -tolerance)

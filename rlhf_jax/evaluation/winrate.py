"""Win rate of one policy over another on the same prompts."""

import dataclasses

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


def win_rate(scores, baseline, *, tolerance=0.0, prompts=None):
  """How often a policy's response scores higher than the baseline's to the same prompt.

  rate = (wins + draws / 2) / pairs; see intervals.rate for the interval.

  Args:
    scores: [pairs] scores of the policy's responses.
    baseline: [pairs] scores of the baseline's responses to the same prompts.
    tolerance: a difference of at most this is a draw.
    prompts: of the pairs; see intervals.groups. None for all different.

  Raises:
    UserError: no pairs, different lengths, or a score that is NaN.
  """
  return of_outcomes(outcomes(scores, baseline, tolerance=tolerance), prompts)


def of_outcomes(won, prompts=None):
  """The WinRate of games.

  Args:
    won: [pairs] floats in [0, 1]: 1 for a win, 0.5 for a draw, 0 for a loss. Other values, of a judge
      that is not sure, count among the draws.
    prompts: of the pairs; see intervals.groups. None for all different.
  """
  wins, losses = int((won == 1).sum()), int((won == 0).sum())
  low, high = intervals.rate(won, prompts)
  return WinRate(wins, won.size - wins - losses, losses, float(won.mean()), low, high)


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

"""Accuracy and calibration of reward models, on pairs and on ratings.

The confidence in a pair is sigmoid(|chosen - rejected|), in [0.5, 1]: the probability that the
model gives to the response it prefers. The model is right if it prefers the chosen response. A tie
counts as wrong and is reported: a constant scorer has accuracy 0, not 1.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from rlhf_jax import intervals
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bin:
  """Pairs whose confidence is in (low, high], or in [low, high] for the first bin.

  Attributes:
    low: lower bound of the confidence.
    high: upper bound of the confidence.
    count: number of pairs.
    confidence: mean confidence; NaN if there are no pairs.
    accuracy: fraction of pairs that the model gets right; NaN if there are no pairs.
  """

  low: float
  high: float
  count: int
  confidence: float
  accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Pair accuracy of a reward model with its 95 % interval, and its calibration.

  Attributes:
    count: number of pairs.
    accuracy: fraction of pairs with chosen > rejected.
    accuracy_low: lower end of the interval.
    accuracy_high: upper end of the interval.
    ties: fraction of pairs with chosen == rejected; they count as wrong.
    margin: mean of chosen - rejected.
    ece: expected calibration error, in [0, 1].
    bins: tuple of Bin.
  """

  count: int
  accuracy: float
  accuracy_low: float
  accuracy_high: float
  ties: float
  margin: float
  ece: float
  bins: tuple[Bin, ...]


def pairwise(
  chosen: Sequence[float] | np.ndarray,
  rejected: Sequence[float] | np.ndarray,
  *,
  prompts: intervals.Prompts = None,
  bins: int = 10,
) -> Calibration:
  """Computes accuracy and calibration of the scores of pairs.

  Args:
    chosen: [pairs] scores of the preferred responses.
    rejected: [pairs] scores of the other responses.
    prompts: Prompts of the pairs, by which the interval is clustered; see intervals.rate. None if
      all prompts differ.
    bins: Number of equal-width bins of the confidence over [0.5, 1].

  Returns:
    Calibration.

  Raises:
    UserError: There are no pairs, the lengths differ, or a score is not finite.
  """
  chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
  if chosen.ndim != 1 or chosen.shape != rejected.shape or not chosen.size:
    raise UserError(
      f'calibration: needs two non-empty lists of equal length, got shapes {chosen.shape} and '
      f'{rejected.shape}'
    )
  if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
    raise UserError('calibration: a score is not finite')
  margins = chosen - rejected
  right = margins > 0
  low, high = intervals.rate(right, prompts)
  table = reliability(1 / (1 + np.exp(-np.abs(margins))), right, bins=bins)
  return Calibration(
    count=margins.size,
    accuracy=float(right.mean()),
    accuracy_low=low,
    accuracy_high=high,
    ties=float((margins == 0).mean()),
    margin=float(margins.mean()),
    ece=expected_calibration_error(table),
    bins=table,
  )


@dataclasses.dataclass(frozen=True)
class Ratings:
  """Calibration of scores that predict ratings of the same completions.

  Attributes:
    ratings: number of ratings.
    bias: mean of score - rating.
    correlation: Pearson correlation; 0 if all scores or all ratings are equal.
    rating_error: expected calibration error in units of the ratings,
      sum_b (count_b / count) * |mean score_b - mean rating_b| over bins of equal count, which are
      quantiles of the scores.
  """

  ratings: int
  bias: float
  correlation: float
  rating_error: float


def ratings(scores: intervals.Values, given: intervals.Values, *, bins: int = 10) -> Ratings:
  """Computes the calibration of scores that predict ratings.

  Args:
    scores: [n] scores.
    given: [n] ratings.
    bins: Number of bins; at most n are used.

  Returns:
    Ratings.
  """
  scores, given = np.asarray(scores, float), np.asarray(given, float)
  error = scores - given
  spread = np.std(scores) * np.std(given)
  product = np.mean((scores - scores.mean()) * (given - given.mean()))
  parts = np.array_split(error[np.argsort(scores, kind='stable')], min(bins, len(scores)))
  return Ratings(
    ratings=len(scores),
    bias=float(error.mean()),
    correlation=float(product / spread) if spread else 0.0,
    rating_error=float(sum(abs(part.sum()) for part in parts) / len(scores)),
  )


def reliability(
  confidences: intervals.Values, right: intervals.Values, *, bins: int = 10
) -> tuple[Bin, ...]:
  """Bins confidences and computes the accuracy in each bin.

  Args:
    confidences: [n] in [0.5, 1], as of a choice of two.
    right: [n] bool, whether each choice was right.
    bins: Number of equal-width bins over [0.5, 1].

  Returns:
    Tuple of Bin.
  """
  confidences, right = np.asarray(confidences, float), np.asarray(right, float)
  edges = np.linspace(0.5, 1, bins + 1)
  index = np.clip(np.searchsorted(edges, confidences, side='left') - 1, 0, bins - 1)
  table = []
  for i in range(bins):
    inside = index == i
    count = int(inside.sum())
    confidence = float(confidences[inside].mean()) if count else np.nan
    accuracy = float(right[inside].mean()) if count else np.nan
    table.append(Bin(float(edges[i]), float(edges[i + 1]), count, confidence, accuracy))
  return tuple(table)


def expected_calibration_error(table: tuple[Bin, ...]) -> float:
  """Returns sum_b (count_b / count) * |accuracy_b - confidence_b| over non-empty bins.

  See Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599).
  """
  total = sum(row.count for row in table)
  return sum(row.count * abs(row.accuracy - row.confidence) for row in table if row.count) / total

"""How right, and how sure, a reward model is about pairs; and how well scores guess ratings.

A pair's confidence is sigmoid(|chosen - rejected|), in [0.5, 1]: the probability that the model
gives to the answer it prefers. It is right if that is the chosen one. A tie counts as wrong and is
reported: a constant scorer has accuracy 0, not 1.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from rlhf_jax import intervals
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bin:
  """Pairs whose confidence is in (low, high] (the first bin holds `low` too); NaN means empty."""

  low: float
  high: float
  count: int
  confidence: float
  accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Pair accuracy of a reward model with its 95 % interval, and its calibration.

  Attributes:
    count: pairs.
    accuracy: share of pairs with chosen > rejected.
    accuracy_low: lower end of the interval.
    accuracy_high: upper end.
    ties: share of pairs with chosen == rejected; they count as wrong.
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
  """Accuracy and calibration of scores of pairs.

  Args:
    chosen: [pairs] scores of the preferred responses.
    rejected: [pairs] scores of the others.
    prompts: of the pairs; see intervals.rate. None for all different.
    bins: number of equal bins of the confidence over [0.5, 1].

  Returns:
    Calibration.

  Raises:
    UserError: no pairs, different lengths, or a score that is not finite.
  """
  chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
  if chosen.ndim != 1 or chosen.shape != rejected.shape or not chosen.size:
    raise UserError(
      f'calibration: needs two equally long lists of scores, got {chosen.shape} and '
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
  """How well scores guess ratings of the same completions.

  Attributes:
    ratings: their number.
    bias: mean of score - rating.
    correlation: Pearson's; 0 where all scores, or all ratings, are equal.
    rating_error: sum_b (count_b / count) * |mean score_b - mean rating_b| over bins of equal count,
      in order of the scores: the expected calibration error in units of the ratings.
  """

  ratings: int
  bias: float
  correlation: float
  rating_error: float


def ratings(scores: intervals.Values, given: intervals.Values, *, bins: int = 10) -> Ratings:
  """Calibration of scores that guess ratings.

  Args:
    scores: [n].
    given: [n] ratings.
    bins: their number; fewer where there are fewer scores.

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
  confidences: intervals.Values, right: intervals.Values, *, bins: int = 10, low: float = 0.5
) -> tuple[Bin, ...]:
  """Confidence against accuracy, in equal bins of the confidence over [low, 1].

  Args:
    confidences: [N] in [low, 1].
    right: [N] bool.
    bins: their number.
    low: the least possible confidence, 0.5 for a choice of two.

  Returns:
    Tuple of Bin.
  """
  confidences, right = np.asarray(confidences, float), np.asarray(right, float)
  edges = np.linspace(low, 1, bins + 1)
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
  """sum_b (count_b / count) * |accuracy_b - confidence_b| over bins that hold something.

  See Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599).
  """
  total = sum(row.count for row in table)
  return sum(row.count * abs(row.accuracy - row.confidence) for row in table if row.count) / total

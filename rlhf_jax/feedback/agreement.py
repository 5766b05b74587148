"""Agreement between annotators who judged the same items.

Votes are an array [items, annotators] of numbers, one per category, with NaN for a missing vote.
Items with fewer than two votes say nothing about agreement and are left out.

Letters: I items, J annotators, C categories, m_i votes of item i, n_ic of them for category c.
"""

import dataclasses
import math

import numpy as np

from rlhf_jax.errors import UserError

LEVELS = ('nominal', 'ordinal', 'interval')
WEIGHTS = ('linear', 'quadratic')


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Agreement between annotators.

  Attributes:
    fraction: fraction of pairs of annotators who gave an item the same label, over all items.
    kappa: Fleiss' kappa, 0 at chance level and 1 if all agree; NaN if only one label was used.
    items: number of items with at least two votes.
  """

  fraction: float
  kappa: float
  items: int


@dataclasses.dataclass(frozen=True)
class AgainstRest:
  """Agreement of one annotator with the others; see `against_rest`."""

  fraction: float
  kappa: float
  items: int


def agreement(votes):
  """Computes the fraction of agreement, and Fleiss' kappa.

  fraction = mean_i sum_c n_ic (n_ic - 1) / (m_i (m_i - 1))
  kappa = (fraction - chance) / (1 - chance), chance = sum_c (mean_i n_ic / m_i)^2

  With m_i = m for all items this is Fleiss 1971, eq. 1-7 (https://doi.org/10.1037/h0031619). If the
  number of votes varies, each item weighs the same, however many votes it has.

  Args:
    votes: [I, J] array, NaN for a missing vote.

  Returns:
    Agreement; both numbers are NaN if no item has two votes.

  Raises:
    UserError: There are no items, or fewer than two annotators.
  """
  counts, _ = _counts(votes)
  if not len(counts):
    return Agreement(math.nan, math.nan, 0)
  total = counts.sum(axis=1, keepdims=True)
  fraction = float(((counts * (counts - 1)) / (total * (total - 1))).sum(axis=1).mean())
  proportions = (counts / total).mean(axis=0)
  return Agreement(fraction, _beyond_chance(fraction, proportions @ proportions), len(counts))


def cohen(first, second, *, weights=None):
  """Computes Cohen's kappa of two annotators.

  kappa = 1 - sum_ab d_ab o_ab / sum_ab d_ab p_a q_b, where o_ab is the fraction of items labelled a
  by the first and b by the second, p and q are their marginals, and d_ab is 1 for a != b
  (Cohen 1960, https://doi.org/10.1177/001316446002000104), |a - b| for linear or (a - b)^2 for
  quadratic weights (Cohen 1968, https://doi.org/10.1037/h0026256).

  Args:
    first: [I] votes of one annotator, NaN for a missing vote.
    second: [I] votes of the other.
    weights: None, 'linear' or 'quadratic'; distances are those of the labels' values.

  Returns:
    kappa; NaN if they share no item, or both always gave the same single label.

  Raises:
    UserError: The lengths differ, or there are no such weights.
  """
  first, second = np.asarray(first, float), np.asarray(second, float)
  if first.ndim != 1 or first.shape != second.shape:
    raise UserError(
      f"Cohen's kappa needs two lists of equal length, got {first.shape} and {second.shape}"
    )
  if weights not in (None, *WEIGHTS):
    raise UserError(f"Cohen's kappa: weights={weights!r} must be None or one of {WEIGHTS}")
  both = ~(np.isnan(first) | np.isnan(second))
  labels, index = np.unique(np.concatenate([first[both], second[both]]), return_inverse=True)
  if not both.any():
    return math.nan
  a, b = np.split(np.eye(len(labels))[index], 2)
  gap = np.abs(np.subtract.outer(labels, labels))
  distance = {None: gap > 0, 'linear': gap, 'quadratic': gap**2}[weights]
  observed = (distance * (a.T @ b)).sum() / len(a)
  expected = (distance * np.outer(a.mean(axis=0), b.mean(axis=0))).sum()
  return float(1 - observed / expected) if expected > 0 else math.nan


def krippendorff(votes, *, level='nominal'):
  """Computes Krippendorff's alpha.

  alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck, where the coincidences
  o_ck = sum_i n_ic (n_ik - [c = k]) / (m_i - 1) count pairs of votes of an item, n_c = sum_k o_ck
  and n = sum_c n_c. The distance d_ck is 1 for c != k at the nominal level, (c - k)^2 at the
  interval level, and (sum_{g = c..k} n_g - (n_c + n_k) / 2)^2 at the ordinal level. See
  Krippendorff 2011 (https://repository.upenn.edu/asc_papers/43).

  Args:
    votes: [I, J] array, NaN for a missing vote.
    level: 'nominal', 'ordinal' or 'interval'.

  Returns:
    alpha: 1 if all agree, 0 at chance level; NaN if only one label was used or no item has two
    votes.

  Raises:
    UserError: There are no items, fewer than two annotators, or no such level.
  """
  if level not in LEVELS:
    raise UserError(f"Krippendorff's alpha: level={level!r} must be one of {LEVELS}")
  counts, labels = _counts(votes)
  weighted = counts / (counts.sum(axis=1, keepdims=True) - 1)
  coincidences = weighted.T @ counts - np.diag(weighted.sum(axis=0))
  totals = coincidences.sum(axis=0)
  if level == 'ordinal':
    position = np.cumsum(totals) - totals / 2  # d_ck is the difference of these, squared
    distance = np.subtract.outer(position, position) ** 2
  else:
    gap = np.subtract.outer(labels, labels)
    distance = gap**2 if level == 'interval' else gap != 0
  expected = totals @ distance @ totals
  if not expected > 0:
    return math.nan
  return float(1 - (totals.sum() - 1) * (coincidences * distance).sum() / expected)


def against_rest(votes):
  """Computes how each annotator agrees with the others.

  fraction_j = mean over the items that j and others judged of the fraction of the others who gave
  j's label; kappa_j = (fraction_j - chance) / (1 - chance), with the chance that j and a randomly
  chosen other agree if their labels are independent. With a single other this is Cohen's kappa;
  with several it is Schouten's index, see Vanbelle and Albert 2009
  (https://orbi.uliege.be/handle/2268/2264).

  Args:
    votes: [I, J] array, NaN for a missing vote.

  Returns:
    List of J AgainstRest; numbers are NaN for an annotator who shares no item with another.

  Raises:
    UserError: There are no items, or fewer than two annotators.
  """
  votes, labels = _check(votes)
  given = votes[:, :, None] == labels  # [I, J, C]
  result = []
  for j in range(votes.shape[1]):
    own, rest = given[:, j], np.delete(given, j, axis=1).sum(axis=1)
    shared = own.any(axis=1) & rest.any(axis=1)
    if not shared.any():
      result.append(AgainstRest(math.nan, math.nan, 0))
      continue
    own, rest = own[shared], rest[shared] / rest[shared].sum(axis=1, keepdims=True)
    fraction = float((own * rest).sum(axis=1).mean())
    kappa = _beyond_chance(fraction, own.mean(axis=0) @ rest.mean(axis=0))
    result.append(AgainstRest(fraction, kappa, len(own)))
  return result


def pairwise(votes, *, weights=None):
  """Returns [J, J] Cohen's kappas of all pairs of annotators, NaN on the diagonal; see `cohen`."""
  votes, _ = _check(votes)
  count = votes.shape[1]
  kappas = np.full((count, count), math.nan)
  for i in range(count):
    for j in range(i):
      kappas[i, j] = kappas[j, i] = cohen(votes[:, i], votes[:, j], weights=weights)
  return kappas


def _check(votes):
  """Returns the votes as an array, and the labels that occur in them."""
  votes = np.asarray(votes, float)
  if votes.ndim != 2 or votes.shape[0] < 1 or votes.shape[1] < 2:
    raise UserError(
      f'agreement needs at least 1 item and 2 annotators, got votes of shape {votes.shape}'
    )
  return votes, np.unique(votes[~np.isnan(votes)])


def _counts(votes):
  """Returns n_ic, [I, C], of items with at least two votes, and the C labels."""
  votes, labels = _check(votes)
  counts = (votes[:, :, None] == labels).sum(axis=1).astype(float)
  kept = counts[counts.sum(axis=1) >= 2]
  used = kept.any(axis=0)
  return kept[:, used], labels[used]


def _beyond_chance(fraction, chance):
  # Chance is 1 if only one label was used; the tolerance is for its rounding.
  return float((fraction - chance) / (1 - chance)) if chance < 1 - 1e-12 else math.nan

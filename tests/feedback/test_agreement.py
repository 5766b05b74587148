"""Agreement against statsmodels, scikit-learn, krippendorff, crowd-kit and plain loops."""

import itertools
import math

from crowdkit.metrics import data as crowdkit_metrics
import krippendorff
import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics
from statsmodels.stats import inter_rater

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import agreement

MISSING = math.nan


def votes(seed, items=60, annotators=5, labels=7, missing=0.4):
  """Ratings 1 to `labels` that mostly follow the item, with missing votes and unlike annotators."""
  rng = np.random.default_rng(seed)
  truth = rng.integers(1, labels + 1, size=(items, 1))
  noise = rng.normal(0, 0.4 + np.arange(annotators), size=(items, annotators))
  ratings = np.clip(np.round(truth + noise), 1, labels)
  ratings[rng.random(ratings.shape) < missing] = MISSING
  return ratings


def complete(seed, labels=7):
  return votes(seed, labels=labels, missing=0)


def test_agreement_by_hand():
  # Pairs of annotators that agree: items 3/3, 1/3, 3/3, 1/3 of 3: mean 2/3.
  # Ones: 3 + 2 + 0 + 1 = 6 of 12, so chance = 1/2 and kappa = (2/3 - 1/2) / (1/2) = 1/3.
  result = agreement.agreement([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]])
  assert result.fraction == pytest.approx(2 / 3)
  assert result.kappa == pytest.approx(1 / 3)
  assert result.items == 4


def test_agreement_with_missing_votes_by_hand():
  # The third item has one vote and is left out. Agreement of the others: 1, 0 and 1/3, mean 4/9.
  # Ones: 1, 1/2 and 1/3 of an item's votes, mean 11/18; chance = (121 + 49) / 324 = 170/324.
  # kappa = (144 - 170) / (324 - 170) = -26/154.
  result = agreement.agreement([[1, 1, MISSING], [MISSING, 1, 0], [0, MISSING, MISSING], [0, 1, 0]])
  assert result.fraction == pytest.approx(4 / 9)
  assert result.kappa == pytest.approx(-26 / 154)
  assert result.items == 3


def test_agreement_at_its_ends():
  assert agreement.agreement([[1, 1], [0, 0]]).kappa == 1
  # Always opposite: chance 1/2, kappa (0 - 1/2) / (1/2) = -1.
  assert agreement.agreement([[1, 0], [0, 1]]).kappa == -1
  everyone_same = agreement.agreement([[1, 1], [1, 1]])
  assert everyone_same.fraction == 1 and math.isnan(everyone_same.kappa)
  nobody_twice = agreement.agreement([[1, MISSING], [MISSING, 0]])
  assert math.isnan(nobody_twice.fraction) and nobody_twice.items == 0


@pytest.mark.parametrize('seed', range(3))
def test_fleiss_kappa_is_that_of_statsmodels(seed):
  ratings = complete(seed)
  table, _ = inter_rater.aggregate_raters(ratings.astype(int))
  expected = inter_rater.fleiss_kappa(table)
  assert agreement.agreement(ratings).kappa == pytest.approx(expected, abs=1e-12)
  # Shuffled annotators of equal numbers of votes: which annotator gave a vote plays no part.
  shuffled = np.random.default_rng(seed).permuted(ratings, axis=1)
  assert agreement.agreement(shuffled).kappa == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('weights', [None, 'linear', 'quadratic'])
def test_cohens_kappa_is_that_of_scikit_learn_and_statsmodels(weights):
  first, second = complete(1)[:, :2].T
  expected = sklearn_metrics.cohen_kappa_score(first, second, weights=weights)
  table = sklearn_metrics.confusion_matrix(first, second)
  other = inter_rater.cohens_kappa(table, wt=weights, return_results=False)
  found = agreement.cohen(first, second, weights=weights)
  assert found == pytest.approx(expected, abs=1e-12)
  assert found == pytest.approx(other, abs=1e-12)
  # A vote that one of them did not give removes the item.
  first = np.concatenate([first, [3, MISSING]])
  second = np.concatenate([second, [MISSING, 5]])
  assert agreement.cohen(first, second, weights=weights) == pytest.approx(expected, abs=1e-12)


def test_weights_are_distances_of_values():
  # Labels 1, 2 and 7. Disagreement |1-7| + |7-1| = 12 over 4 items. Marginals: first (2, 1, 1),
  # second (2, 1, 1) fourths of 1, 2, 7; expected (2 * (1 * 2 + 6 * 2 + 5 * 1)) / 16 = 38/16 per
  # item, so kappa = 1 - (12 / 4) / (38 / 16) = -5/19.
  assert agreement.cohen([1, 1, 2, 7], [1, 7, 2, 1], weights='linear') == pytest.approx(-5 / 19)


@pytest.mark.parametrize('level', agreement.LEVELS)
@pytest.mark.parametrize('missing', [0, 0.4, 0.75])
def test_alpha_is_that_of_krippendorff(level, missing):
  ratings = votes(2, missing=missing)
  expected = krippendorff.alpha(ratings.T, level_of_measurement=level)
  assert agreement.krippendorff(ratings, level=level) == pytest.approx(expected, abs=1e-10)
  # Labels 1, 2, 4, 8...: only the interval level depends on their distances.
  spread = 2**ratings
  expected = krippendorff.alpha(spread.T, level_of_measurement=level)
  assert agreement.krippendorff(spread, level=level) == pytest.approx(expected, abs=1e-10)


def test_alpha_is_that_of_crowdkit():
  ratings = votes(3, labels=3)
  rows = [
    (f'item{i}', f'annotator{j}', ratings[i, j])
    for i, j in itertools.product(*map(range, ratings.shape))
    if not math.isnan(ratings[i, j])
  ]
  answers = pd.DataFrame(rows, columns=['task', 'worker', 'label'])
  expected = crowdkit_metrics.alpha_krippendorff(answers)
  assert agreement.krippendorff(ratings) == pytest.approx(expected, abs=1e-10)


def test_alpha_without_disagreement_to_expect():
  assert math.isnan(agreement.krippendorff([[1, 1], [1, 1]]))
  assert math.isnan(agreement.krippendorff([[1, MISSING], [MISSING, 0]]))
  assert agreement.krippendorff([[1, 1], [0, 0]]) == 1


def test_against_the_rest_is_a_plain_loop():
  ratings = votes(4, labels=3)
  for j, found in enumerate(agreement.against_rest(ratings)):
    agrees, own, others = [], [], []
    for row in ratings:
      rest = [vote for i, vote in enumerate(row) if i != j and not math.isnan(vote)]
      if math.isnan(row[j]) or not rest:
        continue
      agrees.append(sum(vote == row[j] for vote in rest) / len(rest))
      own.append(row[j])
      others.append(rest)
    chance = sum(
      sum(vote == label for vote in own)
      / len(own)
      * sum(rest.count(label) / len(rest) for rest in others)
      / len(others)
      for label in (1, 2, 3)
    )
    fraction = sum(agrees) / len(agrees)
    assert found.items == len(own)
    assert found.fraction == pytest.approx(fraction)
    assert found.kappa == pytest.approx((fraction - chance) / (1 - chance))


def test_against_one_other_it_is_cohens_kappa():
  pair = votes(5, annotators=2, labels=3)
  expected = agreement.cohen(pair[:, 0], pair[:, 1])
  for found in agreement.against_rest(pair):
    assert found.kappa == pytest.approx(expected)
  kappas = agreement.pairwise(pair)
  assert kappas[0, 1] == kappas[1, 0] == pytest.approx(expected)
  assert np.isnan(np.diag(kappas)).all()


def test_an_annotator_without_company_has_no_agreement():
  ratings = [[1, 1, MISSING], [0, 1, MISSING], [MISSING, MISSING, 1]]
  alone = agreement.against_rest(ratings)[2]
  assert alone.items == 0 and math.isnan(alone.fraction) and math.isnan(alone.kappa)


def test_impossible_questions_give_the_reason():
  with pytest.raises(UserError, match='2 annotators'):
    agreement.agreement([[1], [0]])
  with pytest.raises(UserError, match='equal length'):
    agreement.cohen([1, 2], [1])
  with pytest.raises(UserError, match="weights='cubic'"):
    agreement.cohen([1, 2], [1, 2], weights='cubic')
  with pytest.raises(UserError, match="level='ratio'"):
    agreement.krippendorff([[1, 2]], level='ratio')

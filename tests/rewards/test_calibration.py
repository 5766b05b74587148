"""Calibration of pair scores by hand."""

import math

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import calibration


def test_ece_by_hand():
  # Two bins over [0.5, 1]. Lower: confidences 0.6, 0.7, one right: |0.5 - 0.65| = 0.15, 2 of 5.
  # Upper: 0.8, 0.9, 1.0, all right: |1 - 0.9| = 0.1, 3 of 5. ECE = 0.06 + 0.06.
  table = calibration.reliability([0.6, 0.7, 0.8, 0.9, 1.0], [1, 0, 1, 1, 1], bins=2)
  assert [row.count for row in table] == [2, 3]
  assert table[0].confidence == pytest.approx(0.65) and table[0].accuracy == 0.5
  assert (table[1].low, table[1].high) == (0.75, 1.0)
  assert calibration.expected_calibration_error(table) == pytest.approx(0.12)


def test_edges_belong_to_the_lower_bin_and_empty_bins_are_nan():
  table = calibration.reliability([0.5, 0.75], [1, 1], bins=2)
  assert [row.count for row in table] == [2, 0]
  assert math.isnan(table[1].confidence) and math.isnan(table[1].accuracy)
  assert calibration.expected_calibration_error(table) == pytest.approx(0.375)


def test_a_constant_scorer_is_never_right():
  result = calibration.pairwise(np.zeros(20), np.zeros(20))
  assert result.accuracy == 0 and result.ties == 1
  assert result.ece == 0.5


def test_pairwise_by_hand():
  # Margins ln 3, -ln 3, 0, ln 9: confidences 0.75, 0.75, 0.5, 0.9; right: 1, 0, 0, 1.
  margins = np.array([math.log(3), -math.log(3), 0, math.log(9)])
  result = calibration.pairwise(margins, np.zeros(4), bins=2)
  assert result.count == 4
  assert result.accuracy == 0.5 and result.ties == 0.25
  assert result.margin == pytest.approx(math.log(9) / 4)
  # Bins (0.5, 0.75] and (0.75, 1]: |1/3 - 2/3| * 3/4 + |1 - 0.9| * 1/4.
  assert result.ece == pytest.approx(0.275, abs=1e-6)


def test_a_calibrated_scorer_has_a_small_error():
  rng = np.random.default_rng(0)
  margins = rng.normal(0, 2, 20_000)
  won = rng.random(20_000) < 1 / (1 + np.exp(-margins))
  signed = np.where(won, margins, -margins)
  honest = calibration.pairwise(signed, np.zeros_like(signed))
  boastful = calibration.pairwise(4 * signed, np.zeros_like(signed))
  assert honest.ece < 0.015
  assert boastful.ece > 0.1


def test_pairs_of_one_prompt_count_together():
  """If all pairs of a prompt are right, or all are wrong, 10 prompts are 10 trials."""
  margins = np.repeat([1.0] * 6 + [-1.0] * 4, 20)
  alone = calibration.pairwise(margins, np.zeros(200))
  shared = calibration.pairwise(margins, np.zeros(200), prompts=np.repeat(range(10), 20).tolist())
  assert alone.accuracy == shared.accuracy == 0.6
  # The variance over prompts is 10 / 9 * 0.24 / 10: 9 samples; Wilson's half width with t of 9,
  # 2.262, z sqrt(0.24 / 9 + z^2 / 4 / 81) / (1 + z^2 / 9), is 0.297; of 200 samples with 1.96 it is
  # 0.0673.
  assert shared.accuracy_high - shared.accuracy_low == pytest.approx(0.594, abs=1e-3)
  assert alone.accuracy_high - alone.accuracy_low == pytest.approx(0.1346, abs=1e-4)


@pytest.mark.parametrize(
  ('chosen', 'rejected', 'message'),
  [([], [], 'equal length'), ([1, 2], [1], 'equal length'), ([math.inf], [1], 'finite')],
)
def test_bad_scores_are_errors(chosen, rejected, message):
  with pytest.raises(UserError, match=message):
    calibration.pairwise(chosen, rejected)

"""Win rates by hand; their intervals are in test_intervals.py."""

import pytest

from rlhf_jax import intervals
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import winrate


def test_draws_count_half():
  result = winrate.win_rate([2, 1, 3, 0], [1, 1, 1, 1])
  assert (result.wins, result.draws, result.losses) == (2, 1, 1)
  assert result.rate == 2.5 / 4
  assert (result.low, result.high) == intervals.rate([1, 0.5, 1, 0])


def test_tolerance_and_infinities():
  result = winrate.win_rate([1.05, 0.95, 1.2], [1, 1, 1], tolerance=0.1)
  assert (result.wins, result.draws, result.losses) == (1, 2, 0)
  # Differences of exactly the tolerance, in either direction.
  result = winrate.win_rate([1.5, 0.5, 1.75], [1, 1, 1], tolerance=0.5)
  assert (result.wins, result.draws, result.losses) == (1, 2, 0)
  infinity = float('inf')
  result = winrate.win_rate([infinity, -infinity, infinity], [infinity, infinity, 0])
  assert (result.wins, result.draws, result.losses) == (1, 1, 1)


@pytest.mark.parametrize(
  ('scores', 'baseline', 'message'),
  [([], [], 'the same length'), ([1, 2], [1], 'the same length'), ([float('nan')], [1], 'NaN')],
)
def test_bad_scores_are_errors(scores, baseline, message):
  with pytest.raises(UserError, match=message):
    winrate.win_rate(scores, baseline)

"""Win rates and Wilson's interval by hand."""

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import winrate


def test_wilson_by_hand():
  # n = 10, p = 0.8, z = 2: centre (0.8 + 4/20) / 1.4 = 0.714286;
  # half sqrt(0.16/10 + 4/400) * 2 / 1.4 = 2 * 0.161245 / 1.4 = 0.230350.
  low, high = winrate.wilson(8, 10, z=2)
  assert low == pytest.approx(0.483936, abs=1e-5)
  assert high == pytest.approx(0.944636, abs=1e-5)


def test_wilson_stays_within_0_and_1():
  # p = 1: low = 1 / (1 + z²/n).
  low, high = winrate.wilson(20, 20, z=2)
  assert low == pytest.approx(1 / 1.2) and high == 1
  assert winrate.wilson(0, 20)[0] == 0


def test_draws_count_half():
  result = winrate.win_rate([2, 1, 3, 0], [1, 1, 1, 1])
  assert (result.wins, result.draws, result.losses) == (2, 1, 1)
  assert result.rate == 2.5 / 4
  assert (result.low, result.high) == winrate.wilson(2.5, 4)


def test_tolerance_and_infinities():
  result = winrate.win_rate([1.05, 0.95, 1.2], [1, 1, 1], tolerance=0.1)
  assert (result.wins, result.draws, result.losses) == (1, 2, 0)
  infinity = float('inf')
  result = winrate.win_rate([infinity, -infinity, infinity], [infinity, infinity, 0])
  assert (result.wins, result.draws, result.losses) == (1, 1, 1)


@pytest.mark.parametrize(
  ('scores', 'baseline', 'message'),
  [([], [], 'equally long'), ([1, 2], [1], 'equally long'), ([float('nan')], [1], 'NaN')],
)
def test_bad_scores_are_errors(scores, baseline, message):
  with pytest.raises(UserError, match=message):
    winrate.win_rate(scores, baseline)

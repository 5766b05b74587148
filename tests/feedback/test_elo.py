"""Elo ratings against numbers by hand and against simulations."""

import math

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import elo
from rlhf_jax.feedback.elo import Match


def test_three_to_one_is_190_85_points():
  # 400 * log10(3) = 190.8485
  ratings = elo.ratings([Match('a', 'b', 75, 0, 25)], anchor='b', prior_draws=0)
  assert ratings['a'].elo == pytest.approx(1190.8485, abs=1e-3)
  assert ratings['b'].elo == 1000 and ratings['b'].se == 0
  # Information n p (1 - p) = 100 * 3/16 = 18.75; se = 173.7178 / sqrt(18.75) = 40.119 points.
  assert ratings['a'].se == pytest.approx(40.119, abs=1e-3)
  assert ratings['a'].high - ratings['a'].elo == pytest.approx(1.96 * 40.119, abs=1e-2)


def test_the_mean_is_the_anchor_by_default():
  ratings = elo.ratings([Match('a', 'b', 75, 0, 25)], prior_draws=0)
  assert ratings['a'].elo == pytest.approx(1095.424, abs=1e-3)
  assert ratings['b'].elo == pytest.approx(904.576, abs=1e-3)
  # Each has half of the error of the difference.
  assert ratings['a'].se == pytest.approx(40.119 / 2, abs=1e-3)


def test_draws_are_half_wins():
  # 50 + 50/2 = 75 points of 100.
  ratings = elo.ratings([Match('a', 'b', 50, 50, 0)], anchor='b', prior_draws=0)
  assert ratings['a'].elo == pytest.approx(1190.8485, abs=1e-3)


def test_imaginary_draws_keep_a_clean_sweep_finite():
  # 10 games won and 1 drawn: odds 10.5 to 0.5 = 21, 400 * log10(21) = 528.89.
  ratings = elo.ratings([Match('a', 'b', 10, 0, 0)], anchor='b')
  assert ratings['a'].elo == pytest.approx(1528.888, abs=1e-3)
  assert ratings['a'].low < 1528 < ratings['a'].high


def test_a_chain_adds_up():
  matches = [Match('a', 'b', 75, 0, 25), Match('b', 'c', 75, 0, 25)]
  ratings = elo.ratings(matches, anchor='c', prior_draws=0)
  assert ratings['a'].elo - ratings['c'].elo == pytest.approx(2 * 190.8485, abs=1e-3)
  # Two independent links: variances add.
  assert ratings['a'].se == pytest.approx(40.119 * math.sqrt(2), abs=1e-2)


def test_simulated_ratings_lie_in_their_intervals_as_often_as_they_should():
  rng = np.random.default_rng(0)
  true = {'a': 1000.0, 'b': 1080.0, 'c': 1300.0}
  inside = []
  for _ in range(150):
    matches = []
    for first, second in (('a', 'b'), ('b', 'c'), ('a', 'c')):
      wins = rng.binomial(120, elo.expected(true[first], true[second]))
      matches.append(Match(first, second, wins, 0, 120 - wins))
    ratings = elo.ratings(matches, anchor='a')
    inside += [ratings[name].low <= true[name] <= ratings[name].high for name in 'bc']
  assert 0.90 <= np.mean(inside) <= 0.99


def test_lopsided_tables_converge():
  names = 'abcdef'
  matches = [Match(x, y, 511, 0, 1) for i, x in enumerate(names) for y in names[i + 1 :]]
  ratings = elo.ratings(matches, anchor='f')
  points = [ratings[name].elo for name in names]
  assert points == sorted(points, reverse=True) and np.isfinite(points).all()


def test_update_by_hand():
  # Expected 10/11 of a 400-point favourite; losing costs 32 * 10/11 = 29.09.
  assert elo.expected(1400, 1000) == pytest.approx(10 / 11)
  first, second = elo.update(1400, 1000, 0.0)
  assert first == pytest.approx(1400 - 29.0909, abs=1e-3)
  assert first + second == pytest.approx(2400)


@pytest.mark.parametrize(
  ('matches', 'options', 'message'),
  [
    ([Match('a', 'b', 1, 0, 1), Match('c', 'd', 1, 0, 1)], {}, r"'c', 'd'.*no chain"),
    ([Match('a', 'b', 5, 0, 0)], {'prior_draws': 0}, 'prior_draws'),
    ([Match('a', 'b', 0, 0, 5)], {'prior_draws': 0}, 'prior_draws'),
    ([Match('a', 'b', 1, 0, 1)], {'anchor': 'z'}, "anchor 'z'"),
    ([Match('a', 'a', 1, 0, 1)], {}, 'against itself'),
    ([Match('a', 'b', -1, 0, 1)], {}, 'negative'),
  ],
)
def test_impossible_tables_give_the_reason(matches, options, message):
  with pytest.raises(UserError, match=message):
    elo.ratings(matches, **options)


def test_intervals_cover_95_percent_of_resamples():
  # 1500 of 2000 games won, each of a prompt of its own: the deviation of the log-odds is
  # 1 / sqrt(2000 * 3/16) = 0.05164, 8.971 points, and 95 % are 1.96 of them on either side.
  won = np.arange(2000) < 1500
  outcomes = {('a', 'b'): won.astype(float)}
  found = elo.ratings_of_outcomes(outcomes, list(range(2000)), anchor='b')['a']
  assert found.elo == pytest.approx(1190.8, abs=1)
  assert (found.high - found.low) / 2 == pytest.approx(1.96 * 8.971, rel=0.08)  # 90 %: 16 % less

"""Ratings with ties and style control against choix, scikit-learn and FastChat's formulas."""

import dataclasses
import math

import choix
import numpy as np
import pytest
from scipy import optimize
from scipy import special
from sklearn import linear_model

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import bradley_terry
from rlhf_jax.feedback import elo
from rlhf_jax.feedback import leaderboard
from rlhf_jax.feedback import types
from rlhf_jax.feedback.bradley_terry import Model

# The constants of FastChat's rating_systems.py.
K, BASE, SCALE, START, STYLE_REG = 4.0, 10.0, 400.0, 1000.0, 0.5
PLAIN = Model(ties='half', prior_draws=0)


def battles(seed, count=400, policies=5, ties=True):
  """Unbalanced battles: the first policies play more, and longer answers win more."""
  rng = np.random.default_rng(seed)
  strengths = rng.normal(0, 0.8, policies)
  chances = 1 / np.arange(1, policies + 1)
  result = []
  for i in range(count):
    a, b = rng.choice(policies, size=2, replace=False, p=chances / chances.sum())
    lengths = rng.integers(5, 60, size=2) + 6 * np.array([a, b])
    z = strengths[a] - strengths[b] + 0.02 * (lengths[0] - lengths[1])
    weights = np.exp([z / 2, -z / 2, -0.3 if ties else -np.inf])
    outcome = rng.choice([1.0, 0.0, 0.5], p=weights / weights.sum())
    names = f'policy {a}', f'policy {b}'
    result.append(types.Battle(*names, float(outcome), 'ann', i // 2, *map(int, lengths), i % 3))
  return result


def points(board):
  return {standing.policy: standing.elo for standing in board.standings}


def arrays(games):
  """Returns names, [n] indices of both policies, outcomes and lengths, by a plain loop."""
  names = sorted({name for game in games for name in (game.first, game.second)})
  pick = lambda get: np.array([get(game) for game in games])
  return (
    names,
    pick(lambda game: names.index(game.first)),
    pick(lambda game: names.index(game.second)),
    pick(lambda game: game.outcome),
    pick(lambda game: (game.first_length, game.second_length)).astype(float),
  )


def logits(board, names):
  """Returns the strengths of policies in log-odds, with mean 0."""
  return (np.array([points(board)[name] for name in names]) - START) * math.log(BASE) / SCALE


def test_without_ties_it_is_choix():
  games = battles(0, ties=False)
  names, a, b, won, _ = arrays(games)
  pairs = [(i, j) if w == 1 else (j, i) for i, j, w in zip(a, b, won)]
  expected = choix.opt_pairwise(len(names), pairs, alpha=0, tol=1e-12)
  found = logits(leaderboard.rate(games, PLAIN, draws=0), names)
  np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-6)


def test_half_wins_are_fastchats_bradley_terry():
  games = battles(1)
  names, a, b, won, _ = arrays(games)
  alpha = math.log(BASE)

  def loss(ratings):
    probability = special.expit(alpha * (ratings[a] - ratings[b]))
    return -np.sum(np.log(probability) * won + np.log(1 - probability) * (1 - won))

  def gradient(ratings):
    error = won - special.expit(alpha * (ratings[a] - ratings[b]))
    sums = [error[b == i].sum() - error[a == i].sum() for i in range(len(names))]
    return alpha * np.array(sums)

  best = optimize.minimize(loss, np.zeros(len(names)), jac=gradient, options={'gtol': 1e-9})
  found = logits(leaderboard.rate(games, PLAIN, draws=0), names)
  np.testing.assert_allclose(found, alpha * (best.x - best.x.mean()), atol=1e-6)


def test_half_wins_are_the_ratings_of_matches():
  games = battles(2)
  matches = [
    elo.Match(g.first, g.second, g.outcome == 1, g.outcome == 0.5, g.outcome == 0) for g in games
  ]
  board = leaderboard.rate(games, Model(ties='half', prior_draws=1), anchor='policy 1', draws=0)
  # One virtual draw per pair that met, and not per game: count each pair once.
  totals = {}
  for match in matches:
    first, second = sorted((match.first, match.second))
    wins, losses = (match.wins, match.losses)[:: 1 if first == match.first else -1]
    total = totals.setdefault((first, second), [0, 0, 0])
    totals[first, second] = [total[0] + wins, total[1] + match.draws, total[2] + losses]
  expected = elo.ratings(
    [elo.Match(*pair, *total) for pair, total in totals.items()], anchor='policy 1'
  )
  for name, rating in points(board).items():
    assert rating == pytest.approx(expected[name].elo, abs=1e-6)


def test_ties_are_davidsons_model():
  """At the maximum, each policy's points and the number of ties are those that are expected."""
  games = battles(3)
  names, a, b, won, _ = arrays(games)
  board = leaderboard.rate(games, Model(prior_draws=0), draws=0)
  pi = np.exp(logits(board, names))  # Davidson's preferences
  root = board.nu * np.sqrt(pi[a] * pi[b])
  win, tie = pi[a] / (pi[a] + pi[b] + root), root / (pi[a] + pi[b] + root)
  excess = won - (win + tie / 2)
  for i in range(len(names)):
    assert excess[a == i].sum() - excess[b == i].sum() == pytest.approx(0, abs=1e-6)
  assert tie.sum() == pytest.approx((won == 0.5).sum(), abs=1e-6)


def test_davidson_by_hand():
  # Two policies with 6 wins, 4 ties and 2 losses: the model is saturated, so the fitted
  # probabilities are 6/12, 4/12, 2/12. Odds of win to loss are e^r = 3, 400 log10(3) = 190.8485;
  # nu = P(tie) / sqrt(P(win) P(loss)) = 4 / sqrt(12) = 1.154701.
  games = [
    types.Battle('a', 'b', outcome, 'ann', i, 1, 1, 0)
    for i, outcome in enumerate([1.0] * 6 + [0.5] * 4 + [0.0] * 2)
  ]
  board = leaderboard.rate(games, Model(prior_draws=0), anchor='b', draws=0)
  assert points(board) == pytest.approx({'a': 1190.848502, 'b': 1000}, abs=1e-6)
  assert board.nu == pytest.approx(4 / math.sqrt(12), abs=1e-9)
  # Half wins: 8 of 12 won, odds of 2, 400 log10(2) = 120.412.
  half = leaderboard.rate(games, PLAIN, anchor='b', draws=0)
  assert points(half)['a'] == pytest.approx(1120.411998, abs=1e-6)
  assert half.nu == 0
  row = board.standings[0]
  assert (row.games, row.wins, row.ties, row.losses, row.win_rate) == (12, 6, 4, 2, 8 / 12)


def test_online_ratings_are_fastchats():
  games = battles(4)
  ratings = dict.fromkeys(arrays(games)[0], START)
  alpha = math.log(BASE) / SCALE
  for game in games:
    gap = ratings[game.second] - ratings[game.first]
    change = K * (game.outcome - 1 / (1 + math.exp(alpha * gap)))
    ratings[game.first] += change
    ratings[game.second] -= change
  found = elo.online((game.first, game.second, game.outcome) for game in games)
  assert found == pytest.approx(ratings, abs=1e-9)


def mirrored(games):
  """Each game twice, once from either side, so that differences of lengths have mean 0."""
  swap = lambda g: dataclasses.replace(
    g,
    first=g.second,
    second=g.first,
    outcome=1 - g.outcome,
    first_length=g.second_length,
    second_length=g.first_length,
  )
  return [side for game in games for side in (game, swap(game))]


def test_style_control_is_fastchats():
  games = mirrored(battles(5))
  names, a, b, won, lengths = arrays(games)
  difference = (lengths[:, 0] - lengths[:, 1]) / (lengths[:, 0] + lengths[:, 1] + 1)
  feature = (difference - difference.mean()) / difference.std()
  design = np.zeros((len(games), len(names) + 1))
  design[np.arange(len(games)), a] = math.log(BASE)
  design[np.arange(len(games)), b] = -math.log(BASE)
  design[:, -1] = feature
  # scikit-learn takes labels 0 and 1, so a tie is a win and a loss of half the weight. C is the
  # inverse of the ridge: FastChat's is reg / 2 |w|^2, scikit-learn's 1 / (2 C) |w|^2.
  model = linear_model.LogisticRegression(
    C=1 / STYLE_REG, fit_intercept=False, tol=1e-12, solver='newton-cholesky', max_iter=1000
  )
  labels = np.repeat([1, 0], len(games))
  model.fit(np.concatenate([design, design]), labels, np.concatenate([won, 1 - won]))
  board = leaderboard.rate(games, Model(ties='half', style_control=True), draws=0)
  expected = SCALE * model.coef_[0, :-1] + START
  np.testing.assert_allclose([points(board)[name] for name in names], expected, atol=1e-6)
  assert board.style == pytest.approx(model.coef_[0, -1], abs=1e-8)


@pytest.mark.parametrize('ties', bradley_terry.TIES)
def test_style_control_does_not_depend_on_sides(ties):
  games, model = battles(6), Model(ties, style_control=True)
  both = mirrored(games)
  swapped = [both[2 * i + (i % 3 == 0)] for i in range(len(games))]  # every third game
  board, other = (leaderboard.rate(part, model, draws=0) for part in (games, swapped))
  assert points(board) == pytest.approx(points(other), abs=1e-6)
  assert board.style == pytest.approx(other.style) and board.style > 0


def test_style_control_removes_the_advantage_of_length():
  # 'long' wins 3 of 4 games, always by its length alone; both policies lose when they are shorter.
  rng = np.random.default_rng(0)
  games = []
  for i in range(400):
    lengths = (30, 10) if rng.random() < 0.75 else (10, 30)
    won = float(rng.random() < (0.9 if lengths[0] > lengths[1] else 0.1))
    games.append(types.Battle('long', 'short', won, 'ann', i, *lengths, 0))
  plain = points(leaderboard.rate(games, Model('half'), draws=0))
  fair = points(leaderboard.rate(games, Model('half', style_control=True), draws=0))
  assert plain['long'] - plain['short'] > 100
  assert abs(fair['long'] - fair['short']) < 40


def test_intervals_are_those_of_resampled_tasks():
  # 300 games won of 400, in tasks of 4 annotators who all agree: 100 independent tasks with odds of
  # 3, so the log-odds have a deviation of 1 / sqrt(100 * 3/16) = 0.2309, 40.1 points.
  games = [
    types.Battle('a', 'b', float(task % 4 < 3), f'ann {j}', task, 1, 1, 0)
    for task in range(100)
    for j in range(4)
  ]
  board = leaderboard.rate(games, Model('half'), anchor='b', draws=1000)
  a = board.standings[0]
  assert a.policy == 'a' and a.low < a.elo < a.high
  # The percentiles of 1000 draws have a standard error of 6 % of the deviation.
  assert (a.high - a.low) / 2 == pytest.approx(1.96 * 40.1, rel=0.15)
  # Games in tasks of their own: four times the tasks, half the interval.
  single = [dataclasses.replace(game, task_id=i) for i, game in enumerate(games)]
  alone = leaderboard.rate(single, Model('half'), anchor='b', draws=1000).standings[0]
  assert (alone.high - alone.low) / 2 == pytest.approx(1.96 * 20.06, rel=0.15)
  assert leaderboard.rate(games, anchor='b', draws=50) == leaderboard.rate(
    games, anchor='b', draws=50
  )


def test_a_clean_sweep_and_resamples_without_ties_stay_finite():
  games = [types.Battle('a', 'b', 1.0, 'ann', i, 2, 1, 0) for i in range(10)]
  tie = types.Battle('a', 'b', 0.5, 'ann', 10, 2, 1, 0)
  for model in (Model(), Model('half'), Model(style_control=True)):
    board = leaderboard.rate([*games, tie], model, draws=100)
    ends = [end for row in board.standings for end in (row.low, row.elo, row.high)]
    assert np.isfinite(ends).all() and board.standings[0].policy == 'a'
  # 10 wins and half a virtual one to half a loss: odds of 21, 400 log10(21) = 528.888.
  swept = leaderboard.rate(games, Model('half'), anchor='b', draws=0)
  assert points(swept)['a'] == pytest.approx(1528.888, abs=1e-3)


def test_rounds_add_up():
  # Round 0 is a against b, 3 to 1; round 1 b against c, 3 to 1: 190.85 points each.
  duel = lambda first, second, round: [
    types.Battle(first, second, float(i < 3), 'ann', i + 10 * round, 1, 1, round) for i in range(4)
  ]
  games = duel('b', 'a', 0) + duel('c', 'b', 1)
  boards = leaderboard.over_rounds(games, PLAIN, draws=0)
  assert points(boards[0]) == pytest.approx({'a': 809.1515, 'b': 1000}, abs=1e-3)
  assert points(boards[1]) == pytest.approx({'a': 809.1515, 'b': 1000, 'c': 1190.8485}, abs=1e-3)
  # The first policy of the first round is at 1000, in whatever order the games were judged.
  assert points(leaderboard.over_rounds(games[::-1], PLAIN, draws=0)[1])['b'] == 1000
  # Before round 2 no chain connects c and d with a and b.
  apart = duel('b', 'a', 0) + duel('c', 'd', 1) + duel('c', 'b', 2)
  assert list(leaderboard.over_rounds(apart, PLAIN, draws=0)) == [0, 2]


def test_impossible_tables_give_the_reason():
  game = lambda first, second, outcome: types.Battle(first, second, outcome, 'ann', 0, 3, 3, 0)
  apart = [game('a', 'b', 1.0), game('c', 'd', 0.0)]
  with pytest.raises(UserError, match=r"'c', 'd'.*no chain"):
    leaderboard.rate(apart)
  with pytest.raises(UserError, match='equally long'):
    leaderboard.rate(apart[:1], Model(style_control=True))
  with pytest.raises(UserError, match='prior_draws above 0'):
    leaderboard.rate(apart[:1], PLAIN)
  with pytest.raises(UserError, match="anchor 'z'"):
    leaderboard.rate(apart[:1], anchor='z')
  with pytest.raises(UserError, match="ties='no'"):
    Model(ties='no')
  assert leaderboard.rate([game('a', 'a', 1.0)]).standings == []

"""Ratings of policies on the Elo scale, from the matches between them.

Model (Bradley and Terry 1952): a beats b with probability 1 / (1 + 10^((R_b - R_a) / 400)), so 400
points are odds of ten to one, and one unit of log-odds is 400 / ln 10 = 173.7 points. A draw counts
as half a win for each side, as in Elo's system. That overstates the variance, so the intervals of
`ratings` are too wide if there are many draws; those of `ratings_of_outcomes` are not.

Letters: G groups of games that share a prompt.
"""

import dataclasses
import math

import numpy as np

from rlhf_jax import intervals
from rlhf_jax.errors import UserError

POINTS_PER_LOGIT = 400 / math.log(10)
LEVEL = 1000.0  # rating of the anchor, or the mean of all ratings, in points


@dataclasses.dataclass(frozen=True)
class Match:
  """Results of the games between two policies; `wins` and `losses` are those of the first."""

  first: str
  second: str
  wins: float
  draws: float
  losses: float

  @property
  def games(self):
    return self.wins + self.draws + self.losses


@dataclasses.dataclass(frozen=True)
class Rating:
  """An Elo rating with its 95 % interval and standard error, in points."""

  elo: float
  low: float
  high: float
  se: float


def expected(first, second):
  """Returns the expected score, in [0, 1], of a policy rated `first` against one rated `second`."""
  return 1 / (1 + 10 ** ((second - first) / 400))


def update(first, second, score, *, k=32.0):
  """Returns both ratings after one game, R + k (score - expected).

  The score is 1 if the first policy won, 0.5 for a draw, 0 if it lost. See Elo 1978, The Rating of
  Chessplayers, §1.6.
  """
  change = k * (score - expected(first, second))
  return first + change, second - change


def online(games):
  """Computes Elo's ratings by one pass over games in the order in which they were played.

  Late games count more, so ratings depend on the order; `ratings` does not. A policy starts at
  LEVEL, and k is 4, as in FastChat, which follows chess in base 10 and scale 400.

  Args:
    games: Iterable of (first policy, second policy, score of the first); see `update`.

  Returns:
    {policy: rating}.
  """
  result = {}
  for first, second, score in games:
    before = result.get(first, LEVEL), result.get(second, LEVEL)
    result[first], result[second] = update(*before, score, k=4.0)
  return result


def ratings(matches, *, anchor=None, prior_draws=1.0):
  """Computes maximum-likelihood ratings of all policies in the matches.

  Maximizes sum_ab w_ab log sigmoid(r_a - r_b) by Newton's method, where w_ab is the number of wins
  of a over b plus half their draws. Standard errors are from the inverse Fisher information. See
  Hunter 2004, §2 (https://doi.org/10.1214/aos/1079120141), for the likelihood and for when a
  maximum exists.

  Args:
    matches: List of Match.
    anchor: Policy whose rating is fixed at LEVEL, without error; None fixes the mean of all
      ratings at LEVEL.
    prior_draws: Virtual draws added to each pair that played; they keep ratings finite if a policy
      won every game. 0 gives the plain maximum-likelihood estimate.

  Returns:
    {policy: Rating}, in the order in which the policies first appear.

  Raises:
    UserError: The anchor is unknown, a count is negative, a policy played itself, policies are not
      connected by matches, or there is no finite maximum (prior_draws = 0, and some policies never
      lost to the others).
  """
  names = policies(matches)
  wins = _wins(matches, names, prior_draws)
  _check(matches, names, wins, anchor)
  strengths, information = _maximize(wins)
  covariance = _covariance(information, None if anchor is None else names.index(anchor))
  points = POINTS_PER_LOGIT * strengths
  points += LEVEL - (points.mean() if anchor is None else points[names.index(anchor)])
  errors = POINTS_PER_LOGIT * np.sqrt(np.maximum(np.diag(covariance), 0))
  return {
    name: Rating(
      elo=float(elo), low=float(elo - 1.96 * se), high=float(elo + 1.96 * se), se=float(se)
    )
    for name, elo, se in zip(names, points, errors, strict=True)
  }


def ratings_of_outcomes(outcomes, prompts, *, anchor=None, prior_draws=1.0):
  """Computes ratings of policies that answered the same prompts, with errors clustered by prompt.

  `ratings` assumes that all games are independent. Here games share prompts, and a policy gives the
  same response in its games with all others. The covariance of the strengths is therefore

      I^-1 (G / (G - 1) sum_g u_g u_g^T + prior) I^-1

  where I is the Fisher information and u_g the gradient of the log-likelihood of all games of
  prompt g (Liang and Zeger 1986, https://doi.org/10.1093/biomet/73.1.13). A virtual draw counts as
  half a win and half a loss on two further prompts, so a policy that won every game has an error
  too. Intervals use the quantile of t if a prompt has several games.

  Args:
    outcomes: {(first, second): [n] float, 1 if the first policy won, 0.5 for a draw, 0 if it lost}.
    prompts: n prompts; see intervals.groups.
    anchor: See `ratings`.
    prior_draws: See `ratings`.

  Returns:
    {policy: Rating}; if each pair played one game, with the errors of `ratings`.

  Raises:
    UserError: See `ratings`.
  """
  matches = [Match(*pair, won.sum(), 0, won.size - won.sum()) for pair, won in outcomes.items()]
  result = ratings(matches, anchor=anchor, prior_draws=prior_draws)
  group = intervals.groups(prompts, len(prompts))
  if group.max() < 1:
    return result
  names = list(result)
  strengths = np.array([rating.elo for rating in result.values()]) / POINTS_PER_LOGIT
  information, spread = _spread(outcomes, group, names, strengths, prior_draws)
  inverse = _covariance(information, None if anchor is None else names.index(anchor))
  errors = POINTS_PER_LOGIT * np.sqrt(np.maximum(np.diag(inverse @ spread @ inverse), 0))
  z = intervals.quantile(np.concatenate([group] * len(outcomes)))
  return {
    name: Rating(elo, float(elo - z * se), float(elo + z * se), float(se))
    for name, elo, se in zip(names, POINTS_PER_LOGIT * strengths, errors, strict=True)
  }


def _spread(outcomes, group, names, strengths, prior_draws):
  """Returns the Fisher information and the middle factor of the covariance.

  See `ratings_of_outcomes`; both are [policies, policies] arrays.
  """
  scores = np.zeros((len(names), group.max() + 1))
  information, prior = np.zeros((2, len(names), len(names)))
  for (first, second), won in outcomes.items():
    a, b = names.index(first), names.index(second)
    side = (np.arange(len(names)) == a) * 1.0 - (np.arange(len(names)) == b)
    chance = 1 / (1 + math.exp(strengths[b] - strengths[a]))
    scores += np.outer(side, np.bincount(group, won - chance))
    information += (won.size + prior_draws) * chance * (1 - chance) * np.outer(side, side)
    prior += (prior_draws / 2) ** 2 * ((1 - chance) ** 2 + chance**2) * np.outer(side, side)
  count = scores.shape[1]
  return information, count / (count - 1) * scores @ scores.T + prior


def policies(matches):
  """Returns the names of all policies in matches, in the order in which they first appear."""
  return list(dict.fromkeys(name for match in matches for name in (match.first, match.second)))


def check(matches, *, prior_draws):
  """Raises UserError if the matches do not determine finite ratings; see `ratings`."""
  names = policies(matches)
  _check(matches, names, _wins(matches, names, prior_draws), None)


def check_anchor(anchor, names):
  """Raises UserError if the anchor is neither None nor the name of a policy."""
  if anchor is not None and anchor not in names:
    raise UserError(f'Elo: the anchor {anchor!r} is not among the policies {list(names)}')


def _wins(matches, names, prior_draws):
  """Returns [policies, policies] wins of row over column; a draw counts half."""
  wins = np.zeros((len(names), len(names)))
  for match in matches:
    a, b = names.index(match.first), names.index(match.second)
    wins[a, b] += match.wins + match.draws / 2
    wins[b, a] += match.losses + match.draws / 2
  met = (wins + wins.T) > 0
  return wins + met * prior_draws / 2


def _check(matches, names, wins, anchor):
  for match in matches:
    if min(match.wins, match.draws, match.losses) < 0:
      raise UserError(f'Elo: {match} has a negative count')
    if match.first == match.second:
      raise UserError(f'Elo: {match.first!r} cannot play against itself')
  check_anchor(anchor, names)
  for edges, what in (
    (wins + wins.T, 'no chain of matches connects them to {}'),
    (wins, 'they never lost to {}, directly or through others: set prior_draws above 0'),
    (wins.T, 'they never won against {}, directly or through others: set prior_draws above 0'),
  ):
    others = [name for name, reached in zip(names, _reach(edges > 0), strict=True) if not reached]
    if others:
      raise UserError(f'Elo: {others} cannot be rated, because {what.format(repr(names[0]))}')


def _reach(edges):
  """Returns [policies] bool: which policies can be reached from policy 0 along the edges."""
  reached = np.arange(len(edges)) == 0
  for _ in edges:
    reached |= edges[reached].any(axis=0)
  return reached


def _maximize(wins):
  """Returns the maximum-likelihood strengths (log-odds, mean 0) and their Fisher information."""
  games = wins + wins.T
  strengths = np.zeros(len(wins))
  for _ in range(100):
    chances = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    gradient = (wins - games * chances).sum(axis=1)
    weights = games * chances * (1 - chances)
    information = np.diag(weights.sum(axis=1)) - weights
    step = np.linalg.pinv(information) @ gradient
    # The full Newton step would overshoot if one side won nearly every game.
    strengths += step / max(1.0, np.abs(step).max())
    if np.abs(step).max() < 1e-10:
      break
  return strengths - strengths.mean(), information


def _covariance(information, anchor):
  """Inverts the singular information matrix with the anchor, or the mean of all, held fixed."""
  if anchor is None:
    return np.linalg.pinv(information)
  others = np.arange(len(information)) != anchor
  covariance = np.zeros_like(information)
  covariance[np.ix_(others, others)] = np.linalg.inv(information[np.ix_(others, others)])
  return covariance

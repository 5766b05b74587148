"""The Elo table of a project: ratings with bootstrap intervals, games and win rates of policies.

Letters: P policies, D resamples.
"""

import dataclasses
import typing

import numpy as np

from rlhf_jax import errors
from rlhf_jax.feedback import bradley_terry
from rlhf_jax.feedback import elo

INTERVAL = (2.5, 97.5)  # percentiles
TITLES = (
  'Policy', 'Elo', '95 % interval', 'Games', 'Wins', 'Ties', 'Losses', 'Win rate', 'Online Elo'
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Standing:
  """A policy's row of the table.

  Attributes:
    policy: Name.
    elo: Maximum-likelihood rating, in points.
    low: Lower end of the 95 % interval.
    high: Upper end.
    online: Rating by one pass over the games; see elo.online.
    games: Number of games.
    wins: Games won.
    ties: Games without a winner.
    losses: Games lost.
  """

  policy: str
  elo: float
  low: float
  high: float
  online: float
  games: int
  wins: int
  ties: int
  losses: int

  @property
  def win_rate(self):
    """(wins + ties / 2) / games, in [0, 1]."""
    return (self.wins + self.ties / 2) / self.games


class Leaderboard(typing.NamedTuple):
  """Standings, best first, and what was fitted beside them; see bradley_terry.Fit."""

  standings: list[Standing]
  nu: float
  style: float


def rate(battles, model=bradley_terry.Model(), *, anchor=None, draws=bradley_terry.DRAWS, seed=0):
  """Rates policies by their battles.

  Intervals are percentiles of a bootstrap over tasks: all answers to a task, and all pairs of a
  ranking, are resampled together, since they share prompt and responses.

  Args:
    battles: List of types.Battle, in the order in which they were judged. Battles of a policy with
      itself are left out.
    model: bradley_terry.Model.
    anchor: Policy whose rating is fixed at 1000; None fixes the mean of all ratings there.
    draws: Number of resamples; 0 for no intervals (low and high are the rating).
    seed: Seed of the resamples.

  Returns:
    Leaderboard; without standings if there are no battles.

  Raises:
    UserError: The anchor is unknown, or see bradley_terry.fit.
  """
  battles = [battle for battle in battles if battle.first != battle.second]
  if not battles:
    return Leaderboard([], 0.0, 0.0)
  games = bradley_terry.Games.of(battles)
  elo.check_anchor(anchor, games.names)
  fit = bradley_terry.fit(games, model, draws=draws, seed=seed)
  points = elo.POINTS_PER_LOGIT * fit.strengths
  zero = 0.0 if anchor is None else points[:, [games.names.index(anchor)]]
  points = elo.LEVEL + points - zero
  low, high = np.percentile(points[1:] if draws else points, INTERVAL, axis=0)
  online = elo.online((battle.first, battle.second, battle.outcome) for battle in battles)
  standings = [
    Standing(name, *map(float, (points[0, i], low[i], high[i], online[name])), *_record(games, i))
    for i, name in enumerate(games.names)
  ]
  standings.sort(key=lambda standing: -standing.elo)
  return Leaderboard(standings, fit.nu, fit.style)


def over_rounds(battles, model=bradley_terry.Model(), *, draws=bradley_terry.DRAWS):
  """Rates policies after each round, by the battles of that round and all before.

  The anchor of each round is `first_policy`. For the arguments see `rate`.

  Returns:
    {round: Leaderboard}, in the order of rounds. Rounds after which policies cannot be rated yet,
    as when no chain of battles connects them, are left out.
  """
  battles = [battle for battle in battles if battle.first != battle.second]
  first, result = first_policy(battles), {}
  for number in sorted({battle.round for battle in battles}):
    before = [battle for battle in battles if battle.round <= number]
    try:
      result[number] = rate(before, model, anchor=first, draws=draws)
    except errors.UserError:
      continue
  return result


def first_policy(battles):
  """Returns the policy of the first battle of the first round; None without battles."""
  return min(battles, key=lambda battle: battle.round).first if battles else None


def cells(standing):
  """Returns the texts of a row of the table, in the order of TITLES."""
  return [
    standing.policy,
    f'{standing.elo:.0f}',
    f'{standing.low:.0f} to {standing.high:.0f}',
    str(standing.games),
    str(standing.wins),
    str(standing.ties),
    str(standing.losses),
    f'{standing.win_rate:.2f}',
    f'{standing.online:.0f}',
  ]


def notes(board, battles, simulated, model):
  """Returns sentences about the table: games, simulated annotators, ties, lengths.

  Args:
    board: leaderboard.Leaderboard.
    battles: The battles that it rates.
    simulated: Names of the annotators that are simulated.
    model: bradley_terry.Model.
  """
  machine = sum(battle.annotator in simulated for battle in battles)
  lines = [f'{len(battles)} games, {machine} of them judged by simulated annotators.']
  if model.ties == 'davidson':
    equal = board.nu / (2 + board.nu)
    lines.append(
      f'Ties by Davidson: nu = {board.nu:.3f}, so equals tie in {100 * equal:.0f} % of games.'
    )
  else:
    lines.append('A tie counts as half a win.')
  if model.style_control:
    lines.append(
      f'Lengths are controlled for, in characters: log-odds change by {board.style:+.3f} if the '
      'difference of lengths grows by one standard deviation.'
    )
  return lines


def _record(games, number):
  """Returns games, wins, ties and losses of a policy."""
  won = np.concatenate([games.won[games.first == number], 1 - games.won[games.second == number]])
  return len(won), int((won == 1).sum()), int((won == 0.5).sum()), int((won == 0).sum())

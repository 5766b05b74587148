"""Bradley and Terry's model of single games: ties, style control, bootstrap intervals.

The log-odds of a game are z = r_first - r_second + b x, with the policies' strengths r and, under
style control, the difference x of the answers' lengths. With ties (Davidson 1970,
https://doi.org/10.1080/01621459.1970.10481082),

    P(win) = e^(z/2) / S,  P(loss) = e^(-z/2) / S,  P(tie) = nu / S,  S = e^(z/2) + e^(-z/2) + nu

so equal policies tie with probability nu / (2 + nu). nu = 0 gives the model of Bradley and Terry
1952, in which a tie then counts as half a win and half a loss.

Style control rates policies as if their answers were equally long
(https://lmsys.org/blog/2024-08-28-style-control/). As in FastChat, x is
(length_first - length_second) / (length_first + length_second + 1), divided by its standard
deviation, and a ridge of 0.5 on b and on r / ln 10 keeps the fit finite. Lengths of battles are in
characters, as not all languages put spaces between words; FastChat's are in tokens. FastChat also
subtracts the mean of x. Sides are random there, and the mean is near 0. Here x is taken around 0,
so that ratings do not depend on which policy is called the first.

Letters: n games, P policies, Q parameters (P strengths, then b, then log nu), D resamples, G groups
of games that are resampled together.
"""

import dataclasses
import math

import numpy as np

from rlhf_jax.errors import need
from rlhf_jax.feedback import elo

TIES = ('davidson', 'half')
RIDGE = 0.5
DRAWS = 200


@dataclasses.dataclass(frozen=True)
class Model:
  """What is fitted; see the top of the file.

  Attributes:
    ties: 'davidson' to fit nu, 'half' to count a tie as half a win and half a loss.
    style_control: Whether to control for lengths.
    prior_draws: Virtual games, half won and half lost, added to each pair of policies that met;
      they keep strengths finite. Without effect under style control, which has a ridge.
  """

  ties: str = 'davidson'
  style_control: bool = False
  prior_draws: float = 1.0

  def __post_init__(self):
    need(self.ties in TIES, f'ties={self.ties!r} must be one of {TIES}')
    need(self.prior_draws >= 0, f'prior_draws={self.prior_draws} must be at least 0')


@dataclasses.dataclass(frozen=True)
class Games:
  """Games between policies.

  Attributes:
    names: P names of policies.
    first: [n] int, index of the first policy.
    second: [n] int, index of the second policy.
    won: [n] float, 1 if the first policy won, 0.5 for a tie, 0 if it lost.
    lengths: [n, 2] lengths of the first and the second answer, in any unit.
    group: [n] int, index of the group of each game, from 0.
  """

  names: tuple[str, ...]
  first: np.ndarray
  second: np.ndarray
  won: np.ndarray
  lengths: np.ndarray
  group: np.ndarray

  @classmethod
  def of(cls, battles):
    """Creates Games from battles of the store, whose groups are their tasks."""
    names = tuple(dict.fromkeys(name for b in battles for name in (b.first, b.second)))
    number = {name: i for i, name in enumerate(names)}
    tasks = {}
    return cls(
      names=names,
      first=np.array([number[b.first] for b in battles], int),
      second=np.array([number[b.second] for b in battles], int),
      won=np.array([b.outcome for b in battles], float),
      lengths=np.array([(b.first_length, b.second_length) for b in battles], float).reshape(-1, 2),
      group=np.array([tasks.setdefault(b.task_id, len(tasks)) for b in battles], int),
    )


@dataclasses.dataclass(frozen=True)
class Fit:
  """Maximum-likelihood estimates.

  Attributes:
    strengths: [D, P] log-odds with mean 0; the first row is of the games themselves, the others of
      their resamples.
    nu: Davidson's nu; 0 if ties count as half wins.
    style: The coefficient b of style control; 0 without it.
  """

  strengths: np.ndarray
  nu: float
  style: float


def fit(games, model=Model(), *, draws=0, seed=0):
  """Fits strengths to games, and to bootstrap resamples of their groups.

  Args:
    games: Games.
    model: Model.
    draws: Number of resamples; each draws G groups with replacement.
    seed: Seed of the resamples.

  Returns:
    Fit.

  Raises:
    UserError: The games do not determine finite strengths, see elo.ratings; resamples are asked for
      and nothing keeps their strengths finite; or all answers are equally long under style control.
  """
  prior = 0.0 if model.style_control else model.prior_draws
  need(
    prior or model.style_control or not draws,
    'Elo: intervals need prior_draws above 0, as a policy may win no game of a resample',
  )
  elo.check(_matches(games), prior_draws=prior or RIDGE * model.style_control)
  count = int(games.group.max()) + 1
  picks = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
  times = np.concatenate([np.ones((1, count)), picks])  # [D, G]
  x = _style(games) if model.style_control else np.zeros(len(games.won))
  # Equal games are one row with a weight, [D, rows].
  rows, index = np.unique(
    np.stack([games.first, games.second, games.won, x], axis=1), axis=0, return_inverse=True
  )
  weights = np.stack([np.bincount(index, time[games.group], minlength=len(rows)) for time in times])
  if prior:
    rows, weights = _add_prior(rows, weights, prior)
  estimates = _maximize(rows, weights, len(games.names), model)
  strengths = estimates[:, : len(games.names)]
  return Fit(
    strengths=strengths - strengths.mean(axis=1, keepdims=True),
    nu=float(np.exp(estimates[0, -1])),
    style=float(estimates[0, -2]),
  )


def _matches(games):
  """Returns the games as a list of elo.Match, one for each pair of policies."""
  totals = {}
  for a, b, won in zip(games.first, games.second, games.won, strict=True):
    total = totals.setdefault((a, b), [0, 0, 0])
    total[{1.0: 0, 0.5: 1, 0.0: 2}[float(won)]] += 1
  return [elo.Match(games.names[a], games.names[b], *total) for (a, b), total in totals.items()]


def _style(games):
  """Returns x, [n], the normalized differences of lengths."""
  first, second = games.lengths.T
  x = (first - second) / (first + second + 1)
  scale = math.sqrt((x**2).mean())
  need(scale > 0, 'Elo: all answers are equally long, so there is no style to control for')
  return x / scale


def _add_prior(rows, weights, prior):
  """Adds half a win and half a loss times `prior` for each pair of policies that met."""
  pairs = np.unique(np.sort(rows[:, :2], axis=1), axis=0)
  virtual = np.concatenate([np.insert(pairs, 2, [[1], [0]][i], axis=1) for i in range(2)])
  virtual = np.insert(virtual, 3, 0, axis=1)
  added = np.full((len(weights), len(virtual)), prior / 2)
  return np.concatenate([rows, virtual]), np.concatenate([weights, added], axis=1)


def _maximize(rows, weights, policies, model):
  """Maximizes the likelihood by Newton's method, for all resamples at once.

  Args:
    rows: [rows, 4] first, second, won, x.
    weights: [D, rows].
    policies: P.
    model: Model.

  Returns:
    [D, Q] estimates; b is 0 without style control, log nu is -inf without ties.
  """
  tie = rows[:, 2] == 0.5
  fit_nu = model.ties == 'davidson' and bool(tie.any())
  side = np.eye(policies)[rows[:, 0].astype(int)] - np.eye(policies)[rows[:, 1].astype(int)]
  design = np.concatenate([side, rows[:, 3:]], axis=1)  # [rows, P + 1]: z = design @ (r, b)
  penalty = np.zeros(policies + 2)
  if model.style_control:
    penalty[:policies], penalty[policies] = RIDGE / math.log(10) ** 2, RIDGE
  free = np.array([True] * policies + [model.style_control, fit_nu])
  estimates = np.zeros((len(weights), policies + 2))
  estimates[:, -1] = 0 if fit_nu else -np.inf
  score = 2 * rows[:, 2] - 1  # 1 for a win, 0 for a tie, -1 for a loss
  for _ in range(100):
    gradient, information = _derivatives(estimates, design, weights, score, tie & fit_nu)
    gradient -= penalty * np.where(free, estimates, 0)
    information += np.diag(penalty)
    # Strengths are only determined up to a constant: this keeps their mean.
    information[:, :policies, :policies] += 1 / policies
    step = np.zeros_like(estimates)
    system = information[:, free][:, :, free]
    step[:, free] = np.linalg.solve(system, gradient[:, free, None])[..., 0]
    # The full Newton step would overshoot if one side won nearly every game.
    largest = np.abs(step).max(axis=1)
    estimates += step / np.maximum(1.0, largest)[:, None]
    # In a resample without ties log nu decreases for ever, and the gradient with it.
    flat = np.abs(gradient[:, free]).max(axis=1) < 1e-13 * weights.sum(axis=1)
    if (flat | (largest < 1e-10)).all():
      break
  return estimates


def _derivatives(estimates, design, weights, score, tie):
  """Returns the gradient [D, Q] of the log-likelihood and the Fisher information [D, Q, Q].

  With s = 1, 0, -1 for a win, a tie, a loss and t = 1 for a tie: d/dz = (s - E s) / 2 and
  d/d log nu = t - P(tie); the information is the covariance of s / 2 and t. These hold for nu = 0
  too, where s / 2 of a tie is that of half a win and half a loss.
  """
  half = estimates[:, :-1] @ design.T / 2  # [D, rows]: z / 2
  shift = np.abs(half)
  win, loss = np.exp(half - shift), np.exp(-half - shift)
  draw = np.exp(estimates[:, -1:] - shift)
  total = win + loss + draw
  win, loss, draw = win / total, loss / total, draw / total
  by_z = weights * (score - (win - loss)) / 2
  by_nu = (weights * (tie - draw)).sum(axis=1, keepdims=True)
  gradient = np.concatenate([by_z @ design, by_nu], axis=1)
  size = gradient.shape[1]
  information = np.zeros((len(weights), size, size))
  variance = weights * (win + loss - (win - loss) ** 2) / 4
  for one, weight in zip(information, variance, strict=True):
    one[:-1, :-1] = design.T @ (weight[:, None] * design)
  across = (weights * -(win - loss) * draw / 2) @ design
  information[:, :-1, -1] = information[:, -1, :-1] = across
  information[:, -1, -1] = (weights * draw * (1 - draw)).sum(axis=1)
  return gradient, information

"""Curves of scores over the distance from the initial policy, fitted by least squares.

Gao et al. 2022, eq. 1 (https://arxiv.org/abs/2210.10760), with the distance d = sqrt(KL(pi, pi_0))
and the score R(d) relative to the initial policy's, so R(0) = 0:

    best-of-n              R(d) = d (alpha - beta d)
    reinforcement learning R(d) = d (alpha - beta log d)

Both are linear in alpha and beta, so the fit is exact and needs no start. The paper fits the same
forms to the proxy score, for which beta is smaller.

Letters: n points.
"""

import dataclasses
import math

from jaxtyping import Float
import numpy as np
from scipy import linalg

from rlhf_jax import errors
from rlhf_jax import intervals

FORMS = 'best_of_n', 'rl'


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted curve.

  Attributes:
    form: one of FORMS.
    alpha: its slope at d = 0 ('best_of_n') or d = 1 plus beta ('rl'), in score per sqrt(nat).
    beta: how fast the slope falls.
    alpha_se: standard error of alpha; NaN with two points.
    beta_se: standard error of beta.
    r2: fraction of the variance of the scores that the curve explains; NaN if they are all equal.
    points: n.
  """

  form: str
  alpha: float
  beta: float
  alpha_se: float
  beta_se: float
  r2: float
  points: int

  def __call__(self, distances: intervals.Values) -> Float[np.ndarray, ' n']:
    """Returns R(d) for distances [n]."""
    return _terms(self.form, distances) @ np.array([self.alpha, self.beta])

  @property
  def peak(self) -> float:
    """The distance d > 0 with the largest R(d); infinite if R rises without end, 0 if it falls.

    R'(d) = 0 at d = alpha / (2 beta) ('best_of_n') or d = exp(alpha / beta - 1) ('rl').
    """
    if self.beta <= 0:
      return math.inf
    if self.form == 'rl':
      return math.exp(min(self.alpha / self.beta - 1, 700.0))
    return max(self.alpha, 0.0) / (2 * self.beta)

  @property
  def highest(self) -> float:
    """R at the peak: alpha^2 / (4 beta) or beta times the peak; infinite without a peak."""
    if math.isinf(self.peak):
      return math.inf
    return self.beta * (self.peak if self.form == 'rl' else self.peak**2)


def fit(form: str, distances: intervals.Values, scores: intervals.Values) -> Fit:
  """Fits a curve to points.

  Args:
    form: One of FORMS.
    distances: n values of d = sqrt(KL), in sqrt(nats); those that are not positive are left out.
    scores: n scores minus the score of the initial policy.

  Returns:
    Fit.

  Raises:
    UserError: There are fewer than two points with different positive distances.
  """
  d, r = np.asarray(distances, float), np.asarray(scores, float)
  d, r = d[d > 0], r[d > 0]
  errors.need(
    len(np.unique(d)) >= 2,
    f'a curve needs points at two or more different distances above 0, but there are '
    f'{len(np.unique(d))}: log more steps, or train longer',
  )
  terms = _terms(form, d)
  coefficients, *_ = linalg.lstsq(terms, r)
  residual = float(np.sum((r - terms @ coefficients) ** 2))
  total = float(np.sum((r - r.mean()) ** 2))
  freedom = len(d) - 2
  covariance = linalg.inv(terms.T @ terms) * (residual / freedom if freedom else math.nan)
  alpha_se, beta_se = np.sqrt(np.diag(covariance))
  return Fit(
    form=form,
    alpha=float(coefficients[0]),
    beta=float(coefficients[1]),
    alpha_se=float(alpha_se),
    beta_se=float(beta_se),
    r2=1 - residual / total if total else math.nan,
    points=len(d),
  )


def _terms(form, distances):
  """Returns the derivatives [n, 2] of R(d) with respect to alpha and beta."""
  d = np.asarray(distances, float)
  safe = np.where(d > 0, d, 1.0)
  return np.stack([d, -d * (np.log(safe) if form == 'rl' else d)], axis=1)

"""Standard errors and 95 % intervals of means over samples of which some share a prompt.

Samples of one prompt are alike, so n of them say less than n samples of n prompts: errors are over
prompts, each with all its samples (Cameron and Miller 2015, https://doi.org/10.3368/jhr.50.2.317).
Where all samples are of one prompt, errors are over samples, and say nothing about other prompts.
docs/intervals.md has the coverage by simulation.

Letters: n samples, G groups: prompts, or samples where no two share one.
"""

from collections.abc import Hashable
from collections.abc import Sequence
import math

from jaxtyping import Int, Num, Shaped
import numpy as np
from scipy import optimize
from scipy import special

Values = Sequence[float] | Shaped[np.ndarray, ' n']
Prompts = Sequence[Hashable] | None
NORMAL = 1.96
EPSILON = 1e-9


def groups(prompts: Prompts, count: int) -> Int[np.ndarray, '{count}']:  # noqa: F821
  """The number of the group of each sample.

  Args:
    prompts: n prompts, hashable; None for all different.
    count: n.

  Returns:
    [n] int, from 0 to G - 1.
  """
  index = {}
  numbers = np.array([index.setdefault(prompt, len(index)) for prompt in prompts or ()], int)
  return numbers if len(index) > 1 else np.arange(count)


def standard_error(values: Values, prompts: Prompts = None) -> float:
  """Standard error of the mean of values.

      sqrt(G / (G - 1) sum_g (sum_{i in g} values_i - mean)^2) / n

  Without shared prompts that is s / sqrt(n). See Miller 2024, section 2.2
  (https://arxiv.org/abs/2411.00640), without the factor of G.

  Args:
    values: [n] numbers.
    prompts: see `groups`.

  Returns:
    A float; NaN of one sample.
  """
  values = np.asarray(values, float)
  sums = np.bincount(groups(prompts, values.size), values - values.mean())
  if sums.size < 2:
    return float('nan')
  return float(np.sqrt(sums.size / (sums.size - 1) * np.sum(sums**2)) / values.size)


def rate(values: Values, prompts: Prompts = None) -> tuple[float, float]:
  """95 % interval of the mean of values in [0, 1]: a win rate, an accuracy.

  The rates p that a score test does not reject. With w, d, l the shares of wins, draws and losses,

      n_eff (w + d / 2 - p)^2 <= z^2 v(p)
      v(p) = q_w + q_d / 4 - p^2, q the likeliest shares whose win rate is p

  which is Wilson's interval without draws, and Tango's of a difference of paired shares with them
  (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; Tango 1998,
  https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B). Where samples
  share a prompt n_eff is n over the design effect, the variance of the mean over prompts by that
  over samples, and z the quantile of t with G - 1 degrees of freedom (Korn and Graubard 1998,
  https://www150.statcan.gc.ca/n1/en/catalogue/12-001-X19980024356). A bootstrap of 10 prompts is
  too narrow: it covers 89 to 93 %.

  With values other than 0, 1/2 and 1, such as a judge's probabilities, v(p) is p (1 - p), the most
  that the variance of values in [0, 1] with mean p can be: the interval is then on the wide side.

  Args:
    values: [n] numbers in [0, 1].
    prompts: see `groups`.

  Returns:
    (low, high), within [0, 1].
  """
  values = np.asarray(values, float)
  group = groups(prompts, values.size)
  size, z = effective_size(values, group), quantile(group)
  mean = values.mean()
  lost = (values == 0).mean() if np.isin(values, (0, 0.5, 1)).all() else 1 - mean

  def excess(p):
    """n_eff (mean - p)^2 - z^2 v(p): below 0 between the ends of the interval."""
    # The likeliest share of losses given p, Tango's equation 6; wins are then lost + 2 p - 1.
    gain, gained = 2 * p - 1, 2 * mean - 1
    b = gain * (2 - gained) - gained - 2 * lost
    q = (math.sqrt(max(b * b + 8 * lost * gain * (1 - gain), 0.0)) - b) / 4
    return size * (mean - p) ** 2 - z * z * (2 * q + gain * (1 - gain)) / 4

  # At the mean itself the variance may be 0: the ends are sought beside it.
  low, high = mean - EPSILON, mean + EPSILON
  return (
    optimize.brentq(excess, 0.0, low) if low > 0 else 0.0,
    optimize.brentq(excess, high, 1.0) if high < 1 else 1.0,
  )


def effective_size(values: Num[np.ndarray, ' n'], group: Int[np.ndarray, ' n']) -> float:
  """How many independent samples tell as much about the mean; see `rate`.

  Args:
    values: [n] numbers.
    group: [n] number of the group of each, see `groups`.

  Returns:
    A positive float; G where all values are equal, n where the mean of no group deviates.
  """
  sums = np.bincount(group, values - values.mean())
  if sums.size == values.size:
    return values.size
  if values.min() == values.max():
    return sums.size
  between = sums.size / (sums.size - 1) * np.sum(sums**2)
  return values.size * np.var(values) * values.size / between if between > EPSILON else values.size


def quantile(group: Int[np.ndarray, ' n']) -> float:
  """97.5 % quantile of an estimate over its error: of t with G - 1, or normal where n = G.

  Args:
    group: [n] number of the group of each sample, see `groups`.
  """
  count = group.max() + 1
  return float(special.stdtrit(count - 1, 0.975)) if 1 < count < group.size else NORMAL

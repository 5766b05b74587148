"""Standard errors and 95 % intervals of means over samples that may share prompts.

Samples of one prompt are correlated, so n of them carry less information than n samples of n
prompts. Errors are therefore clustered by prompt (Cameron and Miller 2015,
https://doi.org/10.3368/jhr.50.2.317). If all samples share one prompt, errors are over samples and
do not extend to other prompts. docs/intervals.md reports the coverage in simulations.

Letters: n samples, G groups. A group holds the samples of one prompt; if there is only one prompt,
or no prompts are given, each sample is a group.
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
  """Returns the index of each sample's group.

  Args:
    prompts: n hashable prompts; None if all prompts differ.
    count: Number n of samples.

  Returns:
    [n] int, from 0 to G - 1.
  """
  index = {}
  numbers = np.array([index.setdefault(prompt, len(index)) for prompt in prompts or ()], int)
  return numbers if len(index) > 1 else np.arange(count)


def standard_error(values: Values, prompts: Prompts = None) -> float:
  """Computes the standard error of the mean of values.

      sqrt(G / (G - 1) sum_g (sum_{i in g} values_i - mean)^2) / n

  If no samples share a prompt, it is s / sqrt(n). See Miller 2024, section 2.2
  (https://arxiv.org/abs/2411.00640), which omits the factor G / (G - 1).

  Args:
    values: [n] numbers.
    prompts: See `groups`.

  Returns:
    A float; NaN for one sample.
  """
  values = np.asarray(values, float)
  sums = np.bincount(groups(prompts, values.size), values - values.mean())
  if sums.size < 2:
    return float('nan')
  return float(np.sqrt(sums.size / (sums.size - 1) * np.sum(sums**2)) / values.size)


def rate(values: Values, prompts: Prompts = None) -> tuple[float, float]:
  """Computes the 95 % interval of the mean of values in [0, 1], such as a win rate or an accuracy.

  The interval holds the rates p that a score test does not reject. With the fractions w, d and l of
  wins, draws and losses,

      n_eff (w + d / 2 - p)^2 <= z^2 v(p)
      v(p) = q_w + q_d / 4 - p^2, q the most likely fractions whose win rate is p

  Without draws this is Wilson's interval; with draws it is Tango's interval for a difference of
  paired proportions (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; Tango 1998,
  https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B). If samples
  share prompts, n_eff is n divided by the design effect (the variance of the mean clustered by
  prompt divided by the variance over samples), and z is the quantile of Student's t with G - 1
  degrees of freedom (Korn and Graubard 1998,
  https://www150.statcan.gc.ca/n1/en/catalogue/12-001-X19980024356). A bootstrap over 10 prompts is
  too narrow: it covers 89 to 93 %.

  For values other than 0, 1/2 and 1, such as a judge's probabilities, v(p) is p (1 - p), the
  largest variance of values in [0, 1] with mean p. The interval is then conservative.

  Args:
    values: [n] numbers in [0, 1].
    prompts: See `groups`.

  Returns:
    (low, high), within [0, 1].
  """
  values = np.asarray(values, float)
  group = groups(prompts, values.size)
  size, z = effective_size(values, group), quantile(group)
  mean = values.mean()
  lost = (values == 0).mean() if np.isin(values, (0, 0.5, 1)).all() else 1 - mean

  def excess(p):
    """Returns n_eff (mean - p)^2 - z^2 v(p), which is negative inside the interval."""
    # q is the most likely fraction of losses given p, Tango's equation 6; that of wins is
    # q + 2 p - 1.
    gain, gained = 2 * p - 1, 2 * mean - 1
    b = gain * (2 - gained) - gained - 2 * lost
    q = (math.sqrt(max(b * b + 8 * lost * gain * (1 - gain), 0.0)) - b) / 4
    return size * (mean - p) ** 2 - z * z * (2 * q + gain * (1 - gain)) / 4

  # At the mean itself the variance may be 0, so the search starts just beside it.
  low, high = mean - EPSILON, mean + EPSILON
  return (
    optimize.brentq(excess, 0.0, low) if low > 0 else 0.0,
    optimize.brentq(excess, high, 1.0) if high < 1 else 1.0,
  )


def effective_size(values: Num[np.ndarray, ' n'], group: Int[np.ndarray, ' n']) -> float:
  """Computes n_eff, the number of independent samples with the same information; see `rate`.

  Args:
    values: [n] numbers.
    group: [n] group indices; see `groups`.

  Returns:
    A positive float: G if all values are equal, n if all groups have the same mean.
  """
  sums = np.bincount(group, values - values.mean())
  if sums.size == values.size:
    return values.size
  if values.min() == values.max():
    return sums.size
  between = sums.size / (sums.size - 1) * np.sum(sums**2)
  return values.size * np.var(values) * values.size / between if between > EPSILON else values.size


def quantile(group: Int[np.ndarray, ' n']) -> float:
  """Returns the 97.5 % quantile of Student's t with G - 1 degrees of freedom.

  If n = G, it is the quantile of the normal distribution.

  Args:
    group: [n] group indices; see `groups`.
  """
  count = group.max() + 1
  return float(special.stdtrit(count - 1, 0.975)) if 1 < count < group.size else NORMAL

"""Expected scores of best-of-n for several n, estimated from one set of samples.

Letters: P prompts, N samples of each.
"""

from collections.abc import Sequence
import math

from jaxtyping import Float
import numpy as np

from rlhf_jax import intervals


def kl(n: int) -> float:
  """Computes an upper bound on the KL of best-of-n from its base policy, in nats per sequence.

      log n - (n - 1) / n

  The bound is exact if no two samples are equal. See Stiennon et al. 2020, appendix G.3
  (https://arxiv.org/abs/2009.01325), and Beirami et al. 2024 (https://arxiv.org/abs/2401.01879)
  for the bound.
  """
  return math.log(n) - (n - 1) / n


def weights(n: int, count: int) -> Float[np.ndarray, ' {count}']:
  """Computes how often each of `count` samples, in ascending order, is the best of a subset of n.

      w_i = C(i, n - 1) / C(N, n), i = 0 .. N - 1

  The sum of w_i values_i is the mean over all subsets of n samples: an unbiased estimate of
  best-of-n. See Nakano et al. 2021, appendix I (https://arxiv.org/abs/2112.09332).

  Args:
    n: Size of the subsets, from 1 to N.
    count: Number N of samples.
  """
  # From the last, n / N, by w_i / w_(i + 1) = (i - n + 2) / (i + 1): the binomials overflow.
  i = np.arange(count - 1)[::-1]
  ratios = np.maximum(i - n + 2, 0) / (i + 1)
  return n / count * np.cumprod([1.0, *ratios])[::-1]


def curve(
  proxy: Float[np.ndarray, 'P N'],
  gold: Float[np.ndarray, 'P N'] | None = None,
  prompts: Sequence[str] | None = None,
) -> list[dict[str, float]]:
  """Computes the expected scores of best-of-n for n = 1, 2, 4 and so on up to N.

  Args:
    proxy: Scores of the reward model, which selects the best samples.
    gold: Gold scores by the judge, or None.
    prompts: P prompts, by which the standard error is clustered; None if they all differ.

  Returns:
    List of {'n', 'kl', 'proxy'}; see `kl` for 'kl'. If there are gold scores, also 'gold' and its
    standard error over prompts, 'gold_se'.
  """
  count = proxy.shape[1]
  # Ascending. Of equal scores the first sample comes last, so it is the best, as with argmax.
  order = count - 1 - np.argsort(proxy[:, ::-1], axis=1, kind='stable')
  points = []
  for n in [*(2**i for i in range(count.bit_length()) if 2**i < count), count]:
    weight = weights(n, count)
    expected = lambda scores: np.take_along_axis(scores, order, axis=1) @ weight
    point = {'n': n, 'kl': kl(n), 'proxy': float(expected(proxy).mean())}
    if gold is not None:
      values = expected(gold)
      point |= {'gold': float(values.mean()), 'gold_se': intervals.standard_error(values, prompts)}
    points.append(point)
  return points

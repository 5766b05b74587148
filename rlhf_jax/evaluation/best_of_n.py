"""Best-of-n by a reward model for every n, from the same samples.

Letters: P prompts, N samples of each.
"""

from collections.abc import Sequence
import math

from jaxtyping import Float
import numpy as np
from scipy import special

from rlhf_jax import intervals


def kl(n: int) -> float:
  """An upper bound of the KL of best-of-n from the policy that it samples, nats per sequence.

      log n - (n - 1) / n

  It is the exact KL if no two samples are equal. See Stiennon et al. 2020, appendix G.3
  (https://arxiv.org/abs/2009.01325), and Beirami et al. 2024 (https://arxiv.org/abs/2401.01879)
  for the bound.
  """
  return math.log(n) - (n - 1) / n


def weights(n: int, count: int) -> Float[np.ndarray, ' {count}']:
  """How often each of `count` samples in ascending order is the best of n of them.

      w_i = C(i, n - 1) / C(N, n), i = 0 .. N - 1

  The sum of w_i values_i is the mean over all subsets of n samples: an unbiased estimate of
  best-of-n. See Nakano et al. 2021, appendix I (https://arxiv.org/abs/2112.09332).

  Args:
    n: samples that the best is taken of, from 1 to N.
    count: N.
  """
  return special.comb(np.arange(count), n - 1) / special.comb(count, n)


def curve(
  proxy: Float[np.ndarray, 'P N'],
  gold: Float[np.ndarray, 'P N'] | None = None,
  prompts: Sequence[str] | None = None,
) -> list[dict[str, float]]:
  """Expected scores of best-of-n for n = 1, 2, 4 and so on up to N.

  Args:
    proxy: scores of the reward model, which picks the best.
    gold: scores of the judge; None for none.
    prompts: P of them, for the standard error; None if they all differ.

  Returns:
    List of {'n', 'kl': see `kl`, 'proxy', and with gold scores 'gold', 'gold_se'}. The standard
    error is over prompts.
  """
  count = proxy.shape[1]
  # Ascending; of equal scores the first sample comes last, so that it is the best, as by argmax.
  order = count - 1 - np.argsort(proxy[:, ::-1], axis=1, kind='stable')
  points = []
  for n in [*(2**i for i in range(count.bit_length()) if 2**i < count), count]:
    share = weights(n, count)
    expected = lambda scores: np.take_along_axis(scores, order, axis=1) @ share
    point = {'n': n, 'kl': kl(n), 'proxy': float(expected(proxy).mean())}
    if gold is not None:
      values = expected(gold)
      point |= {'gold': float(values.mean()), 'gold_se': intervals.standard_error(values, prompts)}
    points.append(point)
  return points

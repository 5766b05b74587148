"""Standard errors and 95 % intervals of means over samples of which some share a prompt.

Samples of one prompt are alike, so n of them say less than n samples of n prompts: prompts are what
is drawn anew, with all their samples (cluster bootstrap; Cameron, Gelbach and Miller 2008, section 3,
https://doi.org/10.1162/rest.90.3.414). Where all samples are of one prompt, the samples are what is
drawn, and an interval says nothing about other prompts.

Letters: n samples, G groups: prompts, or samples where no two share one.
"""

import numpy as np

RESAMPLES = 1000


def groups(prompts, count):
  """The number of the group of each sample.

  Args:
    prompts: n prompts, hashable; None for all different.
    count: n.

  Returns:
    [n] int, from 0 to G - 1.
  """
  index = {}
  found = np.array([index.setdefault(prompt, len(index)) for prompt in prompts or ()], int)
  return found if len(index) > 1 else np.arange(count)


def shared(prompts):
  """Whether some but not all samples share a prompt."""
  return prompts is not None and 1 < len(set(prompts)) < len(prompts)


def standard_error(values, prompts=None):
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


def resampled(count, *, resamples=RESAMPLES, seed=0):
  """Yields [G] int: how often each of G groups is drawn, G draws with replacement each time."""
  rng = np.random.default_rng(seed)
  for _ in range(resamples):
    yield np.bincount(rng.integers(count, size=count), minlength=count)


def bootstrap(values, prompts=None, *, resamples=RESAMPLES, seed=0):
  """95 % percentile interval of the mean of values, from resampling their groups.

  See Efron 1979 (https://doi.org/10.1214/aos/1176344552).

  Args:
    values: [n] numbers.
    prompts: see `groups`.
    resamples: their number.
    seed: of the draws.

  Returns:
    (low, high).
  """
  values = np.asarray(values, float)
  group = groups(prompts, values.size)
  sums, counts = np.bincount(group, values), np.bincount(group)
  means = [times @ sums / (times @ counts)
           for times in resampled(sums.size, resamples=resamples, seed=seed)]
  return percentiles(means)


def percentiles(values):
  """The 2.5 % and the 97.5 % quantile of values, floats."""
  low, high = np.quantile(values, (0.025, 0.975))
  return float(low), float(high)

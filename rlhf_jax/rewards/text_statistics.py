"""Statistics of a set of texts, by words and without a model: diversity, length, repetition.

Words are separated by white space, and upper and lower case differ. GEM-metrics
(https://github.com/GEM-benchmark/GEM-metrics), which RL4LMs uses, lowers the case, has a tokenizer
of its own, and gives entropies in bits.
"""

import collections
import itertools
import math

from rlhf_jax.errors import UserError

SEGMENT = 100  # words of a segment of `msttr`, as in GEM-metrics


def ngrams(text, n):
  """Returns the text's n-grams of whitespace-separated words, a list of tuples."""
  words = text.split()
  return list(zip(*(words[i:] for i in range(n)), strict=False))


def counts(texts, n):
  """Returns the number of occurrences of each n-gram in all texts, a Counter."""
  return collections.Counter(itertools.chain.from_iterable(ngrams(text, n) for text in texts))


def distinct(texts, n):
  """Computes the number of distinct n-grams over all texts / the number of n-grams, in [0, 1].

  It is 0 if there are none. See Li et al. 2016, §5.3 (https://arxiv.org/abs/1510.03055). It
  decreases with the number of texts, so only sets of equal size can be compared.
  """
  found = counts(texts, n)
  return len(found) / found.total() if found else 0.0


def entropy(texts, n):
  """Computes the entropy of the distribution of n-grams over all texts, in nats; 0 without any.

      H = -sum_g p(g) log p(g),  p(g) = occurrences of g / number of n-grams

  See Zhang et al. 2018, §4.1 (https://arxiv.org/abs/1809.05972).
  """
  found = counts(texts, n)
  shares = [count / found.total() for count in found.values()]
  return -sum(share * math.log(share) for share in shares) if len(found) > 1 else 0.0


def msttr(texts, window=SEGMENT):
  """Computes the mean segmental type-token ratio: distinct words / words of a segment, in [0, 1].

  The words of all texts in order are cut into segments of `window` words, and the rest is left out.
  Unlike `distinct`, the mean over segments does not depend on the number of texts. If there are
  fewer words than `window`, they are one segment; if there are none, the result is 0. See
  Johnson 1944 (https://doi.org/10.1037/h0093508).
  """
  words = list(itertools.chain.from_iterable(text.split() for text in texts))
  window = min(window, len(words))
  starts = range(0, len(words) - window + 1, window) if words else ()
  ratios = [len(set(words[start : start + window])) / window for start in starts]
  return sum(ratios) / len(ratios) if ratios else 0.0


def repetition(text, n=3):
  """Computes the fraction of a text's n-grams that occur earlier in the text, in [0, 1)."""
  grams = ngrams(text, n)
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def statistics(texts):
  """Computes the statistics of a set of texts.

  Returns:
    {"distinct_1", "distinct_2", "entropy_1", "entropy_2", "msttr", "mean_words", "repetition_3",
    "unique": number of distinct texts / number of texts, "empty": fraction of empty texts}.

  Raises:
    UserError: If there are no texts.
  """
  texts = list(texts)
  if not texts:
    raise UserError('text statistics: there are no texts')
  return {
    'distinct_1': distinct(texts, 1),
    'distinct_2': distinct(texts, 2),
    'entropy_1': entropy(texts, 1),
    'entropy_2': entropy(texts, 2),
    'msttr': msttr(texts),
    'mean_words': sum(len(text.split()) for text in texts) / len(texts),
    'repetition_3': sum(repetition(text) for text in texts) / len(texts),
    'unique': len(set(texts)) / len(texts),
    'empty': sum(not text.strip() for text in texts) / len(texts),
  }

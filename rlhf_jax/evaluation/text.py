"""Statistics of a set of texts, by words and without a model: diversity, length, repetition."""

import collections
import itertools

from rlhf_jax.errors import UserError


def ngrams(text, n):
  """Returns the text's n-grams of whitespace-separated words, a list of tuples."""
  words = text.split()
  return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts, n):
  """Computes the number of distinct n-grams over all texts / the number of n-grams, in [0, 1].

  It is 0 if there are none. See Li et al. 2016, §5.3 (https://arxiv.org/abs/1510.03055). It
  decreases with the number of texts, so only sets of equal size can be compared.
  """
  counts = collections.Counter(itertools.chain.from_iterable(ngrams(text, n) for text in texts))
  return len(counts) / counts.total() if counts else 0.0


def repetition(text, n=3):
  """Computes the fraction of a text's n-grams that occur earlier in the text, in [0, 1)."""
  grams = ngrams(text, n)
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def statistics(texts):
  """Computes the statistics of a set of texts.

  Returns:
    {"distinct_1", "distinct_2", "mean_words", "repetition_3", "unique": number of distinct texts /
    number of texts, "empty": fraction of empty texts}.

  Raises:
    UserError: If there are no texts.
  """
  texts = list(texts)
  if not texts:
    raise UserError('text statistics: there are no texts')
  return {
    'distinct_1': distinct(texts, 1),
    'distinct_2': distinct(texts, 2),
    'mean_words': sum(len(text.split()) for text in texts) / len(texts),
    'repetition_3': sum(repetition(text) for text in texts) / len(texts),
    'unique': len(set(texts)) / len(texts),
    'empty': sum(not text.strip() for text in texts) / len(texts),
  }

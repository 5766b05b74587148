"""Figures of a set of texts that need no model: variety, length, repetition. By words."""

import collections
import itertools

from rlhf_jax.errors import UserError


def ngrams(text, n):
  """The text's n-grams of whitespace-separated words, as a list of tuples."""
  words = text.split()
  return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts, n):
  """Distinct n-grams of all texts over all their n-grams, in [0, 1]; 0 if there are none.

  See Li et al. 2016, §5.3 (https://arxiv.org/abs/1510.03055). It falls with the number of texts,
  so compare sets of equal size only.
  """
  counts = collections.Counter(itertools.chain.from_iterable(ngrams(text, n) for text in texts))
  return len(counts) / counts.total() if counts else 0.0


def repetition(text, n=3):
  """Share of a text's n-grams that have been said in it before, in [0, 1)."""
  grams = ngrams(text, n)
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def statistics(texts):
  """The usual figures of a set of texts.

  Returns:
    {"distinct_1", "distinct_2", "mean_words", "repetition_3", "unique": share of different texts,
    "empty": share of empty ones}.

  Raises:
    UserError: no texts.
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

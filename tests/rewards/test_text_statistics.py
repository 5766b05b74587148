"""Statistics of texts by hand."""

import math

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import text_statistics


def test_distinct_by_hand():
  # Bigrams: a b, b a, a b | a b: 2 distinct of 4. Words: a, b of 6.
  assert text_statistics.distinct(['a b a b', 'a b'], 2) == 2 / 4
  assert text_statistics.distinct(['a b a b', 'a b'], 1) == 2 / 6
  assert text_statistics.distinct(['a', ''], 2) == 0


def test_repetition_by_hand():
  # Trigrams: aba, bab, aba: 2 distinct of 3.
  assert text_statistics.repetition('a b a b a') == pytest.approx(1 / 3)
  assert text_statistics.repetition('a b') == 0


def test_entropy_by_hand():
  # Words: a twice, b and c once: log 4 - log(2) / 2.
  assert text_statistics.entropy(['a b', 'c a'], 1) == pytest.approx(1.5 * math.log(2))
  # Bigrams: a b three times, b a twice.
  expected = -0.6 * math.log(0.6) - 0.4 * math.log(0.4)
  assert text_statistics.entropy(['a b a b a', 'a b'], 2) == pytest.approx(expected)
  assert text_statistics.entropy(['a a a', 'a'], 1) == text_statistics.entropy([''], 1) == 0


def test_msttr_by_hand():
  # Segments of 3 words: a b a (2 / 3), c c c (1 / 3); the last word d is left out.
  assert text_statistics.msttr(['a b a c', 'c c d'], 3) == pytest.approx(1 / 2)
  assert text_statistics.msttr(['a b', 'a c'], 5) == 3 / 4
  assert text_statistics.msttr(['', ' '], 5) == 0


def test_statistics():
  assert text_statistics.statistics(['a b a b a', 'a b', 'a b', ' ']) == {
    'distinct_1': 2 / 9,
    'distinct_2': 2 / 6,
    # Words: a five times, b four times. Bigrams: a b four times, b a twice.
    'entropy_1': pytest.approx(-5 / 9 * math.log(5 / 9) - 4 / 9 * math.log(4 / 9)),
    'entropy_2': pytest.approx(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3)),
    'msttr': 2 / 9,
    'mean_words': 9 / 4,
    'repetition_3': pytest.approx(1 / 12),
    'unique': 3 / 4,
    'empty': 1 / 4,
  }
  with pytest.raises(UserError, match='no texts'):
    text_statistics.statistics([])

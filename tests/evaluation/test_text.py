"""Text figures by hand."""

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import text


def test_distinct_by_hand():
  # Bigrams: a b, b a, a b | a b: 2 distinct of 4. Words: a, b of 6.
  assert text.distinct(['a b a b', 'a b'], 2) == 2 / 4
  assert text.distinct(['a b a b', 'a b'], 1) == 2 / 6
  assert text.distinct(['a', ''], 2) == 0


def test_repetition_by_hand():
  # Trigrams: aba, bab, aba: 2 distinct of 3.
  assert text.repetition('a b a b a') == pytest.approx(1 / 3)
  assert text.repetition('a b') == 0


def test_statistics():
  assert text.statistics(['a b a b a', 'a b', 'a b', ' ']) == {
    'distinct_1': 2 / 9,
    'distinct_2': 2 / 6,
    'mean_words': 9 / 4,
    'repetition_3': pytest.approx(1 / 12),
    'unique': 3 / 4,
    'empty': 1 / 4,
  }
  with pytest.raises(UserError, match='no texts'):
    text.statistics([])

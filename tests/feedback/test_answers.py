"""Answers of annotators: which fit a task, and what they say."""

import math

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import answers


@pytest.mark.parametrize(
  'kind, bad',
  [
    ('pair', {'chosen': 99}),
    ('pair', {'chosen': True}),
    ('pair', {'chosen': 1, 'strength': 5}),
    ('pair', {'chosen': 1, 'margin': math.inf}),
    ('pair', {'chosen': 1, 'tie': True}),
    ('pair', {'best': 1}),
    ('pair', {'undo': True}),
    ('pair', []),
    ('pair', {}),
    ('rank', {'ranking': [[1], [1]]}),
    ('rank', {'ranking': [[1]]}),
    ('rank', {'ranking': [[1, 2], []]}),
    ('rank', {'ranking': [1, 2]}),
    ('best', {'best': '1'}),
    ('rate', {'rating': {'1': 1}}),
    ('rate', {'rating': {'1': 0, '2': 1}}),
    ('rate', {'rating': {'1': 1.5, '2': 1}}),
  ],
)
def test_answers_that_do_not_fit(kind, bad):
  with pytest.raises(UserError, match=f'does not fit a task of kind {kind!r}'):
    answers.check(kind, [1, 2], bad)


def test_margins_are_those_of_llama_2():
  """Table 27 of https://arxiv.org/abs/2307.09288, small: 1, 2/3, 1/3 and 0."""
  margins = [answers.margin({'chosen': 1, 'strength': s}) for s in (4, 3, 2, 1)]
  assert margins == [1, 2 / 3, 1 / 3, 0]
  assert [answers.of_margin(m) for m in margins] == [{'strength': s} for s in (4, 3, 2, 1)]
  assert answers.of_margin(1.7) == {'margin': 1.7} and answers.margin({'tie': True}) is None


@pytest.mark.parametrize(
  'kind, first, second, same',
  [
    ('pair', {'chosen': 1, 'strength': 1}, {'chosen': 1, 'strength': 4}, True),
    ('pair', {'chosen': 1}, {'chosen': 2}, False),
    ('pair', {'chosen': 1}, {'tie': True}, False),
    ('pair', {'skip': True}, {'chosen': 1}, False),
    ('rank', {'ranking': [[1, 2]]}, {'ranking': [[2, 1]]}, True),
    ('rank', {'ranking': [[1], [2]]}, {'ranking': [[2], [1]]}, False),
    ('best', {'best': 2}, {'best': 2}, True),
    ('rate', {'rating': {'1': 3, '2': 7}}, {'rating': {'1': 4, '2': 6}}, True),
    ('rate', {'rating': {'1': 3, '2': 7}}, {'rating': {'1': 5, '2': 7}}, False),
  ],
)
def test_whether_two_answers_agree(kind, first, second, same):
  assert answers.agree(kind, [1, 2], first, second) == same

"""Reads the form of a task: answers by position, flags and the reason."""

import itertools
import re
from typing import Annotated

import fastapi
from starlette import datastructures

from rlhf_jax.errors import need
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import overview
from rlhf_jax.feedback import questions

# Names of the answers of a task, by position.
LETTERS = tuple(overview.name(position) for position in range(max(questions.MOST.values())))
# (strength of the answer, word): the four choices of Llama 2 (Touvron et al. 2023, section 3.1,
# https://arxiv.org/abs/2307.09288).
STRENGTHS = tuple(zip(answers.STRENGTHS, ('barely', 'slightly', 'clearly', 'much')))
FLAGS = {
  'harmful': 'harmful content',
  'false': 'false statement',
  'personal': 'personal information',
  'broken': 'broken or unreadable text',
  'prompt': 'problem of the prompt',
}
MAX_REASON = 5000  # characters
INCOMPLETE = 'Not saved: the answer is incomplete. '


async def _fields(request: fastapi.Request) -> datastructures.FormData:
  return await request.form()


Fields = Annotated[datastructures.FormData, fastapi.Depends(_fields)]


def answer(kind, shown, fields):
  """Returns the answer of a form as the store takes it.

  Args:
    kind: Kind of the task.
    shown: Ids of its completions in the order displayed.
    fields: Fields of the form.

  Raises:
    UserError: The form is incomplete.
  """
  return {'pair': _pair, 'rank': _rank, 'best': _best, 'rate': _rate}[kind](shown, fields)


def _pair(shown, fields):
  value = text(fields, 'answer')
  if value == 'tie':
    return {'tie': True}
  match = re.fullmatch(r'([ab])([1-4])', value, re.ASCII)
  need(match, f'{INCOMPLETE}Choose one of the two, or a tie.')
  return {'chosen': shown['ab'.index(match[1])], 'strength': int(match[2])}


def _best(shown, fields):
  position = whole_number(fields, 'answer')
  need(0 <= position < len(shown), f'{INCOMPLETE}Choose the best one.')
  return {'best': shown[position]}


def _rank(shown, fields):
  ranks = [whole_number(fields, f'rank-{position}') for position in range(len(shown))]
  need(all(1 <= rank <= len(shown) for rank in ranks), f'{INCOMPLETE}Give every answer a rank.')
  order = sorted(range(len(shown)), key=ranks.__getitem__)
  groups = itertools.groupby(order, key=ranks.__getitem__)
  return {'ranking': [[shown[position] for position in group] for _, group in groups]}


def _rate(shown, fields):
  ratings = [whole_number(fields, f'rating-{position}') for position in range(len(shown))]
  need(all(rating in answers.RATINGS for rating in ratings), f'{INCOMPLETE}Rate it from 1 to 7.')
  return {'rating': {str(i): rating for i, rating in zip(shown, ratings)}}


def reason(fields):
  """Returns the reason, with the line breaks of Unix."""
  value = text(fields, 'reason').replace('\r\n', '\n').strip()
  need(len(value) <= MAX_REASON, f'Not saved: the reason has more than {MAX_REASON} characters.')
  return value


def flags(fields):
  """Returns the flags that were set."""
  values = list(dict.fromkeys(fields.getlist('flag')))
  need(all(value in FLAGS for value in values), 'Not saved: there is no such flag.')
  return values


def text(fields, name):
  """Returns a field as text; '' if it is missing or a file.

  Raises:
    UserError: No database can store it; see questions.check_text.
  """
  value = fields.get(name, '')
  return questions.check_text(value, f'the field {name!r}') if isinstance(value, str) else ''


def whole_number(fields, name):
  """Returns a field as an int.

  Raises:
    UserError: It is missing, or something else.
  """
  value = text(fields, name)
  if not re.fullmatch(r'\d{1,18}', value, re.ASCII):
    raise UserError(f'{INCOMPLETE}Choose an answer first.')
  return int(value)

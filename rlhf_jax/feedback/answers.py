"""Answers of annotators: checks, and what they say about the order of the completions.

  | kind | answer, with ids of completions                                       |
  |------|----------------------------------------------------------------------|
  | pair | {"chosen": id, "strength": 1 to 4} or {"tie": true}                  |
  | rank | {"ranking": [[id], [id, id], ...]}, best first, ties together        |
  | best | {"best": id}                                                         |
  | rate | {"rating": {"id": 1 to 7}}                                           |
  | any  | {"skip": true}                                                       |

The strength says how much better the chosen one is, and may be absent. An imported pair may have
its own "margin" in its place. A row that undoes a judgement has the answer {"undo": true}.
"""

from collections.abc import Sequence
import math
from typing import Any

from rlhf_jax.errors import UserError

Answer = dict[str, Any]

STRENGTHS = (1, 2, 3, 4)
RATINGS = tuple(range(1, 8))
WANTED = {
  'pair': '{"chosen": ID, "strength": 1 to 4} or {"tie": true}',
  'rank': '{"ranking": [[ID], [ID, ID], ...]} with every completion once',
  'best': '{"best": ID}',
  'rate': '{"rating": {"ID": 1 to 7}} with every completion once',
}


def check(kind: str, ids: Sequence[int], answer: Any) -> Answer:
  """Returns an answer if it fits the task.

  Args:
    kind: Kind of the task.
    ids: Ids of its completions.
    answer: The answer.

  Raises:
    UserError: It is not one of the answers that the kind of task has.
  """
  if answer == {'skip': True} or isinstance(answer, dict) and _fits(kind, list(ids), answer):
    return answer
  raise UserError(
    f'the answer {answer!r} does not fit a task of kind {kind!r} about the completions '
    f'{list(ids)}: it must be {WANTED[kind]}, or {{"skip": true}}'
  )


def _fits(kind: str, ids: list[int], answer: Answer) -> bool:
  if kind == 'pair':
    return answer == {'tie': True} or _fits_pair(ids, answer)
  if kind == 'rank' and answer.keys() == {'ranking'}:
    groups = answer['ranking']
    if not isinstance(groups, list) or not all(isinstance(g, list) and g for g in groups):
      return False
    ranked = [item for group in groups for item in group]
    return all(map(_is_id, ranked)) and sorted(ranked) == sorted(ids)
  if kind == 'best' and answer.keys() == {'best'}:
    return _is_id(answer['best']) and answer['best'] in ids
  if kind == 'rate' and answer.keys() == {'rating'}:
    rating = answer['rating']
    return (
      isinstance(rating, dict)
      and rating.keys() == set(map(str, ids))
      and all(_is_id(value) and value in RATINGS for value in rating.values())
    )
  return False


def _fits_pair(ids: list[int], answer: Answer) -> bool:
  if not _is_id(answer.get('chosen')) or answer['chosen'] not in ids:
    return False
  rest = answer.keys() - {'chosen'}
  if rest == {'strength'}:
    return _is_id(answer['strength']) and answer['strength'] in STRENGTHS
  if rest == {'margin'}:
    margin = answer['margin']
    number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    return number and math.isfinite(margin)
  return not rest


def _is_id(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def skipped(answer: Answer) -> bool:
  """Returns whether the answer skips the task."""
  return 'skip' in answer


def ranks(kind: str, ids: Sequence[int], answer: Answer) -> list[int] | None:
  """Returns the rank of each completion, 0 for the best, equal for ties; None for a skip.

  Of a task of kind 'best', all others are tied; of 'rate', completions of equal rating are.

  Args:
    kind: Kind of the task.
    ids: Ids of its completions.
    answer: An answer that fits it.
  """
  if skipped(answer):
    return None
  if kind == 'pair':
    return [0 if 'tie' in answer else int(i != answer['chosen']) for i in ids]
  if kind == 'best':
    return [int(i != answer['best']) for i in ids]
  if kind == 'rank':
    position = {i: number for number, group in enumerate(answer['ranking']) for i in group}
    return [position[i] for i in ids]
  values = [answer['rating'][str(i)] for i in ids]
  order = sorted(set(values), reverse=True)
  return [order.index(value) for value in values]


def margin(answer: Answer) -> float | None:
  """Returns the margin of the chosen completion of a pair; None if the answer has no strength.

  It is (strength - 1) / 3: 0, 1/3, 2/3, 1 for negligibly, slightly, plainly, significantly better,
  the small margins of Llama 2 (Touvron et al. 2023, table 27, https://arxiv.org/abs/2307.09288).
  """
  if 'strength' in answer:
    return (answer['strength'] - 1) / 3
  return answer.get('margin')


def of_margin(value: float) -> Answer:
  """Returns the part of a pair's answer from which `margin` gives the value exactly."""
  for strength in STRENGTHS:
    if margin({'strength': strength}) == value:
      return {'strength': strength}
  return {'margin': value}


def agree(kind: str, ids: Sequence[int], first: Answer, second: Answer) -> bool:
  """Returns whether two answers say the same.

  The strength of a preference may differ, and a rating by one point.
  """
  if skipped(first) or skipped(second):
    return skipped(first) and skipped(second)
  if kind == 'rate':
    return all(abs(first['rating'][str(i)] - second['rating'][str(i)]) <= 1 for i in ids)
  return ranks(kind, ids, first) == ranks(kind, ids, second)


def renumber(answer: Answer, ids: dict[int, int]) -> Answer:
  """Returns an answer with other ids of the completions: {the id it has: the new one}."""
  new = dict(answer)
  for key in ('chosen', 'best'):
    if key in answer:
      new[key] = ids[answer[key]]
  if 'ranking' in answer:
    new['ranking'] = [[ids[i] for i in group] for group in answer['ranking']]
  if 'rating' in answer:
    new['rating'] = {str(ids[int(i)]): value for i, value in answer['rating'].items()}
  return new

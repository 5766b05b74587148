"""Figures about a project for its owner: progress, annotators, and disagreement."""

from collections.abc import Sequence
import dataclasses
import math
import statistics

import sqlalchemy as sa

from rlhf_jax.feedback import agreement
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types
from rlhf_jax.feedback import votes

NOBODY = agreement.AgainstRest(math.nan, math.nan, 0)
NOTHING = types.Quality(0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Part:
  """Progress of the tasks of one kind in one round, without gold questions and repeats.

  Attributes:
    round: Number of the round.
    kind: Kind of the tasks.
    tasks: Number of tasks.
    wanted: Number of answers wanted, the sum of the overlaps.
    judged: Number of answers given.
  """

  round: int
  kind: str
  tasks: int
  wanted: int
  judged: int


@dataclasses.dataclass(frozen=True)
class Person:
  """How an annotator works.

  Attributes:
    annotator: Who.
    judged: Number of answers, those to gold questions and repeats included.
    skipped: Number of tasks skipped.
    flagged: Number of answers with a flag.
    seconds: Median time of an answer; NaN without answers.
    rest: Agreement with the other annotators.
    quality: Answers to gold questions and repeats.
  """

  annotator: types.Annotator
  judged: int
  skipped: int
  flagged: int
  seconds: float
  rest: agreement.AgainstRest
  quality: types.Quality


@dataclasses.dataclass(frozen=True)
class Dispute:
  """A task and what annotators said about it; `score` is votes.disagreement."""

  task: types.Task
  judgements: list[types.Judgement]
  score: float


def progress(database: database_lib.Database, project: types.Project) -> list[Part]:
  """Returns the progress of each kind of task in each round, in the order of rounds."""
  row = schema.Task
  query = sa.select(
    row.round, row.kind, sa.func.count(), sa.func.sum(row.overlap), sa.func.sum(row.judged)
  )
  query = query.where(row.project_id == project.id, reading.wanted())
  with database.read() as session:
    found = session.execute(query.group_by(row.round, row.kind)).all()
  return [Part(number, kind, *map(int, rest)) for number, kind, *rest in sorted(found)]


def people(
  annotators: Sequence[types.Annotator], judgements: Sequence[types.Judgement]
) -> list[Person]:
  """Returns how each annotator works.

  Args:
    annotators: Annotators, in the order of the result.
    judgements: Judgements that count.
  """
  rest, quality = votes.against_rest(judgements), reading.quality(judgements)
  result = []
  for annotator in annotators:
    own = [item for item in judgements if item.annotator.id == annotator.id]
    answered = [item for item in own if not answers.skipped(item.answer)]
    result.append(
      Person(
        annotator=annotator,
        judged=len(answered),
        skipped=len(own) - len(answered),
        flagged=sum(bool(item.flags) for item in own),
        seconds=statistics.median(item.seconds for item in answered) if answered else math.nan,
        rest=rest.get(annotator.id, NOBODY),
        quality=quality.get(annotator.name, NOTHING),
      )
    )
  return result


def disputes(judgements: Sequence[types.Judgement], *, flag: str = '') -> list[Dispute]:
  """Returns the tasks about which annotators disagree, those with the most disagreement first.

  Args:
    judgements: Judgements that count.
    flag: If set, the tasks with a judgement that has this flag, with or without disagreement.
  """
  by_task = {}
  for item in judgements:
    if reading.is_ordinary(item.task):
      by_task.setdefault(item.task.id, []).append(item)
  result = []
  for given in by_task.values():
    task = given[0].task
    score = votes.disagreement(
      task, [item.answer for item in given if not answers.skipped(item.answer)]
    )
    if any(flag in item.flags for item in given) if flag else score > 0:
      result.append(Dispute(task, given, score))
  return sorted(result, key=lambda d: (-d.score, -len(d.judgements), d.task.id))


def flags(judgements: Sequence[types.Judgement]) -> list[str]:
  """Returns all flags that annotators set, in alphabetical order."""
  return sorted({flag for item in judgements for flag in item.flags})


def describe(task: types.Task, answer: answers.Answer) -> str:
  """Returns an answer in words; completions are A, B, C... in the order of the task."""
  if answers.skipped(answer):
    return 'skipped'
  letter = {completion.id: name(i) for i, completion in enumerate(task.completions)}
  if task.kind == 'pair':
    if 'tie' in answer:
      return 'tie'
    strength = answer.get('strength', answer.get('margin'))
    word = 'strength' if 'strength' in answer else 'margin'
    return letter[answer['chosen']] + ('' if strength is None else f', {word} {strength:g}')
  if task.kind == 'best':
    return f'{letter[answer["best"]]} is best'
  if task.kind == 'rank':
    return ' > '.join(' = '.join(map(letter.get, group)) for group in answer['ranking'])
  return ', '.join(f'{letter[int(i)]}: {value}' for i, value in answer['rating'].items())


def name(position: int) -> str:
  """Returns the letter of a completion: A for position 0, B, ..., Z, 27, 28, ..."""
  return chr(ord('A') + position) if position < 26 else str(position + 1)

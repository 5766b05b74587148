"""Reads of the feedback store: rows as values of `types`, judgements, results and statistics."""

from collections.abc import Iterable
from collections.abc import Sequence
import hashlib
import itertools
import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types

FORMS = ('pairs', 'rankings', 'ratings')

_Undo = orm.aliased(schema.Judgement)


def counts(until: int | None = None) -> sa.ColumnElement[bool]:
  """Returns the condition that a judgement counts: it is no undo, and no other row undoes it.

  Args:
    until: The last row that is looked at; None for all.
  """
  undone = sa.exists().where(_Undo.undoes == schema.Judgement.id)
  if until is not None:
    undone = undone.where(_Undo.id <= until)
  return schema.Judgement.undoes.is_(None) & ~undone


def skips() -> sa.ColumnElement[bool]:
  """Returns the condition that a judgement skips its task."""
  return sa.func.coalesce(schema.Judgement.answer['skip'].as_boolean(), sa.false())


def outside_chat() -> sa.ColumnElement[bool]:
  """Returns the condition that the task is no turn of a dialogue."""
  return ~sa.exists().where(
    schema.Prompt.id == schema.Task.prompt_id, schema.Prompt.dialogue_id.is_not(None)
  )


def wanted() -> sa.ColumnElement[bool]:
  """Returns the condition that a task counts in the progress of its project.

  Gold questions and repeats do not. Neither does a task that only one annotator may answer and has
  skipped, nor a turn of a dialogue without an answer, since nobody will answer these any more.
  """
  task = schema.Task
  skipped = sa.exists().where(schema.Judgement.task_id == task.id, counts(), skips())
  left = task.annotator_id.is_not(None) & (skipped | ~outside_chat())
  return (task.policies != '') & ((task.judged > 0) | ~left)


def project(row: schema.Project) -> types.Project:
  """Returns the project of a row."""
  return types.Project(
    id=row.id,
    name=row.name,
    instructions=row.instructions,
    overlap=row.settings['overlap'],
    gold_fraction=row.settings['gold_fraction'],
    repeat_fraction=row.settings['repeat_fraction'],
    lease_seconds=row.settings['lease_seconds'],
    selection=row.settings['selection'],
    created=row.created,
  )


def annotator(row: schema.Annotator) -> types.Annotator:
  """Returns the annotator of a row."""
  return types.Annotator(
    id=row.id,
    name=row.name,
    role=row.role,
    simulated=row.simulated,
    disabled=row.disabled,
    created=row.created,
    password_hash=row.password_hash,
    link_hash=row.link_hash,
  )


def prompt(row: schema.Prompt) -> types.Prompt:
  """Returns the prompt of a row."""
  return types.Prompt(row.id, row.text, row.messages, row.dialogue_id)


def completion(row: schema.Completion) -> types.Completion:
  """Returns the completion of a row."""
  return types.Completion(
    id=row.id,
    prompt_id=row.prompt_id,
    text=row.text,
    policy=row.policy,
    checkpoint=row.checkpoint,
    sampling=row.sampling,
    created=row.created,
  )


def tasks(session: orm.Session, rows: Sequence[schema.Task]) -> list[types.Task]:
  """Returns the tasks of rows, with their prompts and completions."""
  prompts = {item.id: prompt(item) for item in _by_id(session, schema.Prompt, rows, _prompt_ids)}
  completions = {
    item.id: completion(item) for item in _by_id(session, schema.Completion, rows, _completion_ids)
  }
  return [
    types.Task(
      id=row.id,
      project_id=row.project_id,
      kind=row.kind,
      prompt=prompts[row.prompt_id],
      completions=[completions[i] for i in row.completion_ids],
      overlap=row.overlap,
      priority=row.priority,
      round=row.round,
      gold=row.gold,
      annotator_id=row.annotator_id,
      repeats_task_id=row.repeats_task_id,
      created=row.created,
    )
    for row in rows
  ]


def _prompt_ids(row):
  return [row.prompt_id]


def _completion_ids(row):
  return row.completion_ids


def _by_id(session, table, rows, ids_of) -> Iterable[Any]:
  """Yields the rows of a table whose ids other rows name, in parts that any database takes."""
  ids = list(dict.fromkeys(i for row in rows for i in ids_of(row)))
  for start in range(0, len(ids), 1000):
    yield from session.scalars(sa.select(table).where(table.id.in_(ids[start : start + 1000])))


def judgements(
  session: orm.Session,
  project_id: int,
  *,
  round: int | None = None,
  include_undone: bool = False,
  until: int | None = None,
) -> list[types.Judgement]:
  """Returns the judgements of a project, in the order in which they were made.

  Args:
    session: Session of the database.
    project_id: The project.
    round: Only those of tasks of this round.
    include_undone: Whether to return all rows: also those that were undone, and those that undo.
    until: Id of the last judgement to look at; None for all.
  """
  row = schema.Judgement
  query = sa.select(row, schema.Task).join(schema.Task, row.task_id == schema.Task.id)
  query = query.where(schema.Task.project_id == project_id).order_by(row.id)
  if round is not None:
    query = query.where(schema.Task.round == round)
  if until is not None:
    query = query.where(row.id <= until)
  if not include_undone:
    query = query.where(counts(until))
  pairs = session.execute(query).all()
  return _to_judgements(session, [found for found, _ in pairs], [task for _, task in pairs])


def last(session: orm.Session, project_id: int) -> int:
  """Returns the id of the newest judgement of a project; 0 if there is none."""
  query = sa.select(sa.func.max(schema.Judgement.id)).join(
    schema.Task, schema.Judgement.task_id == schema.Task.id
  )
  return session.scalar(query.where(schema.Task.project_id == project_id)) or 0


def judgement(session: orm.Session, row: schema.Judgement) -> types.Judgement:
  """Returns the judgement of a row."""
  return _to_judgements(session, [row], [session.get(schema.Task, row.task_id)])[0]


def _to_judgements(session, rows, task_rows):
  unique = list({row.id: row for row in task_rows}.values())
  by_id = {task.id: task for task in tasks(session, unique)}
  people = {
    item.id: annotator(item)
    for item in _by_id(session, schema.Annotator, rows, lambda row: [row.annotator_id])
  }
  undone = {row.undoes for row in rows if row.undoes is not None}
  return [
    types.Judgement(
      id=row.id,
      task=by_id[row.task_id],
      annotator=people[row.annotator_id],
      answer=row.answer,
      reason=row.reason,
      flags=row.flags,
      shown=row.shown,
      seconds=row.seconds,
      created=row.created,
      undoes=row.undoes,
      undone=row.id in undone,
    )
    for row in rows
  ]


def is_ordinary(task: types.Task) -> bool:
  """Returns whether a task is neither a gold question nor a repeat."""
  return task.gold is None and task.repeats_task_id is None


def battles(found: Sequence[types.Judgement]) -> list[types.Battle]:
  """Returns the results between policies, out of judgements of kind 'pair', 'rank' and 'best'.

  Gold questions, repeats and skips give none, nor do two completions of one policy. Of a 'best'
  judgement, only the best one has results, against each of the others.
  """
  results = []
  for item in found:
    task = item.task
    ids = [c.id for c in task.completions]
    order = answers.ranks(task.kind, ids, item.answer) if is_ordinary(task) else None
    if order is None or task.kind == 'rate':
      continue
    for a, b in itertools.combinations(range(len(ids)), 2):
      first, second = task.completions[a], task.completions[b]
      if first.policy == second.policy or (task.kind == 'best' and order[a] == order[b]):
        continue
      results.append(
        types.Battle(
          first=first.policy,
          second=second.policy,
          outcome=0.5 if order[a] == order[b] else float(order[a] < order[b]),
          annotator=item.annotator.name,
          task_id=task.id,
          first_length=len(first.text),
          second_length=len(second.text),
          round=task.round,
        )
      )
  return results


def records(
  found: Sequence[types.Judgement], *, form: str = 'pairs', simulated: bool | None = None
) -> list[tuple[dict[str, Any], int]]:
  """Returns (record in the library's data formats, id of its judgement) of judgements.

  Gold questions, repeats and skips give none, nor do ratings of red-team attacks, where 7 is the
  most harm: see people_attacks.

  Args:
    found: Judgements.
    form: 'pairs' ({"prompt", "chosen", "rejected", "margin"}, one for each two completions that are
      not tied), 'rankings' ({"prompt", "completions"} with "ranks", "best" or "ratings") or
      'ratings' ({"prompt", "completion", "rating"}, of tasks of kind 'rate').
    simulated: Only those of simulated annotators, or only those of people; None for both.

  Raises:
    UserError: There is no such form.
  """
  if form not in FORMS:
    raise UserError(f'form={form!r} must be one of {", ".join(FORMS)}')
  make = {'pairs': _pairs, 'rankings': _rankings, 'ratings': _ratings}[form]
  results = []
  for item in found:
    if not is_ordinary(item.task) or answers.skipped(item.answer) or _rates_attack(item.task):
      continue
    if simulated is not None and item.annotator.simulated != simulated:
      continue
    by = {'annotator': item.annotator.name, 'simulated': item.annotator.simulated}
    results += [
      ({'prompt': item.task.prompt.value} | fields | by, item.id) for fields in make(item)
    ]
  return results


def _rates_attack(task):
  return task.kind == 'rate' and task.prompt.dialogue_id is not None


def _ranks(item):
  return answers.ranks(item.task.kind, [c.id for c in item.task.completions], item.answer)


def _pairs(item):
  order, texts = _ranks(item), [c.text for c in item.task.completions]
  margin = answers.margin(item.answer)
  more = {} if margin is None else {'margin': margin}
  for a, b in itertools.combinations(range(len(texts)), 2):
    if order[a] != order[b]:
      chosen, rejected = (a, b) if order[a] < order[b] else (b, a)
      yield {'chosen': texts[chosen], 'rejected': texts[rejected]} | more


def _rankings(item):
  completions = item.task.completions
  texts, margin = [c.text for c in completions], answers.margin(item.answer)
  if item.task.kind == 'best':
    label = {'best': [c.id for c in completions].index(item.answer['best'])}
  elif item.task.kind == 'rate':
    label = {'ratings': [float(item.answer['rating'][str(c.id)]) for c in completions]}
  else:
    label = {'ranks': _ranks(item)} | ({} if margin is None else {'margin': margin})
  yield {'completions': texts} | label


def _ratings(item):
  for c in item.task.completions if item.task.kind == 'rate' else ():
    yield {'completion': c.text, 'rating': float(item.answer['rating'][str(c.id)])}


def fingerprint(found: Sequence[tuple[dict[str, Any], int]]) -> str:
  """Returns a hash of records and of the ids of their judgements, as `records` returns them."""
  digest = hashlib.sha256()
  for record, number in found:
    line = json.dumps([number, record], sort_keys=True, ensure_ascii=False)
    digest.update(line.encode() + b'\n')
  return digest.hexdigest()[:16]


def totals(session: orm.Session, project_id: int) -> types.Totals:
  """Returns how many answers the tasks of a project want and have."""
  task = schema.Task
  query = sa.select(sa.func.count(), sa.func.sum(task.overlap), sa.func.sum(task.judged))
  found = session.execute(query.where(task.project_id == project_id, wanted())).one()
  return types.Totals(*(int(number or 0) for number in found))


def progress(session: orm.Session, project_id: int) -> types.Progress:
  """Returns the progress of a project."""
  task, row = schema.Task, schema.Judgement
  of_project = task.project_id == project_id
  joined = sa.select(schema.Annotator.name, sa.func.count()).select_from(row)
  joined = joined.join(task, row.task_id == task.id)
  joined = joined.join(schema.Annotator, row.annotator_id == schema.Annotator.id)
  joined = joined.where(of_project, counts()).group_by(schema.Annotator.name)
  skipped = session.execute(joined.where(task.policies != '', outside_chat(), skips())).all()
  by_annotator = session.execute(joined.where(~skips()).order_by(schema.Annotator.name)).all()
  return types.Progress(
    **totals(session, project_id)._asdict(),
    skipped=sum(number for _, number in skipped),
    by_annotator=dict(tuple(item) for item in by_annotator),
  )


def quality(found: Sequence[types.Judgement]) -> dict[str, types.Quality]:
  """Returns {name: Quality} of all annotators with judgements, out of those that count.

  A skip of a gold question or of a repeat is left out.
  """
  first = {(item.annotator.id, item.task.id): item for item in found}
  totals = {item.annotator.name: [0, 0, 0, 0] for item in found}
  for item in found:
    task, total = item.task, totals[item.annotator.name]
    if answers.skipped(item.answer):
      continue
    ids = [c.id for c in task.completions]
    if task.gold is not None:
      total[0] += 1
      total[1] += answers.agree(task.kind, ids, item.answer, task.gold)
    before = first.get((item.annotator.id, task.repeats_task_id))
    if before is not None and not answers.skipped(before.answer):
      total[2] += 1
      total[3] += answers.agree(task.kind, ids, item.answer, before.answer)
  return {name: types.Quality(*total) for name, total in totals.items()}

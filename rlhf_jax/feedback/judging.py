"""Judgements and their undoing, as writes that hold the project's lock."""

from collections.abc import Sequence
import dataclasses
import math
import time

import sqlalchemy as sa
from sqlalchemy import orm

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import leasing
from rlhf_jax.feedback import questions
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types

MAX_TOKEN = 200  # characters
IMPORTED = 'import '  # start of the tokens of judgements that no annotator made here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """What an annotator sends; see types.Judgement. `token` is the idempotency key."""

  answer: answers.Answer
  reason: str
  flags: Sequence[str]
  seconds: float
  token: str

  def __post_init__(self):
    questions.check_text(self.reason, 'the reason')
    for flag in self.flags:
      questions.check_text(flag, 'a flag')
    if not (math.isfinite(self.seconds) and self.seconds >= 0):
      raise UserError(f'the time of a judgement must be at least 0 seconds, but is {self.seconds}')
    if not questions.check_text(self.token, 'the token') or len(self.token) > MAX_TOKEN:
      raise UserError(f'the token of a judgement must have 1 to {MAX_TOKEN} characters')


def judge(
  database: database_lib.Database, lease_id: int, annotator: types.Annotator, form: Form, now: float
) -> types.Judgement:
  """Stores the answer to a leased task; see `Store.judge`."""
  query = sa.select(schema.Task.project_id)
  leased = query.join(schema.Lease, schema.Lease.task_id == schema.Task.id)
  judged = query.join(schema.Judgement, schema.Judgement.task_id == schema.Task.id)
  with database.read() as session:
    project_id = session.scalar(leased.where(schema.Lease.id == lease_id))
    if project_id is None:
      project_id = session.scalar(judged.where(schema.Judgement.token == form.token))
  if project_id is None:
    raise _lost(annotator)
  with database.write(project_id) as session:
    row = session.scalar(sa.select(schema.Judgement).where(schema.Judgement.token == form.token))
    if row is None:
      row = _judge(session, lease_id, annotator, form, now)
    elif row.annotator_id != annotator.id:
      raise UserError('the token of this judgement belongs to another annotator: reload the page')
    elif session.scalar(sa.select(sa.exists().where(schema.Judgement.undoes == row.id))):
      raise _lost(annotator)
    return reading.judgement(session, row)


def _judge(session, lease_id, annotator, form, now):
  check_enabled(session, annotator)
  lease = session.get(schema.Lease, lease_id)
  if lease is None or lease.annotator_id != annotator.id:
    raise _lost(annotator)
  task = session.get(schema.Task, lease.task_id)
  if lease.expires <= now and not leasing.has_room(session, task, annotator.id, now):
    raise UserError(
      f'{annotator.name}: the time for this task was over, and others have answered it. '
      'Take the next task.'
    )
  answers.check(task.kind, task.completion_ids, form.answer)
  row = schema.Judgement(
    task_id=task.id,
    annotator_id=annotator.id,
    answer=form.answer,
    reason=form.reason,
    flags=list(form.flags),
    shown=lease.shown,
    seconds=form.seconds,
    created=now,
    token=form.token,
  )
  session.add(row)
  session.delete(lease)
  task.judged += not answers.skipped(form.answer)
  session.flush()
  return row


def undoable(
  session: orm.Session, project: types.Project, annotator: types.Annotator
) -> schema.Judgement | None:
  """Returns the judgement that `undo` undoes; None if there is none."""
  row, task = schema.Judgement, schema.Task
  query = sa.select(row).join(task, row.task_id == task.id)
  query = query.where(
    task.project_id == project.id,
    row.annotator_id == annotator.id,
    ~row.token.startswith(IMPORTED),
    reading.counts(),
    reading.outside_chat(),
  )
  return session.scalar(query.order_by(row.id.desc()).limit(1))


def undo(
  database: database_lib.Database,
  project: types.Project,
  annotator: types.Annotator,
  judgement_id: int | None,
  now: float,
) -> types.Judgement | None:
  """Undoes the newest judgement of an annotator; see `Store.undo`."""
  with database.write(project.id) as session:
    check_enabled(session, annotator)
    undone = undoable(session, project, annotator)
    if undone is None or judgement_id not in (None, undone.id):
      return None
    asked = session.get(schema.Task, undone.task_id)
    undoing = schema.Judgement(
      task_id=asked.id,
      annotator_id=annotator.id,
      answer={'undo': True},
      reason='',
      flags=[],
      shown=undone.shown,
      seconds=0.0,
      created=now,
      undoes=undone.id,
      token=f'undo {undone.id}',
    )
    session.add(undoing)
    asked.judged -= not answers.skipped(undone.answer)
    # A skip gave the task to others, who may have answered it since.
    if leasing.has_room(session, asked, annotator.id, now):
      leasing.lease_task(session, project, asked, annotator.id, now)
    session.flush()
    return reading.judgement(session, undoing)


def check_enabled(session: orm.Session, annotator: types.Annotator) -> None:
  """Raises UserError if an annotator was disabled."""
  row = session.get(schema.Annotator, annotator.id)
  if row is None or row.disabled:
    raise UserError(f'the annotator {annotator.name!r} is disabled: ask an owner of the project')


def _lost(annotator):
  return UserError(
    f'{annotator.name}: this task is not assigned to you, or no longer. Take the next task.'
  )


def now_or(value: float | None) -> float:
  """Returns the time, in seconds: the value, or now if it is None."""
  return time.time() if value is None else value

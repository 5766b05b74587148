"""Leases of tasks to annotators. All functions run inside a write that holds the project's lock.

Ordinary tasks never have more judgements that count, together with leases that have not expired,
than their overlap. A gold question may be answered by every annotator, and a repeat or a turn of
a dialogue belongs to one annotator, so these have no such limit.
"""

import json
import secrets

import sqlalchemy as sa
from sqlalchemy import orm

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import assign
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types

REPEAT_GAP = 5  # a task is repeated after at least this many others

_OTHERS = orm.aliased(schema.Lease)


def next_lease(
  session: orm.Session,
  project: types.Project,
  annotator_id: int,
  now: float,
  ratings: dict[str, float],
) -> schema.Lease | None:
  """Returns the annotator's newest open lease, else a new one; None if nothing is left to do.

  An expired lease is renewed if its task still wants an answer.

  Args:
    session: Session that holds the lock of the project.
    project: The project.
    annotator_id: The annotator.
    now: Time, in seconds.
    ratings: Elo of the policies, for the selection 'elo'.
  """
  for lease, task in _held(session, project.id, annotator_id):
    if lease.expires > now or has_room(session, task, annotator_id, now):
      # A page that is shown again writes nothing while most of the time is left.
      if lease.expires - now < project.lease_seconds / 2:
        lease.created = lease.created if lease.expires > now else now
        lease.expires = now + project.lease_seconds
      return lease
    session.delete(lease)
  session.flush()
  task = _quality_task(session, project, annotator_id) or _ordinary_task(
    session, project, annotator_id, now, ratings
  )
  return task and lease_task(session, project, task, annotator_id, now)


def lease_task(
  session: orm.Session,
  project: types.Project,
  task: schema.Task,
  annotator_id: int,
  now: float,
) -> schema.Lease:
  """Returns a lease of a task to an annotator, the one there is or a new one."""
  query = sa.select(schema.Lease).where(
    schema.Lease.task_id == task.id, schema.Lease.annotator_id == annotator_id
  )
  lease = session.scalar(query)
  if lease is None:
    lease = schema.Lease(
      task_id=task.id,
      annotator_id=annotator_id,
      shown=assign.display_order(task.completion_ids, task.id, annotator_id),
      token=secrets.token_urlsafe(16),
      created=now,
      expires=now,
    )
    session.add(lease)
  lease.created = lease.created if lease.expires > now else now
  lease.expires = now + project.lease_seconds
  session.flush()
  return lease


def own_lease(
  session: orm.Session,
  project: types.Project,
  task_id: int,
  annotator: types.Annotator,
  now: float,
) -> schema.Lease:
  """Returns a lease of a task to the only annotator who may answer it.

  Raises:
    UserError: The task belongs to nobody, to another annotator, or has been answered.
  """
  query = sa.select(schema.Task).where(
    schema.Task.id == task_id,
    schema.Task.project_id == project.id,
    schema.Task.annotator_id == annotator.id,
    ~has_judged(annotator.id),
  )
  task = session.scalar(query)
  if task is None:
    raise UserError(
      f'task {task_id} does not belong to the annotator {annotator.name!r}, or has been answered'
    )
  return lease_task(session, project, task, annotator.id, now)


def assignment(session: orm.Session, lease: schema.Lease) -> types.Assignment:
  """Returns the assignment of a lease."""
  [task] = reading.tasks(session, [session.get(schema.Task, lease.task_id)])
  by_id = {completion.id: completion for completion in task.completions}
  return types.Assignment(
    lease_id=lease.id,
    task=task,
    shown=[by_id[i] for i in lease.shown],
    token=lease.token,
    expires=lease.expires,
  )


def has_room(session: orm.Session, task: schema.Task, annotator_id: int, now: float) -> bool:
  """Returns whether a task wants an answer that no other annotator is giving."""
  if task.gold is not None or task.annotator_id is not None:
    return True
  query = sa.select(sa.func.count()).where(
    schema.Lease.task_id == task.id,
    schema.Lease.annotator_id != annotator_id,
    schema.Lease.expires > now,
  )
  return task.judged + session.scalar(query) < task.overlap


def has_judged(annotator_id: int) -> sa.ColumnElement[bool]:
  """Returns the condition that an annotator has a judgement of the task that counts."""
  return sa.exists().where(
    schema.Judgement.task_id == schema.Task.id,
    schema.Judgement.annotator_id == annotator_id,
    reading.counts(),
  )


def _may_answer(annotator_id):
  owner = schema.Task.annotator_id
  return owner.is_(None) | (owner == annotator_id)


def _held(session, project_id, annotator_id):
  query = sa.select(schema.Lease, schema.Task).join(
    schema.Task, schema.Lease.task_id == schema.Task.id
  )
  query = query.where(
    schema.Task.project_id == project_id,
    schema.Lease.annotator_id == annotator_id,
    reading.outside_chat(),
  )
  return session.execute(query.order_by(schema.Lease.id.desc())).all()


def _ordinary_task(session, project, annotator_id, now, ratings):
  task = schema.Task
  leased = sa.select(sa.func.count()).where(
    _OTHERS.task_id == task.id, _OTHERS.annotator_id != annotator_id, _OTHERS.expires > now
  )
  query = sa.select(task).where(
    task.project_id == project.id,
    task.judged < task.overlap,
    task.policies != '',
    _may_answer(annotator_id),
    task.judged + leased.scalar_subquery() < task.overlap,
    ~has_judged(annotator_id),
    reading.outside_chat(),
  )
  first = session.scalar(query.order_by(task.priority.desc(), task.shuffle).limit(1))
  if first is None or project.selection == 'disagreement':
    return first
  groups = _open_policies(session, project.id, first.priority)
  if len(groups) == 1:
    return first
  query = query.where(task.priority == first.priority).order_by(task.shuffle).limit(1)
  order = assign.order(
    groups,
    selection=project.selection,
    counts=_pair_counts(session, project.id, now),
    ratings=ratings,
  )
  found = (session.scalar(query.where(task.policies == groups[names])) for names in order)
  return next(task for task in found if task is not None)


def _open_policies(session, project_id, priority):
  """Returns {names of policies: the same as text} of the open tasks of a priority."""
  task = schema.Task
  query = sa.select(task.policies).where(
    task.project_id == project_id,
    task.judged < task.overlap,
    task.policies != '',
    task.priority == priority,
  )
  return {tuple(json.loads(text)): text for text in session.scalars(query.distinct())}


def _pair_counts(session, project_id, now):
  """Returns {policies: judgements and open leases of the tasks that compare them}."""
  task = schema.Task
  of_project = sa.select(task.policies).where(task.project_id == project_id, task.policies != '')
  judged = of_project.add_columns(sa.func.sum(task.judged)).group_by(task.policies)
  leased = of_project.add_columns(sa.func.count()).join(
    schema.Lease, schema.Lease.task_id == task.id
  )
  leased = leased.where(schema.Lease.expires > now).group_by(task.policies)
  counts = {}
  for names, number in [*session.execute(judged), *session.execute(leased)]:
    key = tuple(json.loads(names))
    counts[key] = counts.get(key, 0) + int(number)
  return counts


def _quality_task(session, project, annotator_id):
  """Returns a gold question or a repeat, for a share of an annotator's assignments, or None."""
  if not project.gold_fraction and not project.repeat_fraction:
    return None
  rows = sa.select(sa.func.count()).select_from(schema.Judgement)
  rows = rows.join(schema.Task, schema.Judgement.task_id == schema.Task.id).where(
    schema.Judgement.annotator_id == annotator_id, schema.Task.project_id == project.id
  )
  key = project.id, annotator_id, session.scalar(rows)
  draw = assign.uniform('quality', *key)
  if draw < project.gold_fraction:
    return _gold_task(session, project, annotator_id, key)
  if draw < project.gold_fraction + project.repeat_fraction:
    return _repeat_task(session, project, annotator_id, key)
  return None


def _gold_task(session, project, annotator_id, key):
  task = schema.Task
  query = sa.select(task).where(
    task.project_id == project.id,
    task.gold.is_not(sa.null()),
    _may_answer(annotator_id),
    ~has_judged(annotator_id),
    reading.outside_chat(),
  )
  found = session.scalars(query.order_by(task.id)).all()
  return found[int(len(found) * assign.uniform('gold', *key))] if found else None


def _repeat_task(session, project, annotator_id, key):
  """Makes a task that repeats one that the annotator judged before; None if there is none."""
  task, again = schema.Task, orm.aliased(schema.Task)
  repeated = sa.exists().where(again.repeats_task_id == task.id, again.annotator_id == annotator_id)
  query = sa.select(task).join(schema.Judgement, schema.Judgement.task_id == task.id)
  query = query.where(
    task.project_id == project.id,
    task.policies != '',
    schema.Judgement.annotator_id == annotator_id,
    reading.counts(),
    ~reading.skips(),
    ~repeated,
    reading.outside_chat(),
  )
  found = session.scalars(query.order_by(schema.Judgement.id)).all()[:-REPEAT_GAP]
  if not found:
    return None
  first = found[int(len(found) * assign.uniform('repeat', *key))]
  repeat = schema.Task(
    project_id=project.id,
    kind=first.kind,
    prompt_id=first.prompt_id,
    completion_ids=first.completion_ids,
    policies='',
    overlap=1,
    priority=0.0,
    shuffle=0.0,
    round=first.round,
    annotator_id=annotator_id,
    repeats_task_id=first.id,
    judged=0,
    created=first.created,
  )
  session.add(repeat)
  session.flush()
  return repeat

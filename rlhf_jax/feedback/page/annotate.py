"""The pages of annotators: the next task, its answer, skip, undo, progress and instructions.

Pages name answers A, B, ... in the order displayed, and forms send positions in it; the lease of
the task says which completion that is. No page has the name of a policy.
"""

import statistics
import time
from typing import Annotated

import fastapi
import sqlalchemy as sa
from starlette import responses

from rlhf_jax.errors import need
from rlhf_jax.feedback import judging
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types
from rlhf_jax.feedback.page import auth
from rlhf_jax.feedback.page import forms

router = fastapi.APIRouter()
QUESTIONS = {
  'pair': 'Which answer is better?',
  'rank': 'Rank the answers',
  'best': 'Which answer is best?',
  'rate': 'How good is it?',
}
DAY = 24 * 3600.0

User = Annotated[types.Annotator, fastapi.Depends(auth.current)]
Fields = forms.Fields


@router.get('/')
def next_task(request: fastapi.Request, user: User):
  """Shows the task that is assigned to the annotator, or assigns one."""
  return _next(request, user)


@router.post('/judge')
def judge(request: fastapi.Request, user: User, fields: Fields):
  """Stores an answer, and shows the next task."""
  return _store(request, user, fields, skip=False)


@router.post('/skip')
def skip(request: fastapi.Request, user: User, fields: Fields):
  """Stores that the annotator skips the task, and shows the next one."""
  return _store(request, user, fields, skip=True)


@router.post('/undo')
def undo(request: fastapi.Request, user: User, fields: Fields):
  """Undoes the last answer, and shows its task again; a form that is sent twice undoes one."""
  if forms.text(fields, 'judgement'):
    number = forms.whole_number(fields, 'judgement')
    request.app.state.store.undo(request.app.state.project, user, judgement=number)
  return _next(request, user) if auth.is_htmx(request) else responses.RedirectResponse('/', 303)


@router.get('/progress')
def progress(request: fastapi.Request, user: User):
  """Shows how much is done by the annotator, and in the whole project."""
  row = schema.Judgement
  with request.app.state.store.database.read() as rows:
    own = rows.execute(_own(request, user, row.seconds, row.created, reading.skips())).all()
    totals = reading.totals(rows, request.app.state.project.id)
  times = [seconds for seconds, _, skipped in own if not skipped]
  return auth.render(
    request,
    'progress.html',
    own=len(times),
    skipped=len(own) - len(times),
    today=sum(created > time.time() - DAY and not skipped for _, created, skipped in own),
    seconds=f'{statistics.median(times):.0f}' if times else '–',
    progress=totals,
  )


@router.get('/instructions')
def instructions(request: fastapi.Request, user: User):
  """Shows what the owner asks of annotators, and the keys."""
  del user
  project = request.app.state.store.project(request.app.state.project.name)
  paragraphs = [part for part in project.instructions.split('\n\n') if part.strip()]
  return auth.render(request, 'instructions.html', project=project, paragraphs=paragraphs)


def _next(request, user, saved=False):
  """Shows the next task, or that there is none."""
  assignment = request.app.state.store.next_task(request.app.state.project, user)
  project = request.app.state.project
  with request.app.state.store.database.read() as rows:
    own = rows.scalar(_own(request, user, sa.func.count()).where(~reading.skips()))
    newest = judging.undoable(rows, project, user)
    totals = reading.totals(rows, project.id)
  undoable = newest and newest.id
  if assignment is None:
    return auth.render(request, 'done.html', own=own, undoable=undoable, saved=saved)
  kind = assignment.task.kind
  return auth.render(
    request,
    'task.html',
    kind=kind,
    question=QUESTIONS[kind],
    task=assignment.task,
    shown=assignment.shown,
    lease_id=assignment.lease_id,
    token=assignment.token,
    own=own,
    undoable=undoable,
    saved=saved,
    progress=totals,
    letters=forms.LETTERS,
    strengths=forms.STRENGTHS,
    flags=forms.FLAGS,
    reason_length=forms.MAX_REASON,
  )


def _store(request, user, fields, *, skip):
  """Stores the answer of a form, unless it is stored already."""
  store = request.app.state.store
  token = forms.text(fields, 'token')
  lease = _lease(store, forms.whole_number(fields, 'lease'), token, user)
  if lease is not None:
    lease_id, kind, shown, displayed = lease
    store.judge(
      lease_id,
      user,
      {'skip': True} if skip else forms.answer(kind, shown, fields),
      reason=forms.reason(fields),
      flags=forms.flags(fields),
      seconds=max(0.0, time.time() - displayed),
      token=token,
    )
  if auth.is_htmx(request):
    return _next(request, user, saved=True)
  return responses.RedirectResponse('/', 303)


def _lease(store, lease_id, token, user):
  """Finds the lease of a form.

  Its id can be guessed; its token is only in the form that was displayed.

  Args:
    store: The store.
    lease_id: Id of the lease.
    token: Token of the form.
    user: The annotator.

  Returns:
    (id, kind of its task, ids of the completions in the order displayed, time of display); None if
    the form was stored before.

  Raises:
    UserError: It is not the annotator's, it is gone, its judgement was undone, or its task is a
      turn of a dialogue, which the pages of the chat store.
  """
  with store.database.read() as rows:
    query = sa.select(schema.Lease, schema.Task.kind).join(
      schema.Task, schema.Lease.task_id == schema.Task.id
    )
    found = rows.execute(
      query.where(
        schema.Lease.id == lease_id,
        schema.Lease.annotator_id == user.id,
        schema.Lease.token == token,
        reading.outside_chat(),
      )
    ).first()
    if found is not None:
      lease, kind = found
      return lease.id, kind, lease.shown, lease.created
    query = sa.select(schema.Judgement.id).where(
      schema.Judgement.token == token,
      schema.Judgement.annotator_id == user.id,
      reading.counts(),
    )
    need(
      rows.scalar(query) is not None,
      'This task is not assigned to you, or no longer. Load the page again for the next one.',
    )
  return None


def _own(request, user, *columns):
  """Returns a query of an annotator's judgements in the project that count."""
  row, task = schema.Judgement, schema.Task
  query = sa.select(*columns).select_from(row).join(task, row.task_id == task.id)
  return query.where(
    task.project_id == request.app.state.project.id,
    row.annotator_id == user.id,
    reading.counts(),
  )

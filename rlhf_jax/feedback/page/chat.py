"""The chat pages: an annotator writes, two policies answer side by side, and one answer is picked.

Which policies answer and on which side is random, and no page says which they are. The answers are
streamed as lines of JSON, which static/chat.js reads:

  {"side": 0 or 1, "text": "..."}   a piece of text
  {"side": 0 or 1, "done": true}    the answer is complete
  {"stored": true}                  both are stored; the page of the dialogue has the choice
  {"error": "..."}                  there are no answers

The pieces of both sides are sent at one pace, that of the slower policy, so that neither order nor
speed tells which is which. The answers are stored when both are complete. A browser that goes away
before cancels them, and the page samples them again when it is opened again.
"""

import asyncio
from collections.abc import AsyncIterator
import contextlib
import json
import logging
import random
import time
from typing import Annotated

import fastapi
from starlette import concurrency
from starlette import responses

from rlhf_jax import errors
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import dialogues
from rlhf_jax.feedback import judging
from rlhf_jax.feedback import live
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types
from rlhf_jax.feedback.page import annotate
from rlhf_jax.feedback.page import auth
from rlhf_jax.feedback.page import forms

router = fastapi.APIRouter()
QUESTIONS = {
  'write': 'Your message',
  'answer': 'The answers are being written',
  'choose': 'Which answer is better?',
  'rate': 'How well did the attack succeed?',
  'closed': 'This dialogue has ended',
}
MORE_HARMFUL = 'Which answer is more harmful?'
BROKEN = 'One of the policies cannot answer. Tell the owner of the project.'
NOT_STORED = (
  'The answers could not be stored. Try again in a moment; if it happens again, tell the owner of '
  'the project.'
)
REPLACED = 'The answers to this message are being written in another window.'
BUSY = 'The answers of your other dialogues are being written: wait for them.'
MAX_WRITING = 2  # dialogues of an annotator whose answers are being written
MAX_PAUSE = 0.5  # seconds between the pieces of the longer answer when the other one has ended
SHOWN = 100  # dialogues in the list
_log = logging.getLogger('rlhf_jax.feedback')
_random = random.SystemRandom()


def own(request: fastapi.Request, dialogue_id: int, user: annotate.User) -> types.Dialogue:
  """Returns the dialogue of the path.

  Raises:
    fastapi.HTTPException: The annotator has no such dialogue; status 404.
  """
  found = dialogues.find(request.app.state.store, request.app.state.project, user, dialogue_id)
  if found is None:
    raise fastapi.HTTPException(404, 'You have no such dialogue.')
  return found


Own = Annotated[types.Dialogue, fastapi.Depends(own)]


@router.get('/chat')
def overview(request: fastapi.Request, user: annotate.User):
  """Shows the dialogues of the annotator, and the forms that start one."""
  found = dialogues.openings(request.app.state.store, request.app.state.project, user)
  return auth.render(request, 'chat_list.html', dialogues=found[:SHOWN])


@router.post('/chat')
def start(request: fastapi.Request, user: annotate.User, fields: annotate.Fields):
  """Starts a dialogue."""
  mode = forms.text(fields, 'mode')
  errors.need(mode in schema.MODES, 'Choose one of the two kinds of dialogues.')
  errors.need(request.app.state.policies, 'There are no policies to talk to.')
  store, project = request.app.state.store, request.app.state.project
  dialogue = accounts.add_dialogue(store.database, project, user, mode)
  return responses.RedirectResponse(f'/chat/{dialogue.id}', 303)


@router.get('/chat/{dialogue_id}')
def show(request: fastapi.Request, user: annotate.User, dialogue: Own):
  """Shows a dialogue."""
  return _page(request, user, dialogue)


@router.post('/chat/{dialogue_id}/say')
def say(request: fastapi.Request, user: annotate.User, dialogue: Own, fields: annotate.Fields):
  """Adds a message of the annotator."""
  text = forms.text(fields, 'text')
  dialogues.say(request.app.state.store, request.app.state.project, dialogue, text)
  return _after(request, user, dialogue)


@router.post('/chat/{dialogue_id}/answers')
async def answers(request: fastapi.Request, user: annotate.User, dialogue: Own):
  """Streams two answers to the last message, and stores them."""
  store = request.app.state.store
  state = await concurrency.run_in_threadpool(dialogues.state, store, dialogue)
  if state.step != 'answer':  # another window was first
    return responses.PlainTextResponse(_line(stored=True))
  lines = _lines(request.app.state, user, state.prompt)
  return responses.StreamingResponse(lines, media_type='application/x-ndjson')


@router.post('/chat/{dialogue_id}/judge')
def judge(request: fastapi.Request, user: annotate.User, dialogue: Own, fields: annotate.Fields):
  """Stores which answer is picked, or the rating of the attack."""
  store, project = request.app.state.store, request.app.state.project
  state = dialogues.state(store, dialogue)
  if state.task is not None:
    assignment, displayed = _assignment(store, project, state.task, user)
    token = forms.text(fields, 'token')
    if token == assignment.token:  # else the form was sent twice, and is stored already
      answer = forms.answer(state.task.kind, [c.id for c in assignment.shown], fields)
      form = judging.Form(
        answer=answer,
        reason=forms.reason(fields),
        flags=forms.flags(fields),
        seconds=max(0.0, time.time() - displayed),
        token=token,
      )
      dialogues.judge(store, dialogue, user, assignment, form)
  return _after(request, user, dialogue)


@router.post('/chat/{dialogue_id}/end')
def end(request: fastapi.Request, user: annotate.User, dialogue: Own):
  """Ends a dialogue; an attack is rated next."""
  dialogues.end(request.app.state.store, request.app.state.project, dialogue, user)
  return _after(request, user, dialogue)


def _after(request, user, dialogue):
  """Shows the dialogue after a form."""
  if auth.is_htmx(request):
    found = dialogues.find(request.app.state.store, request.app.state.project, user, dialogue.id)
    return _page(request, user, found)
  return responses.RedirectResponse(f'/chat/{dialogue.id}', 303)


def _page(request, user, dialogue):
  store, project = request.app.state.store, request.app.state.project
  state = dialogues.state(store, dialogue)
  red_team = dialogue.mode == 'red_team'
  shown, token = [], ''
  if state.task is not None:
    assignment, _ = _assignment(store, project, state.task, user)
    shown, token = assignment.shown, assignment.token
  question = QUESTIONS[state.step]
  return auth.render(
    request,
    'chat.html',
    dialogue=dialogue,
    state=state,
    red_team=red_team,
    question=MORE_HARMFUL if red_team and state.step == 'choose' else question,
    quality='more harmful' if red_team else 'better',
    shown=shown,
    token=token,
    strengths=forms.STRENGTHS,
    flags=forms.FLAGS,
    letters=forms.LETTERS,
    message_length=dialogues.MAX_MESSAGE,
    reason_length=forms.MAX_REASON,
  )


def _assignment(store, project, task, user):
  """Returns the assignment of a turn, and the time when it was made."""
  assignment = store.lease(project, task, user)
  with store.database.read() as rows:
    return assignment, rows.get(schema.Lease, assignment.lease_id).created


async def _lines(app_state, user, prompt) -> AsyncIterator[str]:
  """Yields the lines of two answers; see the top of the file."""
  policies, queue = app_state.policies, asyncio.Queue()
  if policies is None:
    yield _line(error='There are no policies to talk to.')
    return
  writing = app_state.writing.setdefault(user.id, {})
  if prompt.dialogue_id in writing:  # this window replaces the other one
    other, tasks = writing.pop(prompt.dialogue_id)
    other.put_nowait((0, live.Unavailable(REPLACED)))
    for task in tasks:
      task.cancel()
  if len(writing) >= MAX_WRITING:
    yield _line(error=BUSY)
    return
  names = policies.names
  names = _random.sample(names, 2) if len(names) > 1 else 2 * names
  streams = [policies.stream(name, prompt.messages) for name in names]
  tasks = [asyncio.create_task(_read(side, one, queue)) for side, one in enumerate(streams)]
  writing[prompt.dialogue_id] = queue, tasks
  try:
    async with contextlib.aclosing(_paired(queue)) as pieces:
      async for side, piece in pieces:
        yield _line(side=side, done=True) if piece is None else _line(side=side, text=piece)
    yield await _store(app_state, user, prompt, streams)
  except (live.Unavailable, live.Refused) as error:
    yield _line(error=_sentence(str(error)))
  except Exception as error:
    _log.error('chat: %s: %s', type(error).__name__, error)
    yield _line(error=BROKEN)
  finally:
    if writing.get(prompt.dialogue_id) == (queue, tasks):
      del writing[prompt.dialogue_id]
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _read(side, answer, queue):
  """Puts (side, piece) into a queue for each piece of an answer, then (side, None or an error)."""
  try:
    async for piece in answer:
      queue.put_nowait((side, piece))
    queue.put_nowait((side, None))
  except Exception as error:  # also those of the machine: without a message the page would wait
    queue.put_nowait((side, error))


async def _paired(queue):
  """Yields what `_read` puts into a queue at one pace: a piece of each side, then of each the next.

  When the shorter answer has ended, the rest of the longer one comes at the mean pace so far: it
  may be complete already. Both ends come last.

  Args:
    queue: Queue of both sides.

  Raises:
    Exception: One of the answers failed.
  """
  clock = asyncio.get_running_loop().time
  order = _random.sample((0, 1), 2)
  waiting, ended, times, last = ([], []), set(), [], 0.0
  while len(ended) < 2 or any(waiting):
    if not all(waiting[side] or side in ended for side in order):
      side, piece = await queue.get()
      if isinstance(piece, Exception):
        raise piece
      if piece is None:
        ended.add(side)
      else:
        waiting[side].append(piece)
      continue
    if all(waiting):
      times.append(clock())
    elif len(times) > 1:
      pause = min((times[-1] - times[0]) / (len(times) - 1), MAX_PAUSE)
      await asyncio.sleep(max(last + pause - clock(), 0.0))
    last = clock()
    for side in order:
      if waiting[side]:
        yield side, waiting[side].pop(0)
  for side in order:
    yield side, None


async def _store(app_state, user, prompt, streams):
  """Stores the answers; returns the last line."""
  found = [dialogues.Answered(s.text, s.policy, s.checkpoint, s.sampling) for s in streams]
  try:
    await concurrency.run_in_threadpool(
      dialogues.add_answers, app_state.store, app_state.project, user, prompt, found
    )
  except Exception as error:
    # The first line alone: the others may hold what was to be written.
    _log.error('chat: answers were not stored: %s', str(error).partition('\n')[0])
    return _line(error=NOT_STORED)
  return _line(stored=True)


def _sentence(text):
  """Returns the message of an error with a capital letter and a full stop."""
  return f'{text[0].upper()}{text[1:].rstrip(".")}.'


def _line(**fields):
  return json.dumps(fields) + '\n'

"""Dialogues of annotators with two policies, as rows of the feedback store.

As in Bai et al. 2022, section 2 (https://arxiv.org/abs/2204.05862), each turn is a comparison of
two answers, and the one that is picked continues the dialogue. In the mode 'helpful' the better
answer is picked. In 'red_team' the more harmful one is, so that the attack continues; it is stored
as the *rejected* one, as in their data, so that reward models learn from both modes alike. At its
end, the annotator rates how well the attack succeeded (Ganguli et al. 2022,
https://arxiv.org/abs/2209.07858).

The database alone holds the state of a dialogue, so a browser or a server may end at any time.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import time
from typing import Any

import sqlalchemy as sa

from rlhf_jax.errors import need
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import assign
from rlhf_jax.feedback import judging
from rlhf_jax.feedback import leasing
from rlhf_jax.feedback import questions
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback import types

MAX_MESSAGE = 20_000  # characters
MAX_ID = 2**31 - 1  # of a row; a database cannot compare larger numbers
NUL, REPLACEMENT = '\0', '\ufffd'


@dataclasses.dataclass(frozen=True)
class State:
  """Where a dialogue stands.

  Attributes:
    step: 'write' (the annotator's message is next), 'answer' (two answers to `prompt` are next),
      'choose' (a choice between the answers of `task`), 'rate' (the rating of the attack in `task`)
      or 'closed'.
    messages: The conversation so far; in 'rate' and 'closed' with the last answer picked.
    prompt: The prompt without answers, in 'answer'.
    task: The task without a judgement, in 'choose' and 'rate'.
    picked: The last answer picked, or None.
    turns: Number of answers picked.
  """

  step: str
  messages: list[dict[str, str]]
  prompt: types.Prompt | None
  task: types.Task | None
  picked: types.Completion | None
  turns: int


@dataclasses.dataclass(frozen=True)
class Answered:
  """A complete answer of a policy; see types.Completion."""

  text: str
  policy: str
  checkpoint: str | None
  sampling: dict[str, Any] | None


def find(
  store: store_lib.Store, project: types.Project, annotator: types.Annotator, dialogue_id: int
) -> types.Dialogue | None:
  """Returns a dialogue of an annotator; None if there is none, or if it is another's."""
  row = schema.Dialogue
  query = sa.select(row).where(
    row.id == dialogue_id, row.project_id == project.id, row.annotator_id == annotator.id
  )
  if abs(dialogue_id) > MAX_ID:
    return None
  with store.database.read() as session:
    found = session.scalar(query)
  return None if found is None else accounts.dialogue(found)


def openings(
  store: store_lib.Store, project: types.Project, annotator: types.Annotator
) -> list[tuple[types.Dialogue, str]]:
  """Returns the dialogues of an annotator, newest first, with their first messages ('' if none)."""
  found = accounts.dialogues(store.database, project, annotator)
  row = schema.Prompt
  query = sa.select(sa.func.min(row.id)).join(
    schema.Dialogue, row.dialogue_id == schema.Dialogue.id
  )
  query = query.where(
    schema.Dialogue.annotator_id == annotator.id, row.project_id == project.id
  ).group_by(row.dialogue_id)
  with store.database.read() as session:
    prompts = session.scalars(sa.select(row).where(row.id.in_(query)))
    first = {prompt.dialogue_id: prompt.messages[0]['content'] for prompt in prompts}
  return [(dialogue, first.get(dialogue.id, '')) for dialogue in reversed(found)]


def state(store: store_lib.Store, dialogue: types.Dialogue) -> State:
  """Returns where a dialogue stands."""
  with store.database.read() as session:
    return _read(session, dialogue)


def _read(session, dialogue):
  """Returns what `state` does; a write calls it, as a second connection may have to wait for it."""
  closed = session.get(schema.Dialogue, dialogue.id).closed
  newest = session.scalar(_newest_prompt(dialogue.id))
  rows = session.scalars(_tasks(dialogue.id).order_by(schema.Task.id))
  tasks = reading.tasks(session, rows.all())
  ids = [task.id for task in tasks]
  query = sa.select(schema.Judgement.task_id, schema.Judgement.answer)
  query = query.where(schema.Judgement.task_id.in_(ids), reading.counts())
  judged = {task_id: answer for task_id, answer in session.execute(query)}
  prompt = None if newest is None else reading.prompt(newest)
  return _state(dataclasses.replace(dialogue, closed=closed), prompt, tasks, judged)


def _state(dialogue, prompt, tasks, judged):
  """Returns the State.

  Args:
    dialogue: The dialogue.
    prompt: Its newest prompt, or None.
    tasks: Its tasks, oldest first.
    judged: {id of a task: answer}.
  """
  messages, last, turns = [], None, 0
  for task in tasks:
    if task.kind == 'pair' and task.id in judged and 'skip' not in judged[task.id]:
      last, turns = picked(dialogue, task, judged[task.id]), turns + 1
      answer = {'role': 'assistant', 'content': last.text.strip()}
      messages = [*task.prompt.messages, answer]
  where = {'prompt': None, 'task': None, 'picked': last, 'turns': turns}
  rated = any(task.kind == 'rate' and task.id in judged for task in tasks)
  if rated or dialogue.closed is not None:
    return State('closed', messages, **where)
  if tasks and tasks[-1].id not in judged:
    task = tasks[-1]
    if task.kind == 'rate':
      return State('rate', messages, **where | {'task': task})
    return State('choose', task.prompt.messages, **where | {'task': task})
  if prompt is not None and all(task.prompt.id != prompt.id for task in tasks):
    return State('answer', prompt.messages, **where | {'prompt': prompt})
  return State('write', messages, **where)


def picked(dialogue: types.Dialogue, task: types.Task, answer: dict[str, Any]) -> types.Completion:
  """Returns the completion that continues a dialogue after a judgement of a turn.

  After a tie it is the first one in canonical order, which is random.
  """
  first, second = task.completions
  if 'tie' in answer:
    return first
  better = first.id == answer['chosen']
  return first if better == (dialogue.mode == 'helpful') else second


def say(
  store: store_lib.Store, project: types.Project, dialogue: types.Dialogue, text: str
) -> None:
  """Adds a message of the annotator; a message that was not answered yet is replaced.

  Raises:
    UserError: The message is empty or too long, or it is not the annotator's turn.
  """
  text = text.replace('\r\n', '\n').strip()
  need(text, 'Not sent: the message is empty.')
  need(len(text) <= MAX_MESSAGE, f'Not sent: the message has more than {MAX_MESSAGE} characters.')
  with store.database.write(project.id) as session:
    now = _read(session, dialogue)  # other writes wait
    need(now.step != 'closed', 'Not sent: this dialogue has ended. Start a new one.')
    need(now.step in ('write', 'answer'), 'Not sent: first choose one of the answers.')
    before = now.messages if now.step == 'write' else now.messages[:-1]
    messages = [*before, {'role': 'user', 'content': text}]
    if now.prompt is None or now.prompt.messages != messages:  # else the form was sent twice
      _add_prompt(session, dialogue, messages)


def _add_prompt(session, dialogue, messages):
  """Adds a row even if an earlier one is equal: the annotator may go back to a former message."""
  text = questions.check_text(questions.plain(messages), 'the message')
  query = sa.select(sa.func.count()).where(schema.Prompt.dialogue_id == dialogue.id)
  key = json.dumps([text, dialogue.id, session.scalar(query)])
  row = schema.Prompt(
    project_id=dialogue.project_id,
    dialogue_id=dialogue.id,
    text=text,
    messages=messages,
    digest=hashlib.sha256(key.encode()).hexdigest(),
  )
  session.add(row)


def add_answers(
  store: store_lib.Store,
  project: types.Project,
  annotator: types.Annotator,
  prompt: types.Prompt,
  answers: Sequence[Answered],
) -> None:
  """Adds two answers to a prompt, and the task to compare them, which displays them in this order.

  Does nothing if another window of the annotator was first: the prompt is answered, another message
  has replaced it, or the dialogue has ended.
  """
  with store.database.write(project.id) as session:
    judging.check_enabled(session, annotator)
    dialogue = session.get(schema.Dialogue, prompt.dialogue_id)
    newest = session.scalar(_newest_prompt(dialogue.id))
    query = _tasks(dialogue.id).where(
      (schema.Task.prompt_id == prompt.id) | (schema.Task.kind == 'rate')
    )
    if dialogue.closed is not None or newest.id != prompt.id or session.scalar(query.limit(1)):
      return
    rows = [
      questions.add_completion(
        session, prompt.id, a.text.replace(NUL, REPLACEMENT), a.policy, a.checkpoint, a.sampling
      )
      for a in answers
    ]
    options = questions.Options(overlap=1, annotator_id=annotator.id)
    task = questions.add_task(session, project, 'pair', prompt.id, rows, options)
    wanted = [row.id for row in rows]
    if assign.display_order(wanted, task.id, annotator.id) != wanted:
      task.completion_ids = wanted[::-1]
    leasing.lease_task(session, project, task, annotator.id, time.time())


def judge(
  store: store_lib.Store,
  dialogue: types.Dialogue,
  annotator: types.Annotator,
  assignment: types.Assignment,
  form: judging.Form,
) -> None:
  """Stores the choice of a turn, or the rating of an attack.

  Args:
    store: The store.
    dialogue: The dialogue.
    annotator: Its annotator.
    assignment: The assignment of the turn.
    form: The answer as the annotator gave it: in 'red_team', 'chosen' is the more harmful one.
  """
  answer = form.answer
  if dialogue.mode == 'red_team' and 'chosen' in answer:
    [other] = {c.id for c in assignment.task.completions} - {answer['chosen']}
    answer = answer | {'chosen': other}
  store.judge(
    assignment,
    annotator,
    answer,
    reason=form.reason,
    flags=form.flags,
    seconds=form.seconds,
    token=form.token,
  )
  if assignment.task.kind == 'rate':
    accounts.close_dialogue(store.database, dialogue)


def end(
  store: store_lib.Store,
  project: types.Project,
  dialogue: types.Dialogue,
  annotator: types.Annotator,
) -> None:
  """Ends a dialogue; one of 'red_team' with answers is closed when its attack has been rated."""
  now = state(store, dialogue)
  if now.step in ('closed', 'rate'):
    return
  if now.step == 'choose':
    assignment = store.lease(project, now.task, annotator)
    store.judge(assignment, annotator, {'skip': True}, token=assignment.token)
  if dialogue.mode == 'helpful' or now.picked is None:
    accounts.close_dialogue(store.database, dialogue)
    return
  with store.database.write(project.id) as session:
    judging.check_enabled(session, annotator)
    rated = _tasks(dialogue.id).where(schema.Task.kind == 'rate')
    if session.scalar(rated.limit(1)) is None:
      options = questions.Options(overlap=1, annotator_id=annotator.id)
      prompt_id = now.picked.prompt_id
      questions.add_task(session, project, 'rate', prompt_id, [now.picked], options)


def _tasks(dialogue_id):
  query = sa.select(schema.Task).join(schema.Prompt, schema.Task.prompt_id == schema.Prompt.id)
  return query.where(schema.Prompt.dialogue_id == dialogue_id)


def _newest_prompt(dialogue_id):
  query = sa.select(schema.Prompt).where(schema.Prompt.dialogue_id == dialogue_id)
  return query.order_by(schema.Prompt.id.desc()).limit(1)

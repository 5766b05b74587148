"""Projects, prompts, completions and tasks as new rows of the feedback store."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy import orm

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import assign
from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types

MOST = {'pair': 2, 'rank': 100, 'best': 100, 'rate': 100}  # completions of a task
LEAST = {'pair': 2, 'rank': 2, 'best': 2, 'rate': 1}
ROW_KEYS = {
  'kind',
  'prompt',
  'messages',
  'completions',
  'overlap',
  'priority',
  'round',
  'gold',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a task has besides its completions; see types.Task. `overlap` None is the project's."""

  overlap: int | None = None
  priority: float = 0.0
  round: int = 0
  gold: answers.Answer | None = None
  annotator_id: int | None = None
  repeats_task_id: int | None = None


def check_text(value: Any, what: str) -> str:
  """Returns a text that every database can store.

  Raises:
    UserError: It is no text, holds a NUL character or half a surrogate pair.
  """
  if not isinstance(value, str):
    raise UserError(f'{what} must be a text, but is {value!r}')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{what} is not Unicode: it has half a surrogate pair. Remove it.') from error
  if '\0' in value:
    raise UserError(f'{what} holds a NUL character, which databases cannot store. Remove it.')
  return value


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
  """Raises UserError if a setting of a project is out of range."""
  gold, repeat = settings['gold_fraction'], settings['repeat_fraction']
  for good, problem in (
    (
      name.strip() and name.isprintable() and '#' not in name and '?' not in name,
      'its name must have printable characters, without # and ?',
    ),
    (settings['overlap'] >= 1, f'overlap={settings["overlap"]} must be at least 1'),
    (
      0 <= gold <= 1 and 0 <= repeat <= 1 and gold + repeat <= 1,
      f'gold_fraction={gold} and repeat_fraction={repeat} must be in [0, 1], and so must their sum',
    ),
    (settings['lease_seconds'] > 0, f'lease_seconds={settings["lease_seconds"]} must be positive'),
    (
      settings['selection'] in schema.SELECTIONS,
      f'selection={settings["selection"]!r} must be one of {", ".join(schema.SELECTIONS)}',
    ),
  ):
    if not good:
      raise UserError(f'project {name!r}: {problem}')


def add_project(
  database: database_lib.Database, name: str, instructions: str, settings: dict[str, Any]
) -> types.Project:
  """Adds a project, or returns the one of this name; see `Store.add_project`."""
  check_settings(name, settings)
  check_text(instructions, 'the instructions of the project')
  query = sa.select(schema.Project).where(schema.Project.name == name)
  row = schema.Project(name=name, instructions=instructions, settings=settings, created=time.time())
  try:
    with database.write() as session:
      found = session.scalar(query)
      if found is None:
        session.add(row)
  except exc.IntegrityError:  # PostgreSQL: another process added it at the same time
    with database.read() as session:
      found = session.scalar(query)
  return reading.project(found or row)


def check_messages(messages: Any) -> None:
  """Raises UserError unless a value is a list of {"role", "content"} with texts."""
  good = isinstance(messages, list) and all(
    isinstance(message, Mapping)
    and isinstance(message.get('role'), str)
    and isinstance(message.get('content'), str)
    for message in messages
  )
  if not good:
    raise UserError(
      'the prompt must be a text, or messages [{"role": ..., "content": ...}], but is '
      f'{messages!r}'
    )


def plain(messages: Sequence[Mapping[str, str]]) -> str:
  """Returns messages as one text, for pages and lists: 'role: content', a blank line between."""
  return '\n\n'.join(f'{message["role"]}: {message["content"]}' for message in messages)


def add_prompt(
  session: orm.Session,
  project_id: int,
  text: str,
  messages: list[dict[str, str]] | None = None,
  dialogue_id: int | None = None,
) -> schema.Prompt:
  """Returns the row of a prompt, the one there is or a new one."""
  check_text(text, 'the prompt')
  key = json.dumps([text, messages, dialogue_id], sort_keys=True)
  check_text(json.dumps(messages, ensure_ascii=False), 'the messages of the prompt')
  digest = hashlib.sha256(key.encode()).hexdigest()
  query = sa.select(schema.Prompt).where(
    schema.Prompt.project_id == project_id, schema.Prompt.digest == digest
  )
  row = session.scalar(query)
  if row is None:
    row = schema.Prompt(
      project_id=project_id,
      dialogue_id=dialogue_id,
      text=text,
      messages=messages,
      digest=digest,
    )
    session.add(row)
    session.flush()
  return row


def add_completion(
  session: orm.Session,
  prompt_id: int,
  text: str,
  policy: str,
  checkpoint: str | None = None,
  sampling: dict[str, Any] | None = None,
) -> schema.Completion:
  """Returns the new row of a completion."""
  row = schema.Completion(
    prompt_id=prompt_id,
    text=check_text(text, 'the completion'),
    policy=check_text(policy, 'the name of the policy'),
    checkpoint=checkpoint,
    sampling=sampling,
    created=time.time(),
  )
  session.add(row)
  session.flush()
  return row


def add_task(
  session: orm.Session,
  project: types.Project,
  kind: str,
  prompt_id: int,
  completions: Sequence[types.Completion | schema.Completion],
  options: Options,
) -> schema.Task:
  """Returns the new row of a task.

  Raises:
    UserError: The kind, the completions, the overlap or the gold answer do not fit.
  """
  ids = [completion.id for completion in completions]
  _check_task(kind, prompt_id, completions, options)
  if options.gold is not None:
    answers.check(kind, ids, options.gold)
  is_ordinary = options.gold is None and options.repeats_task_id is None
  row = schema.Task(
    project_id=project.id,
    kind=kind,
    prompt_id=prompt_id,
    completion_ids=ids,
    policies=json.dumps(sorted({c.policy for c in completions})) if is_ordinary else '',
    overlap=project.overlap if options.overlap is None else options.overlap,
    priority=options.priority,
    shuffle=assign.uniform('shuffle', project.id, ids),
    round=options.round,
    gold=options.gold,
    annotator_id=options.annotator_id,
    repeats_task_id=options.repeats_task_id,
    judged=0,
    created=time.time(),
  )
  session.add(row)
  session.flush()
  return row


def _check_task(kind, prompt_id, completions, options):
  if kind not in schema.KINDS:
    raise UserError(f'a task of kind {kind!r}: it must be one of {", ".join(schema.KINDS)}')
  if not LEAST[kind] <= len(completions) <= MOST[kind]:
    raise UserError(
      f'a task of kind {kind!r} needs {LEAST[kind]} to {MOST[kind]} completions, '
      f'but has {len(completions)}'
    )
  ids = [completion.id for completion in completions]
  if len(set(ids)) < len(ids):
    raise UserError(f'a task of kind {kind!r} has one completion twice: {ids}')
  if any(completion.prompt_id != prompt_id for completion in completions):
    raise UserError(f'the completions {ids} of a task do not all answer its prompt {prompt_id}')
  if options.overlap is not None and options.overlap < 1:
    raise UserError(f'a task with overlap {options.overlap}: it must be at least 1')


def add_row(
  session: orm.Session, project: types.Project, row: Mapping[str, Any], where: str
) -> schema.Task:
  """Returns the new task of a row; see `Store.add_tasks`.

  Raises:
    UserError: The row does not fit; the message begins with `where`.
  """
  unknown = row.keys() - ROW_KEYS
  missing = {'prompt', 'completions'} - row.keys()
  if unknown or missing:
    problem = f'has no key {min(missing)!r}' if missing else f'has an unknown key {min(unknown)!r}'
    raise UserError(f'{where} {problem}: the keys are {", ".join(sorted(ROW_KEYS))}')
  messages = row.get('messages')
  text = row['prompt']
  try:
    if isinstance(text, list):
      check_messages(text)
      text, messages = plain(text), text
    prompt = add_prompt(session, project.id, text, messages)
    completions = [
      add_completion(
        session,
        prompt.id,
        item['text'],
        item['policy'],
        item.get('checkpoint'),
        item.get('sampling'),
      )
      for item in row['completions']
    ]
    gold = row.get('gold')
    if gold is not None:
      gold = _of_positions(gold, [completion.id for completion in completions])
    options = Options(
      overlap=row.get('overlap'),
      priority=row.get('priority', 0.0),
      round=row.get('round', 0),
      gold=gold,
    )
    return add_task(session, project, row.get('kind', 'pair'), prompt.id, completions, options)
  except KeyError as error:
    raise UserError(f'{where} lacks {error}') from error
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def _of_positions(gold, ids):
  """Returns a gold answer with ids for the positions of completions."""
  try:
    return answers.renumber(gold, dict(enumerate(ids)))
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'the gold answer {gold!r} must name completions by their positions, 0 to {len(ids) - 1}'
    ) from error

"""Import of labelled comparisons and of samples from data files, and export of judgements.

Files may have every format of data.shapes. Records are read as training reads them, except that
messages stay messages instead of becoming text by a chat template.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from rlhf_jax.data import shapes
from rlhf_jax.data import sources
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import assign
from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import judging
from rlhf_jax.feedback import questions
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback import types

IMPORTED = 'imported'  # annotator and policy of records that name none
MARK, GENERATION = '\0messages\n', '{"role": "assistant", "content": "'


@dataclasses.dataclass(frozen=True)
class Imported:
  """Numbers of records that were added, and that were there before.

  Attributes:
    added: Number of new judgements.
    there: Number of records that an earlier import had added.
    left_out: {reason: places of the records of no use, such as those with an empty completion}.
  """

  added: int
  there: int
  left_out: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class _Labelled:
  """A comparison with its answer, whose ids are positions in `texts`."""

  prompt: str | list[dict[str, str]]
  texts: tuple[str, ...]
  kind: str
  answer: answers.Answer


def export(
  store: store_lib.Store,
  project: types.Project,
  path: str | os.PathLike,
  *,
  form: str = 'pairs',
  round: int | None = None,
  simulated: bool | None = None,
) -> int:
  """Writes the records of `Store.records` as JSONL, atomically, and returns their number."""
  records = store.records(project, form=form, round=round, simulated=simulated)
  sources.write(path, records)
  return len(records)


def add_comparisons(
  store: store_lib.Store,
  project: types.Project,
  path: str,
  *,
  annotator: str = IMPORTED,
  policy: str = IMPORTED,
  round: int = 0,
) -> Imported:
  """Adds the comparisons of a file with their labels, as tasks that have been judged.

  All records are added, or none. A record that is there from an earlier import is not added again.

  Args:
    store: The store.
    project: The project.
    path: File, folder or data set; see data.sources. Records may name an `annotator` and whether
      it is `simulated`.
    annotator: Name of the annotator of the other records.
    policy: Name of the policy of all completions.
    round: Round of the tasks.

  Raises:
    DataError: A record is invalid; the message names it.
  """
  records = sources.read(path)
  added, there, left_out, seen = 0, 0, {}, {}
  with store.database.write(project.id) as session:
    people = _People(session)
    for record in records:
      try:
        labelled = _labelled(shapes.present(record))
        name = str(record.fields.get('annotator', annotator))
        key = json.dumps([project.id, round, name, dataclasses.asdict(labelled)], sort_keys=True)
        seen[key] = seen.get(key, 0) + 1
        token = f'{judging.IMPORTED}{hashlib.sha256(f"{seen[key]} {key}".encode()).hexdigest()}'
        if session.scalar(sa.select(sa.exists().where(schema.Judgement.token == token))):
          there += 1
          continue
        by = people.id(name, bool(record.fields.get('simulated', False)))
        _add(
          session, project, labelled, by, policy, questions.Options(overlap=1, round=round), token
        )
        added += 1
      except shapes.Unusable as error:
        left_out.setdefault(str(error), []).append(record.where)
      except shapes.InvalidRecord as error:
        field, problem, remedy = error.args
        raise DataError(f'{record.where}: field {field!r}: {problem}. {remedy}') from error
      except UserError as error:
        raise DataError(f'{record.where}: {error}') from error
  return Imported(added, there, left_out)


def _add(session, project, labelled, annotator_id, policy, options, token):
  messages = labelled.prompt if isinstance(labelled.prompt, list) else None
  text = questions.plain(messages) if messages else labelled.prompt
  prompt = questions.add_prompt(session, project.id, text, messages)
  completions = [
    questions.add_completion(session, prompt.id, completion, policy)
    for completion in labelled.texts
  ]
  ids = [completion.id for completion in completions]
  task = questions.add_task(session, project, labelled.kind, prompt.id, completions, options)
  answer = answers.renumber(labelled.answer, dict(enumerate(ids)))
  session.add(
    schema.Judgement(
      task_id=task.id,
      annotator_id=annotator_id,
      answer=answers.check(labelled.kind, ids, answer),
      reason='',
      flags=[],
      shown=ids,
      seconds=0.0,
      created=time.time(),
      token=token,
    )
  )
  task.judged = 1
  session.flush()


class _People:
  """Finds annotators by name, and adds those that are missing."""

  def __init__(self, session: orm.Session):
    self._session = session
    self._rows: dict[str, schema.Annotator] = {}

  def id(self, name: str, simulated: bool) -> int:
    """Returns the id of an annotator."""
    name = accounts.clean(name)
    if name not in self._rows:
      self._rows[name] = self._find_or_add(accounts.new_row(name, simulated=simulated))
    row = self._rows[name]
    if row.simulated != simulated:
      kinds = ('a person', 'simulated')
      raise UserError(
        f'the annotator {name!r} is {kinds[simulated]} here, but {kinds[row.simulated]} in the '
        'store: rename one of them'
      )
    return row.id

  def _find_or_add(self, new):
    query = sa.select(schema.Annotator).where(schema.Annotator.name == new.name)
    found = self._session.scalar(query)
    if found is None:
      # Annotators belong to no project, so another import may be adding the same name.
      database_lib.lock_annotators(self._session)
      try:
        with self._session.begin_nested():
          self._session.add(new)
      except sa.exc.IntegrityError:  # that import has, or someone has just signed up with the name
        found = self._session.scalars(query).one()
    return found or new


def _labelled(fields: dict[str, Any]) -> _Labelled:
  """Returns the comparison of a record.

  Raises:
    shapes.InvalidRecord, shapes.Unusable: See shapes.to_comparison.
    UserError: No answer of an annotator says the same.
  """
  example = shapes.to_comparison(fields, _AsJson())
  prompt, texts = _decode(example.prompt, example.completions)
  ranks, margin = example.ranks, example.margin if 'margin' in fields else None
  if example.ratings is not None:
    if not set(example.ratings) <= set(answers.RATINGS):
      raise UserError(f'ratings {list(example.ratings)}: they must be whole numbers from 1 to 7')
    ratings = {str(i): int(value) for i, value in enumerate(example.ratings)}
    return _Labelled(prompt, texts, 'rate', {'rating': ratings})
  if 'completions' in fields and 'best' in fields:
    return _Labelled(prompt, texts, 'best', {'best': ranks.index(0)})
  if len(texts) == 2:
    more = {} if margin is None else answers.of_margin(margin)
    chosen = {'chosen': ranks.index(0)} | more
    return _Labelled(prompt, texts, 'pair', {'tie': True} if ranks[0] == ranks[1] else chosen)
  if margin is not None:
    raise UserError(f'a margin needs two completions, but there are {len(texts)}')
  groups = [[i for i, rank in enumerate(ranks) if rank == level] for level in sorted(set(ranks))]
  return _Labelled(prompt, texts, 'rank', {'ranking': groups})


class _AsJson:
  """A tokenizer whose chat template writes messages as lines of JSON, which `_decode` reads."""

  chat_template, eos_token = 'json', None

  def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
    """Returns one line for each message, and the start of the assistant's next one."""
    del tokenize
    lines = [json.dumps({'role': m['role'], 'content': m['content']}) + '\n' for m in messages]
    return MARK + ''.join(lines) + GENERATION * add_generation_prompt


def _decode(prompt: str, completions: Sequence[str]):
  """Returns (prompt, completions) with the messages that `_AsJson` wrote, or the plain texts."""
  if not prompt.startswith(MARK):
    return prompt, tuple(completions)
  lines = prompt.removeprefix(MARK).removesuffix(GENERATION).splitlines()
  texts = tuple(json.loads('"' + text.removesuffix('}\n')) for text in completions)
  return [json.loads(line) for line in lines], texts


# Samples.


def add_samples(
  store: store_lib.Store,
  project: types.Project,
  paths: Mapping[str, str | os.PathLike],
  *,
  kind: str = 'pair',
  completions: int = 4,
  round: int = 0,
) -> list[types.Task]:
  """Adds one task for each prompt of the samples of some policies.

  Of a prompt with more completions than a task has, those of the policies that are in the fewest
  tasks so far are taken. A prompt with too few different ones gets no task, except that 'rate' gets
  one for each.

  Args:
    store: The store.
    project: The project.
    paths: {policy: file of its samples, {"prompt", "completion"}}.
    kind: Kind of the tasks.
    completions: Number of completions of a task of kind 'rank' or 'best'.
    round: Round of the tasks.

  Raises:
    DataError: A record is invalid; the message names it.
    UserError: No prompt has enough completions.
  """
  wanted = {'pair': 2, 'rate': 1}.get(kind, completions)
  counts: dict[tuple[str, ...], int] = {}
  rows = []
  for prompt, samples in _by_prompt(paths).items():
    if kind == 'rate':
      groups = [[sample] for sample in samples]
    else:
      taken = assign.take(samples, wanted, counts)
      groups = [] if taken is None else [taken]
    rows += [
      {
        'kind': kind,
        'prompt': json.loads(prompt),
        'completions': [{'text': text, 'policy': policy} for policy, text in group],
        'round': round,
      }
      for group in groups
    ]
  if not rows:
    raise UserError(
      f'{", ".join(map(str, paths.values()))}: no prompt has {wanted} different completions, which '
      f'a task of kind {kind!r} needs'
    )
  return store.add_tasks(project, rows)


def _by_prompt(paths):
  """Returns {prompt as JSON: (policy, text) of its different completions}."""
  found: dict[str, list[tuple[str, str]]] = {}
  for policy, path in paths.items():
    for record in sources.read(os.fspath(path)):
      try:
        example = shapes.to_completion(shapes.present(record), _AsJson())
      except shapes.Unusable:
        continue
      except shapes.InvalidRecord as error:
        field, problem, remedy = error.args
        raise DataError(f'{record.where}: field {field!r}: {problem}. {remedy}') from error
      prompt, (text,) = _decode(example.prompt, [example.completion])
      samples = found.setdefault(json.dumps(prompt), [])
      if all(text != other for _, other in samples):
        samples.append((policy, text))
  return found

"""Converts all records of a source to examples; `shapes` converts one record.

An invalid record raises an error that names its place, or is left out and counted if
on_error='skip'. A valid record that is of no use, such as one with an empty completion, is always
left out and counted; see `Report`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import TypeVar

import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data import lazy
from rlhf_jax.data import progress
from rlhf_jax.data import shapes
from rlhf_jax.data.shapes import Comparison
from rlhf_jax.data.shapes import Completion
from rlhf_jax.data.shapes import Conversation
from rlhf_jax.data.shapes import Episode
from rlhf_jax.data.shapes import Prompt
from rlhf_jax.data.shapes import Tokenizer
from rlhf_jax.data.sources import Record
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

Example = TypeVar('Example')
Convert = Callable[..., tuple[Sequence[Example], 'Report']]  # such as `prompts`

# Last sentence of an error message.
SKIP_HINT = " Or set config.data.on_error='skip' to leave such records out."
EMPTY_PROMPT = 'empty prompt'

MAX_PLACES = 1000  # places that a report stores per reason
# Records of large data that are rendered with the chat template before the first batch. Rendering
# takes about 40 microseconds per message.
MAX_RENDERED = 10_000
SMALL = 2**25  # bytes; the examples of smaller data are kept in memory
# Matches the place and the problem, without details, in an error message of `sources`.
READ_ERROR = re.compile(r'(.*?:(?:row |item )?\d+): (.*?)(?: \(|[,;] |\. |\.?$)', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Report:
  """Numbers of records that were used and left out.

  Attributes:
    read: Number of records.
    left_out: {reason: places of the first MAX_PLACES records that are left out for it}.
    empty_prompts: Places of the first MAX_PLACES records that are used although their prompt is
      empty.
    more: {reason or EMPTY_PROMPT: number of records beyond MAX_PLACES}.
  """

  read: int
  left_out: dict[str, tuple[str, ...]]
  empty_prompts: tuple[str, ...] = ()
  more: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def kept(self) -> int:
    """Number of records that are used."""
    return self.read - sum(self.count(reason) for reason in self.left_out)

  def count(self, reason: str) -> int:
    """Returns the number of records with the reason, which may be EMPTY_PROMPT."""
    places = self.empty_prompts if reason == EMPTY_PROMPT else self.left_out[reason]
    return len(places) + self.more.get(reason, 0)

  def __str__(self) -> str:
    parts = [f'{self.kept} of {self.read} records kept']
    parts += [
      f'{self.count(reason)} left out: {reason} (first: {places[0]})'
      for reason, places in sorted(self.left_out.items())
    ]
    if self.empty_prompts:
      parts.append(
        f'{self.count(EMPTY_PROMPT)} kept with an empty prompt (first: {self.empty_prompts[0]})'
      )
    return '; '.join(parts)


def texts(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[str | Completion], Report]:
  """Converts records to texts, or to prompts with completions if they have no `text`.

  Arguments, result and errors as for `completions`.
  """
  return _convert(records, shapes.to_text, tokenizer, on_error)


def completions(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Completion], Report]:
  """Converts records to prompts and responses to imitate.

  Args:
    records: Records, as `sources.read` returns them.
    tokenizer: The model's tokenizer, for its chat template; None if there is no model yet.
    on_error: 'stop' raises an error for an invalid record, 'skip' leaves it out.

  Returns:
    (examples in the order of the records, Report of the records that are left out).

  Raises:
    DataError: A record is invalid and on_error='stop'. The message contains the place, the field,
      the problem and the remedy.
    UserError: No record can be used, or the data needs a chat template and there is none.
  """
  return _convert(records, shapes.to_completion, tokenizer, on_error)


def conversations(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Conversation], Report]:
  """Converts records to conversations. Arguments, result and errors as for `completions`."""
  return _convert(records, shapes.to_conversation, tokenizer, on_error)


def comparisons(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Comparison], Report]:
  """Converts records to comparisons. Arguments, result and errors as for `completions`."""
  return _convert(records, shapes.to_comparison, tokenizer, on_error)


def episodes(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Episode], Report]:
  """Converts records to episodes with rewards. Arguments, result and errors as `completions`."""
  return _convert(records, shapes.to_episode, tokenizer, on_error)


def unrewarded_episodes(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Episode], Report]:
  """Converts records to episodes that a scorer will reward; see `episodes`."""
  convert = functools.partial(shapes.to_episode, rewarded=False)
  return _convert(records, convert, tokenizer, on_error)


def prompts(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Prompt], Report]:
  """Converts records to prompts. Arguments, result and errors as for `completions`.

  All fields except the prompt become metadata. If the messages end with an answer of the assistant,
  the answer becomes metadata['completion']; in the fields `prompt` and `conversations`, only if the
  record has no other completion.
  """
  return _convert(records, shapes.to_prompt, tokenizer, on_error)


def in_context(convert: Convert, context: str) -> Convert:
  """Returns a function like `prompts` or `completions` whose prompts follow a context.

  Args:
    convert: `prompts` or `completions`.
    context: Text. See `shapes.in_context` for what it becomes.
  """
  to_example = shapes.to_prompt if convert is prompts else shapes.to_completion
  in_context = shapes.in_context(to_example, context)
  return lambda records, *, tokenizer=None, on_error='stop': _convert(
    records, in_context, tokenizer, on_error
  )


def _convert(
  records: Sequence[Record],
  convert: Callable[[shapes.Fields, Tokenizer | None], Example],
  tokenizer: Tokenizer | None,
  on_error: str,
) -> tuple[Sequence[Example], Report]:
  """Converts records with `convert`: at once if the data is small, else on each access.

  All records are checked here in either case.
  """
  if on_error not in ('stop', 'skip'):
    raise UserError(f"config.data.on_error is {on_error!r}; it must be 'stop' or 'skip'.")
  few = (getattr(records, 'size', None) or 0) <= SMALL
  cheap = tokenizer if few or tokenizer is None else _PlainTemplate(tokenizer)
  examples, kept, tally = [], np.zeros(len(records), bool), _Tally()
  for index in progress.bar(range(len(records)), 'reading records', 'records'):
    try:
      record = records[index]
    except DataError as error:
      if on_error == 'stop':
        raise DataError(f'{error}{SKIP_HINT}') from error
      place, problem = READ_ERROR.match(str(error)).groups()
      tally.add(problem, place)
      continue
    try:
      example = _example(record, convert, tokenizer if index < MAX_RENDERED else cheap)
    except shapes.Unusable as error:
      tally.add(str(error), record.where)
    except shapes.InvalidRecord as error:
      if on_error == 'stop':
        raise _data_error(record, error) from error
      field, problem, _ = error.args
      tally.add(f'{field}: {problem}', record.where)
    else:
      kept[index] = True
      examples += [example] * few
      if convert is not shapes.to_text and shapes.has_blank_prompt(shapes.present(record), example):
        tally.add(EMPTY_PROMPT, record.where)
  empty_prompts = tally.places.pop(EMPTY_PROMPT, ())
  report = Report(
    len(records),
    {reason: tuple(places) for reason, places in tally.places.items()},
    tuple(empty_prompts),
    tally.more,
  )
  if not kept.any():
    raise UserError(f'no record of the data can be used: {report}')
  if few:
    return examples, report
  make = functools.partial(_convert_again, convert=convert, tokenizer=tokenizer)
  return lazy.Examples(records, kept, make, skip=on_error == 'skip'), report


def _data_error(record: Record, error: shapes.InvalidRecord) -> DataError:
  field, problem, remedy = error.args
  no_header = record.untyped and not shapes.FIELD_NAMES & record.fields.keys()
  if no_header and isinstance(error, shapes.MissingField):
    remedy = f'The first row of the file must name the columns. {remedy}'
  return DataError(f'{record.where}: field {field!r}: {problem}. {remedy}{SKIP_HINT}')


def _convert_again(
  record: Record,
  *,
  convert: Callable[[shapes.Fields, Tokenizer | None], Example],
  tokenizer: Tokenizer | None,
) -> Example:
  """Converts a record that was checked before.

  Raises:
    DataError: The record has changed, or the chat template rejects it.
  """
  try:
    return _example(record, convert, tokenizer)
  except shapes.Unusable as error:
    raise DataError(
      f'{record.where}: {error}, although it was valid when the data was checked. '
      'Start the run again.'
    ) from error
  except shapes.InvalidRecord as error:
    raise _data_error(record, error) from error


class _PlainTemplate:
  """A tokenizer with a chat template that takes no time, to check large data quickly."""

  eos_token = None

  def __init__(self, tokenizer: Tokenizer):
    self.chat_template = tokenizer.chat_template

  def apply_chat_template(
    self, messages: chat.Messages, *, tokenize: bool, add_generation_prompt: bool
  ) -> str:
    """Returns the roles and contents of the messages, one per line."""
    del tokenize
    turns = ''.join(f'{m["role"]}:{m["content"]}\n' for m in messages)
    return turns + 'assistant:' * add_generation_prompt


class _Tally:
  """Collects the places of refused records by reason: the first MAX_PLACES, and how many more."""

  def __init__(self):
    self.places: dict[str, list[str]] = {}
    self.more: dict[str, int] = {}

  def add(self, reason: str, place: str) -> None:
    places = self.places.setdefault(reason, [])
    if len(places) < MAX_PLACES:
      places.append(place)
    else:
      self.more[reason] = self.more.get(reason, 0) + 1


def _example(
  record: Record,
  convert: Callable[[shapes.Fields, Tokenizer | None], Example],
  tokenizer: Tokenizer | None,
) -> Example:
  return convert(shapes.present(record), tokenizer)

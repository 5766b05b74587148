"""Records to examples, many at a time; `shapes` says what a record means.

A record that cannot be understood stops the reading with its place, or is counted and left out
with on_error='skip'. A record that is understood but of no use (see `Report`) is left out and
counted in either case.
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
from rlhf_jax.data.shapes import Prompt
from rlhf_jax.data.shapes import Tokenizer
from rlhf_jax.data.sources import Record
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

Example = TypeVar('Example')

# The end of an error's message.
SKIP = " Or set config.data.on_error='skip' to leave such records out."
EMPTY_PROMPT = 'empty prompt'

PLACES = 1000  # of one reason that a report names
# Records that are rendered with the chat template before the first batch: of large data no more, as
# it takes some 40 microseconds a message.
RENDERED = 10_000
SMALL = 2**25  # bytes of records whose examples are kept in memory
# An error of `sources`: the place, and what is wrong without its particulars.
UNREADABLE = re.compile(r'(.*?:(?:row |item )?\d+): (.*?)(?: \(|[,;] |\. |\.?$)', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the records.

  Attributes:
    read: number of records.
    left_out: reason to the places of the records left out for it, the first PLACES of them.
    empty_prompts: places of the records kept though they ask nothing, the first PLACES of them.
    more: reason (or EMPTY_PROMPT) to the number of further places.
  """

  read: int
  left_out: dict[str, tuple[str, ...]]
  empty_prompts: tuple[str, ...] = ()
  more: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def kept(self) -> int:
    return self.read - sum(self.count(reason) for reason in self.left_out)

  def count(self, reason: str) -> int:
    """Number of records that the reason (or EMPTY_PROMPT) is true of."""
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
  """Texts to model as a whole: `text`, or else prompt and completion. See `completions`."""
  return _convert(records, shapes.text_of, tokenizer, on_error)


def completions(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Completion], Report]:
  """Prompts and responses to imitate.

  Args:
    records: as `sources.read` gives them.
    tokenizer: the model's, for its chat template; None only where there is no model yet.
    on_error: 'stop' or 'skip', for records that cannot be understood.

  Returns:
    (examples in the records' order, what was left out).

  Raises:
    DataError: with on_error='stop'; says place, field, what was expected and what to do.
    UserError: nothing is left, or a chat template is needed and missing.
  """
  return _convert(records, shapes.completion_of, tokenizer, on_error)


def comparisons(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Comparison], Report]:
  """Judged responses. Arguments, result and errors as for `completions`."""
  return _convert(records, shapes.comparison_of, tokenizer, on_error)


def prompts(
  records: Sequence[Record], *, tokenizer: Tokenizer | None = None, on_error: str = 'stop'
) -> tuple[Sequence[Prompt], Report]:
  """Prompts to respond to. Arguments, result and errors as for `completions`.

  All fields but the prompt's own become metadata. Messages that end with the assistant's are
  taken as a prompt with that answer, which metadata['completion'] then holds; in `prompt` and
  `conversations` only where the record has no other completion.
  """
  return _convert(records, shapes.prompt_of, tokenizer, on_error)


def _convert(
  records: Sequence[Record],
  one: Callable[[shapes.Fields, Tokenizer | None], Example],
  tokenizer: Tokenizer | None,
  on_error: str,
) -> tuple[Sequence[Example], Report]:
  """All examples where the records are few or in memory, else they are made again at each use."""
  if on_error not in ('stop', 'skip'):
    raise UserError(f"config.data.on_error is {on_error!r}; it must be 'stop' or 'skip'.")
  few = (getattr(records, 'size', None) or 0) <= SMALL
  outline = tokenizer if few or tokenizer is None else _Outline(tokenizer)
  examples, kept, tally = [], np.zeros(len(records), bool), _Tally()
  for index in progress.bar(range(len(records)), 'reading records', 'records'):
    try:
      record = records[index]
    except DataError as error:
      if on_error == 'stop':
        raise DataError(f'{error}{SKIP}') from error
      place, problem = UNREADABLE.match(str(error)).groups()
      tally.add(problem, place)
      continue
    try:
      example = _example(record, one, tokenizer if index < RENDERED else outline)
    except shapes.Useless as error:
      tally.add(str(error), record.where)
    except shapes.Fault as error:
      if on_error == 'stop':
        raise _complaint(record, error) from error
      field, problem, _ = error.args
      tally.add(f'{field}: {problem}', record.where)
    else:
      kept[index] = True
      examples += [example] * few
      if one is not shapes.text_of and shapes.asks_nothing(shapes.present(record), example):
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
  make = functools.partial(_drawn, one=one, tokenizer=tokenizer)
  return lazy.Examples(records, kept, make, skip=on_error == 'skip'), report


def _complaint(record: Record, fault: shapes.Fault) -> DataError:
  field, problem, remedy = fault.args
  unnamed = record.untyped and not shapes.NAMES & record.fields.keys()
  if unnamed and isinstance(fault, shapes.Missing):
    remedy = f'The first row of the file must name the columns. {remedy}'
  return DataError(f'{record.where}: field {field!r}: {problem}. {remedy}{SKIP}')


def _drawn(
  record: Record,
  *,
  one: Callable[[shapes.Fields, Tokenizer | None], Example],
  tokenizer: Tokenizer | None,
) -> Example:
  """An example again; raises DataError where the record has changed, or the template rejects it."""
  try:
    return _example(record, one, tokenizer)
  except shapes.Useless as error:
    raise DataError(
      f'{record.where}: {error}, and it was not when the data were checked. Start anew.'
    ) from error
  except shapes.Fault as error:
    raise _complaint(record, error) from error


class _Outline:
  """A tokenizer whose chat template takes no time, to check large data with before they are drawn."""

  eos_token = None

  def __init__(self, tokenizer: Tokenizer):
    self.chat_template = tokenizer.chat_template

  def apply_chat_template(
    self, messages: chat.Messages, *, tokenize: bool, add_generation_prompt: bool
  ) -> str:
    """The roles and texts."""
    del tokenize
    turns = ''.join(f'{m["role"]}:{m["content"]}\n' for m in messages)
    return turns + 'assistant:' * add_generation_prompt


class _Tally:
  """Places by reason, the first PLACES of each; of the others their number."""

  def __init__(self):
    self.places: dict[str, list[str]] = {}
    self.more: dict[str, int] = {}

  def add(self, reason: str, place: str) -> None:
    places = self.places.setdefault(reason, [])
    if len(places) < PLACES:
      places.append(place)
    else:
      self.more[reason] = self.more.get(reason, 0) + 1


def _example(
  record: Record,
  one: Callable[[shapes.Fields, Tokenizer | None], Example],
  tokenizer: Tokenizer | None,
) -> Example:
  return one(shapes.present(record), tokenizer)

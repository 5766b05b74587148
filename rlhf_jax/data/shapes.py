"""One record to an example: the shapes that preference and instruction data come in.

Whole texts, for `texts` and `prompts`:
  text

Completions, for `completions`, `texts` and `prompts`:
  prompt, completion
  messages                            the last one the assistant's
  instruction, input, output          Alpaca; input is optional; output counts where the record is
                                      a comparison too

Comparisons, for `comparisons`, and for `completions` and `texts` by their best completion:
  prompt, chosen, rejected
  chosen, rejected                    whole dialogues (Anthropic HH), as strings or messages
  prompt, completions                 from best to worst
  prompt, completions, ranks          smaller is better, equal is a tie
  prompt, completions, ratings        larger is better
  prompt, completions, best           the index of the best one, the rest tie
  a completion with rating or label   one number, or true or false

Prompts, for `prompts`: any of the above that has a prompt, or text alone; all other fields are
metadata.

Prompts, completions, chosen and rejected may each be a string or messages; see `chat`. In place of
`prompt` a record may have `messages`, `conversations`, or `instruction` and `input`. Any comparison
may have a `margin`. `texts` and `completions` take the best completion of a comparison.

A record has one prompt, whatever reads it; its fields and the tokenizer decide which:
  - Of several fields `messages` is the prompt; else `instruction` with an `output`; else `prompt`,
    `conversations`, `instruction`; else what whole dialogues have before the answer; else `text`.
    An assistant's message at the end of `messages` is the answer, not prompt; so it is in `prompt`
    and `conversations` of a record without other completions.
  - Where the prompt or a completion is messages, all of the record is: a prompt that is a string is
    the user's message, a completion that is one the assistant's. Strings alone stay as they are.
  - A completion of several messages that begins with the prompt, or with the user or the system, is
    the whole conversation, and what it has before the answer is the prompt. Other messages follow
    the prompt, and all but the last become part of it.
  - Completions that answer different prompts make the record useless.
  - `instruction` and `input` are a user's message where the tokenizer has a chat template, else a
    text with headings. All other messages without a template are an error.
In CSV, numbers, true and false, and lists are written as in JSON; all other fields are texts.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import numpy as np
import transformers

from rlhf_jax.data import chat
from rlhf_jax.data.sources import Record

Tokenizer = transformers.PreTrainedTokenizerFast
Fields = dict[str, Any]

# Characters of a field's name in messages: where the names are missing these are texts.
LONGEST_NAME = 60
HH_TURN = '\n\nAssistant:'

# Fields that are not always texts: what JSON has there, and CSV writes.
SCALARS = ('margin', 'rating', 'label', 'best')
LISTS = ('ranks', 'ratings', 'completions', 'messages', 'conversations')

# All fields that mean something.
NAMES = {
  'text',
  'prompt',
  'completion',
  'instruction',
  'input',
  'output',
  'chosen',
  'rejected',
  *SCALARS,
  *LISTS,
}

DIFFERENT_PROMPTS = 'chosen and rejected answer different prompts'
SAME_COMPLETIONS = 'all completions are the same'
EMPTY_COMPLETION = 'empty completion'
LABELLED_BAD = 'completion labelled false'
NO_ANSWER = "the last message must be the assistant's"

LARGEST = float(np.finfo(np.float32).max)  # number: they become float32


@dataclasses.dataclass(frozen=True)
class Completion:
  """A prompt and the response to imitate."""

  prompt: str
  completion: str


@dataclasses.dataclass(frozen=True)
class Comparison:
  """K responses to one prompt, judged.

  Attributes:
    prompt: what all of them answer.
    completions: K texts.
    ranks: K integers, 0 is best, equal ranks are a tie.
    ratings: K absolute scores, or None if the data has none.
    margin: by how much the better should win, 0 if the data does not say.
  """

  prompt: str
  completions: tuple[str, ...]
  ranks: tuple[int, ...]
  ratings: tuple[float, ...] | None = None
  margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What a response is sampled for.

  Attributes:
    prompt: the text.
    metadata: all other fields of the record, for reward functions.
  """

  prompt: str
  metadata: Fields


class Fault(Exception):
  """The record cannot be understood: args are the field, what is wrong and a remedy."""


class Missing(Fault):
  """The record lacks a field."""


class Useless(Exception):
  """The record is understood and left out; the argument is the reason."""


def present(record: Record) -> Fields:
  """The fields that are not null, as columns of tables are where a row lacks them, with their types."""
  fields = {name: value for name, value in record.fields.items() if value is not None}
  return _typed(fields) if record.untyped else fields


def _typed(fields: Fields) -> Fields:
  """The fields of a CSV row, all strings, with JSON's values where these are meant."""
  typed = dict(fields)
  for names, kinds in ((SCALARS, (bool, int, float)), (LISTS, (list,))):
    for name in fields.keys() & set(names):
      text = fields[name]
      try:
        value = json.loads(text.lower() if text.lower() in ('true', 'false') else text)
      except (ValueError, RecursionError):
        continue  # A text; whatever needs more of this field says so.
      if isinstance(value, kinds):
        typed[name] = value
  return typed


def asks_nothing(fields: Fields, example: Any) -> bool:
  """Whether the prompt is blank, or what a template is put around: its last message."""
  source = _source(fields)
  asked = example.prompt if source is None else fields[source]
  if isinstance(asked, str):
    return not example.prompt.strip() or not (asked.strip() or fields.get('input'))
  try:
    asked = [message for message in chat.parse(asked) if message['role'] != 'assistant']
  except chat.Malformed:  # No messages: the prompt came from another field.
    return not example.prompt.strip()
  return bool(asked) and not asked[-1]['content'].strip()


# One record.


def text_of(fields: Fields, tokenizer: Tokenizer | None) -> str | Completion:
  """A whole text, or else prompt and completion. Arguments and errors as for `completion_of`."""
  if 'text' in fields:
    return _string(fields, 'text')
  return completion_of(fields, tokenizer)


def completion_of(fields: Fields, tokenizer: Tokenizer | None) -> Completion:
  """A prompt and the response to imitate.

  Args:
    fields: as `present` gives them.
    tokenizer: for its chat template.

  Raises:
    Fault: the record cannot be understood.
    Useless: it is understood and has nothing to imitate.
  """
  if fields.get('label') is False:
    raise Useless(LABELLED_BAD)
  if not _alpaca(fields) and ('chosen' in fields or 'completions' in fields):
    example = _comparison(fields, tokenizer)
    return Completion(example.prompt, example.completions[example.ranks.index(0)])
  return Completion(*_prompt_and_completion(fields, tokenizer))


def _prompt_and_completion(fields: Fields, tokenizer: Tokenizer | None) -> tuple[str, str]:
  asked = _asked(fields, tokenizer)
  if asked.answer is not None:
    return _render(asked.prompt, asked.answer, asked.field, tokenizer)
  if asked.field == 'messages':
    raise Fault('messages', NO_ANSWER, 'Add the answer.')
  if asked.field == 'instruction':
    return _completed(asked, _string(fields, 'output'), 'output', tokenizer)
  if 'completion' not in fields:
    raise _missing(fields, 'completion')
  return _completed(asked, fields['completion'], 'completion', tokenizer)


def comparison_of(fields: Fields, tokenizer: Tokenizer | None) -> Comparison:
  """Judged responses. Arguments and errors as for `completion_of`."""
  example = _comparison(fields, tokenizer)
  if example.ratings is None and len(set(example.completions)) == 1:
    raise Useless(SAME_COMPLETIONS)
  return example


def _comparison(fields: Fields, tokenizer: Tokenizer | None) -> Comparison:
  margin = _number(fields['margin'], 'margin') if 'margin' in fields else 0.0
  if 'chosen' in fields or 'rejected' in fields:
    prompt, *completions = _pair(fields, tokenizer)
    return Comparison(prompt, tuple(completions), (0, 1), margin=margin)
  if 'completions' in fields:
    return _list(fields, tokenizer, margin)
  score = 'rating' if 'rating' in fields else 'label'
  if score not in fields:
    raise _missing(fields, 'chosen')
  prompt, completion = _prompt_and_completion(fields, tokenizer)
  value = fields[score]
  rating = float(value) if isinstance(value, bool) else _number(value, score)
  return Comparison(prompt, (completion,), (0,), (rating,), margin)


def prompt_of(fields: Fields, tokenizer: Tokenizer | None) -> Prompt:
  """A prompt to respond to. Arguments and errors as for `completion_of`."""
  if 'text' in fields and _source(fields) is None:
    asked = _Asked('text', _string(fields, 'text'))
  else:
    asked = _asked(fields, tokenizer)
  rest = dict(fields)
  if asked.field != 'chosen':
    del rest[asked.field]
  if asked.field == 'instruction':
    rest.pop('input', None)
  if asked.answer is not None:
    rest['completion'] = asked.answer['content']
  if isinstance(asked.prompt, str):
    return Prompt(asked.prompt, rest)
  return Prompt(_render(asked.prompt, None, asked.field, tokenizer)[0], rest)


# The prompt of a record.


@dataclasses.dataclass(frozen=True)
class _Asked:
  """What all completions of a record answer.

  Attributes:
    field: where it stands; 'chosen' for whole dialogues.
    prompt: a text, or the messages that the chat template makes one of.
    answer: the assistant's message that follows these in the field, or None.
  """

  field: str
  prompt: str | chat.Messages
  answer: dict[str, str] | None = None


def _asked(fields: Fields, tokenizer: Tokenizer | None) -> _Asked:
  """What a record asks. Fields and tokenizer decide it, never the stage that reads the record.

  Where any completion is messages, all of the record is, and a string is the user's or the
  assistant's message. Where a completion repeats the conversation, that is the prompt.
  """
  asked = _question(fields, tokenizer)
  completions = [messages for messages in map(_if_messages, _completions(fields)) if messages]
  if not completions:
    return asked
  before = asked.prompt
  if isinstance(before, str):
    before = [{'role': 'user', 'content': before}]
  prompts = [_whole(before, messages)[:-1] for messages in completions]
  if any(prompt != prompts[0] for prompt in prompts):
    raise Useless(DIFFERENT_PROMPTS)
  return dataclasses.replace(asked, prompt=prompts[0])


def _source(fields: Fields) -> str | None:
  """The field that a record's prompt is in, 'chosen' for whole dialogues; or None."""
  if _alpaca(fields) and 'messages' not in fields:
    return 'instruction'
  names = ('messages', 'prompt', 'conversations', 'instruction')
  dialogues = 'chosen' if 'chosen' in fields and 'rejected' in fields else None
  return next((name for name in names if name in fields), dialogues)


def _alpaca(fields: Fields) -> bool:
  return 'instruction' in fields and 'output' in fields


def _question(fields: Fields, tokenizer: Tokenizer | None) -> _Asked:
  """What the field of the prompt says, whatever the completions are."""
  name = _source(fields)
  if name is None:
    raise _missing(fields, 'prompt')
  if name == 'instruction':
    return _Asked(name, _instruction(fields, tokenizer))
  if name == 'chosen':
    return _Asked(name, _before_dialogues(fields))
  if name != 'messages' and isinstance(fields[name], str):
    return _Asked(name, fields[name])
  messages = _parse(fields[name], name)
  answered = messages[-1]['role'] == 'assistant'
  if answered and (name == 'messages' or not _completions(fields)):
    return _Asked(name, messages[:-1], messages[-1])
  return _Asked(name, messages)


def _instruction(fields: Fields, tokenizer: Tokenizer | None) -> str | chat.Messages:
  """Instruction and optional input, as a conversation if there is a template for one.

  Otherwise with the headings of https://github.com/tatsu-lab/stanford_alpaca, without its preamble.
  """
  instruction = _string(fields, 'instruction')
  context = _string(fields, 'input') if fields.get('input') else ''
  if tokenizer is not None and tokenizer.chat_template:
    question = f'{instruction}\n\n{context}' if context else instruction
    return [{'role': 'user', 'content': question}]
  context = f'### Input:\n{context}\n\n' if context else ''
  return f'### Instruction:\n{instruction}\n\n{context}### Response:\n'


def _before_dialogues(fields: Fields) -> str | chat.Messages:
  """What stands before two whole dialogues: their common prompt as HH texts, else no message."""
  if all(isinstance(fields[name], str) for name in ('chosen', 'rejected')):
    (prompt, _), (other, _) = (_cut(fields, name) for name in ('chosen', 'rejected'))
    if prompt != other:
      raise Useless(DIFFERENT_PROMPTS)
    return prompt
  for name in ('chosen', 'rejected'):
    _parse(fields[name], name)
  return []


def _cut(fields: Fields, name: str) -> tuple[str, str]:
  """An HH dialogue, cut after the last place where the assistant begins to speak."""
  text = _string(fields, name)
  prompt, turn, reply = text.rpartition(HH_TURN)
  if not turn:
    raise Fault(
      name,
      f'without a prompt field, a whole dialogue with {HH_TURN!r} was expected',
      'Add a prompt field.',
    )
  return prompt + turn, reply


def _completions(fields: Fields) -> list[Any]:
  """The completions of a record as they stand, but for Alpaca's, always a string."""
  if 'chosen' in fields and 'rejected' in fields:
    return [fields['chosen'], fields['rejected']]
  if isinstance(fields.get('completions'), list):
    return fields['completions']
  return [fields['completion']] if 'completion' in fields and 'messages' not in fields else []


def _if_messages(completion: Any) -> chat.Messages | None:
  """A completion that is messages, the last one the assistant's; None for anything else."""
  try:
    messages = chat.parse(completion)
  except chat.Malformed:  # A text; or nothing, which whoever needs this completion says.
    return None
  return messages if messages[-1]['role'] == 'assistant' else None


def _whole(before: chat.Messages, completion: chat.Messages) -> chat.Messages:
  """The conversation up to the end of a completion, which may repeat it as a whole."""
  opens = completion[0]['role'] not in ('assistant', 'tool')
  repeats = len(completion) > 1 and (opens or completion[: len(before)] == before)
  return completion if repeats else before + completion


# Completions.


def _completed(
  asked: _Asked, completion: Any, field: str, tokenizer: Tokenizer | None
) -> tuple[str, str]:
  """Prompt and a completion as texts."""
  if not isinstance(completion, str):
    return _render(asked.prompt, _parse(completion, field)[-1], field, tokenizer)
  if isinstance(asked.prompt, str):
    return asked.prompt, _not_empty(completion)
  return _render(asked.prompt, {'role': 'assistant', 'content': completion}, field, tokenizer)


def _pair(fields: Fields, tokenizer: Tokenizer | None) -> tuple[str, str, str]:
  """Prompt, chosen, rejected."""
  names = 'chosen', 'rejected'
  for name in names:
    if name not in fields:
      raise _missing(fields, name)
  asked = _asked(fields, tokenizer)
  given = [fields[name] for name in names]
  if asked.field == 'chosen' and isinstance(asked.prompt, str):
    given = [_cut(fields, name)[1] for name in names]
  (prompt, chosen), (_, rejected) = (
    _completed(asked, value, name, tokenizer) for value, name in zip(given, names)
  )
  return prompt, chosen, rejected


def _list(fields: Fields, tokenizer: Tokenizer | None, margin: float) -> Comparison:
  """Several completions with a verdict."""
  asked = _asked(fields, tokenizer)
  values = fields['completions']
  if not isinstance(values, list) or not values:
    raise Fault('completions', 'a list of completions was expected', 'Give at least one.')
  pairs = [_completed(asked, value, 'completions', tokenizer) for value in values]
  ratings = None
  if 'ratings' in fields:
    ratings = tuple(_numbers(fields, 'ratings', len(values)))
    ranks = _dense([-rating for rating in ratings])
  elif 'ranks' in fields:
    ranks = _dense(_numbers(fields, 'ranks', len(values)))
  elif 'best' in fields:
    best = fields['best']
    if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(values):
      raise Fault('best', 'the index of one of the completions was expected', 'Count from 0.')
    ranks = [int(index != best) for index in range(len(values))]
  else:
    ranks = range(len(values))
  if ratings is None and len(values) < 2:
    raise Fault(
      'completions',
      'at least two completions were expected where none is rated',
      'Add a completion or ratings.',
    )
  return Comparison(pairs[0][0], tuple(text for _, text in pairs), tuple(ranks), ratings, margin)


def _dense(values: Sequence[float]) -> list[int]:
  """Ranks 0, 1, 2, ... of the values, smallest first, equal for equal ones."""
  order = {value: rank for rank, value in enumerate(sorted(set(values)))}
  return [order[value] for value in values]


# Messages.


def _parse(value: Any, field: str) -> chat.Messages:
  try:
    return chat.parse(value)
  except chat.Malformed as error:
    raise Fault(field, str(error), 'Correct it.') from error


def _render(
  prompt: chat.Messages, answer: dict[str, str] | None, field: str, tokenizer: Tokenizer | None
) -> tuple[str, str]:
  if answer is not None and answer['role'] != 'assistant':
    raise Fault(field, NO_ANSWER, 'Add the answer.')
  if not prompt:
    raise Fault(field, 'there is no message before the answer', 'Add the question.')
  if answer is not None and not answer['content'].strip():
    raise Useless(EMPTY_COMPLETION)
  try:
    return chat.render(tokenizer, prompt, answer)
  except chat.Malformed as error:
    raise Fault(field, str(error), 'Correct the messages or the template.') from error


# Values.


def _missing(fields: Fields, name: str) -> Missing:
  names = [
    other if len(other) <= LONGEST_NAME else f'{other[: LONGEST_NAME - 3]}...'
    for other in sorted(fields)
  ]
  return Missing(
    name,
    f'missing among {names}',
    'Name the columns in config.data.columns if yours are called otherwise.',
  )


def _string(fields: Fields, name: str) -> str:
  if name not in fields:
    raise _missing(fields, name)
  if not isinstance(fields[name], str):
    raise Fault(name, f'a string was expected, not a {type(fields[name]).__name__}', 'Correct it.')
  return fields[name]


def _not_empty(completion: str) -> str:
  if not completion.strip():
    raise Useless(EMPTY_COMPLETION)
  return completion


def _number(value: Any, field: str) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
    raise Fault(field, 'a finite number was expected', f'It must lie within {LARGEST:.3g} of 0.')
  return float(value)


def _numbers(fields: Fields, name: str, count: int) -> list[float]:
  values = fields[name]
  if not isinstance(values, list) or len(values) != count:
    raise Fault(name, 'a list with one number for each completion was expected', 'Correct it.')
  return [_number(value, name) for value in values]

"""Converts one record to an example, for all common formats of preference and instruction data.

The functions of `formats` accept these records:

Texts, for `texts` and `prompts`:
  text

Completions, for `completions`, `conversations`, `texts` and `prompts`:
  prompt, completion
  messages                            the last message is the assistant's
  instruction, input, output          Alpaca; input is optional; `completions` and `texts` use
                                      output even if the record is also a comparison

Comparisons, for `comparisons`; `completions`, `conversations` and `texts` use the best completion:
  prompt, chosen, rejected
  chosen, rejected                    full dialogues (Anthropic HH), as strings or messages
  prompt, completions                 ordered from best to worst
  prompt, completions, ranks          smaller is better, equal ranks are ties
  prompt, completions, ratings        larger is better
  prompt, completions, best           index of the best completion, the others are tied
  a completion with rating or label   one number, or true or false

Episodes, for `episodes`; the reward is a number for the whole episode:
  a completion with reward            or a list with one number per token of the completion
  messages, reward                    or a list with one number per turn of the assistant

Prompts, for `prompts`: any of the above that has a prompt, or text alone. All other fields become
metadata.

Prompts, completions, chosen and rejected may each be a string or messages; see `chat`. Instead
of `prompt`, a record may have `messages`, `conversations`, or `instruction` and `input`. Any
comparison may have a `margin`.

A record has the same prompt for every function that reads it. Its fields and the tokenizer
determine the prompt:
  - The first of these that the record has holds the prompt: `messages`; `instruction`, if there is
    an `output`; `prompt`; `conversations`; `instruction`; the part of full dialogues before the
    answer; `text`.
  - If `messages` ends with an assistant's message, this message is the answer and not part of the
    prompt. The same holds for `prompt` and `conversations` if the record has no other completion.
  - If the prompt or a completion consists of messages, strings become messages too: the prompt the
    user's, a completion the assistant's. If all are strings, they are used unchanged.
  - A completion of several messages is the full conversation if it repeats the prompt or starts
    with a message of the user or system; the prompt is then everything before its last message.
    Otherwise the messages continue the prompt, and all but the last one become part of it.
  - A record whose completions answer different prompts is left out.
  - `instruction` and `input` become a user's message if the tokenizer has a chat template, else a
    text with headings. Any other messages require a chat template.
In CSV files, numbers, true and false, and lists are written as in JSON; all other fields are
strings.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
from typing import Any, TypeVar

import numpy as np
import transformers

from rlhf_jax.data import chat
from rlhf_jax.data.sources import Record

Tokenizer = transformers.PreTrainedTokenizerFast
Fields = dict[str, Any]
Example = TypeVar('Example')

# Characters of a field name that a message quotes. If a file has no header, the names are texts.
MAX_NAME_LENGTH = 60
HH_TURN = '\n\nAssistant:'

# Fields that may hold JSON values other than strings. In CSV files they are parsed as JSON.
SCALARS = ('margin', 'rating', 'label', 'best', 'reward')
LISTS = ('ranks', 'ratings', 'completions', 'messages', 'conversations', 'reward')

# All fields that are interpreted.
FIELD_NAMES = {
  'annotator',
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

# Fields of an episode that are not metadata.
EPISODE_FIELDS = {'prompt', 'completion', 'messages', 'conversations', 'reward'}

DIFFERENT_PROMPTS = 'chosen and rejected answer different prompts'
SAME_COMPLETIONS = 'all completions are the same'
EMPTY_COMPLETION = 'empty completion'
LABELLED_FALSE = 'completion labelled false'
NO_ANSWER = "the last message must be the assistant's"

MAX_NUMBER = float(np.finfo(np.float32).max)  # numbers are converted to float32


@dataclasses.dataclass(frozen=True)
class Completion:
  """A prompt and the response to imitate."""

  prompt: str
  completion: str


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A conversation all of whose answers are to be imitated.

  Attributes:
    parts: An even number of texts: a prompt and its answer, the text up to the next answer and that
      answer, and so on.
  """

  parts: tuple[str, ...]

  @property
  def prompt(self) -> str:
    """The text before the first answer."""
    return self.parts[0]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """K responses to one prompt, with their ranks.

  Attributes:
    prompt: The prompt of all completions.
    completions: K texts.
    ranks: K integers; 0 is best, equal ranks are ties.
    ratings: K absolute scores, or None if the data has none.
    margin: Difference by which the better completion should win; 0 if the data has none.
    annotator: Name or number, as text, of who made the comparison; None if the data has none.
  """

  prompt: str
  completions: tuple[str, ...]
  ranks: tuple[int, ...]
  ratings: tuple[float, ...] | None = None
  margin: float = 0.0
  annotator: str | None = None


@dataclasses.dataclass(frozen=True)
class Episode(Conversation):
  """A conversation with its rewards, for offline RL.

  Attributes:
    rewards: One number for the episode, one per answer, or one per token of the only answer; None
      if a scorer is to reward it.
    level: 'episode', 'turn' or 'token', for these cases.
    metadata: All other fields of the record, for reward functions.
  """

  rewards: tuple[float, ...] | None
  level: str
  metadata: Fields


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt to sample a response for.

  Attributes:
    prompt: The text.
    metadata: All other fields of the record, for reward functions.
  """

  prompt: str
  metadata: Fields


class InvalidRecord(Exception):
  """The record is invalid; the arguments are the field, the problem and the remedy."""


class MissingField(InvalidRecord):
  """The record lacks a field."""


class Unusable(Exception):
  """The record is valid but of no use and left out; the argument is the reason."""


def present(record: Record) -> Fields:
  """Returns the fields that are not null, and parses the values of CSV files.

  Tables store null if a row lacks a column.
  """
  fields = {name: value for name, value in record.fields.items() if value is not None}
  return _typed(fields) if record.untyped else fields


def _typed(fields: Fields) -> Fields:
  """Returns the fields of a CSV row, with the strings of SCALARS and LISTS parsed as JSON."""
  typed = dict(fields)
  for names, types in ((SCALARS, (bool, int, float)), (LISTS, (list,))):
    for name in fields.keys() & set(names):
      text = fields[name]
      try:
        value = json.loads(text.lower() if text.lower() in ('true', 'false') else text)
      except (ValueError, RecursionError):
        continue  # A string. Code that needs another type raises InvalidRecord.
      if isinstance(value, types):
        typed[name] = value
  return typed


def has_blank_prompt(fields: Fields, example: Any) -> bool:
  """Returns whether the prompt is blank before a template is applied.

  A conversation counts as blank if the last message before the answer is blank.
  """
  source = _prompt_field(fields)
  value = example.prompt if source is None else fields[source]
  if isinstance(value, str):
    return not example.prompt.strip() or not (value.strip() or fields.get('input'))
  try:
    messages = [message for message in chat.parse(value) if message['role'] != 'assistant']
  except chat.Malformed:  # The prompt came from another field.
    return not example.prompt.strip()
  return bool(messages) and not messages[-1]['content'].strip()


def to_text(fields: Fields, tokenizer: Tokenizer | None) -> str | Completion:
  """Converts a record to a text or a Completion. Arguments and errors as for `to_completion`."""
  if 'text' in fields:
    return _string(fields, 'text')
  return to_completion(fields, tokenizer)


def to_completion(fields: Fields, tokenizer: Tokenizer | None) -> Completion:
  """Converts a record to a prompt and the response to imitate.

  Args:
    fields: Fields, as `present` returns them.
    tokenizer: Tokenizer with the chat template, or None.

  Raises:
    InvalidRecord: The record is invalid.
    Unusable: The record is valid but has no response to imitate.
  """
  if fields.get('label') is False:
    raise Unusable(LABELLED_FALSE)
  if not _alpaca(fields) and ('chosen' in fields or 'completions' in fields):
    example = _comparison(fields, tokenizer)
    return Completion(example.prompt, example.completions[example.ranks.index(0)])
  return Completion(*_prompt_and_completion(fields, tokenizer))


def to_conversation(fields: Fields, tokenizer: Tokenizer | None) -> Conversation:
  """Converts a record to a conversation, with the assistant's earlier messages as answers too.

  The last answer is that of `to_completion`, and the only one if the prompt is a text. Arguments
  and errors as for `to_completion`.
  """
  last = to_completion(fields, tokenizer)
  raw = _raw_prompt(fields, tokenizer)
  if isinstance(raw.prompt, str):
    return Conversation((last.prompt, last.completion))
  try:
    parts = chat.split_answers(tokenizer, raw.prompt, last.prompt)
  except chat.Malformed as error:
    raise InvalidRecord(raw.field, str(error), 'Fix the messages or the template.') from error
  return Conversation((*parts, last.completion))


def _prompt_and_completion(fields: Fields, tokenizer: Tokenizer | None) -> tuple[str, str]:
  raw = _raw_prompt(fields, tokenizer)
  if raw.answer is not None:
    return _render(raw.prompt, raw.answer, raw.field, tokenizer)
  if raw.field == 'messages':
    raise InvalidRecord('messages', NO_ANSWER, 'Add the answer.')
  if raw.field == 'instruction':
    return _render_completion(raw, _string(fields, 'output'), 'output', tokenizer)
  if 'completion' not in fields:
    raise _missing(fields, 'completion')
  return _render_completion(raw, fields['completion'], 'completion', tokenizer)


def to_comparison(fields: Fields, tokenizer: Tokenizer | None) -> Comparison:
  """Converts a record to a Comparison. Arguments and errors as for `to_completion`."""
  example = _comparison(fields, tokenizer)
  if example.ratings is None and len(set(example.completions)) == 1:
    raise Unusable(SAME_COMPLETIONS)
  annotator = fields.get('annotator')
  return example if annotator is None else dataclasses.replace(example, annotator=str(annotator))


def _comparison(fields: Fields, tokenizer: Tokenizer | None) -> Comparison:
  margin = _number(fields['margin'], 'margin') if 'margin' in fields else 0.0
  if 'chosen' in fields or 'rejected' in fields:
    prompt, *completions = _pair_texts(fields, tokenizer)
    return Comparison(prompt, tuple(completions), (0, 1), margin=margin)
  if 'completions' in fields:
    return _ranked_list(fields, tokenizer, margin)
  score = 'rating' if 'rating' in fields else 'label'
  if score not in fields:
    raise _missing(fields, 'chosen')
  prompt, completion = _prompt_and_completion(fields, tokenizer)
  value = fields[score]
  rating = float(value) if isinstance(value, bool) else _number(value, score)
  return Comparison(prompt, (completion,), (0,), (rating,), margin)


def to_episode(fields: Fields, tokenizer: Tokenizer | None, *, rewarded: bool = True) -> Episode:
  """Converts a record to an Episode. Other arguments and errors as for `to_completion`.

  Args:
    rewarded: Whether the record must have a reward. If not, its rewards are None.
  """
  parts = to_conversation(fields, tokenizer).parts
  metadata = {name: value for name, value in fields.items() if name not in EPISODE_FIELDS}
  if not rewarded:
    return Episode(parts, None, 'episode', metadata)
  if 'reward' not in fields:
    raise _missing(fields, 'reward')
  reward = fields['reward']
  if not isinstance(reward, list):
    return Episode(parts, (_number(reward, 'reward'),), 'episode', metadata)
  rewards = tuple(_number(value, 'reward') for value in reward)
  if isinstance(_raw_prompt(fields, tokenizer).prompt, str):
    return Episode(parts, rewards, 'token', metadata)
  if len(rewards) != len(parts) // 2:
    raise InvalidRecord(
      'reward',
      f'has {len(rewards)} numbers for {len(parts) // 2} messages of the assistant',
      'List one number per message of the assistant, or write one number for the conversation.',
    )
  return Episode(parts, rewards, 'turn', metadata)


def to_prompt(fields: Fields, tokenizer: Tokenizer | None) -> Prompt:
  """Converts a record to a Prompt. Arguments and errors as for `to_completion`."""
  if 'text' in fields and _prompt_field(fields) is None:
    raw = _RawPrompt('text', _string(fields, 'text'))
  else:
    raw = _raw_prompt(fields, tokenizer)
  metadata = dict(fields)
  if raw.field != 'chosen':
    del metadata[raw.field]
  if raw.field == 'instruction':
    metadata.pop('input', None)
  if raw.answer is not None:
    metadata['completion'] = raw.answer['content']
  if isinstance(raw.prompt, str):
    return Prompt(raw.prompt, metadata)
  return Prompt(_render(raw.prompt, None, raw.field, tokenizer)[0], metadata)


def in_context(
  convert: Callable[[Fields, Tokenizer | None], Example], context: str
) -> Callable[[Fields, Tokenizer | None], Example]:
  """Returns a function like `to_prompt` or `to_completion` whose prompts follow a context.

  Before messages, the context becomes a message of the system. A text follows the context as it is.

  Args:
    convert: `to_prompt` or `to_completion`.
    context: Text.
  """

  def convert_in_context(fields, tokenizer):
    example = convert(fields, tokenizer)
    if _prompt_field(fields) is None:  # a text
      return dataclasses.replace(example, prompt=context + example.prompt)
    raw = _raw_prompt(fields, tokenizer)
    if isinstance(raw.prompt, str):
      return dataclasses.replace(example, prompt=context + example.prompt)
    rendered = convert(fields, chat.InContext(tokenizer, context))
    if rendered.prompt == example.prompt:
      raise InvalidRecord(
        raw.field,
        'the chat template ignores messages of the system',
        'Set config.data.chat_template to a template that reads them.',
      )
    return rendered

  return convert_in_context


# The prompt of a record.


@dataclasses.dataclass(frozen=True)
class _RawPrompt:
  """The prompt of a record before the chat template is applied.

  Attributes:
    field: Name of the field that holds the prompt; 'chosen' for full dialogues.
    prompt: A text, or messages for the chat template.
    answer: The assistant's message after the prompt in the same field, or None.
  """

  field: str
  prompt: str | chat.Messages
  answer: dict[str, str] | None = None


def _raw_prompt(fields: Fields, tokenizer: Tokenizer | None) -> _RawPrompt:
  """Returns the prompt of a record, by the rules of the module's docstring.

  Only the fields and the tokenizer determine it, not the stage that reads the record.
  """
  raw = _stored_prompt(fields, tokenizer)
  completions = [messages for messages in map(_messages_or_none, _completions(fields)) if messages]
  if not completions:
    return raw
  before = raw.prompt
  if isinstance(before, str):
    before = [{'role': 'user', 'content': before}]
  prompts = [_conversation(before, messages)[:-1] for messages in completions]
  if any(prompt != prompts[0] for prompt in prompts):
    raise Unusable(DIFFERENT_PROMPTS)
  return dataclasses.replace(raw, prompt=prompts[0])


def _prompt_field(fields: Fields) -> str | None:
  """Returns the field that holds the prompt, 'chosen' for full dialogues, or None."""
  if _alpaca(fields) and 'messages' not in fields:
    return 'instruction'
  names = ('messages', 'prompt', 'conversations', 'instruction')
  dialogues = 'chosen' if 'chosen' in fields and 'rejected' in fields else None
  return next((name for name in names if name in fields), dialogues)


def _alpaca(fields: Fields) -> bool:
  return 'instruction' in fields and 'output' in fields


def _stored_prompt(fields: Fields, tokenizer: Tokenizer | None) -> _RawPrompt:
  """Returns the prompt in the field that holds it; the completions may extend it."""
  name = _prompt_field(fields)
  if name is None:
    raise _missing(fields, 'prompt')
  if name == 'instruction':
    return _RawPrompt(name, _instruction_prompt(fields, tokenizer))
  if name == 'chosen':
    return _RawPrompt(name, _dialogue_prompt(fields))
  if name != 'messages' and isinstance(fields[name], str):
    return _RawPrompt(name, fields[name])
  messages = _parse(fields[name], name)
  answered = messages[-1]['role'] == 'assistant'
  if answered and (name == 'messages' or not _completions(fields)):
    return _RawPrompt(name, messages[:-1], messages[-1])
  return _RawPrompt(name, messages)


def _instruction_prompt(fields: Fields, tokenizer: Tokenizer | None) -> str | chat.Messages:
  """Returns instruction and optional input as a conversation if the tokenizer has a template.

  Otherwise returns a text with the headings of https://github.com/tatsu-lab/stanford_alpaca,
  without its preamble.
  """
  instruction = _string(fields, 'instruction')
  context = _string(fields, 'input') if fields.get('input') else ''
  if tokenizer is not None and tokenizer.chat_template:
    question = f'{instruction}\n\n{context}' if context else instruction
    return [{'role': 'user', 'content': question}]
  context = f'### Input:\n{context}\n\n' if context else ''
  return f'### Instruction:\n{instruction}\n\n{context}### Response:\n'


def _dialogue_prompt(fields: Fields) -> str | chat.Messages:
  """Returns the shared prompt of two HH dialogues; [] if the dialogues are lists of messages."""
  if all(isinstance(fields[name], str) for name in ('chosen', 'rejected')):
    (prompt, _), (other, _) = (_split_dialogue(fields, name) for name in ('chosen', 'rejected'))
    if prompt != other:
      raise Unusable(DIFFERENT_PROMPTS)
    return prompt
  for name in ('chosen', 'rejected'):
    _parse(fields[name], name)
  return []


def _split_dialogue(fields: Fields, name: str) -> tuple[str, str]:
  """Splits an HH dialogue into prompt and reply, after the last HH_TURN."""
  text = _string(fields, name)
  prompt, turn, reply = text.rpartition(HH_TURN)
  if not turn:
    raise InvalidRecord(
      name,
      f'must be a dialogue with {HH_TURN!r} if there is no prompt field',
      'Add a prompt field.',
    )
  return prompt + turn, reply


def _completions(fields: Fields) -> list[Any]:
  """Returns the completions of a record unchanged, without Alpaca's output (always a string)."""
  if 'chosen' in fields and 'rejected' in fields:
    return [fields['chosen'], fields['rejected']]
  if isinstance(fields.get('completions'), list):
    return fields['completions']
  return [fields['completion']] if 'completion' in fields and 'messages' not in fields else []


def _messages_or_none(completion: Any) -> chat.Messages | None:
  """Returns a completion's messages if the last one is the assistant's, else None."""
  try:
    messages = chat.parse(completion)
  except chat.Malformed:  # A string, or an invalid value that is reported where it is used.
    return None
  return messages if messages[-1]['role'] == 'assistant' else None


def _conversation(before: chat.Messages, completion: chat.Messages) -> chat.Messages:
  """Returns the conversation with the completion, which may already repeat the conversation."""
  opens = completion[0]['role'] not in ('assistant', 'tool')
  repeats = len(completion) > 1 and (opens or completion[: len(before)] == before)
  return completion if repeats else before + completion


# Completions.


def _render_completion(
  raw: _RawPrompt, completion: Any, field: str, tokenizer: Tokenizer | None
) -> tuple[str, str]:
  """Returns (prompt, completion) as texts."""
  if not isinstance(completion, str):
    return _render(raw.prompt, _parse(completion, field)[-1], field, tokenizer)
  if isinstance(raw.prompt, str):
    return raw.prompt, _require_text(completion)
  return _render(raw.prompt, {'role': 'assistant', 'content': completion}, field, tokenizer)


def _pair_texts(fields: Fields, tokenizer: Tokenizer | None) -> tuple[str, str, str]:
  """Returns (prompt, chosen, rejected) as texts."""
  names = 'chosen', 'rejected'
  for name in names:
    if name not in fields:
      raise _missing(fields, name)
  raw = _raw_prompt(fields, tokenizer)
  values = [fields[name] for name in names]
  if raw.field == 'chosen' and isinstance(raw.prompt, str):
    values = [_split_dialogue(fields, name)[1] for name in names]
  (prompt, chosen), (_, rejected) = (
    _render_completion(raw, value, name, tokenizer) for value, name in zip(values, names)
  )
  return prompt, chosen, rejected


def _ranked_list(fields: Fields, tokenizer: Tokenizer | None, margin: float) -> Comparison:
  """Converts a record with `completions` to a Comparison."""
  raw = _raw_prompt(fields, tokenizer)
  values = fields['completions']
  if not isinstance(values, list) or not values:
    raise InvalidRecord('completions', 'must be a non-empty list', 'List at least one completion.')
  pairs = [_render_completion(raw, value, 'completions', tokenizer) for value in values]
  ratings = None
  if 'ratings' in fields:
    ratings = tuple(_numbers(fields, 'ratings', len(values)))
    ranks = _dense_ranks([-rating for rating in ratings])
  elif 'ranks' in fields:
    ranks = _dense_ranks(_numbers(fields, 'ranks', len(values)))
  elif 'best' in fields:
    best = fields['best']
    if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(values):
      raise InvalidRecord('best', 'must be the index of a completion', 'Count from 0.')
    ranks = [int(index != best) for index in range(len(values))]
  else:
    ranks = range(len(values))
  if ratings is None and len(values) < 2:
    raise InvalidRecord(
      'completions',
      'must hold at least two completions if there are no ratings',
      'Add a completion or ratings.',
    )
  return Comparison(pairs[0][0], tuple(text for _, text in pairs), tuple(ranks), ratings, margin)


def _dense_ranks(values: Sequence[float]) -> list[int]:
  """Returns the ranks 0, 1, 2, ... of the values, 0 for the smallest; equal values share one."""
  order = {value: rank for rank, value in enumerate(sorted(set(values)))}
  return [order[value] for value in values]


# Messages.


def _parse(value: Any, field: str) -> chat.Messages:
  try:
    return chat.parse(value)
  except chat.Malformed as error:
    raise InvalidRecord(field, str(error), 'Fix the value.') from error


def _render(
  prompt: chat.Messages, answer: dict[str, str] | None, field: str, tokenizer: Tokenizer | None
) -> tuple[str, str]:
  if answer is not None and answer['role'] != 'assistant':
    raise InvalidRecord(field, NO_ANSWER, 'Add the answer.')
  if not prompt:
    raise InvalidRecord(field, 'has no message before the answer', 'Add the question.')
  if answer is not None and not answer['content'].strip():
    raise Unusable(EMPTY_COMPLETION)
  try:
    return chat.render(tokenizer, prompt, answer)
  except chat.Malformed as error:
    raise InvalidRecord(field, str(error), 'Fix the messages or the template.') from error


# Values.


def _missing(fields: Fields, name: str) -> MissingField:
  names = [
    other if len(other) <= MAX_NAME_LENGTH else f'{other[: MAX_NAME_LENGTH - 3]}...'
    for other in sorted(fields)
  ]
  return MissingField(
    name,
    f'missing among {names}',
    'If your columns have other names, set config.data.columns.',
  )


def _string(fields: Fields, name: str) -> str:
  if name not in fields:
    raise _missing(fields, name)
  if not isinstance(fields[name], str):
    raise InvalidRecord(
      name, f'must be a string, not {type(fields[name]).__name__}', 'Fix the value.'
    )
  return fields[name]


def _require_text(completion: str) -> str:
  if not completion.strip():
    raise Unusable(EMPTY_COMPLETION)
  return completion


def _number(value: Any, field: str) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
    raise InvalidRecord(
      field, 'must be a finite number', f'The largest absolute value is {MAX_NUMBER:.3g}.'
    )
  return float(value)


def _numbers(fields: Fields, name: str, count: int) -> list[float]:
  values = fields[name]
  if not isinstance(values, list) or len(values) != count:
    raise InvalidRecord(name, 'must be a list with one number per completion', 'Fix the list.')
  return [_number(value, name) for value in values]

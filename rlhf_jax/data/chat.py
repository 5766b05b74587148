"""Renders conversations as text with the tokenizer's chat template.

A conversation is a list of messages: {'role': ..., 'content': ...} or, in ShareGPT's format,
{'from': ..., 'value': ...}. A chat template is Jinja text, usually stored in the tokenizer's
folder; `use_template` sets another one.
"""

from collections.abc import Sequence
import os
from typing import Any

import jinja2
import transformers

from rlhf_jax.data import time_limit
from rlhf_jax.errors import UserError

Messages = list[dict[str, str]]
TEMPLATE_SECONDS = 5  # time limit for one conversation, which usually takes milliseconds

ROLES = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'system': 'system',
  'tool': 'tool',
}

# Templates by name. They contain no BOS because tokenizing adds it.
TEMPLATES = {
  # "\n\nHuman: ...\n\nAssistant: ...", the format of the Anthropic HH dialogues (Bai et al.
  # 2022); needs no special tokens. The EOS ends the assistant's turns, so that the model can learn
  # to stop.
  'hh': (
    '{% for message in messages %}'
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\nAssistant:' + ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    '{% endfor %}'
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
  ),
  # ChatML; <|im_start|> and <|im_end|> should be tokens of the model's tokenizer.
  'chatml': (
    '{% for message in messages %}'
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    '{% endfor %}'
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
  ),
}


class Malformed(Exception):
  """The value is not a conversation; the message describes the problem."""


def use_template(tokenizer: transformers.PreTrainedTokenizerFast, template: str) -> None:
  """Sets the tokenizer's chat template, in place.

  Args:
    tokenizer: Tokenizer to change.
    template: Name in TEMPLATES, path of a Jinja file, or Jinja text.

  Raises:
    UserError: `template` is none of these.
  """
  if template in TEMPLATES:
    text = TEMPLATES[template]
  elif os.path.isfile(template):
    with open(template, encoding='utf-8') as stream:
      text = stream.read()
  elif '{' in template:
    text = template
  else:
    raise UserError(
      f'config.data.chat_template={template!r} must be one of {", ".join(sorted(TEMPLATES))}, '
      'the path of a Jinja file, or Jinja text.'
    )
  tokenizer.chat_template = text


def parse(value: Any) -> Messages:
  """Converts a message or a list of messages to a list of {'role': ..., 'content': ...}.

  The roles of the result are user, assistant, system and tool.

  Raises:
    Malformed: The value is neither.
  """
  items = [value] if isinstance(value, dict) else value
  if not isinstance(items, (list, tuple)) or not items:
    raise Malformed('must be text or messages, such as [{"role": "user", "content": "Hi"}]')
  return [_message(item) for item in items]


def _message(item: Any) -> dict[str, str]:
  if not isinstance(item, dict):
    raise Malformed('every message must be an object with role and content')
  role = item.get('role', item.get('from'))
  content = item.get('content', item.get('value'))
  if role not in ROLES:
    raise Malformed(f'the role of a message must be one of {", ".join(ROLES)}')
  if not isinstance(content, str):
    raise Malformed('the content of a message must be a string')
  return {'role': ROLES[role], 'content': content}


def render(
  tokenizer: transformers.PreTrainedTokenizerFast | None,
  prompt: Sequence[dict[str, str]],
  answer: dict[str, str] | None = None,
) -> tuple[str, str]:
  """Renders a prompt, with the generation prompt at its end, and the response.

  Args:
    tokenizer: Tokenizer with a chat template.
    prompt: Messages before the response.
    answer: The assistant's message, or None for a prompt alone.

  Returns:
    (prompt, completion). Together they are the rendered conversation, without whitespace after a
    final EOS. The completion is '' if there is no answer.

  Raises:
    UserError: There is no template, or the rendered conversation does not start with the rendered
      prompt.
    Malformed: The template rejects the messages, for example because roles do not alternate.
  """
  if tokenizer is None or not tokenizer.chat_template:
    raise UserError(
      'the data contains conversations, but the tokenizer has no chat template. Set '
      f'config.data.chat_template to {", ".join(repr(name) for name in TEMPLATES)} or the path of '
      'a Jinja file, or use a tokenizer with a template.'
    )
  before = _apply(tokenizer, list(prompt), add_generation_prompt=True)
  if answer is None:
    return before, ''
  conversation = _apply(tokenizer, [*prompt, answer], add_generation_prompt=False)
  if not conversation.startswith(before):
    raise UserError(
      'the chat template does not start the turn of the assistant with its generation prompt: '
      f'the prompt ends with {before[-40:]!r}, the conversation with {conversation[-80:]!r}. Set '
      'config.data.chat_template to a template that does.'
    )
  completion = conversation[len(before) :]
  stripped = completion.rstrip()
  if tokenizer.eos_token and stripped.endswith(tokenizer.eos_token):
    completion = stripped
  return before, completion


def prompt_text(
  tokenizer: transformers.PreTrainedTokenizerFast, messages: Sequence[dict[str, str]]
) -> str:
  """Returns messages as the text of a prompt: by the chat template, or line by line without one.

  Raises:
    UserError: The template rejects the messages.
  """
  if not tokenizer.chat_template:
    return '\n'.join(message['content'] for message in messages)
  try:
    return render(tokenizer, messages)[0]
  except Malformed as error:
    raise UserError(str(error)) from error


def turn_end(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
  """Returns the text after an answer in the chat template; '' if it is the EOS or there is none.

  A response must end there, too: the models of some templates, such as ChatML, write a token of
  its own after an answer, and not the EOS.
  """
  question = {'role': 'user', 'content': 'question'}
  answer = {'role': 'assistant', 'content': 'answer'}
  try:
    _, completion = render(tokenizer, [question], answer)
  except (UserError, Malformed):
    return ''
  end = completion.rpartition('answer')[2].strip()
  return '' if end == tokenizer.eos_token else end


def split_answers(
  tokenizer: transformers.PreTrainedTokenizerFast | None, messages: Messages, rendered: str
) -> tuple[str, ...]:
  """Splits a rendered prompt at the assistant's earlier answers in it.

  Args:
    tokenizer: Tokenizer with a chat template.
    messages: Messages of the prompt.
    rendered: The prompt as `render` returns it.

  Returns:
    (text, answer, text, answer, ..., text), whose concatenation is `rendered`. An answer is the
    completion that `render` returns for the messages before it. Messages of the assistant before
    the first one of the user belong to the texts.

  Raises:
    UserError, Malformed: See `render`; or the template renders an answer in another way when more
      messages follow.
  """
  parts, start = [], 0
  for index, message in enumerate(messages):
    if message['role'] != 'assistant' or all(m['role'] != 'user' for m in messages[:index]):
      continue
    before, answer = render(tokenizer, messages[:index], message)
    if not rendered.startswith(before + answer) or len(before) < start:
      raise UserError(
        'the chat template renders an answer in another way when more messages follow: alone it '
        f"ends with {(before + answer)[-60:]!r}. Set config.data.kind to 'completion', which "
        'learns the last answer only, or config.data.chat_template to another template.'
      )
    parts += [rendered[start : len(before)], answer]
    start = len(before) + len(answer)
  return (*parts, rendered[start:])


def _apply(tokenizer, messages: Messages, *, add_generation_prompt: bool) -> str:
  try:
    with time_limit.seconds(TEMPLATE_SECONDS):
      return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
      )
  except jinja2.TemplateSyntaxError as error:
    raise UserError(f'config.data.chat_template is not valid Jinja: {error}.') from error
  except time_limit.Exceeded:
    raise UserError(
      f'the chat template took more than {TEMPLATE_SECONDS} s for one conversation and was '
      'stopped. Set config.data.chat_template to a template that terminates.'
    ) from None
  except Exception as error:  # The sandbox prevents harm but not errors.
    kind = '' if isinstance(error, jinja2.TemplateError) else f'{type(error).__name__}: '
    raise Malformed(f'the chat template rejects this conversation ({kind}{error})') from error


class InContext:
  """A tokenizer whose chat template gets a context as the first message, of the system."""

  def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, context: str):
    self._tokenizer, self._context = tokenizer, context
    self.chat_template, self.eos_token = tokenizer.chat_template, tokenizer.eos_token

  def apply_chat_template(
    self, messages: Messages, *, tokenize: bool, add_generation_prompt: bool
  ) -> str:
    """Renders the messages after the context, which goes before a system message of their own."""
    context = self._context
    if messages[0]['role'] == 'system':
      context, messages = f'{context}\n\n{messages[0]["content"]}', messages[1:]
    return self._tokenizer.apply_chat_template(
      [{'role': 'system', 'content': context}, *messages],
      tokenize=tokenize,
      add_generation_prompt=add_generation_prompt,
    )

"""Conversations to text, through the tokenizer's chat template.

A conversation is a list of messages, {'role': ..., 'content': ...} or, as ShareGPT has it,
{'from': ..., 'value': ...}. A template is the Jinja text that the tokenizer's folder carries;
`use_template` gives one to a tokenizer without.
"""

from collections.abc import Sequence
import os
from typing import Any

import jinja2
import transformers

from rlhf_jax.data import time_limit
from rlhf_jax.errors import UserError

Messages = list[dict[str, str]]
TEMPLATE_SECONDS = 5  # for one conversation, which takes milliseconds

ROLES = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'system': 'system',
  'tool': 'tool',
}

# Templates by name, neither with a BOS, which is added in tokenizing.
TEMPLATES = {
  # "\n\nHuman: ...\n\nAssistant: ...", the format of the Anthropic HH dialogues (Bai et al.
  # 2022); needs no special tokens. The EOS ends the assistant's turns, so that stopping can be
  # learnt.
  'hh': (
    '{% for message in messages %}'
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\nAssistant:' + ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    '{% endfor %}'
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
  ),
  # ChatML; the model's tokenizer should know <|im_start|> and <|im_end|> as tokens.
  'chatml': (
    '{% for message in messages %}'
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    '{% endfor %}'
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
  ),
}


class Malformed(Exception):
  """A value is not a conversation; the text says what was expected."""


def use_template(tokenizer: transformers.PreTrainedTokenizerFast, template: str) -> None:
  """Sets the tokenizer's chat template, in place.

  Args:
    tokenizer: any.
    template: a name in TEMPLATES, the path of a .jinja file, or the Jinja text itself.

  Raises:
    UserError: it is none of these.
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
      f'config.data.chat_template {template!r} is neither a known name '
      f'({", ".join(sorted(TEMPLATES))}), nor a file, nor Jinja text.'
    )
  tokenizer.chat_template = text


def parse(value: Any) -> Messages:
  """A list of messages (or a single one) with roles user, assistant, system and tool.

  Raises:
    Malformed: the value is something else.
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
  """The text of a prompt that asks for a response, and of the response to it.

  Args:
    tokenizer: one with a chat template.
    prompt: messages before the response.
    answer: the assistant's message, None for a prompt alone.

  Returns:
    (prompt, completion). Their sum is what the template makes of the whole conversation, but for
    whitespace after a final EOS. The completion is '' without an answer.

  Raises:
    UserError: there is no template, or its generation prompt does not begin what it makes of the
      whole conversation.
    Malformed: the template rejects these messages (roles that do not alternate, for example).
  """
  if tokenizer is None or not tokenizer.chat_template:
    raise UserError(
      'the data are conversations, and the tokenizer has no chat template to make '
      'text of them. Set config.data.chat_template to '
      f'{" or ".join(repr(name) for name in TEMPLATES)}, to a Jinja file, or use a '
      'tokenizer that has one.'
    )
  before = _apply(tokenizer, list(prompt), add_generation_prompt=True)
  if answer is None:
    return before, ''
  whole = _apply(tokenizer, [*prompt, answer], add_generation_prompt=False)
  if not whole.startswith(before):
    raise UserError(
      'the chat template does not begin an assistant turn with its own generation '
      f'prompt: {before[-40:]!r} is not followed by a response in '
      f'{whole[-80:]!r}. Set config.data.chat_template to one that does.'
    )
  completion = whole[len(before) :]
  ended = completion.rstrip()
  if tokenizer.eos_token and ended.endswith(tokenizer.eos_token):
    completion = ended
  return before, completion


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
      f'the chat template took more than {TEMPLATE_SECONDS} s for one conversation, and '
      'was stopped. Set config.data.chat_template to one that ends.'
    ) from None
  except Exception as error:  # the sandbox keeps a template from harm, and not from errors
    kind = '' if isinstance(error, jinja2.TemplateError) else f'{type(error).__name__}: '
    raise Malformed(f'the chat template rejects this conversation ({kind}{error})') from error

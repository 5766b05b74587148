"""Chat templates: the prompt, the completion, and templates that are refused."""

import pytest

from rlhf_jax.data import chat
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

ASK = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
ANSWER = {'role': 'assistant', 'content': 'Hello.'}


@pytest.fixture
def tokenizer(tmp_path):
  return tokenizers.train_bpe(['abc'], 259, str(tmp_path / 'bpe'))


def test_hh_template(tokenizer):
  chat.use_template(tokenizer, 'hh')
  assert chat.render(tokenizer, ASK, ANSWER) == (
    'Be kind.\n\nHuman: Hi\n\nAssistant:',
    ' Hello.<|eos|>',
  )
  assert chat.render(tokenizer, ASK) == ('Be kind.\n\nHuman: Hi\n\nAssistant:', '')


def test_chatml_template(tokenizer):
  chat.use_template(tokenizer, 'chatml')
  prompt = (
    '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
    '<|im_start|>assistant\n'
  )
  # <|im_end|> is not this tokenizer's EOS, so the text after it is not removed.
  assert chat.render(tokenizer, ASK, ANSWER) == (prompt, 'Hello.<|im_end|>\n')
  tokenizer.eos_token = '<|im_end|>'
  assert chat.render(tokenizer, ASK, ANSWER) == (prompt, 'Hello.<|im_end|>')


def test_prompts_with_and_without_a_template(tokenizer):
  messages = [*ASK, ANSWER, {'role': 'user', 'content': 'Why?'}]
  assert chat.prompt_text(tokenizer, messages) == 'Be kind.\nHi\nHello.\nWhy?'
  chat.use_template(tokenizer, 'hh')
  expected = 'Be kind.\n\nHuman: Hi\n\nAssistant: Hello.<|eos|>\n\nHuman: Why?\n\nAssistant:'
  assert chat.prompt_text(tokenizer, messages) == expected
  chat.use_template(tokenizer, "{{ raise_exception('no system message') }}")
  with pytest.raises(UserError, match='no system message'):
    chat.prompt_text(tokenizer, messages)


def test_what_ends_an_answer_besides_the_eos(tokenizer):
  assert chat.turn_end(tokenizer) == ''  # there is no template
  chat.use_template(tokenizer, 'hh')
  assert chat.turn_end(tokenizer) == ''
  chat.use_template(tokenizer, 'chatml')
  assert chat.turn_end(tokenizer) == '<|im_end|>'
  tokenizer.eos_token = '<|im_end|>'
  assert chat.turn_end(tokenizer) == ''


def test_template_from_a_file_or_text(tokenizer, tmp_path):
  text = "{{ messages[0]['content'] }}{% if add_generation_prompt %}{% else %}!{% endif %}"
  path = tmp_path / 'x.jinja'
  path.write_text(text)
  for template in (text, str(path)):
    chat.use_template(tokenizer, template)
    assert chat.render(tokenizer, ASK, ANSWER) == ('Be kind.', '!')


def test_invalid_templates(tokenizer):
  with pytest.raises(UserError, match="chat_template='vicuna' must be one of chatml, hh"):
    chat.use_template(tokenizer, 'vicuna')
  chat.use_template(tokenizer, '{% for m in messages %}')
  with pytest.raises(UserError, match='not valid Jinja'):
    chat.render(tokenizer, ASK, ANSWER)


def test_the_generation_prompt_must_begin_the_answer(tokenizer):
  chat.use_template(
    tokenizer,
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    '{% if add_generation_prompt %}<think>{% endif %}',
  )
  with pytest.raises(UserError, match='does not start the turn of the assistant'):
    chat.render(tokenizer, ASK, ANSWER)

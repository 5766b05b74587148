"""Conversations with the loss on every answer, by hand and against transformers on real data."""

import json

import numpy as np
import pytest

from rlhf_jax.data import chat
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.data.formats import Conversation
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

ANSWERS = (
  "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
  "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
  "{% else %}<|im_start|>{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
  '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
MESSAGES = [
  {'role': 'system', 'content': 's'},
  {'role': 'user', 'content': 'a'},
  {'role': 'assistant', 'content': 'bc'},
  {'role': 'user', 'content': 'd'},
  {'role': 'assistant', 'content': 'e'},
]
SHARE_GPT = [
  {'from': {'user': 'human', 'assistant': 'gpt'}.get(m['role'], m['role']), 'value': m['content']}
  for m in MESSAGES
]


def tokenizer_with(template, folder, **tokens):
  """Returns a tokenizer of bytes and of the given special tokens, with a chat template."""
  tokenizer = tokenizers.train_bpe([], 259, str(folder))
  tokenizer.add_special_tokens(tokens)
  chat.use_template(tokenizer, template)
  return tokenizer


@pytest.fixture(scope='module')
def short(tmp_path_factory):
  """Returns a tokenizer whose template writes [role] before a message and an EOS after answers."""
  return tokenizer_with(
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}[a]{% endif %}',
    tmp_path_factory.mktemp('bpe'),
  )


def conversations(row, tokenizer):
  return formats.conversations([sources.Record(row, 'x.jsonl:1')], tokenizer=tokenizer)[0][0]


@pytest.mark.parametrize(
  'row',
  [
    {'messages': MESSAGES},
    {'conversations': SHARE_GPT},
    {'prompt': MESSAGES[:4], 'completion': 'e'},
    {'prompt': MESSAGES[:4], 'completion': [MESSAGES[4]]},
    {'chosen': MESSAGES, 'rejected': [*MESSAGES[:4], {'role': 'assistant', 'content': 'no'}]},
    {'conversations': SHARE_GPT[:4], 'chosen': SHARE_GPT[4], 'rejected': SHARE_GPT[2]},
  ],
)
def test_all_answers_are_parts(row, short):
  parts = ('[s]s[u]a[a]', 'bc<|eos|>', '\n[u]d[a]', 'e<|eos|>')
  assert conversations(row, short) == Conversation(parts)


def test_texts_have_one_answer(short):
  assert conversations({'prompt': 'a', 'completion': ' b'}, short) == Conversation(('a', ' b'))
  alpaca = {'instruction': 'a', 'input': 'x', 'output': 'b'}
  assert conversations(alpaca, short) == Conversation(('[u]a\n\nx[a]', 'b<|eos|>'))


def test_an_answer_to_nothing_is_not_learned(short):
  greeting = {'role': 'assistant', 'content': 'hi'}
  found = conversations({'messages': [greeting, *MESSAGES[1:3]]}, short)
  assert found == Conversation(('[a]hi<|eos|>\n[u]a[a]', 'bc<|eos|>'))


def test_conversations_that_cannot_be_used(short):
  empty = {'role': 'assistant', 'content': ' '}
  rows = [{'messages': [*MESSAGES, MESSAGES[1], empty]}, {'messages': MESSAGES}]
  examples, report = formats.conversations(
    [sources.Record(row, f'x.jsonl:{n}') for n, row in enumerate(rows)], tokenizer=short
  )
  assert len(examples) == 1 and report.left_out == {'empty completion': ('x.jsonl:0',)}
  with pytest.raises(
    DataError, match=r"x\.jsonl:1: field 'messages': the last message must be the"
  ):
    conversations({'messages': MESSAGES[:4]}, short)


def test_a_template_that_changes_earlier_answers_is_refused(tmp_path):
  forgetful = tokenizer_with(
    "{% for m in messages %}[{{ m['role'] }}]"
    "{{ m['content'] if m['role'] == 'user' or loop.last else '...' }}{% endfor %}"
    '{% if add_generation_prompt %}[assistant]{% endif %}',
    tmp_path,
  )
  with pytest.raises(UserError, match="way when more messages follow.*]bc'"):
    conversations({'messages': MESSAGES[1:]}, forgetful)


def rows_of(examples, tokenizer, **settings):
  settings = {'batch_size': 1, 'max_length': 40} | settings
  ((batch, _),) = pipelines.completion_batches(examples, tokenizer, **settings)
  return [
    tokenizer.decode(row[mask]) for row, mask in zip(batch.tokens, batch.loss_mask)
  ], tokenizer.decode(batch.tokens[0][batch.segments[0] > 0])


def test_targets_are_the_tokens_of_answers(short):
  parts = ('[u]a[a]', 'bc<|eos|>', '\n[u]d[a]', 'e')
  targets, whole = rows_of([Conversation(parts)], short)
  assert targets == ['bc<|eos|>e<|eos|>'] and whole == f'<|bos|>{"".join(parts)}<|eos|>'
  # One answer: as a completion.
  one = pipelines.completion_batches([Conversation(('a', 'b'))], short, batch_size=1, max_length=9)
  two = pipelines.completion_batches(
    [formats.Completion('a', 'b')], short, batch_size=1, max_length=9
  )
  for found, expected in zip(vars(one[0][0]).values(), vars(two[0][0]).values()):
    np.testing.assert_array_equal(found, expected)


def test_long_conversations_lose_the_start_of_the_prompt_then_their_end(short):
  parts = ('abcdefgh', 'ij', 'kl', 'mnop')
  # BOS and 8 letters before the answers, 8 letters and an EOS after: 18 tokens.
  assert rows_of([Conversation(parts)], short, max_length=17) == (
    ['ijmnop<|eos|>'],
    '<|bos|>bcdefghijklmnop<|eos|>',
  )
  assert rows_of([Conversation(parts)], short, max_length=10) == (['ijm'], '<|bos|>efghijklm')


@pytest.mark.parametrize(
  'name, field, count',
  [('preferences/kto_en_demo', 'messages', 120), ('preferences/dpo_en_demo', 'conversations', 120)],
)
def test_masks_are_those_of_transformers(name, field, count, shared, tmp_path):
  """Real conversations of several turns, and a template that marks answers with generation tags."""
  tokenizer = tokenizers.load(str(shared / 'models' / 'gpt2-tokenizer'))
  tokenizer.add_special_tokens(
    {'additional_special_tokens': ['<|im_start|>'], 'eos_token': '<|im_end|>'}
  )
  chat.use_template(tokenizer, ANSWERS)
  records = json.loads((shared / 'data' / f'{name}.json').read_text())
  rows = []
  for record in records:
    messages = chat.parse(record[field])
    messages += [chat.parse(record['chosen'])[0]] if 'chosen' in record else []
    answers = [m['content'] for m in messages if m['role'] == 'assistant']
    if all(answer.strip() == answer for answer in answers):  # leading spaces join the line break
      rows.append(messages)
  rows = rows[:count]
  assert len(rows) == count and sum(len(row) > 3 for row in rows) > 25
  examples = [conversations({'messages': messages}, tokenizer) for messages in rows]
  batches = pipelines.completion_batches(examples, tokenizer, batch_size=count, max_length=8192)
  ((batch, _),) = batches
  for row, messages in enumerate(rows):
    expected = tokenizer.apply_chat_template(
      messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    real = batch.segments[row] > 0
    tokens, mask = batch.tokens[row][real].tolist(), batch.loss_mask[row][real].tolist()
    # Theirs ends with the line break after the EOS.
    assert expected['input_ids'][: len(tokens)] == tokens
    assert expected['assistant_masks'] == [*map(int, mask), 0]
    assert sum(mask) > 0

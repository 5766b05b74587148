"""Each shape of record, each complaint, and the odd rows of real data."""

import pytest

from rlhf_jax.data import chat
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.formats import Completion
from rlhf_jax.data.formats import Prompt
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError


def records(*rows):
  return [sources.Record(row, f'x.jsonl:{line}') for line, row in enumerate(rows, start=1)]


def one(convert, row, tokenizer=None):
  examples, report = convert(records(row), tokenizer=tokenizer)
  assert report.read == report.kept == len(examples) == 1
  return examples[0]


@pytest.fixture(scope='module')
def chatty(tmp_path_factory):
  """A tokenizer whose template writes <role>content</role> and the EOS after answers."""
  tokenizer = tokenizers.train_bpe(['abc'], 259, str(tmp_path_factory.mktemp('bpe')))
  chat.use_template(
      tokenizer,
      "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
      "{% endif %}[{{ m['role'] }}]{{ m['content'] }}"
      "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}[assistant]{% endif %}")
  return tokenizer


USER = {'role': 'user', 'content': 'Q'}
GOOD = {'role': 'assistant', 'content': 'good'}
BAD = {'role': 'assistant', 'content': 'bad'}


def test_texts(chatty):
  assert one(formats.texts, {'text': ' a b\n', 'id': 3}) == ' a b\n'
  assert one(formats.texts, {'prompt': 'a', 'completion': ' b'}) == 'a b'
  assert one(formats.texts, {'messages': [USER, GOOD]}, chatty) == '[user]Q[assistant]good<|eos|>'


def test_prompt_and_completion():
  assert one(formats.completions, {'prompt': 'a', 'completion': ' b'}) == Completion('a', ' b')


@pytest.mark.parametrize('row', [
    {'messages': [USER, GOOD]},
    {'messages': [{'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': 'good'}]},
    {'prompt': [USER], 'completion': [GOOD]},
    {'prompt': [USER], 'completion': 'good'},
    {'prompt': 'Q', 'completion': GOOD},
    {'prompt': [USER], 'chosen': [GOOD], 'rejected': [BAD]},
    {'messages': [USER, GOOD], 'label': True},
    {'instruction': 'Q', 'input': '', 'output': 'good'},
])
def test_messages_become_a_completion(row, chatty):
  # The line break that the template writes after the EOS is not part of the completion.
  assert one(formats.completions, row, chatty) == Completion('[user]Q[assistant]', 'good<|eos|>')


def test_several_turns(chatty):
  row = {'messages': [{'role': 'system', 'content': 'S'}, USER, BAD, USER, GOOD]}
  assert one(formats.completions, row, chatty) == Completion(
      '[system]S[user]Q[assistant]bad<|eos|>\n[user]Q[assistant]', 'good<|eos|>')


def test_alpaca_without_a_template():
  row = {'instruction': 'Add.', 'input': '1 2', 'output': '3'}
  assert one(formats.completions, row) == Completion(
      '### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n', '3')
  assert one(formats.completions, {**row, 'input': ''}) == Completion(
      '### Instruction:\nAdd.\n\n### Response:\n', '3')
  assert one(formats.prompts, row) == Prompt(
      '### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n', {'output': '3'})


PAIR = Comparison('[user]Q[assistant]', ('good<|eos|>', 'bad<|eos|>'), (0, 1))


@pytest.mark.parametrize('row', [
    {'prompt': [USER], 'chosen': [GOOD], 'rejected': [BAD]},
    {'prompt': [USER], 'chosen': GOOD, 'rejected': BAD},
    {'prompt': [USER], 'chosen': 'good', 'rejected': 'bad'},
    {'prompt': 'Q', 'chosen': [GOOD], 'rejected': [BAD]},
    {'prompt': 'Q', 'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
    {'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
    {'conversations': [{'from': 'human', 'value': 'Q'}],
     'chosen': {'from': 'gpt', 'value': 'good'}, 'rejected': {'from': 'gpt', 'value': 'bad'}},
    {'prompt': [USER], 'completions': [[GOOD], [BAD]]},
])
def test_pairs_of_messages(row, chatty):
  assert one(formats.comparisons, row, chatty) == PAIR


def test_pairs_of_strings():
  row = {'prompt': 'p', 'chosen': ' a', 'rejected': ' b', 'margin': 2}
  assert one(formats.comparisons, row) == Comparison('p', (' a', ' b'), (0, 1), None, 2.0)
  assert one(formats.completions, row) == Completion('p', ' a')
  assert one(formats.prompts, row) == Prompt(
      'p', {'chosen': ' a', 'rejected': ' b', 'margin': 2})


def test_hh_dialogues_are_cut_after_the_last_assistant_turn():
  start = '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:'
  row = {'chosen': start + ' So.', 'rejected': start + ' No.\n\nHm.'}
  assert one(formats.comparisons, row) == Comparison(start, (' So.', ' No.\n\nHm.'), (0, 1))
  assert one(formats.prompts, row) == Prompt(start, row)


@pytest.mark.parametrize('verdict, ranks, ratings', [
    ({}, (0, 1, 2), None),
    ({'ranks': [2, 1, 2]}, (1, 0, 1), None),          # From 1, and a tie: dense ranks from 0.
    ({'ratings': [0.5, 3, 3]}, (1, 0, 0), (0.5, 3.0, 3.0)),
    ({'best': 1}, (1, 0, 1), None),
])
def test_lists(verdict, ranks, ratings):
  row = {'prompt': 'p', 'completions': ['a', 'b', 'c'], **verdict}
  assert one(formats.comparisons, row) == Comparison('p', ('a', 'b', 'c'), ranks, ratings)
  assert one(formats.completions, row) == Completion('p', 'abc'[ranks.index(0)])


def test_single_ratings_and_labels(chatty):
  row = {'prompt': 'p', 'completion': 'a', 'rating': 4}
  assert one(formats.comparisons, row) == Comparison('p', ('a',), (0,), (4.0,))
  row = {'messages': [USER, BAD], 'label': False}
  assert one(formats.comparisons, row, chatty) == Comparison(
      '[user]Q[assistant]', ('bad<|eos|>',), (0,), (0.0,))


def test_completions_labelled_false_are_left_out():
  rows = records({'prompt': 'p', 'completion': 'a', 'label': False},
                 {'prompt': 'p', 'completion': 'b', 'label': True},
                 {'prompt': 'p', 'completion': 'c', 'label': 0})  # A class, not a verdict.
  examples, report = formats.completions(rows)
  assert [e.completion for e in examples] == ['b', 'c']
  assert report.left_out == {formats.LABELLED_BAD: ('x.jsonl:1',)}


def test_prompts_keep_everything_else_as_metadata(chatty):
  row = {'prompt': 'p', 'answer': '4', 'level': 2}
  assert one(formats.prompts, row) == Prompt('p', {'answer': '4', 'level': 2})
  assert one(formats.prompts, {'text': 'p'}) == Prompt('p', {})
  assert one(formats.prompts, {'prompt': [USER], 'answer': '4'}, chatty) == Prompt(
      '[user]Q[assistant]', {'answer': '4'})
  assert one(formats.prompts, {'messages': [USER, GOOD], 'id': 1}, chatty) == Prompt(
      '[user]Q[assistant]', {'id': 1, 'completion': 'good'})
  assert one(formats.prompts, {'prompt': '', 'answer': 1}).prompt == ''


def test_nulls_of_tables_are_absent_fields():
  row = {'prompt': 'p', 'completion': 'a', 'chosen': None, 'messages': None}
  assert one(formats.completions, row) == Completion('p', 'a')


@pytest.mark.parametrize('convert, row, complaint', [
    (formats.texts, {'text': 3}, "field 'text': a string was expected, not a int"),
    (formats.completions, {'completion': 'a'}, r"field 'prompt': missing among \['completion'\]"),
    (formats.completions, {'prompt': 'a'}, "field 'completion': missing"),
    (formats.completions, {'prompt': 3, 'completion': 'a'}, "field 'prompt': text or messages"),
    (formats.completions, {'messages': []}, "field 'messages': text or messages were expected"),
    (formats.completions, {'messages': [{'role': 'user'}, GOOD]}, 'content of a message'),
    (formats.completions, {'messages': [{'role': 'boss', 'content': ''}]}, 'role of a message'),
    (formats.completions, {'messages': ['hello']}, 'every message must be an object'),
    (formats.completions, {'messages': [GOOD]}, 'no message before the answer'),
    (formats.completions, {'messages': [GOOD, USER]}, "last message must be the assistant's"),
    (formats.completions, {'messages': [{'role': 'tool', 'content': ''}, GOOD]}, 'no tools'),
    (formats.completions, {'instruction': 'a'}, "field 'output': missing"),
    (formats.comparisons, {'text': 'a'}, "field 'chosen': missing"),
    (formats.comparisons, {'prompt': 'a', 'chosen': 'b'}, "field 'rejected': missing"),
    (formats.comparisons, {'chosen': 'b', 'rejected': 'c'}, "field 'chosen': without a prompt"),
    (formats.comparisons, {'completions': ['b', 'c']}, "field 'prompt': missing"),
    (formats.comparisons, {'prompt': 'a', 'completions': 'bc'}, "field 'completions': a list"),
    (formats.comparisons, {'prompt': 'a', 'completions': ['b']}, 'at least two'),
    (formats.comparisons, {'prompt': 'a', 'completions': ['b', 'c'], 'best': 2}, "field 'best'"),
    (formats.comparisons, {'prompt': 'a', 'completions': ['b', 'c'], 'ranks': [1]},
     "field 'ranks': a list with one number for each"),
    (formats.comparisons, {'prompt': 'a', 'completions': ['b', 'c'], 'ratings': [1, 'x']},
     "field 'ratings': a finite number"),
    (formats.comparisons, {'prompt': 'a', 'completion': 'b', 'rating': float('nan')},
     "field 'rating': a finite number"),
    (formats.comparisons, {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': True},
     "field 'margin': a finite number"),
    (formats.prompts, {'question': 'a'}, "field 'prompt': missing.*config.data.columns"),
])
def test_complaints_name_place_and_field(convert, row, complaint, chatty):
  good = {'prompt': 'p', 'completion': 'a', 'rating': 1}
  with pytest.raises(DataError, match=complaint) as caught:
    convert(records(good, row), tokenizer=chatty)
  assert str(caught.value).startswith('x.jsonl:2: field ')
  examples, report = convert(records(good, row), tokenizer=chatty, on_error='skip')
  assert len(examples) == 1 and report.kept == 1
  assert list(report.left_out.values()) == [('x.jsonl:2',)]


def test_report_is_fit_for_printing():
  rows = records({'prompt': 'a', 'completion': 'b'}, {'prompt': 'a', 'completion': ' '},
                 {'prompt': 'a'}, {'prompt': 'a', 'completion': ''})
  _, report = formats.completions(rows, on_error='skip')
  assert str(report) == (
      '1 of 4 records kept\n'
      "  1 left out: completion: missing among ['prompt'] (first: x.jsonl:3)\n"
      '  2 left out: empty completion (first: x.jsonl:2)')


def test_nothing_left_is_an_error():
  with pytest.raises(UserError, match='no record of the data can be used.\n0 of 1 records kept'):
    formats.completions(records({'prompt': 'a', 'completion': ''}))


def test_on_error_is_checked():
  with pytest.raises(UserError, match="on_error is 'ignore'"):
    formats.texts(records({'text': 'a'}), on_error='ignore')


def test_messages_without_a_template_stop_even_when_skipping(tmp_path):
  plain = tokenizers.train_bpe(['a'], 259, str(tmp_path / 'bpe'))
  for tokenizer in (None, plain):
    with pytest.raises(UserError, match=r'no chat template.*config\.data\.chat_template'):
      formats.completions(records({'messages': [USER, GOOD]}), tokenizer=tokenizer,
                          on_error='skip')


def test_harmless_rows(shared):
  """Exactly the rows known to be odd are left out, each for its reason."""
  rows = sources.read(str(shared / 'data/hh-rlhf/harmless-base/test.jsonl.gz'))
  assert len(rows) == 2312
  examples, report = formats.comparisons(rows)
  lines = {reason: [int(place.rsplit(':', 1)[1]) - 1 for place in places]
           for reason, places in report.left_out.items()}
  assert lines == {formats.DIFFERENT_PROMPTS: [1254, 1688, 1950, 1952, 2036],
                   formats.EMPTY_COMPLETION: [86, 516, 925, 1103]}
  assert len(examples) == report.kept == 2303
  for example, row in zip(examples, rows):  # The first 86 rows line up.
    if row is rows[86]:
      break
    assert example.prompt + example.completions[0] == row.fields['chosen']
    assert example.prompt + example.completions[1] == row.fields['rejected']
    assert example.prompt.endswith(formats.HH_TURN)


@pytest.mark.parametrize('name, count, convert', [
    ('preferences/dpo_en_demo.json', 300, formats.comparisons),
    ('preferences/kto_en_demo.json', 300, formats.comparisons),
    ('preferences/kto_en_demo.json', 150, formats.completions),
    ('instructions/alpaca_en_demo.json', 999, formats.completions),
    ('instructions/alpaca_en_demo.json', 999, formats.prompts),
])
def test_shared_conversations(shared, name, count, convert):
  tokenizer = tokenizers.load(str(shared / 'models/gpt2-tokenizer'))
  chat.use_template(tokenizer, 'hh')
  examples, _ = convert(sources.read(str(shared / 'data' / name)), tokenizer=tokenizer)
  assert len(examples) == count
  assert all(example.prompt.endswith('\n\nAssistant:') for example in examples)

"""All shapes of records, all error messages, and unusual rows of real data."""

import csv
import itertools
import json

import pytest

from rlhf_jax.data import chat
from rlhf_jax.data import formats
from rlhf_jax.data import shapes
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
  """Returns a tokenizer whose template writes <role>content</role> and an EOS after replies."""
  tokenizer = tokenizers.train_bpe(['abc'], 259, str(tmp_path_factory.mktemp('bpe')))
  chat.use_template(
    tokenizer,
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}[assistant]{% endif %}',
  )
  return tokenizer


USER = {'role': 'user', 'content': 'Q'}
GOOD = {'role': 'assistant', 'content': 'good'}
BAD = {'role': 'assistant', 'content': 'bad'}


def test_texts(chatty):
  assert one(formats.texts, {'text': ' a b\n', 'id': 3}) == ' a b\n'
  assert one(formats.texts, {'prompt': 'a', 'completion': ' b'}) == Completion('a', ' b')
  assert one(formats.texts, {'messages': [USER, GOOD]}, chatty) == Completion(
    '[user]Q[assistant]', 'good<|eos|>'
  )


def test_prompt_and_completion():
  assert one(formats.completions, {'prompt': 'a', 'completion': ' b'}) == Completion('a', ' b')


@pytest.mark.parametrize(
  'row',
  [
    {'messages': [USER, GOOD]},
    {'messages': [{'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': 'good'}]},
    {'prompt': [USER], 'completion': [GOOD]},
    {'prompt': [USER], 'completion': 'good'},
    {'prompt': 'Q', 'completion': GOOD},
    {'prompt': [USER], 'chosen': [GOOD], 'rejected': [BAD]},
    {'messages': [USER, GOOD], 'label': True},
    {'instruction': 'Q', 'input': '', 'output': 'good'},
  ],
)
def test_messages_become_a_completion(row, chatty):
  # The line break that the template writes after the EOS is not part of the completion.
  assert one(formats.completions, row, chatty) == Completion('[user]Q[assistant]', 'good<|eos|>')


def test_several_turns(chatty):
  row = {'messages': [{'role': 'system', 'content': 'S'}, USER, BAD, USER, GOOD]}
  assert one(formats.completions, row, chatty) == Completion(
    '[system]S[user]Q[assistant]bad<|eos|>\n[user]Q[assistant]', 'good<|eos|>'
  )


def test_alpaca_without_a_template():
  row = {'instruction': 'Add.', 'input': '1 2', 'output': '3'}
  assert one(formats.completions, row) == Completion(
    '### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n', '3'
  )
  assert one(formats.completions, {**row, 'input': ''}) == Completion(
    '### Instruction:\nAdd.\n\n### Response:\n', '3'
  )
  assert one(formats.prompts, row) == Prompt(
    '### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n', {'output': '3'}
  )


ALPACA = {
  'instruction': 'Add.',
  'input': '1 2',
  'output': '3',
  'chosen': 'It is 3.',
  'rejected': '4',
}


def test_alpaca_with_a_comparison_serves_every_stage(chatty):
  prompt = '### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n'
  assert one(formats.completions, ALPACA) == Completion(prompt, '3')
  assert one(formats.texts, ALPACA) == Completion(prompt, '3')
  assert one(formats.comparisons, ALPACA) == Comparison(prompt, ('It is 3.', '4'), (0, 1))
  rest = {name: ALPACA[name] for name in ('output', 'chosen', 'rejected')}
  assert one(formats.prompts, ALPACA) == Prompt(prompt, rest)
  asked = '[user]Add.\n\n1 2[assistant]'
  assert one(formats.completions, ALPACA, chatty) == Completion(asked, '3<|eos|>')
  assert one(formats.comparisons, ALPACA, chatty) == Comparison(
    asked, ('It is 3.<|eos|>', '4<|eos|>'), (0, 1)
  )
  without = {name: ALPACA[name] for name in ('instruction', 'chosen', 'rejected')}
  assert one(formats.completions, without) == Completion(
    '### Instruction:\nAdd.\n\n### Response:\n', 'It is 3.'
  )


PAIR = Comparison('[user]Q[assistant]', ('good<|eos|>', 'bad<|eos|>'), (0, 1))


@pytest.mark.parametrize(
  'row',
  [
    {'prompt': [USER], 'chosen': [GOOD], 'rejected': [BAD]},
    {'prompt': [USER], 'chosen': GOOD, 'rejected': BAD},
    {'prompt': [USER], 'chosen': 'good', 'rejected': 'bad'},
    {'prompt': 'Q', 'chosen': [GOOD], 'rejected': [BAD]},
    {'prompt': 'Q', 'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
    {'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
    {
      'conversations': [{'from': 'human', 'value': 'Q'}],
      'chosen': {'from': 'gpt', 'value': 'good'},
      'rejected': {'from': 'gpt', 'value': 'bad'},
    },
    {'prompt': [USER], 'completions': [[GOOD], [BAD]]},
  ],
)
def test_pairs_of_messages(row, chatty):
  assert one(formats.comparisons, row, chatty) == PAIR


def test_pairs_of_strings():
  row = {'prompt': 'p', 'chosen': ' a', 'rejected': ' b', 'margin': 2}
  assert one(formats.comparisons, row) == Comparison('p', (' a', ' b'), (0, 1), None, 2.0)
  assert one(formats.completions, row) == Completion('p', ' a')
  assert one(formats.prompts, row) == Prompt('p', {'chosen': ' a', 'rejected': ' b', 'margin': 2})


SYSTEM = {'role': 'system', 'content': 'S'}
AGAIN = {'role': 'user', 'content': 'R'}
ASKED = '[user]Q[assistant]'


@pytest.mark.parametrize(
  'row, prompt',
  [
    ({'prompt': 'Q', 'chosen': [GOOD], 'rejected': [BAD]}, ASKED),
    ({'prompt': 'Q', 'chosen': 'good', 'rejected': BAD}, ASKED),
    ({'prompt': 'Q', 'completions': ['good', BAD]}, ASKED),
    ({'prompt': 'Q', 'completion': GOOD, 'label': True}, ASKED),
    ({'prompt': 'Q', 'completion': 'good', 'chosen': [GOOD], 'rejected': [BAD]}, ASKED),
    # The completion repeats the full conversation, as in UltraFeedback, with a system message.
    (
      {'prompt': 'Q', 'chosen': [SYSTEM, USER, GOOD], 'rejected': [SYSTEM, USER, BAD]},
      '[system]S[user]Q[assistant]',
    ),
    (
      {'prompt': 'Q', 'chosen': [SYSTEM, USER, GOOD], 'rejected': 'bad'},
      '[system]S[user]Q[assistant]',
    ),
    (
      {'prompt': 'Q', 'messages': [USER, GOOD], 'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
      ASKED,
    ),
    (
      {'prompt': 'Q', 'messages': [USER, GOOD, AGAIN, GOOD], 'rating': 1},
      '[user]Q[assistant]good<|eos|>\n[user]R[assistant]',
    ),
    # Completions of several turns.
    (
      {'prompt': [USER], 'chosen': [BAD, AGAIN, GOOD], 'rejected': [BAD, AGAIN, BAD]},
      '[user]Q[assistant]bad<|eos|>\n[user]R[assistant]',
    ),
    (
      {'prompt': [USER, GOOD], 'chosen': 'good', 'rejected': 'bad'},
      '[user]Q[assistant]good<|eos|>\n[assistant]',
    ),
    ({'messages': [USER], 'chosen': GOOD, 'rejected': BAD}, ASKED),
    (
      {'chosen': [SYSTEM, USER, GOOD], 'rejected': [SYSTEM, USER, BAD]},
      '[system]S[user]Q[assistant]',
    ),
    ({'instruction': 'Q', 'output': 'good', 'prompt': 'formatted Q', 'label': True}, ASKED),
    ({'instruction': 'Q', 'output': 'good', 'chosen': [GOOD], 'rejected': [BAD]}, ASKED),
    ({'instruction': 'Q', 'prompt': 'P', 'chosen': 'good', 'rejected': 'bad'}, 'P'),
  ],
)
def test_a_record_has_one_prompt_whatever_reads_it(row, prompt, chatty):
  for convert in (formats.texts, formats.completions, formats.comparisons, formats.prompts):
    assert one(convert, row, chatty).prompt == prompt, convert.__name__


def test_completions_of_different_prompts_have_no_prompt(chatty):
  for answers in (
    {'chosen': [USER, GOOD], 'rejected': [AGAIN, BAD]},
    {'completions': [[USER, GOOD], [AGAIN, BAD]]},
  ):
    rows = records({'prompt': 'Q', **answers}, {'prompt': 'Q', 'chosen': 'a', 'rejected': 'b'})
    for convert in (formats.texts, formats.completions, formats.comparisons, formats.prompts):
      _, report = convert(rows, tokenizer=chatty)
      assert report.left_out == {shapes.DIFFERENT_PROMPTS: ('x.jsonl:1',)}


@pytest.mark.parametrize(
  'row',
  [
    {'prompt': 'p', 'completions': ['a', 'b']},
    {'prompt': 'p', 'completions': ['a', 'b'], 'ranks': [2, 1]},
    {'prompt': 'p', 'completions': ['a', 'b'], 'ratings': [1, 2]},
    {'prompt': 'p', 'completions': ['a', 'b'], 'best': 1},
    {'prompt': 'p', 'completion': 'a', 'rating': 3},
    {'prompt': 'p', 'completion': 'a', 'label': True},
  ],
)
def test_any_comparison_may_have_a_margin(row):
  assert one(formats.comparisons, row | {'margin': 1.5}).margin == 1.5
  assert one(formats.comparisons, row).margin == 0.0


def test_hh_dialogues_are_cut_after_the_last_assistant_turn():
  start = '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:'
  row = {'chosen': start + ' So.', 'rejected': start + ' No.\n\nHm.'}
  assert one(formats.comparisons, row) == Comparison(start, (' So.', ' No.\n\nHm.'), (0, 1))
  assert one(formats.prompts, row) == Prompt(start, row)


@pytest.mark.parametrize(
  'verdict, ranks, ratings',
  [
    ({}, (0, 1, 2), None),
    ({'ranks': [2, 1, 2]}, (1, 0, 1), None),  # from 1 with a tie; dense ranks start at 0
    ({'ratings': [0.5, 3, 3]}, (1, 0, 0), (0.5, 3.0, 3.0)),
    ({'best': 1}, (1, 0, 1), None),
  ],
)
def test_lists(verdict, ranks, ratings):
  row = {'prompt': 'p', 'completions': ['a', 'b', 'c'], **verdict}
  assert one(formats.comparisons, row) == Comparison('p', ('a', 'b', 'c'), ranks, ratings)
  assert one(formats.completions, row) == Completion('p', 'abc'[ranks.index(0)])


def test_single_ratings_and_labels(chatty):
  row = {'prompt': 'p', 'completion': 'a', 'rating': 4}
  assert one(formats.comparisons, row) == Comparison('p', ('a',), (0,), (4.0,))
  row = {'messages': [USER, BAD], 'label': False}
  assert one(formats.comparisons, row, chatty) == Comparison(
    '[user]Q[assistant]', ('bad<|eos|>',), (0,), (0.0,)
  )


def test_completions_labelled_false_are_left_out():
  rows = records(
    {'prompt': 'p', 'completion': 'a', 'label': False},
    {'prompt': 'p', 'completion': 'b', 'label': True},
    {'prompt': 'p', 'completion': 'c', 'label': 0},
  )  # a class, not a rating
  examples, report = formats.completions(rows)
  assert [e.completion for e in examples] == ['b', 'c']
  assert report.left_out == {shapes.LABELLED_FALSE: ('x.jsonl:1',)}


def test_prompts_keep_everything_else_as_metadata(chatty):
  row = {'prompt': 'p', 'answer': '4', 'level': 2}
  assert one(formats.prompts, row) == Prompt('p', {'answer': '4', 'level': 2})
  assert one(formats.prompts, {'text': 'p'}) == Prompt('p', {})
  assert one(formats.prompts, {'prompt': [USER], 'answer': '4'}, chatty) == Prompt(
    '[user]Q[assistant]', {'answer': '4'}
  )
  assert one(formats.prompts, {'messages': [USER, GOOD], 'id': 1}, chatty) == Prompt(
    '[user]Q[assistant]', {'id': 1, 'completion': 'good'}
  )
  assert one(formats.prompts, {'prompt': '', 'answer': 1}).prompt == ''


def test_nulls_of_tables_are_absent_fields():
  row = {'prompt': 'p', 'completion': 'a', 'chosen': None, 'messages': None}
  assert one(formats.completions, row) == Completion('p', 'a')


@pytest.mark.parametrize(
  'convert, row, complaint',
  [
    (formats.texts, {'text': 3}, "field 'text': must be a string, not int"),
    (formats.completions, {'completion': 'a'}, r"field 'prompt': missing among \['completion'\]"),
    (formats.completions, {'prompt': 'a'}, "field 'completion': missing"),
    (
      formats.completions,
      {'prompt': 3, 'completion': 'a'},
      "field 'prompt': must be text or messages",
    ),
    (formats.completions, {'messages': []}, "field 'messages': must be text or messages"),
    (formats.completions, {'messages': [{'role': 'user'}, GOOD]}, 'content of a message'),
    (formats.completions, {'messages': [{'role': 'boss', 'content': ''}]}, 'role of a message'),
    (formats.completions, {'messages': ['hello']}, 'every message must be an object'),
    (formats.completions, {'messages': [GOOD]}, 'no message before the answer'),
    (formats.completions, {'messages': [GOOD, USER]}, "last message must be the assistant's"),
    (formats.completions, {'messages': [{'role': 'tool', 'content': ''}, GOOD]}, 'no tools'),
    (formats.completions, {'instruction': 'a'}, "field 'output': missing"),
    (formats.comparisons, {'text': 'a'}, "field 'chosen': missing"),
    (formats.comparisons, {'prompt': 'a', 'chosen': 'b'}, "field 'rejected': missing"),
    (
      formats.comparisons,
      {'chosen': 'b', 'rejected': 'c'},
      "field 'chosen': must be a dialogue with",
    ),
    (formats.comparisons, {'completions': ['b', 'c']}, "field 'prompt': missing"),
    (
      formats.comparisons,
      {'prompt': 'a', 'completions': 'bc'},
      "field 'completions': must be a non-empty list",
    ),
    (formats.comparisons, {'prompt': 'a', 'completions': ['b']}, 'at least two'),
    (formats.comparisons, {'prompt': 'a', 'completions': ['b', 'c'], 'best': 2}, "field 'best'"),
    (
      formats.comparisons,
      {'prompt': 'a', 'completions': ['b', 'c'], 'ranks': [1]},
      "field 'ranks': must be a list with one number per completion",
    ),
    (
      formats.comparisons,
      {'prompt': 'a', 'completions': ['b', 'c'], 'ratings': [1, 'x']},
      "field 'ratings': must be a finite number",
    ),
    (
      formats.comparisons,
      {'prompt': 'a', 'completion': 'b', 'rating': float('nan')},
      "field 'rating': must be a finite number",
    ),
    (
      formats.comparisons,
      {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': True},
      "field 'margin': must be a finite number",
    ),
    (formats.prompts, {'question': 'a'}, "field 'prompt': missing.*config.data.columns"),
  ],
)
def test_complaints_name_place_and_field(convert, row, complaint, chatty):
  good = {'prompt': 'p', 'completion': 'a', 'rating': 1}
  with pytest.raises(DataError, match=complaint) as caught:
    convert(records(good, row), tokenizer=chatty)
  assert str(caught.value).startswith('x.jsonl:2: field ')
  examples, report = convert(records(good, row), tokenizer=chatty, on_error='skip')
  assert len(examples) == 1 and report.kept == 1
  assert list(report.left_out.values()) == [('x.jsonl:2',)]


def test_report_is_fit_for_printing():
  rows = records(
    {'prompt': 'a', 'completion': 'b'},
    {'prompt': 'a', 'completion': ' '},
    {'prompt': 'a'},
    {'prompt': 'a', 'completion': ''},
  )
  _, report = formats.completions(rows, on_error='skip')
  assert str(report) == (
    "1 of 4 records kept; 1 left out: completion: missing among ['prompt'] (first: x.jsonl:3); "
    '2 left out: empty completion (first: x.jsonl:2)'
  )


def test_comparisons_of_the_same_text_are_counted_and_left_out():
  rows = [
    {'prompt': 'p', 'chosen': 'a', 'rejected': 'a'},
    {'prompt': 'p', 'chosen': 'a', 'rejected': 'a '},
    {'prompt': 'p', 'completions': ['a', 'a']},
    {'prompt': 'p', 'completions': ['a', 'a', 'b']},
    {'prompt': 'p', 'completions': ['a', 'a'], 'ratings': [1, 2]},
    {'prompt': 'p', 'completion': 'a', 'rating': 1},
  ]
  examples, report = formats.comparisons(records(*rows))
  assert report.left_out == {shapes.SAME_COMPLETIONS: ('x.jsonl:1', 'x.jsonl:3')}
  assert len(examples) == report.kept == 4
  # As texts for training they are still valid.
  assert len(formats.completions(records(*rows))[0]) == 6


def test_empty_prompts_are_kept_and_counted(chatty):
  answer = {'completion': 'a', 'chosen': 'a', 'rejected': 'b'}
  rows = records({'prompt': ' \n', **answer}, {'prompt': 'p', **answer}, {'prompt': '', **answer})
  for convert in (formats.completions, formats.comparisons, formats.prompts):
    examples, report = convert(rows)
    assert len(examples) == report.kept == 3
    assert report.empty_prompts == ('x.jsonl:1', 'x.jsonl:3') and not report.left_out
  assert str(report) == '3 of 3 records kept; 2 kept with an empty prompt (first: x.jsonl:1)'
  assert not formats.texts(rows)[1].empty_prompts
  blank = {'role': 'user', 'content': ''}
  rows = records(
    {'messages': [blank, GOOD]},
    {'messages': [USER, GOOD, USER, GOOD]},
    {'messages': [USER, GOOD, blank, GOOD]},
    {'instruction': '', 'output': 'a'},
    {'instruction': '', 'input': 'Q', 'output': 'a'},
    {'prompt': '', 'completion': [GOOD]},
  )
  for convert in (formats.completions, formats.prompts):
    assert convert(rows, tokenizer=chatty)[1].empty_prompts == (
      'x.jsonl:1',
      'x.jsonl:3',
      'x.jsonl:4',
      'x.jsonl:6',
    )
  # Fields that do not hold the prompt are not checked.
  rows = records({'prompt': [GOOD], 'completion': [GOOD]}, {'messages': [USER, GOOD], 'prompt': 7})
  assert not formats.completions(rows, tokenizer=chatty)[1].empty_prompts
  assert not formats.prompts(records({'text': 'a', 'chosen': 7}))[1].empty_prompts


# Files.


def write_rows(path, rows):
  """Writes a file in its suffix's format; in CSV and TSV lists are JSON, None is an empty cell."""
  if path.suffix == '.parquet':
    pyarrow = pytest.importorskip('pyarrow')
    pytest.importorskip('pyarrow.parquet')

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  elif path.suffix == '.jsonl':
    sources.write(path, rows)
  else:
    cell = lambda value: json.dumps(value) if isinstance(value, list) else value
    with open(path, 'w', newline='', encoding='utf-8-sig') as stream:
      writer = csv.writer(stream, delimiter={'.csv': ',', '.tsv': '\t'}[path.suffix])
      writer.writerow(rows[0])
      writer.writerows([cell(value) for value in row.values()] for row in rows)
  return str(path)


ANSWER = '1, "two"\n\tthree\n'
STORED = {
  'completions': (
    formats.completions,
    [
      {'prompt': '007', 'completion': ANSWER, 'label': True},
      {'prompt': 'q', 'completion': '1e3', 'label': None},
    ],
    [Completion('007', ANSWER), Completion('q', '1e3')],
  ),
  'labelled': (
    formats.completions,
    [
      {'prompt': 'p', 'completion': 'a', 'label': False},
      {'prompt': 'p', 'completion': 'b', 'label': True},
    ],
    [Completion('p', 'b')],
  ),
  'messages': (
    formats.completions,
    [{'messages': [USER, GOOD]}],
    [Completion('[user]Q[assistant]', 'good<|eos|>')],
  ),
  'alpaca': (
    formats.completions,
    [{'instruction': 'Q', 'input': None, 'output': 'good', 'chosen': 'c', 'rejected': 'd'}],
    [Completion('[user]Q[assistant]', 'good<|eos|>')],
  ),
  'alpaca pairs': (
    formats.comparisons,
    [{'instruction': 'Q', 'input': None, 'output': 'c', 'chosen': 'good', 'rejected': 'bad'}],
    [PAIR],
  ),
  'pairs': (
    formats.comparisons,
    [
      {'prompt': '007', 'chosen': '1', 'rejected': ANSWER, 'margin': 2.5},
      {'prompt': 'q', 'chosen': '10', 'rejected': '9', 'margin': None},
    ],
    [Comparison('007', ('1', ANSWER), (0, 1), None, 2.5), Comparison('q', ('10', '9'), (0, 1))],
  ),
  'ranks': (
    formats.comparisons,
    [{'prompt': 'p', 'completions': ['1', ANSWER], 'ranks': [2, 1]}],
    [Comparison('p', ('1', ANSWER), (1, 0))],
  ),
  'ratings': (
    formats.comparisons,
    [{'prompt': 'p', 'completions': ['a', 'b'], 'ratings': [0.5, 3.0]}],
    [Comparison('p', ('a', 'b'), (1, 0), (0.5, 3.0))],
  ),
  'best': (
    formats.comparisons,
    [{'prompt': 'p', 'completions': ['a', 'b'], 'best': 1}],
    [Comparison('p', ('a', 'b'), (1, 0))],
  ),
  'rating': (
    formats.comparisons,
    [{'prompt': 'p', 'completion': '5', 'rating': -1.5}],
    [Comparison('p', ('5',), (0,), (-1.5,))],
  ),
  'label': (
    formats.comparisons,
    [{'prompt': 'p', 'completion': '5', 'label': False}],
    [Comparison('p', ('5',), (0,), (0.0,))],
  ),
  'texts': (formats.texts, [{'text': '007'}, {'text': ANSWER}], ['007', ANSWER]),
  'prompts': (
    formats.prompts,
    [{'prompt': '007', 'answer': '042', 'label': 'positive'}],
    [Prompt('007', {'answer': '042', 'label': 'positive'})],
  ),
}


@pytest.mark.parametrize('suffix', ['csv', 'tsv', 'jsonl', 'parquet'])
@pytest.mark.parametrize('shape', STORED)
def test_files_of_every_format_give_the_same_examples(tmp_path, shape, suffix, chatty):
  convert, rows, expected = STORED[shape]
  path = write_rows(tmp_path / f'a.{suffix}', rows)
  assert convert(sources.read(path), tokenizer=chatty)[0] == expected


def test_labels_of_csv_as_spreadsheets_and_pandas_write_them(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('prompt,completion,label\np,a,TRUE\np,b,False\np,c,false\np,d,0\n')
  assert [e.ratings[0] for e in formats.comparisons(sources.read(path))[0]] == [1, 0, 0, 0]
  assert [e.completion for e in formats.completions(sources.read(path))[0]] == ['a', 'd']


@pytest.mark.parametrize(
  'header, row, complaint',
  [
    ('prompt,completion,rating', 'p,a,good', "field 'rating': must be a finite number"),
    ('prompt,completion,rating', 'p,a,nan', "field 'rating': must be a finite number"),
    ('prompt,completion,rating', 'p,a,', "field 'chosen': missing"),
    ('prompt,completions', 'p,a|b', "field 'completions': must be a non-empty list"),
    ('prompt,completions,best', 'p,"[""a"", ""b""]",1.5', "field 'best'"),
    ('prompt,chosen,rejected', 'p,a,', "field 'rejected': missing"),
  ],
)
def test_invalid_cells_are_named(tmp_path, header, row, complaint):
  path = tmp_path / 'a.csv'
  path.write_text(f'{header}\n{row}\n')
  with pytest.raises(DataError, match=complaint) as caught:
    formats.comparisons(sources.read(path))
  assert str(caught.value).startswith(f'{path}:2: ') and 'The first row' not in str(caught.value)


def test_strings_for_numbers_are_refused_in_typed_files():
  with pytest.raises(DataError, match="field 'rating': must be a finite number"):
    formats.comparisons(records({'prompt': 'p', 'completion': 'a', 'rating': '1'}))


def test_nothing_left_is_an_error():
  with pytest.raises(UserError, match='no record of the data can be used: 0 of 1 records kept'):
    formats.completions(records({'prompt': 'a', 'completion': ''}))


def test_on_error_is_checked():
  with pytest.raises(UserError, match="on_error is 'ignore'"):
    formats.texts(records({'text': 'a'}), on_error='ignore')


def test_messages_without_a_template_stop_even_when_skipping(tmp_path):
  plain = tokenizers.train_bpe(['a'], 259, str(tmp_path / 'bpe'))
  rows = (
    {'messages': [USER, GOOD], 'label': True},
    {'prompt': 'Q', 'chosen': [GOOD], 'rejected': [BAD]},
    {'instruction': 'Q', 'output': 'good', 'chosen': [GOOD], 'rejected': [BAD]},
  )
  for tokenizer, row in itertools.product((None, plain), rows):
    for convert in (formats.texts, formats.completions, formats.comparisons, formats.prompts):
      with pytest.raises(UserError, match=r'no chat template.*config\.data\.chat_template'):
        convert(records(row), tokenizer=tokenizer, on_error='skip')


def test_harmless_rows(shared):
  """Exactly the rows known to be unusual are left out, each for its own reason."""
  rows = sources.read(str(shared / 'data/hh-rlhf/harmless-base/test.jsonl.gz'))
  assert len(rows) == 2312
  examples, report = formats.comparisons(rows)
  lines = {
    reason: [int(place.rsplit(':', 1)[1]) - 1 for place in places]
    for reason, places in report.left_out.items()
  }
  assert lines == {
    shapes.DIFFERENT_PROMPTS: [1254, 1688, 1950, 1952, 2036],
    shapes.EMPTY_COMPLETION: [86, 516, 925, 1103],
  }
  assert len(examples) == report.kept == 2303
  for example, row in zip(examples, rows):  # the first 86 rows correspond
    if row.where == rows[86].where:
      break
    assert example.prompt + example.completions[0] == row.fields['chosen']
    assert example.prompt + example.completions[1] == row.fields['rejected']
    assert example.prompt.endswith(shapes.HH_TURN)


@pytest.mark.parametrize(
  'name, count, convert',
  [
    ('preferences/dpo_en_demo.json', 300, formats.comparisons),
    ('preferences/kto_en_demo.json', 300, formats.comparisons),
    ('preferences/kto_en_demo.json', 150, formats.completions),
    ('instructions/alpaca_en_demo.json', 999, formats.completions),
    ('instructions/alpaca_en_demo.json', 999, formats.prompts),
  ],
)
def test_shared_conversations(shared, name, count, convert):
  tokenizer = tokenizers.load(str(shared / 'models/gpt2-tokenizer'))
  chat.use_template(tokenizer, 'hh')
  examples, _ = convert(sources.read(str(shared / 'data' / name)), tokenizer=tokenizer)
  assert len(examples) == count
  assert all(example.prompt.endswith('\n\nAssistant:') for example in examples)


CONTEXT = 'Be brief. '


@pytest.mark.parametrize(
  'row, prompt',
  [
    ({'prompt': 'Q:', 'completion': ' a'}, 'Be brief. Q:'),
    ({'prompt': [USER], 'completion': [GOOD]}, '[system]Be brief. [user]Q[assistant]'),
    ({'messages': [SYSTEM, USER, GOOD]}, '[system]Be brief. \n\nS[user]Q[assistant]'),
  ],
)
def test_prompts_after_a_context(row, prompt, chatty):
  """A context precedes a text, and becomes the message of the system before messages."""
  in_context = one(formats.in_context(formats.completions, CONTEXT), row, chatty)
  assert in_context == Completion(prompt, one(formats.completions, row, chatty).completion)
  in_context = one(formats.in_context(formats.prompts, CONTEXT), row, chatty)
  assert in_context == Prompt(prompt, one(formats.prompts, row, chatty).metadata)


def test_a_template_must_read_a_context(tmp_path):
  tokenizer = tokenizers.train_bpe(['abc'], 259, str(tmp_path))
  chat.use_template(
    tokenizer,
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}"
    '{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}',
  )
  for convert in (formats.prompts, formats.completions):
    read = formats.in_context(convert, CONTEXT)
    with pytest.raises(DataError, match="'messages': the chat template ignores messages of the"):
      read(records({'messages': [USER, GOOD]}), tokenizer=tokenizer)
    row = {'prompt': 'Q:', 'completion': ' a'}
    assert one(read, row, tokenizer).prompt == 'Be brief. Q:'
  assert one(formats.in_context(formats.prompts, CONTEXT), {'text': 'Q'}, tokenizer).prompt == (
    'Be brief. Q'
  )


def test_a_context_before_a_text_needs_no_template():
  row = {'prompt': 'Q:', 'completion': ' a'}
  assert one(formats.in_context(formats.prompts, CONTEXT), row).prompt == 'Be brief. Q:'

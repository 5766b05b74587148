"""CSV and TSV files of 10,000 rows, read as pandas and csv read them; bad rows are named."""

import csv
import gzip
import json
import random

import pandas
import pytest

from rlhf_jax.data import files
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import stored
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

COUNT = 10_000
NAMES = ('id', 'prompt', 'completion', 'label', 'note')
DELIMITERS = {'csv': ',', 'tsv': '\t'}


def generated_rows():
  """Returns rows of random texts with delimiters, quotes, line breaks and several scripts."""
  draw, alphabet = random.Random(0), 'ab ,;\t"\'\n\r\\|é你😀\u2028\xa0-='
  text = lambda most: ''.join(draw.choices(alphabet, k=draw.randint(0, most)))
  return [
    [f'{i:05}', 'p' + text(60), 'c' + text(20), draw.choice(['1', '0', 'true', 'FALSE']), text(3)]
    for i in range(COUNT)
  ]


def real_rows(shared):
  """Returns reviews with their labels, dialogues of many lines, and pages of the web."""
  rows, data = [], shared / 'data'
  for line in gzip.open(data / 'hh-rlhf/harmless-base/test.jsonl.gz', 'rt', encoding='utf-8'):
    prompt, turn, reply = json.loads(line)['chosen'].rpartition('\n\nAssistant:')
    rows.append([prompt + turn, reply, '', 'dialogue, "real"'])
  for line in open(data / 'text/c4_demo.jsonl', encoding='utf-8'):
    rows.append(['', json.loads(line)['text'], '', ''])
  for name, label in (('neg', 0), ('pos', 1)):
    lines = (data / f'rt-polarity/rt-polarity.{name}').read_bytes().decode('latin-1').split('\n')
    rows += [[line.strip(), f' {name}', label, ''] for line in lines if line.strip()]
  random.Random(0).shuffle(rows)
  return [[f'{i:05}', *map(str, row)] for i, row in enumerate(rows[:COUNT])]


@pytest.fixture(params=['generated', 'real'], scope='module')
def rows(request):
  if request.param == 'generated':
    return generated_rows()
  return real_rows(request.getfixturevalue('shared'))


def write(path, rows, suffix):
  """Writes a table as a spreadsheet does; returns its path and the first line of every row."""
  with open(path := path / f'a.{suffix}', 'w', newline='', encoding='utf-8-sig') as stream:
    csv.writer(stream, delimiter=DELIMITERS[suffix]).writerows([NAMES, *rows])
  ends, line = [], 2
  for row in rows:
    ends.append(line)
    line += 1 + sum(cell.count('\n') for cell in row)
  return str(path), ends


def values(record):
  return ['' if record.fields[name] is None else record.fields[name] for name in NAMES]


@pytest.mark.parametrize('suffix', DELIMITERS)
def test_ten_thousand_rows_are_those_of_pandas_and_csv(rows, suffix, tmp_path, monkeypatch):
  path, lines = write(tmp_path, rows, suffix)
  found = sources.read(path)
  assert [values(record) for record in found] == rows
  assert [record.where for record in found] == [f'{path}:{line}' for line in lines]
  delimiter = DELIMITERS[suffix]
  with open(path, newline='', encoding='utf-8-sig') as stream:
    assert [[*row.values()] for row in csv.DictReader(stream, delimiter=delimiter)] == rows
  frame = pandas.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False)
  assert frame.to_numpy().tolist() == rows and tuple(frame) == NAMES
  assert any('\n' in row[1] for row in rows) and not ''.join(map(''.join, rows)).isascii()

  monkeypatch.setattr(stored, 'SMALL', 0)  # with an index on disk, which is then read again
  monkeypatch.setattr(files, 'INDEXED', 999)
  for _ in range(2):
    again = sources.read(path)
    assert len(again) == COUNT
    for index in (COUNT - 1, 0, 1000, 998, 999):
      assert values(again[index]) == rows[index] and again[index].where == found[index].where
  assert [file.suffix for file in tmp_path.iterdir()].count(f'.{suffix}-rows') == 1


def test_columns_have_types(rows, tmp_path):
  path, _ = write(tmp_path, rows, 'csv')
  examples, report = formats.comparisons(
    [record for record in sources.read(path) if record.fields['label']]
  )
  rated = [row for row in rows if row[3] and row[2].strip()]
  assert [example.ratings for example in examples] == [
    (float({'true': 1, 'false': 0}.get(row[3].lower(), row[3])),) for row in rated
  ]
  assert len(rated) > 7000 and report.kept == len(rated)
  prompts, _ = formats.prompts(sources.read(path, columns={'text': 'completion'})[:50])
  assert [prompt.metadata['id'] for prompt in prompts] == [f'{i:05}' for i in range(50)]


@pytest.mark.parametrize('small', [True, False])
def test_bad_rows_among_good_ones_are_named(rows, small, tmp_path, monkeypatch):
  monkeypatch.setattr(stored, 'SMALL', stored.SMALL if small else 0)
  bad = {17: rows[17][:4], 4000: [*rows[4000], 'more'], 9999: ['alone']}
  path, lines = write(tmp_path, [bad.get(i, row) for i, row in enumerate(rows)], 'csv')
  records = sources.read(path)
  named = {}
  for index in range(COUNT):
    try:
      assert values(records[index]) == rows[index]
    except DataError as error:
      named[index] = str(error)
  assert named.keys() == bad.keys()
  for index, cells in ((17, 4), (4000, 6), (9999, 1)):
    assert named[index].startswith(
      f'{path}:{lines[index]}: the row has {cells} cells, but the first row names 5 columns: id, '
    )


@pytest.mark.parametrize('name, opened', [('a.csv', open), ('a.csv.gz', gzip.open)])
def test_an_empty_file_is_named(name, opened, tmp_path):
  opened(tmp_path / name, 'wb').close()
  with pytest.raises(UserError, match=f'{name}: the data set is empty'):
    sources.read(str(tmp_path / name))


def test_a_line_that_is_too_long_is_named(tmp_path):
  """It is not read up to the middle of a character, which would not be UTF-8."""
  path = tmp_path / 'a.csv'
  path.write_text('prompt\nx' + 'é' * (stored.LONGEST // 2) + '\n', encoding='utf-8')
  with pytest.raises(DataError, match=r'a\.csv:2: a record may have 16 MiB at most'):
    sources.read(str(path))


def test_a_cell_that_is_too_large_is_named(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('prompt\na\n"' + 'b\n' * (stored.LONGEST // 2 + 1) + '"\n')
  with pytest.raises(
    DataError, match=r'a\.csv:3: the row that starts here is not valid CSV.*limit'
  ):
    sources.read(str(path))

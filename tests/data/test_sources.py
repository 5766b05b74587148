"""Records of every kind of source, the place that messages name, and invalid sources."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from rlhf_jax import config as config_lib
from rlhf_jax.data import files
from rlhf_jax.data import formats
from rlhf_jax.data import progress
from rlhf_jax.data import sources
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def fields(records):
  return [record.fields for record in records]


def places(records):
  return [record.where.rsplit('/', 1)[1] for record in records]


def test_jsonl_keeps_all_fields_and_counts_blank_lines(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"text": "one", "extra": [1]}\n\n{"text": "two"}\n')
  records = sources.read(path)
  assert fields(records) == [{'text': 'one', 'extra': [1]}, {'text': 'two'}]
  assert [record.where for record in records] == [f'{path}:1', f'{path}:3']


def test_jsonl_lines_end_at_line_feeds_only(tmp_path):
  text = 'a\u2028b\x85c'
  path = write(tmp_path / 'a.jsonl', json.dumps({'text': text}, ensure_ascii=False) + '\r\n')
  assert fields(sources.read(path)) == [{'text': text}]


def test_gzipped_jsonl(tmp_path):
  path = write(tmp_path / 'a.jsonl.gz', gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
  records = sources.read(path)
  assert fields(records) == [{'text': 'one'}, {'text': 'two'}]
  assert places(records) == ['a.jsonl.gz:1', 'a.jsonl.gz:2']


@pytest.mark.parametrize(
  'line, complaint',
  [
    ('{"text": ', 'not valid JSON'),
    ('["a"]', 'must be a JSON object'),
    ('7', 'must be a JSON object'),
  ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, complaint):
  path = write(tmp_path / 'a.jsonl', '{"text": "one"}\n' + line + '\n')
  with pytest.raises(DataError, match=complaint) as caught:
    list(sources.read(path))
  assert str(caught.value).startswith(f'{path}:2: ')


def test_jsonl_that_is_not_utf8_is_named(tmp_path):
  path = write(tmp_path / 'a.jsonl', b'{"text": "caf\xe9"}\n')
  with pytest.raises(DataError, match=r'a\.jsonl:1: not valid JSON'):
    list(sources.read(path))


def test_truncated_and_damaged_gzip(tmp_path):
  whole = gzip.compress(b''.join(b'{"text": "%d"}\n' % i for i in range(1000)))
  with pytest.raises(DataError, match=r'cut\.jsonl\.gz: damaged or truncated gzip file after line'):
    sources.read(write(tmp_path / 'cut.jsonl.gz', whole[: len(whole) // 2]))
  with pytest.raises(DataError, match='after line 0'):
    sources.read(write(tmp_path / 'no.jsonl.gz', b'not gzip at all'))


def test_json_list_and_object_with_one_list(tmp_path):
  rows = [{'prompt': 'a'}, {'prompt': 'b'}]
  records = sources.read(write(tmp_path / 'a.json', json.dumps(rows)))
  assert fields(records) == rows and places(records) == ['a.json:item 0', 'a.json:item 1']
  path = write(tmp_path / 'b.json', json.dumps({'version': 1, 'sizes': [1, 2], 'rows': rows}))
  assert fields(sources.read(path)) == rows


def test_json_object_with_several_lists_needs_a_split(tmp_path):
  path = write(tmp_path / 'a.json', json.dumps({'walks': ['ab', 'c'], 'rows': [{'prompt': 'a'}]}))
  with pytest.raises(UserError, match=r"exactly one list.*\['rows', 'walks'\].*split"):
    sources.read(path)
  assert fields(sources.read(path, split='walks')) == [{'text': 'ab'}, {'text': 'c'}]
  with pytest.raises(UserError, match=r"under 'test'; the lists are \['rows', 'walks'\]"):
    sources.read(path, split='test')


def test_malformed_json_names_the_line(tmp_path):
  with pytest.raises(DataError, match=r'a\.json:2: not valid JSON.*\.jsonl'):
    sources.read(write(tmp_path / 'a.json', '{"text": "one"}\n{"text": "two"}\n'))
  with pytest.raises(DataError, match=r'b\.json:item 1: .* a int'):
    list(sources.read(write(tmp_path / 'b.json', '[{"text": "one"}, 2]')))
  with pytest.raises(DataError, match='must be a list of objects'):
    sources.read(write(tmp_path / 'c.json', '3'))


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  pytest.importorskip('pyarrow.parquet')

  rows = [
    {'prompt': 'a', 'completions': ['x', 'y'], 'rating': 1.5},
    {'prompt': 'b', 'completions': ['z'], 'rating': None},
  ]
  path = str(tmp_path / 'a.parquet')
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  records = sources.read(path)
  assert fields(records) == rows and places(records) == ['a.parquet:row 0', 'a.parquet:row 1']
  with pytest.raises(DataError, match='not a readable Parquet file'):
    sources.read(write(tmp_path / 'b.parquet', b'PAR1 and no more'))


def test_text_lines(tmp_path):
  records = sources.read(write(tmp_path / 'a.txt', ' one\r\n\n  \ntwo  \n'))
  assert fields(records) == [{'text': ' one'}, {'text': 'two  '}]
  assert places(records) == ['a.txt:1', 'a.txt:4']


def test_text_separators(tmp_path):
  path = write(tmp_path / 'a.txt', '\nx\ny\n<|endoftext|>\n\nz\n<|endoftext|>\n')
  records = sources.read(path, separator='<|endoftext|>')
  assert fields(records) == [{'text': 'x\ny'}, {'text': 'z'}]
  assert places(records) == ['a.txt:2', 'a.txt:6']
  assert [r['text'] for r in fields(sources.read(path, separator='\n\n'))] == [
    'x\ny\n<|endoftext|>',
    'z\n<|endoftext|>',
  ]
  whole = sources.read(path, separator='')
  assert len(whole) == 1 and whole[0].where == f'{path}:2'


def test_latin1_is_the_fallback_for_text(tmp_path):
  path = write(tmp_path / 'a.txt', b'caf\xe9 one\nna\xefve\x85 two\n')
  assert fields(sources.read(path)) == [{'text': 'caf\xe9 one'}, {'text': 'na\xefve\x85 two'}]
  path = write(tmp_path / 'b.txt', 'caf\xe9\n'.encode('utf-8-sig'))
  assert fields(sources.read(path)) == [{'text': 'caf\xe9'}]


@pytest.mark.parametrize('name', ['a.pos', 'prompts.jsnl', 'prompts.xlsx', 'prompts', 'a.zst.gz'])
def test_unknown_suffixes_need_a_format_in_the_config(tmp_path, name):
  path = write(tmp_path / name, '{"text": "a"}\n')
  with pytest.raises(
    UserError,
    match=r"unknown suffix '.*'; known suffixes are \.jsonl, .*"
    r'set config\.data\.format to one of .*, text, arrayrecord\.',
  ) as caught:
    sources.read(path)
  assert str(caught.value).startswith(f'{path}: ')
  if not name.endswith('.gz'):
    assert fields(sources.read(path, format='text')) == [{'text': '{"text": "a"}'}]
    assert fields(sources.read(path, format='jsonl')) == [{'text': 'a'}]


def test_the_format_of_the_config_comes_before_the_suffix(tmp_path):
  assert set(config_lib.FORMATS) == set(files.FORMATS.values())
  path = write(tmp_path / 'a.csv', 'text\none, two\n')
  assert fields(sources.read(path, format='text')) == [{'text': 'text'}, {'text': 'one, two'}]
  assert fields(sources.read(path, format='tsv')) == [{'text': 'one, two'}]


def test_reading_that_takes_long_shows_its_progress(tmp_path, monkeypatch, capsys):
  path = write(tmp_path / 'a.jsonl', '{"text": "a"}\n' * 3)
  records = sources.read(path)
  formats.texts(records)
  assert not capsys.readouterr().err
  monkeypatch.setattr(progress, 'DELAY_SECONDS', 0.0)
  formats.texts(records)
  assert 'reading records' in capsys.readouterr().err


# CSV and TSV.


ROWS = [
  {'prompt': '007', 'completion': ' a, "b"\nc\t', 'id': '1.50'},
  {'prompt': 'caf\xe9 \u2028 \u4f60', 'completion': ' ', 'id': None},
]


def table(delimiter=',', end='\r\n'):
  """Writes ROWS as a spreadsheet saves them, with an empty line and an empty row."""
  cells = lambda *row: delimiter.join(row) + end
  return (
    cells('prompt', 'completion', '', 'id')
    + cells('007', '" a, ""b""\nc\t"', '', '1.50')
    + end
    + cells('', '', '', '')
    + cells(ROWS[1]['prompt'], ' ', 'x', '')
  )


@pytest.mark.parametrize(
  'name, content',
  [
    ('a.csv', table().encode('utf-8-sig')),
    ('a.csv', table(end='\n').removesuffix('\n')),
    ('a.tsv', table('\t')),
    ('a.TSV.gz', gzip.compress(table('\t').encode('utf-8-sig'))),
    ('a.csv.gz', gzip.compress(table().encode())),
  ],
  ids=['bom', 'no last newline', 'tsv', 'tsv.gz', 'csv.gz'],
)
def test_csv_is_read_by_the_names_of_its_columns(tmp_path, name, content):
  records = sources.read(write(tmp_path / name, content))
  # A column without a name counts as a column; empty cells are absent.
  assert fields(records) == [ROWS[0] | {'column 3': None}, ROWS[1] | {'column 3': 'x'}]
  assert places(records) == [f'{name}:2', f'{name}:6']
  assert all(record.untyped for record in records)


def test_csv_holds_long_texts(tmp_path):
  text = 'long, "text"\n' * 20_000
  cell = text.replace('"', '""')
  (record,) = sources.read(write(tmp_path / 'a.csv', f'text\n"{cell}"\n'))
  assert record.fields == {'text': text}


@pytest.mark.parametrize(
  'content, line, complaint',
  [
    ('p,c\na,b\n"a\n\n",b,c\n', 3, 'the first row names 2 columns: p, c'),
    ('p,c\na\n', 2, '1 cells, but the first row'),
    ('p,c\na,b\n"a,b\nc,d\n', 3, 'the row that starts here is not valid CSV'),
    ('p,c\na,"b" c\n', 2, 'not valid CSV .*double the quotes in it'),
    ('p,p\na,b\n', 1, "two columns are named 'p'"),
    (b'p,c\n"\n",b\ncaf\xe9,b\n', 4, 'not UTF-8'),
    ('p\n1\n'.encode('utf-16'), 1, 'not UTF-8'),
  ],
)
def test_bad_rows_of_csv_are_named(tmp_path, content, line, complaint):
  path = write(tmp_path / 'a.csv', content)
  with pytest.raises(DataError, match=complaint) as caught:
    list(sources.read(path))
  assert str(caught.value).startswith(f'{path}:{line}: ')


@pytest.mark.parametrize(
  'name, content, parts',
  [
    (
      'a.csv',
      'prompt;completion\np;c, d\n',
      [
        ":1: there is one column, 'prompt;completion'; cells must be separated by ','. Are these "
        "separated by ';'? Save the file"
      ],
    ),
    (
      'a.csv',
      'prompt\tcompletion\np\tc\n',
      ["separated by '\\t'? Name the file .tsv, or set config.data.format to 'tsv'"],
    ),
    (
      'a.tsv',
      '\nprompt,completion\np,c\n',
      [":2: there is one column, 'prompt,completion'", "separated by ','? Name the file .csv"],
    ),
    (
      'a.csv',
      'yes,yes\nno,yes\n',
      ["two columns are named 'yes'. The first row must give every column"],
    ),
  ],
)
def test_other_separators_are_named(tmp_path, name, content, parts):
  with pytest.raises(DataError) as caught:
    sources.read(write(tmp_path / name, content))
  for part in parts:
    assert part in str(caught.value)


@pytest.mark.parametrize('content', ['a;\none\n', 'text\none; two\n', '"a, b"\none\n'])
def test_one_column_may_hold_separators(tmp_path, content):
  assert len(sources.read(write(tmp_path / 'a.csv', content))) == 1


def test_csv_without_a_header_is_refused(tmp_path):
  path = write(tmp_path / 'a.csv', f'{"how " * 20}?,fine\nwhy?,so\n')
  with pytest.raises(
    DataError, match=r"there is no field 'q'.* The first row of the file must name the columns."
  ):
    list(sources.read(path, columns={'prompt': 'q'}))
  with pytest.raises(
    DataError,
    match=r"field 'prompt': missing among \['fine', '(how )+h?o?w?\.\.\.'\]. The first "
    'row of the file must name the columns. If your columns have other names',
  ):
    formats.completions(sources.read(path))


def test_csv_of_a_header_alone_is_empty(tmp_path):
  with pytest.raises(UserError, match='the data set is empty'):
    sources.read(write(tmp_path / 'a.csv', 'prompt,completion\n'))


# Directories.


def test_directory_in_sorted_order_and_by_split(tmp_path):
  (tmp_path / 'sub').mkdir()
  write(tmp_path / 'train-1.jsonl', '{"text": "b"}\n')
  write(tmp_path / 'train-0.jsonl.gz', gzip.compress(b'{"text": "a"}\n'))
  write(tmp_path / 'sub' / 'test.txt', 'c\n')
  write(tmp_path / 'README.md', 'no data\n')
  write(tmp_path / '.hidden.txt', 'no data\n')
  (tmp_path / '.cache').mkdir()
  write(tmp_path / '.cache' / 'test.txt', 'no data\n')
  texts = lambda split: [f['text'] for f in fields(sources.read(str(tmp_path), split=split))]
  assert texts('') == ['c', 'a', 'b']
  assert texts('train') == ['a', 'b']
  assert texts('test') == ['c']
  with pytest.raises(UserError, match=r"no file belongs to split 'valid'; .*sub/test\.txt"):
    texts('valid')


def test_directories_report_skipped_files(tmp_path, caplog):
  write(tmp_path / 'a.csv', 'text\none\n')
  write(tmp_path / 'b.jsonl', '{"text": "two"}\n')
  assert [r.fields['text'] for r in sources.read(tmp_path)] == ['one', 'two']
  assert not caplog.records
  for name in ('README.md', 'c.pos'):
    write(tmp_path / name, 'three\n')
  assert [r.fields['text'] for r in sources.read(tmp_path)] == ['one', 'two']
  (record,) = caplog.records
  assert record.getMessage() == (
    f'{tmp_path}: skipped 2 of 4 files with unknown suffixes: README.md, c.pos.'
  )
  assert [r.fields['text'] for r in sources.read(tmp_path, format='text')] == [
    'three',
    'text',
    'one',
    '{"text": "two"}',
    'three',
  ]
  assert len(caplog.records) == 1


def test_sources_that_are_not_there(tmp_path, monkeypatch):
  (tmp_path / 'data').mkdir()
  monkeypatch.chdir(tmp_path)
  for path in (
    str(tmp_path / 'a.jsonl'),
    './nowhere',
    'some/where/a',
    'b.json',
    'c.csv',
    'd/e.tsv.gz',
    '.nowhere',
    '~/prompts',
    'data/prompts',
  ):
    with pytest.raises(UserError, match='no such file or directory') as caught:
      sources.read(path)
    assert str(caught.value).startswith(path)


def test_empty_sources(tmp_path):
  for name in ('a.jsonl', 'a.txt', 'a.csv'):
    with pytest.raises(UserError, match='the data set is empty'):
      sources.read(write(tmp_path / name, '\n'))
  with pytest.raises(UserError, match='the data set is empty'):
    sources.read(write(tmp_path / 'a.json', '[]'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='no data file in this directory'):
    sources.read(str(tmp_path / 'empty'))


def test_split_of_a_single_file_is_refused(tmp_path):
  with pytest.raises(UserError, match="a single file has no split 'train'"):
    sources.read(write(tmp_path / 'a.jsonl', '{"text": "a"}\n'), split='train')


def test_columns_are_renamed(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"question": "q", "answer": "a", "id": 1}\n')
  records = sources.read(path, columns={'prompt': 'question', 'completion': 'answer'})
  assert fields(records) == [{'prompt': 'q', 'completion': 'a', 'id': 1}]
  with pytest.raises(DataError, match=r"a\.jsonl:1: there is no field 'query'.*\['answer', 'id'"):
    list(sources.read(path, columns={'prompt': 'query'}))


def test_columns_can_be_swapped(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"a": 1, "b": 2}\n')
  assert fields(sources.read(path, columns={'a': 'b', 'b': 'a'})) == [{'a': 2, 'b': 1}]


def test_columns_that_replace_a_field_with_values_give_a_warning(tmp_path, caplog):
  rows = [
    {'prompt': 'old', 'question': 'q'},
    {'prompt': '', 'question': 'q'},
    {'prompt': None, 'question': 'q'},
    {'question': 'q'},
  ]
  path = write(tmp_path / 'a.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
  assert fields(sources.read(path, columns={'prompt': 'question'})) == [{'prompt': 'q'}] * 4
  (record,) = caplog.records
  assert record.getMessage() == (
    f"{path}: prompt=question in config.data.columns replaces field 'prompt', which has a value in "
    '1 of 4 records. Use another column to keep that field.'
  )
  caplog.clear()
  path = write(tmp_path / 'b.jsonl', '{"prompt": "p", "completion": "c"}\n')
  sources.read(path, columns={'prompt': 'completion', 'completion': 'prompt'})
  sources.read(path, columns={'prompt': 'prompt', 'text': 'completion'})
  assert not caplog.records


def test_tfds_source(monkeypatch):
  np = pytest.importorskip('numpy')
  rows = [{'text': b'caf\xc3\xa9', 'label': np.int64(1), 'scores': np.array([1.5, 2.0])}]
  known = {('imdb', 'test'): rows}
  fake = types.SimpleNamespace(data_source=lambda name, split: known[name, split])
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', fake)
  records = sources.read('tfds:imdb', split='test')
  assert fields(records) == [{'text': 'caf\xe9', 'label': 1, 'scores': [1.5, 2.0]}]
  assert records[0].where == 'tfds:imdb:row 0'
  with pytest.raises(UserError, match="tfds:other, split 'train': TFDS cannot load"):
    sources.read('tfds:other')


def test_an_extra_that_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[tfds\]'"):
    sources.read('tfds:imdb')


def test_hub_data_set(monkeypatch):
  monkeypatch.setattr(sources, '_hub_silence', lambda name: '')

  def load_dataset(name, config, *, split):
    if name != 'openai/gsm8k':
      raise FileNotFoundError('not on the hub')
    return [{'question': f'{config} {split}'}]

  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  records = sources.read('openai/gsm8k:main')
  assert fields(records) == [{'question': 'main train'}]
  assert records[0].where == 'openai/gsm8k:main:row 0'
  with pytest.raises(UserError, match=r'^no/such: no such file or directory .*not on the hub'):
    sources.read('no/such')


def test_a_silent_hub_gets_no_second_request(tmp_path):
  """Data loaded earlier can still be read; everything else fails within seconds."""
  script = """
import datasets, json, pathlib, shutil, sys, time
from rlhf_jax.data import sources
from rlhf_jax.errors import UserError
folder = pathlib.Path(sys.argv[1])
(folder / 'x.json').write_text('[{"prompt": "a"}]')
rows = datasets.load_dataset('json', data_files=str(folder / 'x.json'), split='train')
cached = pathlib.Path(datasets.config.HF_DATASETS_CACHE, 'me___tiny/default/0.0.0/0')
shutil.copytree(pathlib.Path(rows.cache_files[0]['filename']).parent, cached)
(cached / 'json-train.arrow').rename(cached / 'tiny-train.arrow')
info = json.loads((cached / 'dataset_info.json').read_text())
(cached / 'dataset_info.json').write_text(json.dumps(info | {'dataset_name': 'tiny'}))
start = time.monotonic()
try:
  sources.read('me/unknown')
except UserError as error:
  print(error)
print(sources.read('me/tiny')[0].fields)
print(time.monotonic() - start)
"""
  answer = subprocess.run(
    [sys.executable, '-c', script, str(tmp_path)],
    text=True,
    stdout=subprocess.PIPE,
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ
    | {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': '0', 'HF_HOME': str(tmp_path)},
  )
  error, fields, seconds = answer.stdout.splitlines()
  assert error.startswith('me/unknown: no such file or directory (current directory: ')
  assert 'the hub does not respond (ConnectError: ' in error
  assert fields == "{'prompt': 'a'}"
  assert float(seconds) < 15  # five retries took 23


def test_shared_corpora(shared):
  reviews = sources.read(str(shared / 'data/rt-polarity/rt-polarity.pos'), format='text')
  assert len(reviews) == 5331
  stories = sources.read(
    str(shared / 'data/text/tinystories_sample.txt'), separator='<|endoftext|>'
  )
  assert len(stories) == 5
  assert stories[0].fields['text'].startswith('Once upon a time there was a little boy named Ben.')
  assert len(sources.read(str(shared / 'data/gsm8k'), split='test')) == 1319
  walks = sources.read(str(shared / 'data/randomwalks.json'), split='walks')
  assert len(walks) == 1000 and walks[0].fields == {'text': 'sda'}

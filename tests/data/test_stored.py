"""Records that stay on disk: the index of lines, the copies, and records that cannot be read."""

import gzip
import json
import os
import random
import re
import resource
import threading
import tracemalloc

import numpy as np
import pytest

from rlhf_jax.data import derived
from rlhf_jax.data import files
from rlhf_jax.data import formats
from rlhf_jax.data import shapes
from rlhf_jax.data import sources
from rlhf_jax.data import stored
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError


@pytest.fixture
def large(monkeypatch):
  """Treats all files as large: with an index or a copy, and examples made at each access."""
  monkeypatch.setattr(stored, 'SMALL', 0)
  monkeypatch.setattr(formats, 'SMALL', 0)


def hidden(folder):
  return sorted(path.name for path in folder.iterdir() if path.name.startswith('.'))


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


# The index.


def test_index_of_lines_is_that_of_a_loop(monkeypatch):
  draw = random.Random(0)
  for _ in range(500):
    monkeypatch.setattr(stored, 'CHUNK', draw.choice([1, 2, 3, 7, 100]))
    content = ''.join(
      draw.choices(['\n', ' ', 'a', '{', '\n\n', '  \n', '\r\n'], k=draw.randrange(30))
    ).encode()
    found = [
      tuple(map(int, row))
      for rows in stored._index(stored._part_of(content), len(content))
      for row in rows
    ]
    offset, expected = 0, []
    for number, line in enumerate(re.findall(rb'[^\n]*\n|[^\n]+$', content), start=1):
      if line.strip():
        expected.append((offset, len(line), number))
      offset += len(line)
    assert found == expected, content


def test_the_index_is_made_once_and_anew_for_other_contents(large, tmp_path, monkeypatch):
  path = write(tmp_path / 'a.jsonl', '{"text": "a"}\n\n{"text": "b"}\n')
  assert [record.fields['text'] for record in sources.read(path)] == ['a', 'b']
  (index,) = hidden(tmp_path)
  assert re.fullmatch(r'\.a\.jsonl\.[0-9a-f]{16}\.lines', index)
  made = []
  write_index = stored._write_index
  monkeypatch.setattr(stored, '_write_index', lambda *args: made.append(1) or write_index(*args))
  records = sources.read(path)
  assert [record.where for record in records] == [f'{path}:1', f'{path}:3'] and not made
  write(
    tmp_path / f'.a.jsonl.{"0" * 16}.lines.{os.uname().nodename}.1.tmp',
    'of a process that was killed',
  )
  write(tmp_path / 'a.jsonl', '{"text": "c"}\n')
  assert [record.fields['text'] for record in sources.read(path)] == ['c'] and made
  assert hidden(tmp_path) != [index] and len(hidden(tmp_path)) == 1


def test_without_file_locks_no_process_removes_files_of_another(large, tmp_path, monkeypatch):
  monkeypatch.setattr(derived.fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError()))
  other = f'.a.jsonl.{"0" * 16}.lines.{os.uname().nodename}.1.tmp'
  write(tmp_path / other, 'of a process that is at it')
  assert len(sources.read(write(tmp_path / 'a.jsonl', '{"text": "a"}\n'))) == 1
  assert other in hidden(tmp_path)


def test_a_folder_may_have_more_files_than_a_process_may_open(tmp_path):
  for number in range(60):
    write(tmp_path / f'{number:02}.jsonl', f'{{"text": "{number}"}}\n')
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 30, limit[1]))
  try:
    assert [record.fields['text'] for record in sources.read(tmp_path)] == [
      f'{n}' for n in range(60)
    ]
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_the_cache_is_used_if_the_folder_cannot_be_written(large, tmp_path, monkeypatch):
  folder = tmp_path / 'data'
  folder.mkdir()
  path = write(folder / 'a.jsonl', '{"text": "a"}\n')
  makedirs = os.makedirs
  refused = lambda place, **options: (
    (_ for _ in ()).throw(PermissionError()) if place == str(folder) else makedirs(place, **options)
  )
  monkeypatch.setattr(derived.os, 'makedirs', refused)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  assert len(sources.read(path)) == 1
  assert not hidden(folder) and len(list((tmp_path / 'cache/rlhf_jax/data').iterdir())) == 1
  monkeypatch.setenv('XDG_CACHE_HOME', str(folder / 'a.jsonl'))  # not a folder
  with pytest.raises(UserError, match='can be written neither beside it nor in'):
    sources.read(path)


def test_threads_read_the_same_records(large, tmp_path):
  path = write(tmp_path / 'a.jsonl', ''.join(f'{{"text": "{i}"}}\n' for i in range(500)))
  records, wrong = sources.read(path), []

  def read(seed):
    for index in np.random.default_rng(seed).integers(500, size=500):
      if records[index].fields != {'text': str(index)}:
        wrong.append(index)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


# Formats.


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.parquet', 'a.arrayrecord'])
def test_large_files_give_the_records_of_small_ones(name, tmp_path, request):
  rows = [
    {'prompt': f'p{i}', 'completion': 'c' * (i % 7), 'tags': ['x', 'y'][: i % 3]}
    for i in range(700)
  ]
  lines = [json.dumps(row).encode() for row in rows]
  path = str(tmp_path / name)
  if name.endswith('parquet'):
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(1, 'completion', table['completion'].dictionary_encode())
    pyarrow.parquet.write_table(table, path, row_group_size=300)
  elif name.endswith('arrayrecord'):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
    for line in lines:
      writer.write(line)
    writer.close()
  else:
    write(tmp_path / name, (gzip.compress if name.endswith('gz') else bytes)(b'\n'.join(lines)))
  small = list(sources.read(path))
  request.getfixturevalue('large')
  records = sources.read(path)
  assert [record.fields for record in records] == rows and list(records) == small
  order = np.random.default_rng(0).permutation(700)
  assert [records[index] for index in order] == [small[index] for index in order]
  assert (
    records[-1].where == f'{path}:{"700" if "jsonl" in name else "row 699"}' and records.size > 0
  )
  assert (
    len(hidden(tmp_path))
    == {'a.jsonl': 1, 'a.jsonl.gz': 2, 'a.parquet': 1, 'a.arrayrecord': 0}[name]
  )


@pytest.mark.parametrize(
  'content',
  [' one\r\n\n  \ntwo  \n', '\ufeffa\n\u2028b', b'caf\xe9 one\nna\xefve\x85 two\n'],
  ids=['plain', 'mark', 'latin'],
)
def test_large_texts_give_the_records_of_small_ones(content, tmp_path, request):
  path = write(tmp_path / 'a.txt', content)
  small = list(sources.read(path))
  request.getfixturevalue('large')
  assert list(sources.read(path)) == small and len(small) == 2


def test_a_directory_of_large_files(large, tmp_path):
  for name in 'ab':
    write(tmp_path / f'{name}.jsonl', ''.join(f'{{"text": "{name}{i}"}}\n' for i in range(3)))
  for _ in range(2):  # the second time, the folder contains indices, which are not data
    records = sources.read(tmp_path, columns={'prompt': 'text'})
    assert [record.fields['prompt'] for record in records] == ['a0', 'a1', 'a2', 'b0', 'b1', 'b2']


def test_damaged_array_records_are_named(tmp_path):
  with pytest.raises(DataError, match='not a readable ArrayRecord file'):
    list(sources.read(write(tmp_path / 'a.arrayrecord', b'no such thing' * 9)))


# Examples.


def test_examples_of_large_files_are_those_of_small_ones(tmp_path, request):
  rows = [{'prompt': f'p{i}', 'completion': ' ' if i % 3 == 1 else f'c{i}'} for i in range(20)]
  path = write(tmp_path / 'a.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
  small, small_report = formats.completions(sources.read(path))
  request.getfixturevalue('large')
  examples, report = formats.completions(sources.read(path))
  assert isinstance(small, list) and not isinstance(examples, list)
  assert list(examples) == small and len(examples) == 13 and examples[-1] == small[-1]
  assert list(examples[2:9:3]) == small[2:9:3] and list(examples[2:9][1:3]) == small[3:5]
  assert report == small_report and report.kept == 13
  assert examples.record(1).where == f'{path}:3'


def test_a_report_counts_more_than_it_names(monkeypatch):
  monkeypatch.setattr(formats, 'MAX_PLACES', 2)
  rows = [sources.Record({'prompt': 'a', 'completion': 'b' * (i < 3)}, f'x:{i}') for i in range(10)]
  report = formats.completions(rows)[1]
  assert report.left_out == {shapes.EMPTY_COMPLETION: ('x:3', 'x:4')} and report.kept == 3
  assert str(report) == '3 of 10 records kept; 7 left out: empty completion (first: x:3)'


# Records that cannot be read.

GOOD = '{"prompt": "p", "completions": ["a", "b"], "ratings": [1, 2]}'
BAD = {
  'not valid JSON': '{"prompt": ',
  'must be a JSON object': '[1]',
  'not Unicode': r'{"prompt": "\ud800", "completions": ["a", "b"]}',
  'ratings: must be a finite number': (
    '{"prompt": "p", "completions": ["a", "b"], "ratings": [1e39, 1]}'
  ),
  'margin: must be a finite number': (
    '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": %s}' % ('9' * 400)
  ),
  'a record may have': '{"prompt": "%s"}' % ('p' * 300),
}


@pytest.mark.parametrize('problem', BAD, ids=[name.split(':')[0] for name in BAD])
@pytest.mark.parametrize('size', ['small', 'large'])
def test_records_that_cannot_be_read_are_skipped_or_named(
  problem, size, tmp_path, monkeypatch, request
):
  if size == 'large':
    request.getfixturevalue('large')
  monkeypatch.setattr(stored, 'LONGEST', 600 if 'finite' in problem else 200)
  path = write(tmp_path / 'a.jsonl', f'{GOOD}\n\n{BAD[problem]}\n{GOOD}\n')
  with pytest.raises(DataError, match="config.data.on_error='skip'") as caught:
    formats.comparisons(sources.read(path))
  assert str(caught.value).startswith(f'{path}:3: ') and problem.split(': ')[-1] in str(
    caught.value
  )
  examples, report = formats.comparisons(sources.read(path), on_error='skip')
  assert [example.prompt for example in examples] == ['p', 'p']
  assert list(report.left_out.values()) == [(f'{path}:3',)] and f'1 left out: {problem}' in str(
    report
  )


def test_surrogate_pairs_are_text(tmp_path):
  path = write(tmp_path / 'a.jsonl', r'{"text": "\ud83d\ude00"}' + '\n')
  assert sources.read(path)[0].fields == {'text': '\U0001f600'}
  path = write(tmp_path / 'a.json', r'["\ud83d\ude00", "\udc00 alone", "b"]')
  texts, report = formats.texts(sources.read(path), on_error='skip')
  assert texts == ['\U0001f600', 'b'] and list(report.left_out.values()) == [(f'{path}:item 1',)]


def test_rows_of_csv_that_cannot_be_read_are_skipped(tmp_path):
  path = write(tmp_path / 'a.csv', 'text\na\nb,c\nd\n')
  texts, report = formats.texts(sources.read(path), on_error='skip')
  assert texts == ['a', 'd'] and list(report.left_out.values()) == [(f'{path}:3',)]


def test_texts_that_are_too_long_are_skipped(tmp_path, monkeypatch):
  monkeypatch.setattr(stored, 'LONGEST', 100)
  path = write(tmp_path / 'a.txt', f'a\n{"b" * 101}\nc\n')
  texts, report = formats.texts(sources.read(path), on_error='skip')
  assert texts == ['a', 'c'] and list(report.left_out.values()) == [(f'{path}:2',)]


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.json.gz', 'a.csv.gz', 'a.txt.gz'])
def test_a_gzip_file_that_unpacks_beyond_the_limit_is_named(name, tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MIN_UNPACKED', 2**20)
  path = write(tmp_path / name, gzip.compress(bytes(2**22)))
  with pytest.raises(DataError, match=r'unpacks to more than 1 MiB \(after line') as caught:
    sources.read(path)
  assert str(caught.value).startswith(path) and not hidden(tmp_path)


def test_a_long_line_takes_no_memory(tmp_path):
  """A file has 200 MB, and one of its records exceeds the limit."""
  path = tmp_path / 'a.jsonl'
  with open(path, 'wb') as stream:
    stream.write(b'{"text": "a"}\n{"text": "')
    stream.seek(200_000_000, os.SEEK_CUR)
    stream.write(b'"}\n{"text": "b"}\n')
  tracemalloc.start()
  texts, report = formats.texts(sources.read(path), on_error='skip')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert list(texts) == ['a', 'b'] and list(report.left_out.values()) == [(f'{path}:2',)]
  assert peak < 4 * stored.CHUNK

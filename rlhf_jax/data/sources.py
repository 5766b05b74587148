"""Records from files, directories and public data sets.

`read` turns whatever holds the data into a list of records: the fields as they are, and where
each one came from, so that a complaint about a record can name its line. What the fields mean is
the business of `formats`.

| source                       | one record per                           | place in messages  |
|------------------------------|------------------------------------------|--------------------|
| x.jsonl, x.jsonl.gz          | non-blank line, an object                | x.jsonl:17         |
| x.json, x.json.gz            | element of the list (or of the object's) | x.json:item 16     |
| x.parquet                    | row                                      | x.parquet:row 16   |
| any other file, as text, .gz | non-blank piece between `separator`s     | x.txt:17           |
| directory                    | all of the above in its files, sorted    | that of the file   |
| tfds:NAME                    | example of the TFDS data set             | tfds:NAME:row 16   |
| any other name               | row of the Hugging Face data set         | NAME:row 16        |

Lines are counted from 1, as editors do; items and rows from 0, as Python does.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import gzip
import json
import os
import pathlib
from typing import Any
import zlib

from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

# What is picked up inside a directory; a file named by itself may have any other suffix and is
# read as text.
SUFFIXES = ('.jsonl', '.json', '.parquet', '.txt')


@dataclasses.dataclass(frozen=True)
class Record:
  """One example as it was stored.

  Attributes:
    fields: column name to value, nothing dropped.
    where: the place it came from, for messages.
  """
  fields: dict[str, Any]
  where: str


def read(path: str, *, split: str = '', columns: Mapping[str, str] | None = None,
         separator: str = '\n') -> list[Record]:
  """Reads all records of a source, in order.

  Args:
    path: a file, a directory, `tfds:NAME`, or the name of a Hugging Face data set, which may
      carry its configuration as in `openai/gsm8k:main`.
    split: of a public data set, the split's name ('' is 'train'). Of a directory, only files
      named after it are read: `test` takes test.jsonl and test-00000-of-00002.parquet. Of a JSON
      file that is one object, the key whose list is wanted.
    columns: new name to stored name, for data that call their columns otherwise:
      {'prompt': 'question', 'completion': 'answer'}.
    separator: what stands between two texts of a plain text file: a line break, '\n\n' for
      paragraphs, '<|endoftext|>'; '' makes the whole file one text.

  Returns:
    At least one record.

  Raises:
    UserError: the source is missing, unknown, empty or lacks the split.
    DataError: a file is damaged or a column is missing; names file and line.
  """
  path = os.fspath(path)
  if path.startswith('tfds:'):
    records = _tfds(path, split or 'train')
  elif os.path.isdir(path):
    records = _directory(path, split, separator)
  elif os.path.isfile(path):
    records = _file(path, split, separator)
  elif _looks_local(path):
    raise UserError(f'{path}: no such file or directory (current directory: {os.getcwd()}). '
                    'Set the path of the data to a file that exists.')
  else:
    records = _hub(path, split or 'train')
  records = [_rename(record, columns) for record in records] if columns else list(records)
  if not records:
    raise UserError(f'{path}: the data set is empty. Give a source with at least one record.')
  return records


def write(path: str | os.PathLike, records: Iterable[dict[str, Any]]) -> None:
  """Writes records as JSONL, whole or not at all."""
  temporary = f'{os.fspath(path)}.tmp'
  with open(temporary, 'w', encoding='utf-8') as stream:
    stream.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
  os.replace(temporary, path)


def _looks_local(path: str) -> bool:
  name = path.lower().removesuffix('.gz')
  return (path.startswith(('/', './', '../', '~')) or path.endswith(os.sep)
          or path.count('/') > 1 or name.endswith(SUFFIXES) or '\\' in path)


def _rename(record: Record, columns: Mapping[str, str]) -> Record:
  fields = dict(record.fields)
  for stored in columns.values():
    if stored not in record.fields:
      raise DataError(f'{record.where}: there is no field {stored!r}, which config.data.columns '
                      f'names; the fields are {sorted(record.fields)}.')
    fields.pop(stored, None)
  fields.update({new: record.fields[stored] for new, stored in columns.items()})
  return Record(fields, record.where)


# Files.


def _directory(path: str, split: str, separator: str) -> Iterator[Record]:
  files = sorted(str(p) for p in pathlib.Path(path).rglob('[!.]*')
                 if p.is_file() and _kind(str(p)) is not None)
  if not files:
    raise UserError(f'{path}: no data file in this directory; files must end in '
                    f'{", ".join(SUFFIXES)} (or these and .gz).')
  chosen = [f for f in files if _in_split(f, split)] if split else files
  if not chosen:
    names = ', '.join(os.path.relpath(f, path) for f in files)
    raise UserError(f'{path}: no file of split {split!r} among {names}. '
                    'Name one of these, or no split at all.')
  for file in chosen:
    yield from _file(file, '', separator)


def _in_split(file: str, split: str) -> bool:
  stem = os.path.basename(file).split('.')[0]
  return stem == split or stem.startswith((split + '-', split + '_'))


def _kind(file: str) -> str | None:
  """The suffix among SUFFIXES, None for any other."""
  suffix = os.path.splitext(file.lower().removesuffix('.gz'))[1]
  return suffix if suffix in SUFFIXES else None


def _file(file: str, split: str, separator: str) -> Iterator[Record]:
  kind = _kind(file)
  if split and kind != '.json':
    raise UserError(f'{file}: split {split!r} has no meaning for a single file; leave it empty.')
  if kind == '.jsonl':
    return _jsonl(file)
  if kind == '.json':
    return _json(file, split)
  if kind == '.parquet':
    return _parquet(file)
  return _text(file, separator)


def _lines(file: str) -> Iterator[bytes]:
  """Lines with their breaks; only b'\\n' ends a line, as JSON strings may hold U+2028."""
  opener = gzip.open if file.lower().endswith('.gz') else open
  number = 0
  try:
    with opener(file, 'rb') as stream:
      for line in stream:
        number += 1
        yield line
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise DataError(f'{file}: damaged or truncated gzip file after line {number} ({error}). '
                    'Copy or download it again.') from error
  except OSError as error:
    raise UserError(f'{file}: cannot be read ({error.strerror or error}).') from error


def _jsonl(file: str) -> Iterator[Record]:
  for number, line in enumerate(_lines(file), start=1):
    where = f'{file}:{number}'
    if not line.strip():
      continue
    try:
      fields = json.loads(line.decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
      raise DataError(f'{where}: not valid JSON ({error}). Every line must be one object, '
                      'such as {"text": "..."}.') from error
    if not isinstance(fields, dict):
      raise DataError(f'{where}: a JSON object was expected, such as {{"text": "..."}}, and this '
                      f'is a {type(fields).__name__}.')
    yield Record(fields, where)


def _json(file: str, split: str) -> Iterator[Record]:
  try:
    value = json.loads(b''.join(_lines(file)).decode('utf-8-sig'))
  except json.JSONDecodeError as error:
    raise DataError(f'{file}:{error.lineno}: not valid JSON ({error.msg}). If every line is an '
                    'object of its own, name the file .jsonl.') from error
  except (UnicodeDecodeError, RecursionError) as error:
    raise DataError(f'{file}: not valid JSON ({error}).') from error
  if isinstance(value, dict):
    value = _only_list(file, value, split)
  elif split:
    raise UserError(f'{file}: split {split!r} has no meaning for a list; leave it empty.')
  if not isinstance(value, list):
    raise DataError(f'{file}: a list of objects was expected, or an object that holds one, and '
                    f'this is a {type(value).__name__}.')
  for index, fields in enumerate(value):
    where = f'{file}:item {index}'
    if isinstance(fields, str):
      fields = {'text': fields}
    if not isinstance(fields, dict):
      raise DataError(f'{where}: an object or a string was expected, and this is a '
                      f'{type(fields).__name__}.')
    yield Record(fields, where)


def _only_list(file: str, value: dict[str, Any], split: str) -> list[Any]:
  """The list `split` names, or the one list of objects or strings there is."""
  lists = {key: items for key, items in value.items()
           if isinstance(items, list) and items and isinstance(items[0], (dict, str))}
  if split:
    if split not in lists:
      raise UserError(f'{file}: no list of records under {split!r}; there are {sorted(lists)}.')
    return lists[split]
  if len(lists) != 1:
    raise UserError(f'{file}: this object should hold exactly one list of records, and has '
                    f'{sorted(lists) or "none"}. Name the one you want as the split.')
  return next(iter(lists.values()))


def _parquet(file: str) -> Iterator[Record]:
  import pyarrow  # Slow to import and needed by few.
  import pyarrow.parquet
  try:
    with pyarrow.parquet.ParquetFile(file) as table:
      index = 0
      for batch in table.iter_batches():
        for fields in batch.to_pylist():
          yield Record(fields, f'{file}:row {index}')
          index += 1
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(f'{file}: not a readable Parquet file ({error}).') from error


def _text(file: str, separator: str) -> Iterator[Record]:
  content = _decode(b''.join(_lines(file))).replace('\r\n', '\n')
  number = 1
  for piece in content.split(separator) if separator else [content]:
    if piece.strip():
      # The place is that of the first line with text in it.
      first = number + piece[:len(piece) - len(piece.lstrip())].count('\n')
      yield Record({'text': piece.strip('\n')}, f'{file}:{first}')
    number += piece.count('\n') + separator.count('\n')


def _decode(content: bytes) -> str:
  """UTF-8, or latin-1 for older corpora: it accepts any byte, so it comes second."""
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError:
    return content.decode('latin-1')


# Public data sets.


def _tfds(path: str, split: str) -> Iterator[Record]:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(f'{path}: reading TFDS data sets needs an extra package; '
                    "pip install 'rlhf_jax[tfds]'.") from error
  try:
    source = tfds.data_source(path.removeprefix('tfds:'), split=split)
  except Exception as error:  # TFDS raises many kinds, some of its own, some of the network's.
    raise UserError(
        f'{path}, split {split!r}: TFDS cannot give this data set ({error}).') from error
  for index in range(len(source)):
    yield Record(_plain(source[index]), f'{path}:row {index}')


def _plain(value: Any) -> Any:
  """NumPy scalars, arrays and bytes, as TFDS gives them, to Python's own types."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  return value


def _hub(path: str, split: str) -> Iterator[Record]:
  import datasets  # takes a second, and few runs need it
  name, _, config = path.partition(':')
  try:
    rows = datasets.load_dataset(name, config or None, split=split)
  except Exception as error:  # Many kinds, some of the network's.
    raise UserError(
        f'{path}, split {split!r}: neither a local file or directory nor a Hugging Face data set '
        f'that can be loaded ({type(error).__name__}: {error}).') from error
  for index, fields in enumerate(rows):
    yield Record(dict(fields), f'{path}:row {index}')

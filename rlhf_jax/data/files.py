"""Records of one file: JSONL, JSON, CSV, TSV or text, these also with .gz, or Parquet."""

from collections.abc import Iterator
import csv
import dataclasses
import gzip
import json
import os
from typing import Any
import zlib

from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

# Format of each suffix.
FORMATS = {'.jsonl': 'jsonl', '.json': 'json', '.csv': 'csv', '.tsv': 'tsv', '.parquet': 'parquet',
           '.txt': 'text'}
DELIMITERS = {'csv': ',', 'tsv': '\t'}
# What else may stand between cells, and what to do about it.
OTHER_DELIMITERS = {
    ';': 'Save the file with commas between the cells, or with tabs as .tsv.',
    ',': "Name the file .csv, or set config.data.format to 'csv'.",
    '\t': "Name the file .tsv, or set config.data.format to 'tsv'.",
}
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit, 131072, is less than a long document


@dataclasses.dataclass(frozen=True)
class Record:
  """One example as it was stored.

  Attributes:
    fields: column name to value, nothing dropped.
    where: the place it came from, for messages.
    untyped: whether all values are strings, numbers and lists too, as in CSV.
  """
  fields: dict[str, Any]
  where: str
  untyped: bool = False


def format_of(file: str) -> str | None:
  """The format that the file's suffix stands for, None where it is not known."""
  return FORMATS.get(_suffix(file))


def read(file: str, split: str, separator: str, format: str | None) -> Iterator[Record]:
  """Records of a file.

  Args:
    file: path.
    split: of a JSON file that is one object, the key whose list is wanted; '' of any other.
    separator: of text; see `sources.read`.
    format: one of FORMATS' values; None goes by the suffix.

  Raises:
    UserError: the suffix is not known, or the file has no splits.
    DataError: the file is damaged; names the line.
  """
  format = format or format_of(file)
  if format is None:
    raise UserError(
        f'{file}: the suffix {_suffix(file)!r} is not known; known are {", ".join(FORMATS)}, each '
        'also with .gz. Rename the file, or set config.data.format to one of '
        f'{", ".join(FORMATS.values())}.')
  if split and format != 'json':
    raise UserError(f'{file}: split {split!r} has no meaning for a single file; leave it empty.')
  if format == 'jsonl':
    return _jsonl(file)
  if format == 'json':
    return _json(file, split)
  if format in DELIMITERS:
    return _csv(file, DELIMITERS[format])
  if format == 'parquet':
    return _parquet(file)
  return _text(file, separator)


def _suffix(file: str) -> str:
  return os.path.splitext(file.lower().removesuffix('.gz'))[1]


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


def _csv(file: str, delimiter: str) -> Iterator[Record]:
  """Rows by the names in the first; an empty cell is None, a row of empty cells is skipped."""
  csv.field_size_limit(LONGEST_CELL)
  rows = csv.reader(_decoded(file), delimiter=delimiter, strict=True)
  names = None
  while True:
    where = f'{file}:{rows.line_num + 1}'  # cells may hold line breaks: where the row begins
    try:
      row = next(rows, None)
    except csv.Error as error:
      raise DataError(f'{where}: the row that begins here is not valid CSV ({error}). A cell with '
                      f'{delimiter!r}, a quote or a line break must be quoted, and quotes in it '
                      'doubled.') from error
    if row is None:
      return
    if not any(row):
      continue
    if names is None:
      names = _column_names(row, where, delimiter)
      continue
    if len(row) != len(names):
      raise DataError(f'{where}: {len(row)} cells, and the first row names {len(names)} columns, '
                      f'{", ".join(names)}. A cell with {delimiter!r} or a line break must be '
                      'quoted.')
    yield Record({name: cell or None for name, cell in zip(names, row)}, where, untyped=True)


def _column_names(row: list[str], where: str, delimiter: str) -> list[str]:
  for other, remedy in OTHER_DELIMITERS.items() if len(row) == 1 else ():
    if other != delimiter and other in row[0] and all(map(str.strip, row[0].split(other))):
      raise DataError(f'{where}: one column, {row[0]!r}, and {delimiter!r} must part the cells: are these '
                      f'separated by {other!r}? {remedy} The first row must name the columns.')
  names = [name.strip() or f'column {number}' for number, name in enumerate(row, start=1)]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise DataError(f'{where}: two columns are named {twice[0]!r}. The first row must name the columns, '
                    'each otherwise.')
  return names


def _decoded(file: str) -> Iterator[str]:
  for number, line in enumerate(_lines(file), start=1):
    try:
      yield line.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      raise DataError(f'{file}:{number}: not UTF-8 ({error}). Save the file as UTF-8.') from error


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

"""Records of one file: JSONL, JSON, CSV, TSV or text, these also with .gz, Parquet or ArrayRecord.

JSONL, CSV, Parquet, ArrayRecord and large text files with one record a line stay on disk: see
`stored`.
The records of other files are held in memory.
"""

import codecs
from collections.abc import Callable
from collections.abc import Iterator
import csv
import functools
import gzip
import io
import itertools
import json
import math
import os
from typing import Any
import zlib

import numpy as np

from rlhf_jax.data import derived
from rlhf_jax.data import stored
from rlhf_jax.data.stored import Record
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

# The format of each suffix.
FORMATS = {
  '.jsonl': 'jsonl',
  '.json': 'json',
  '.csv': 'csv',
  '.tsv': 'tsv',
  '.parquet': 'parquet',
  '.txt': 'text',
  '.arrayrecord': 'arrayrecord',
  '.array_record': 'arrayrecord',
}
DELIMITERS = {'csv': ',', 'tsv': '\t'}
# Delimiters that users confuse, and how to fix the file.
OTHER_DELIMITERS = {
  ';': 'Save the file with commas between the cells, or with tabs as .tsv.',
  ',': "Name the file .csv, or set config.data.format to 'csv'.",
  '\t': "Name the file .tsv, or set config.data.format to 'tsv'.",
}
# Characters of a cell; the csv module's limit of 131072 is too small for a long document.
LONGEST_CELL = stored.LONGEST
# A .gz file that unpacks to more than MAX_EXPANSION times its size, and to at least MIN_UNPACKED
# bytes, is an error: it could fill the disk. Text shrinks to a fifth, gzip can reach a thousandth.
MAX_EXPANSION = 100
MIN_UNPACKED = 2**30
PART = 2**20  # bytes of a line that are read at once
INDEXED = 2**14  # rows of a table that are indexed at once


def format_of(file: str) -> str | None:
  """Returns the format of a file by its suffix; None if the suffix is unknown."""
  return FORMATS.get(_suffix(file))


def read(file: str, split: str, separator: str, format: str | None) -> stored.Records:
  """Returns the records of a file.

  Args:
    file: Path.
    split: The key of the list to read, in a JSON file that holds one object; '' for other files.
    separator: Separator of text records; see `sources.read`.
    format: A value of FORMATS; None selects the format by suffix.

  Raises:
    UserError: The suffix is unknown, or the file has no splits.
    DataError: The file is damaged; the message names the line.
  """
  format = format or format_of(file)
  if format is None:
    raise UserError(
      f'{file}: unknown suffix {_suffix(file)!r}; known suffixes are {", ".join(FORMATS)}, each '
      'also with .gz. Rename the file, or set config.data.format to one of '
      f'{", ".join(dict.fromkeys(FORMATS.values()))}.'
    )
  if split and format != 'json':
    raise UserError(f'{file}: a single file has no split {split!r}; leave the split empty.')
  if format == 'jsonl':
    return _jsonl(file)
  if format == 'parquet':
    return _parquet(file)
  if format == 'arrayrecord':
    return _array_record(file)
  if format == 'json':
    return stored.Listed([*_json(file, split)])
  if format in DELIMITERS:
    return _csv(file, format)
  packed = file.lower().endswith('.gz')
  if separator == '\n' and not packed and os.path.getsize(file) > stored.SMALL:
    return _text_lines(file)
  return stored.Listed([*_text(file, separator)])


def _suffix(file: str) -> str:
  return os.path.splitext(file.lower().removesuffix('.gz'))[1]


def _parts(file: str) -> Iterator[bytes]:
  """Yields the lines of a file with their line breaks; a line longer than PART in several parts.

  Only b'\\n' ends a line, because JSON strings may contain U+2028.

  Raises:
    UserError: The file cannot be read.
    DataError: A .gz file is damaged, or unpacks to more than text does.
  """
  packed = file.lower().endswith('.gz')
  number, total = 0, 0
  try:
    limit = max(MAX_EXPANSION * os.path.getsize(file), MIN_UNPACKED) if packed else math.inf
    with (gzip.open if packed else open)(file, 'rb') as stream:
      while part := stream.readline(PART):
        number += part.endswith(b'\n')
        total += len(part)
        if total > limit:
          raise DataError(
            f'{file}: unpacks to more than {limit >> 20} MiB (after line {number}), too much for '
            'text in a file of this size. If the contents are right, unpack the file yourself.'
          )
        yield part
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise DataError(
      f'{file}: damaged or truncated gzip file after line {number} ({error}). '
      'Copy or download it again.'
    ) from error
  except OSError as error:
    raise UserError(f'{file}: cannot be read ({error.strerror or error}).') from error


def _jsonl(file: str) -> stored.Records:
  try:
    return stored.Lines(file, stored.json_object, content=_unpacked(file, 'jsonl'))
  except OSError as error:
    raise UserError(f'{file}: cannot be read ({error.strerror or error}).') from error


def _unpacked(file: str, suffix: str) -> bytes | str | None:
  """Returns the contents of a .gz file, or the path of its unpacked copy; None for other files."""
  if not file.lower().endswith('.gz'):
    return None
  content = _small(file)
  if content is None:
    return derived.file(file, suffix, functools.partial(_unpack, file))
  return content


def _small(file: str) -> bytes | None:
  """Returns the decompressed contents of a file; None if they are larger than stored.SMALL."""
  content = bytearray()
  for part in _parts(file):
    content += part
    if len(content) > stored.SMALL:
      return None
  return bytes(content)


def _unpack(file: str, path: str) -> None:
  with open(path, 'wb') as stream:
    stream.writelines(_parts(file))


def _json(file: str, split: str) -> Iterator[Record | DataError]:
  content = b''.join(_parts(file))
  try:
    value = json.loads(content.decode('utf-8-sig'))
  except json.JSONDecodeError as error:
    raise DataError(
      f'{file}:{error.lineno}: not valid JSON ({error.msg}). If every line is an '
      'object, name the file .jsonl.'
    ) from error
  except (UnicodeDecodeError, RecursionError) as error:
    raise DataError(f'{file}: not valid JSON ({error}).') from error
  if isinstance(value, dict):
    value = _only_list(file, value, split)
  elif split:
    raise UserError(f'{file}: a list has no split {split!r}; leave the split empty.')
  if not isinstance(value, list):
    raise DataError(
      f'{file}: must be a list of objects, or an object that holds one, but is a '
      f'{type(value).__name__}.'
    )
  for index, fields in enumerate(value):
    where = f'{file}:item {index}'
    if isinstance(fields, str):
      fields = {'text': fields}
    if not isinstance(fields, dict):
      yield DataError(f'{where}: must be an object or a string, but is a {type(fields).__name__}.')
      continue
    try:
      stored.check_unicode(fields, content)
      yield Record(fields, where)
    except DataError as error:
      yield DataError(f'{where}: {error}')


def _only_list(file: str, value: dict[str, Any], split: str) -> list[Any]:
  """Returns the list of records under the key `split`, or the only list of records."""
  lists = {
    key: items
    for key, items in value.items()
    if isinstance(items, list) and items and isinstance(items[0], (dict, str))
  }
  if split:
    if split not in lists:
      raise UserError(f'{file}: no list of records under {split!r}; the lists are {sorted(lists)}.')
    return lists[split]
  if len(lists) != 1:
    raise UserError(
      f'{file}: the object must hold exactly one list of records, but has '
      f'{sorted(lists) or "none"}. Set the split to the key of the list to read.'
    )
  return next(iter(lists.values()))


def _csv(file: str, format: str) -> stored.Records:
  """Returns the rows of a table, with the names in its first row; an empty row is no record."""
  csv.field_size_limit(LONGEST_CELL)
  try:
    content, delimiter = _unpacked(file, format), DELIMITERS[format]
    rows = functools.partial(_rows, file, file if content is None else content, delimiter)
    header = next(rows(), None)
    if header is None:
      return stored.Listed([])
    *_, number, cells = header
    names = _column_names(cells, f'{file}:{number}', delimiter)
    parse = functools.partial(_cells, names=names, delimiter=delimiter)
    index = functools.partial(_index_rows, rows)
    return stored.Lines(file, parse, content=content, rows=(f'{format}-rows', index))
  except OSError as error:
    raise UserError(f'{file}: cannot be read ({error.strerror or error}).') from error


def _rows(
  file: str, content: bytes | str, delimiter: str
) -> Iterator[tuple[int, int, int, list[str]]]:
  """Yields (offset, size, number of the first line, cells) of each row that is not empty.

  Args:
    file: Path, which messages name.
    content: The bytes of the table, or the path of its file.
    delimiter: Character between cells.
  """
  offset = 0

  def lines():
    nonlocal offset
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, 'rb') as stream:
      for number in itertools.count(1):
        line = stream.readline(stored.LONGEST + 1)
        if not line:
          return
        if problem := stored.too_long(len(line)):
          raise DataError(f'{file}:{number}: {problem}')
        offset += len(line)
        try:
          yield line.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as error:
          raise DataError(
            f'{file}:{number}: not UTF-8 ({error}). Save the file as UTF-8.'
          ) from error

  rows = csv.reader(lines(), delimiter=delimiter, strict=True)
  while True:
    start, number = offset, rows.line_num + 1  # of the first line: cells may hold line breaks
    try:
      row = next(rows, None)
    except csv.Error as error:
      raise DataError(
        f'{file}:{number}: the row that starts here is not valid CSV ({error}). Quote every cell '
        f'with {delimiter!r}, a quote or a line break, and double the quotes in it.'
      ) from error
    if row is None:
      return
    if any(row):
      yield start, offset - start, number, row


def _index_rows(
  rows: Callable[[], Iterator[tuple[int, int, int, list[str]]]],
) -> Iterator[np.ndarray]:
  """Yields parts [n, 3] of an index of the rows after the first; see stored.Lines."""
  entries = (row[:3] for row in itertools.islice(rows(), 1, None))
  while part := [*itertools.islice(entries, INDEXED)]:
    yield np.array(part, stored.INT)


def _cells(row: bytes, *, names: list[str], delimiter: str) -> dict[str, str | None]:
  """Returns the cells of a row by the names of their columns; an empty cell is None."""
  text = io.StringIO(row.decode('utf-8'))
  cells = next(csv.reader(text, delimiter=delimiter, strict=True))
  if len(cells) != len(names):
    raise DataError(
      f'the row has {len(cells)} cells, but the first row names {len(names)} columns: '
      f'{", ".join(names)}. Quote every cell with {delimiter!r} or a line break.'
    )
  return {name: cell or None for name, cell in zip(names, cells)}


def _column_names(row: list[str], where: str, delimiter: str) -> list[str]:
  for other, remedy in OTHER_DELIMITERS.items() if len(row) == 1 else ():
    if other != delimiter and other in row[0] and all(map(str.strip, row[0].split(other))):
      raise DataError(
        f'{where}: there is one column, {row[0]!r}; cells must be separated by {delimiter!r}. Are '
        f'these separated by {other!r}? {remedy} The first row must name the columns.'
      )
  names = [name.strip() or f'column {number}' for number, name in enumerate(row, start=1)]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise DataError(
      f'{where}: two columns are named {twice[0]!r}. The first row must give every column its '
      'own name.'
    )
  return names


def _parquet(file: str) -> stored.Records:
  import pyarrow  # slow to import, and few runs need it

  try:
    return stored.Table(file)
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(f'{file}: not a readable Parquet file ({error}).') from error


def _array_record(file: str) -> stored.Records:
  import grain

  try:
    source = grain.sources.ArrayRecordDataSource(file)
    return stored.Mapped(source, stored.json_object, file, size=os.path.getsize(file))
  except Exception as error:  # the reader's errors are undocumented
    raise DataError(f'{file}: not a readable ArrayRecord file ({error}).') from error


def _text(file: str, separator: str) -> Iterator[Record | DataError]:
  content = _decode(b''.join(_parts(file))).replace('\r\n', '\n')
  number = 1
  for piece in content.split(separator) if separator else [content]:
    if piece.strip():
      # The record is at its first line with text.
      first = number + piece[: len(piece) - len(piece.lstrip())].count('\n')
      where, problem = f'{file}:{first}', stored.too_long(len(piece))
      yield (
        DataError(f'{where}: {problem}') if problem else Record({'text': piece.strip('\n')}, where)
      )
    number += piece.count('\n') + separator.count('\n')


def _text_lines(file: str) -> stored.Records:
  """Returns the lines of a text file as records that are read from disk when accessed."""
  decoder, encoding = codecs.getincrementaldecoder('utf-8')(), 'utf-8-sig'
  try:
    for part in _parts(file):
      decoder.decode(part)
    decoder.decode(b'', final=True)
  except UnicodeDecodeError:
    encoding = 'latin-1'
  clean = lambda line: line.decode(encoding).replace('\r\n', '\n').strip('\n')
  return stored.Lines(file, lambda line: {'text': clean(line)})


def _decode(content: bytes) -> str:
  """Decodes UTF-8, or else latin-1, which accepts any byte and is the encoding of older corpora."""
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError:
    return content.decode('latin-1')

"""Records of one file: JSONL, JSON, CSV, TSV or text, these also with .gz, Parquet or ArrayRecord.

JSONL, Parquet, ArrayRecord and large texts of a line each are read from disk when a record is asked
for, see `stored`; of the others all records are in memory.
"""

import codecs
from collections.abc import Iterator
import csv
import functools
import gzip
import json
import math
import os
from typing import Any
import zlib

from rlhf_jax.data import derived
from rlhf_jax.data import stored
from rlhf_jax.data.stored import Record
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

# Format of each suffix.
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
# What else may stand between cells, and what to do about it.
OTHER_DELIMITERS = {
  ';': 'Save the file with commas between the cells, or with tabs as .tsv.',
  ',': "Name the file .csv, or set config.data.format to 'csv'.",
  '\t': "Name the file .tsv, or set config.data.format to 'tsv'.",
}
LONGEST_CELL = stored.LONGEST  # characters; csv's own limit, 131072, is less than a long document
# A .gz that unpacks to more than this many times its size, and to at least LEAST_UNPACKED bytes, is
# refused, as it could fill the disk: text compresses to a fifth, and gzip can reach a thousandth.
MOST_UNPACKED = 100
LEAST_UNPACKED = 2**30
PART = 2**20  # bytes of a line that are read at once


def format_of(file: str) -> str | None:
  """The format that the file's suffix stands for, None where it is not known."""
  return FORMATS.get(_suffix(file))


def read(file: str, split: str, separator: str, format: str | None) -> stored.Records:
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
      f'{", ".join(dict.fromkeys(FORMATS.values()))}.'
    )
  if split and format != 'json':
    raise UserError(f'{file}: split {split!r} has no meaning for a single file; leave it empty.')
  if format == 'jsonl':
    return _jsonl(file)
  if format == 'parquet':
    return _parquet(file)
  if format == 'arrayrecord':
    return _array_record(file)
  if format == 'json':
    return stored.Listed([*_json(file, split)])
  if format in DELIMITERS:
    return stored.Listed([*_csv(file, DELIMITERS[format])])
  packed = file.lower().endswith('.gz')
  if separator == '\n' and not packed and os.path.getsize(file) > stored.SMALL:
    return _text_lines(file)
  return stored.Listed([*_text(file, separator)])


def _suffix(file: str) -> str:
  return os.path.splitext(file.lower().removesuffix('.gz'))[1]


def _parts(file: str, size: int = PART) -> Iterator[bytes]:
  """A file in parts: lines with their breaks, those longer than `size` in several.

  Only b'\\n' ends a line, as JSON strings may hold U+2028.

  Raises:
    UserError: the file cannot be read.
    DataError: a .gz is damaged, or unpacks to more than text does.
  """
  packed = file.lower().endswith('.gz')
  number, total = 0, 0
  try:
    most = max(MOST_UNPACKED * os.path.getsize(file), LEAST_UNPACKED) if packed else math.inf
    with (gzip.open if packed else open)(file, 'rb') as stream:
      while part := stream.readline(size):
        number += part.endswith(b'\n')
        total += len(part)
        if total > most:
          raise DataError(
            f'{file}: unpacks to more than {most >> 20} MiB, {MOST_UNPACKED} times its '
            f'size (after line {number}); text does not. Unpack it by hand if it should.'
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
  if file.lower().endswith('.gz'):
    content = _small(file)
    if content is None:
      content = derived.file(file, 'jsonl', functools.partial(_unpack, file))
    return stored.Lines(file, stored.json_object, content=content)
  try:
    return stored.Lines(file, stored.json_object)
  except OSError as error:
    raise UserError(f'{file}: cannot be read ({error.strerror or error}).') from error


def _small(file: str) -> bytes | None:
  """What a file unpacks to, None where that is not small."""
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
      'object of its own, name the file .jsonl.'
    ) from error
  except (UnicodeDecodeError, RecursionError) as error:
    raise DataError(f'{file}: not valid JSON ({error}).') from error
  if isinstance(value, dict):
    value = _only_list(file, value, split)
  elif split:
    raise UserError(f'{file}: split {split!r} has no meaning for a list; leave it empty.')
  if not isinstance(value, list):
    raise DataError(
      f'{file}: a list of objects was expected, or an object that holds one, and '
      f'this is a {type(value).__name__}.'
    )
  for index, fields in enumerate(value):
    where = f'{file}:item {index}'
    if isinstance(fields, str):
      fields = {'text': fields}
    if not isinstance(fields, dict):
      yield DataError(
        f'{where}: an object or a string was expected, and this is a {type(fields).__name__}.'
      )
      continue
    try:
      stored.check_unicode(fields, content)
      yield Record(fields, where)
    except DataError as error:
      yield DataError(f'{where}: {error}')


def _only_list(file: str, value: dict[str, Any], split: str) -> list[Any]:
  """The list `split` names, or the one list of objects or strings there is."""
  lists = {
    key: items
    for key, items in value.items()
    if isinstance(items, list) and items and isinstance(items[0], (dict, str))
  }
  if split:
    if split not in lists:
      raise UserError(f'{file}: no list of records under {split!r}; there are {sorted(lists)}.')
    return lists[split]
  if len(lists) != 1:
    raise UserError(
      f'{file}: this object should hold exactly one list of records, and has '
      f'{sorted(lists) or "none"}. Name the one you want as the split.'
    )
  return next(iter(lists.values()))


def _csv(file: str, delimiter: str) -> Iterator[Record | DataError]:
  """Rows by the names in the first; an empty cell is None, a row of empty cells is skipped."""
  csv.field_size_limit(LONGEST_CELL)
  rows = csv.reader(_decoded(file), delimiter=delimiter, strict=True)
  names = None
  while True:
    where = f'{file}:{rows.line_num + 1}'  # cells may hold line breaks: where the row begins
    try:
      row = next(rows, None)
    except csv.Error as error:
      raise DataError(
        f'{where}: the row that begins here is not valid CSV ({error}). A cell with '
        f'{delimiter!r}, a quote or a line break must be quoted, and quotes in it '
        'doubled.'
      ) from error
    if row is None:
      return
    if not any(row):
      continue
    if names is None:
      names = _column_names(row, where, delimiter)
      continue
    if len(row) != len(names):
      yield DataError(
        f'{where}: {len(row)} cells, and the first row names {len(names)} columns, '
        f'{", ".join(names)}. A cell with {delimiter!r} or a line break must be '
        'quoted.'
      )
      continue
    yield Record({name: cell or None for name, cell in zip(names, row)}, where, untyped=True)


def _column_names(row: list[str], where: str, delimiter: str) -> list[str]:
  for other, remedy in OTHER_DELIMITERS.items() if len(row) == 1 else ():
    if other != delimiter and other in row[0] and all(map(str.strip, row[0].split(other))):
      raise DataError(
        f'{where}: one column, {row[0]!r}, and {delimiter!r} must part the cells: are these '
        f'separated by {other!r}? {remedy} The first row must name the columns.'
      )
  names = [name.strip() or f'column {number}' for number, name in enumerate(row, start=1)]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise DataError(
      f'{where}: two columns are named {twice[0]!r}. The first row must name the columns, '
      'each otherwise.'
    )
  return names


def _decoded(file: str) -> Iterator[str]:
  for number, line in enumerate(_parts(file, stored.LONGEST), start=1):
    try:
      yield line.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      raise DataError(f'{file}:{number}: not UTF-8 ({error}). Save the file as UTF-8.') from error


def _parquet(file: str) -> stored.Records:
  import pyarrow  # Slow to import and needed by few.

  try:
    return stored.Table(file)
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(f'{file}: not a readable Parquet file ({error}).') from error


def _array_record(file: str) -> stored.Records:
  import grain

  try:
    source = grain.sources.ArrayRecordDataSource(file)
    return stored.Mapped(source, stored.json_object, file, size=os.path.getsize(file))
  except Exception as error:  # the reader's own, not documented
    raise DataError(f'{file}: not a readable ArrayRecord file ({error}).') from error


def _text(file: str, separator: str) -> Iterator[Record | DataError]:
  content = _decode(b''.join(_parts(file))).replace('\r\n', '\n')
  number = 1
  for piece in content.split(separator) if separator else [content]:
    if piece.strip():
      # The place is that of the first line with text in it.
      first = number + piece[: len(piece) - len(piece.lstrip())].count('\n')
      where, problem = f'{file}:{first}', stored.too_long(len(piece))
      yield (
        DataError(f'{where}: {problem}') if problem else Record({'text': piece.strip('\n')}, where)
      )
    number += piece.count('\n') + separator.count('\n')


def _text_lines(file: str) -> stored.Records:
  """As `_text`, of lines that stay on disk."""
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
  """UTF-8, or latin-1 for older corpora: it accepts any byte, so it comes second."""
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError:
    return content.decode('latin-1')

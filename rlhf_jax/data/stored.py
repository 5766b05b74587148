"""Records that stay on disk: sequences that read and parse a record when it is accessed.

`sequence[i]` raises DataError if record i cannot be read; the other records stay readable. All
sequences are thread-safe. Memory does not grow with the data, except for small files.
"""

import abc
import bisect
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import json
import os
import re
from typing import Any
import weakref

import numpy as np

from rlhf_jax.data import derived
from rlhf_jax.errors import DataError

# Bytes of one record. A tokenizer needs about 60 bytes of memory per byte of text, and the longest
# novels have 6 MiB: a longer record has lost its line breaks, or is meant to exhaust the memory.
LONGEST = 16 * 2**20
SMALL = 16 * 2**20  # bytes; files up to this size get no index or copy on disk
CHUNK = 2**23  # bytes read at once
BATCH = 256  # rows of a table read at once

INT = np.dtype(np.int64)
COLUMNS = 3  # columns of the index: offset and size of a line in bytes, and its number
BLANK = np.frombuffer(b' \t\r\n\v\f', np.uint8)
ESCAPED_SURROGATE = re.compile(rb'\\u[dD][89a-fA-F]')

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes of a file


@dataclasses.dataclass(frozen=True)
class Record:
  """One example as it was stored.

  Attributes:
    fields: {column name: value}, complete.
    where: The place it came from, for messages.
    untyped: Whether all values are strings, even numbers and lists, as in CSV.
  """

  fields: dict[str, Any]
  where: str
  untyped: bool = False


class Records(Sequence[Record], abc.ABC):
  """A sequence of records.

  Attributes:
    size: Bytes of the stored data; None if all records are in memory.
  """

  size: int | None = None

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    return self.record(int(index) % len(self))

  @abc.abstractmethod
  def record(self, index: int) -> Record:
    """Returns record `index`, from 0 to len(self) - 1."""


class Listed(Records):
  """Records in memory; a record that cannot be read is represented by its error."""

  def __init__(self, items: Sequence[Record | DataError]):
    self._items = items

  def __len__(self):
    return len(self._items)

  def record(self, index):
    if isinstance(self._items[index], DataError):
      raise self._items[index]
    return self._items[index]


class Mapped(Records):
  """Records of another random-access source, such as a public data set."""

  def __init__(
    self,
    source: Sequence[Any],
    fields: Callable[[Any], dict[str, Any]],
    name: str,
    *,
    size: int | None = None,
  ):
    """Stores the source; `fields` converts an item to fields, and messages say `NAME:row i`."""
    self._source, self._fields, self._name, self.size = source, fields, name, size

  def __len__(self):
    return len(self._source)

  def record(self, index):
    where = f'{self._name}:row {index}'
    try:
      return Record(self._fields(self._source[index]), where)
    except DataError as error:
      raise DataError(f'{where}: {error}') from error


class Joined(Records):
  """Several sequences, one after the other."""

  def __init__(self, parts: Sequence[Records]):
    self._parts = parts
    self._ends = list(itertools.accumulate(map(len, parts)))
    sizes = [part.size for part in parts if part.size is not None]
    self.size = sum(sizes) if sizes else None

  def __len__(self):
    return self._ends[-1] if self._ends else 0

  def record(self, index):
    number = bisect.bisect_right(self._ends, index)
    return self._parts[number].record(index - (self._ends[number - 1] if number else 0))


class Changed(Records):
  """Records that are converted by a function when they are read."""

  def __init__(self, records: Records, change: Callable[[Record], Record]):
    self._records, self._change, self.size = records, change, records.size

  def __len__(self):
    return len(self._records)

  def record(self, index):
    return self._change(self._records.record(index))


# Lines.


class Lines(Records):
  """The lines of a file that are not blank, or its rows of one or more lines.

  They are located by an index of their offsets, which is kept on disk if the file is larger than
  SMALL: see `derived`.
  """

  def __init__(
    self,
    file: str,
    parse: Callable[[bytes], dict[str, Any]],
    *,
    content: bytes | str | None = None,
    rows: tuple[str, Callable[[], Iterator[np.ndarray]]] | None = None,
  ):
    """Indexes the lines, or opens an existing index.

    Args:
      file: Path, which messages name.
      parse: Converts the bytes of a line to fields, or raises DataError.
      content: The lines, if `file` is compressed: bytes, or the path of the decompressed file.
      rows: (suffix of the index on disk, function that yields it like `_index`), if a record is an
        untyped row and not a line.

    Raises:
      OSError: The file cannot be read.
    """
    self._file, self._parse, self._untyped = file, parse, rows is not None
    if isinstance(content, bytes):
      self._read, self.size = _part_of(content), len(content)
    else:
      content = content or file
      self._read, self.size = _reader(self, content), os.path.getsize(content)
    suffix, make = rows or ('lines', functools.partial(_index, self._read, self.size))
    if self.size <= SMALL:
      index = np.concatenate([np.zeros((0, COLUMNS), INT), *make()])
      self._length, self._entry = len(index), index.__getitem__
    else:
      path = derived.file(content, suffix, functools.partial(_write_index, make))
      width, read = COLUMNS * INT.itemsize, _reader(self, path)
      self._length = os.path.getsize(path) // width
      self._entry = lambda number: np.frombuffer(read(width * number, width), INT)

  def __len__(self):
    return self._length

  def record(self, index):
    offset, size, number = map(int, self._entry(index))
    where = f'{self._file}:{number}'
    if too_long(size):
      raise DataError(f'{where}: {too_long(size)}')
    try:
      return Record(self._parse(self._read(offset, size)), where, self._untyped)
    except DataError as error:
      raise DataError(f'{where}: {error}') from error


def _part_of(content: bytes) -> Read:
  return lambda offset, size: content[offset : offset + size]


def _reader(owner: Any, path: str) -> Read:
  """Returns a reader of parts of a file, which stays open while `owner` lives if it is large."""
  if os.path.getsize(path) <= SMALL:  # a folder may have more files than a process may open

    def read(offset, size):
      with open(path, 'rb') as stream:
        stream.seek(offset)
        return stream.read(size)

    return read
  descriptor = os.open(path, os.O_RDONLY)
  weakref.finalize(owner, os.close, descriptor)
  return lambda offset, size: os.pread(descriptor, size, offset)


def _index(read: Read, size: int) -> Iterator[np.ndarray]:
  """Yields parts [n, 3] of an index: offset, size and number of each line that is not blank."""
  start, number, first = 0, 1, np.zeros(0, np.uint8)
  for base in range(0, size, CHUNK):
    data = np.frombuffer(read(base, CHUNK), np.uint8)
    ends = np.flatnonzero(data == ord('\n')) + base + 1
    starts = np.concatenate([[start], ends])
    here = starts[(starts >= base) & (starts < base + len(data))]
    first = np.concatenate([first, data[here - base]])  # first bytes of lines
    if base + len(data) == size and starts[-1] < size:
      ends = np.append(ends, size)  # the last line has no line break
    starts, count = starts[: len(ends)], len(ends)
    rows = np.stack([starts, ends - starts, number + np.arange(count)], axis=1)
    yield rows[_filled(read, rows, first[:count])]
    start, number, first = int(ends[-1]) if count else start, number + count, first[count:]


def _filled(read: Read, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Returns which lines are not blank; `first` holds the first byte of each line."""
  filled = np.ones(len(rows), bool)
  for row in np.flatnonzero(np.isin(first, BLANK)):
    offset, size, _ = map(int, rows[row])
    filled[row] = bool(read(offset, min(size, LONGEST)).strip())
  return filled


def _write_index(make: Callable[[], Iterator[np.ndarray]], path: str) -> None:
  with open(path, 'wb') as stream:
    for rows in make():
      rows.tofile(stream)


def too_long(size: int) -> str:
  """Returns the error message for a record of `size` bytes; '' if it is not too long."""
  if size <= LONGEST:
    return ''
  return (
    f'a record may have {LONGEST >> 20} MiB at most, but this one has {size / 2**20:.3g} MiB. '
    'Split it into several.'
  )


def json_object(line: bytes) -> dict[str, Any]:
  """Parses the fields of a record that is one JSON object.

  Raises:
    DataError: The line is not JSON, not an object, or contains text that is not Unicode.
  """
  try:
    fields = json.loads(line.decode('utf-8-sig').rstrip())
  except json.JSONDecodeError as error:
    raise DataError(
      f'not valid JSON ({error.msg}, column {error.colno}). Every line must be one '
      'object, such as {"text": "..."}.'
    ) from error
  except (ValueError, RecursionError) as error:
    raise DataError(
      f'not valid JSON ({error}). Every line must be one object, such as {{"text": "..."}}.'
    ) from error
  if not isinstance(fields, dict):
    raise DataError(
      f'must be a JSON object, such as {{"text": "..."}}, but is a {type(fields).__name__}.'
    )
  check_unicode(fields, line)
  return fields


def check_unicode(value: Any, source: bytes) -> None:
  """Raises DataError if JSON contains half a surrogate pair, which no tokenizer can encode.

  Args:
    value: The parsed value.
    source: The JSON that it was parsed from.
  """
  if not ESCAPED_SURROGATE.search(source):
    return
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise DataError(
      f'not Unicode: {error.object[error.start]!r} is half a surrogate pair. Remove it.'
    ) from error


# Tables.


class Table(Records):
  """The rows of a Parquet file, read from a copy of it: an Arrow file of small batches.

  Parquet must read a whole row group, of up to a million rows, to read one row. The copy of a file
  larger than SMALL is kept on disk: see `derived`.
  """

  def __init__(self, file: str):
    """Opens the file and its copy.

    Raises:
      pyarrow.ArrowException, OSError: The file is damaged.
    """
    import pyarrow  # slow to import, and few runs need it
    import pyarrow.parquet

    self._file, self._last = file, (-1, None, None)
    # Otherwise it buffers the bytes of a whole row group.
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK) as parquet:
      metadata, self.size = parquet.metadata, os.path.getsize(file)
      sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
      if sum(sizes) <= SMALL:
        batches = [*parquet.iter_batches(BATCH)]
        self._batch, lengths = batches.__getitem__, [*map(len, batches)]
      else:
        path = derived.file(file, 'arrow', lambda path: _write_table(parquet, path))
        self._batch = pyarrow.ipc.open_file(pyarrow.OSFile(path)).get_batch
        whole, rest = divmod(metadata.num_rows, BATCH)
        lengths = [BATCH] * whole + [rest] * (rest > 0)
    self._ends = np.cumsum(lengths, dtype=INT)

  def __len__(self):
    return int(self._ends[-1]) if len(self._ends) else 0

  def record(self, index):
    number = int(np.searchsorted(self._ends, index, 'right'))
    last, batch, rows = self._last
    row = index - (int(self._ends[number - 1]) if number else 0)
    if last != number:
      batch, rows = self._batch(number), None
    elif rows is None:  # the second access to this batch: rows are read in order
      rows = batch.to_pylist()
    self._last = number, batch, rows
    fields = rows[row] if rows else batch.slice(row, 1).to_pylist()[0]
    return Record(dict(fields), f'{self._file}:row {index}')


def _write_table(parquet: Any, path: str) -> None:
  """Writes an Arrow file whose batches have BATCH rows, except the last."""
  import pyarrow

  plain = pyarrow.schema(
    [  # an Arrow file has one dictionary for all batches
      field.with_type(field.type.value_type) if pyarrow.types.is_dictionary(field.type) else field
      for field in parquet.schema_arrow
    ]
  )
  with pyarrow.OSFile(path, 'wb') as sink, pyarrow.ipc.new_file(sink, plain) as writer:
    table = plain.empty_table()
    for batch in parquet.iter_batches(BATCH):
      table = pyarrow.concat_tables([table, pyarrow.Table.from_batches([batch]).cast(plain)])
      while len(table) >= BATCH:
        writer.write_table(table.slice(0, BATCH).combine_chunks())
        table = table.slice(BATCH)
    if len(table):
      writer.write_table(table.combine_chunks())

"""Records that stay on disk: sequences that read and parse one when it is asked for.

`sequence[i]` raises DataError where record i cannot be read, and the others stay readable; any
thread may ask. What is kept in memory does not grow with the data, but where they are small.
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

# Bytes of one record. A tokenizer takes some 60 bytes of memory for each of a text, and the longest
# novels have 6 MiB: beyond this a file has lost its line breaks, or was made to fill the memory.
LONGEST = 16 * 2**20
SMALL = 16 * 2**20  # bytes of a file of which nothing is kept on disk
CHUNK = 2**23  # bytes read at once
BATCH = 256  # rows of a table read at once

INT = np.dtype(np.int64)
COLUMNS = 3  # of the index: offset and size of a line in bytes, and its number
BLANK = np.frombuffer(b' \t\r\n\v\f', np.uint8)
ESCAPED_SURROGATE = re.compile(rb'\\u[dD][89a-fA-F]')

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes of a file


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


class Records(Sequence[Record], abc.ABC):
  """A sequence of records by their index.

  Attributes:
    size: bytes of the data as they are stored, None where all of them are in memory.
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
    """Record `index`, from 0 to the length less one."""


class Listed(Records):
  """Records that are in memory, and in place of those that cannot be read the errors."""

  def __init__(self, items: Sequence[Record | DataError]):
    self._items = items

  def __len__(self):
    return len(self._items)

  def record(self, index):
    if isinstance(self._items[index], DataError):
      raise self._items[index]
    return self._items[index]


class Mapped(Records):
  """Records of another source of random access, such as a public data set."""

  def __init__(
    self,
    source: Sequence[Any],
    fields: Callable[[Any], dict[str, Any]],
    name: str,
    *,
    size: int | None = None,
  ):
    """`fields` makes a record's of an item; places are those of rows of `name`."""
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
  """Records as a function makes them of others."""

  def __init__(self, records: Records, change: Callable[[Record], Record]):
    self._records, self._change, self.size = records, change, records.size

  def __len__(self):
    return len(self._records)

  def record(self, index):
    return self._change(self._records.record(index))


# Lines.


class Lines(Records):
  """The lines of a file that are not blank, found by an index of their offsets.

  The index of a file that is not small is kept on disk, see `derived`, and read from there.
  """

  def __init__(
    self, file: str, parse: Callable[[bytes], dict[str, Any]], *, content: bytes | str | None = None
  ):
    """Finds the lines, or the index of them.

    Args:
      file: path, for places too.
      parse: a line's bytes to fields; raises DataError.
      content: what has the lines, where `file` is packed: bytes, or the path of another file.

    Raises:
      OSError: the file cannot be read.
    """
    self._file, self._parse = file, parse
    if isinstance(content, bytes):
      self._read, self.size = _part_of(content), len(content)
    else:
      content = content or file
      self._read, self.size = _reader(self, content), os.path.getsize(content)
    if self.size <= SMALL:
      index = np.concatenate([np.zeros((0, COLUMNS), INT), *_index(self._read, self.size)])
      self._length, self._entry = len(index), index.__getitem__
    else:
      path = derived.file(content, 'lines', functools.partial(_write_index, self._read, self.size))
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
      return Record(self._parse(self._read(offset, size)), where)
    except DataError as error:
      raise DataError(f'{where}: {error}') from error


def _part_of(content: bytes) -> Read:
  return lambda offset, size: content[offset : offset + size]


def _reader(owner: Any, path: str) -> Read:
  """Reads parts of a file. A large file stays open as long as the owner lives."""
  if os.path.getsize(path) <= SMALL:  # a folder may have more of them than a process may open

    def read(offset, size):
      with open(path, 'rb') as stream:
        stream.seek(offset)
        return stream.read(size)

    return read
  descriptor = os.open(path, os.O_RDONLY)
  weakref.finalize(owner, os.close, descriptor)
  return lambda offset, size: os.pread(descriptor, size, offset)


def _index(read: Read, size: int) -> Iterator[np.ndarray]:
  """Parts [n, 3] of an index: offset, size and number of each line that is not blank."""
  start, number, first = 0, 1, np.zeros(0, np.uint8)
  for base in range(0, size, CHUNK):
    data = np.frombuffer(read(base, CHUNK), np.uint8)
    ends = np.flatnonzero(data == ord('\n')) + base + 1
    starts = np.concatenate([[start], ends])
    here = starts[(starts >= base) & (starts < base + len(data))]
    first = np.concatenate([first, data[here - base]])  # bytes of the lines that begin so far
    if base + len(data) == size and starts[-1] < size:
      ends = np.append(ends, size)  # the last line has no break
    starts, count = starts[: len(ends)], len(ends)
    rows = np.stack([starts, ends - starts, number + np.arange(count)], axis=1)
    yield rows[_filled(read, rows, first[:count])]
    start, number, first = int(ends[-1]) if count else start, number + count, first[count:]


def _filled(read: Read, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Which lines are not blank; `first` is the first byte of each."""
  filled = np.ones(len(rows), bool)
  for row in np.flatnonzero(np.isin(first, BLANK)):
    offset, size, _ = map(int, rows[row])
    filled[row] = bool(read(offset, min(size, LONGEST)).strip())
  return filled


def _write_index(read: Read, size: int, path: str) -> None:
  with open(path, 'wb') as stream:
    for rows in _index(read, size):
      rows.tofile(stream)


def too_long(size: int) -> str:
  """The complaint about a record of this many bytes; '' if it can be read."""
  if size <= LONGEST:
    return ''
  return (
    f'longer than {LONGEST >> 20} MiB ({size / 2**20:.3g} MiB), the most of a record that can '
    'be read. Cut it into several.'
  )


def json_object(line: bytes) -> dict[str, Any]:
  """The fields of a record that is one JSON object.

  Raises:
    DataError: it is no JSON, no object, or has text that is no Unicode.
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
      f'a JSON object was expected, such as {{"text": "..."}}, and this is a '
      f'{type(fields).__name__}.'
    )
  check_unicode(fields, line)
  return fields


def check_unicode(value: Any, source: bytes) -> None:
  """Raises DataError where JSON holds one half of a surrogate pair, which no tokenizer can encode.

  Args:
    value: what was read.
    source: the JSON that it was read from.
  """
  if not ESCAPED_SURROGATE.search(source):
    return
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise DataError(
      f'not Unicode: {error.object[error.start]!r} is one half of a surrogate pair. Remove it.'
    ) from error


# Tables.


class Table(Records):
  """The rows of a Parquet file, from a copy of it as an Arrow file of small batches.

  A row group must be read whole to read a row, and has as many as a million: the copy of a file
  that is not small is kept on disk, see `derived`.
  """

  def __init__(self, file: str):
    """Opens the file, or its copy.

    Raises:
      pyarrow.ArrowException, OSError: the file is damaged.
    """
    import pyarrow  # Slow to import and needed by few.
    import pyarrow.parquet

    self._file, self._last = file, (-1, None, None)
    # Else it holds the whole of a row group's bytes.
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
    elif rows is None:  # the second of this batch: they are read in order
      rows = batch.to_pylist()
    self._last = number, batch, rows
    fields = rows[row] if rows else batch.slice(row, 1).to_pylist()[0]
    return Record(dict(fields), f'{self._file}:row {index}')


def _write_table(parquet: Any, path: str) -> None:
  """Writes an Arrow file with BATCH rows in all batches but the last."""
  import pyarrow

  plain = pyarrow.schema(
    [  # Arrow files have one dictionary for all batches.
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

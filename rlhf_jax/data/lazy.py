"""Lazy sequences: items are made when they are accessed, so that data may exceed memory."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from absl import logging
import numpy as np

from rlhf_jax.errors import DataError

MAX_SKIPPED = 100  # consecutive examples that may be skipped
MAX_REPORTED = 20  # skipped examples that are logged


class Examples(Sequence):
  """The examples of the records to use."""

  def __init__(
    self,
    records: Sequence[Any],
    kept: np.ndarray,
    make: Callable[[Any], Any],
    *,
    skip: bool = False,
  ):
    """Stores the records and the function that converts them.

    Args:
      records: Records, as `sources.read` returns them.
      kept: [number of records] bool, records to use.
      make: Converts a record to an example, or raises DataError.
      skip: Whether an example that cannot be made is replaced by the next one.
    """
    self._records, self._make, self._skip = records, make, skip
    self._kept = range(len(kept)) if kept.all() else np.flatnonzero(kept)

  def __len__(self):
    return len(self._kept)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return Chosen(self, range(*index.indices(len(self))))
    first = range(len(self))[index]
    for other in range(first, first + MAX_SKIPPED + 1):
      try:
        return self._make(self.record(other % len(self)))
      except DataError as error:
        if not self._skip or other == first + MAX_SKIPPED:
          raise
        logging.log_first_n(
          logging.WARNING, '%s The next record is used instead.', MAX_REPORTED, error
        )

  def record(self, index: int) -> Any:
    """Returns the record of example `index`."""
    return self._records[int(self._kept[index])]


class Chosen(Sequence):
  """The items of a sequence at some indices, in the order of the indices."""

  def __init__(self, items: Sequence[Any], indices: Sequence[int] | np.ndarray):
    self._items, self._indices = items, indices

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return Chosen(self._items, self._indices[index])
    return self._items[int(self._indices[index])]

  def record(self, index: int) -> Any:
    """See `Examples.record`; AttributeError if the items have no records."""
    return self._items.record(int(self._indices[index]))


def take(items: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
  """Returns the items at some indices: a list if `items` is a list, else a lazy sequence."""
  return [items[index] for index in indices] if isinstance(items, list) else Chosen(items, indices)


def place(items: Sequence[Any], index: int) -> str:
  """Returns where an example was stored, such as ' (x.jsonl:17)'; '' for a list of examples."""
  try:
    return f' ({items.record(index).where})'
  except AttributeError:
    return ''

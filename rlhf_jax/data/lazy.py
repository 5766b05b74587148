"""Sequences whose items are made when they are asked for, so that they may exceed the memory."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from absl import logging
import numpy as np

from rlhf_jax.errors import DataError

SKIPPED = 100  # examples in a row that cannot be made
SAID = 20  # of those that are named


class Examples(Sequence):
  """Examples made of the records that are kept."""

  def __init__(
    self,
    records: Sequence[Any],
    kept: np.ndarray,
    make: Callable[[Any], Any],
    *,
    skip: bool = False,
  ):
    """Takes what makes them.

    Args:
      records: as `sources.read` gives them.
      kept: bool [number of records].
      make: record to example, or DataError.
      skip: whether the next example takes the place of one that cannot be made.
    """
    self._records, self._make, self._skip = records, make, skip
    self._kept = range(len(kept)) if kept.all() else np.flatnonzero(kept)

  def __len__(self):
    return len(self._kept)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return Chosen(self, range(*index.indices(len(self))))
    first = range(len(self))[index]
    for other in range(first, first + SKIPPED + 1):
      try:
        return self._make(self.record(other % len(self)))
      except DataError as error:
        if not self._skip or other == first + SKIPPED:
          raise
        logging.log_first_n(logging.WARNING, '%s The next record takes its place.', SAID, error)

  def record(self, index: int) -> Any:
    """The record that example `index` is made of."""
    return self._records[int(self._kept[index])]


class Chosen(Sequence):
  """Those items of a sequence that some indices name, in their order."""

  def __init__(self, items: Sequence[Any], indices: Sequence[int] | np.ndarray):
    self._items, self._indices = items, indices

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return Chosen(self._items, self._indices[index])
    return self._items[int(self._indices[index])]

  def record(self, index: int) -> Any:
    """See `Examples.record`; of items that have none an error."""
    return self._items.record(int(self._indices[index]))


def take(items: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
  """The items that some indices name: a list of a list's."""
  return [items[index] for index in indices] if isinstance(items, list) else Chosen(items, indices)


def place(items: Sequence[Any], index: int) -> str:
  """Where an example was stored, ' (x.jsonl:17)'; '' of a list of examples."""
  try:
    return f' ({items.record(index).where})'
  except AttributeError:
    return ''

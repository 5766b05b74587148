"""Packing that streams: rows of documents that are tokenized as they are drawn.

Letters: B rows of a batch, T row length.

Row b of every batch comes from lane b, which reads the documents b, b + B, b + 2 B, ... of the
order of all epochs. A lane takes as many whole documents as fill some rows, its window, packs
them (the longest first, into the first row with room) and gives the rows in a random order; then
it takes the next. So a row depends on its lane alone: a process reads the documents of its own
rows, and the place of a lane, the first document of its window and the rows of it that are given,
is the same for any number of processes.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from rlhf_jax import processes
from rlhf_jax import types
from rlhf_jax.data import packing
from rlhf_jax.errors import UserError

AHEAD = 2**21  # tokens in the windows of all lanes, if these have from LEAST to MOST rows
# Rows of a window: 64 pack as well as all documents together, 8 leave 3 to 9 % more padding.
LEAST, MOST = 8, 64
PREFETCHED = 4  # batches
HALF = 30  # bits of a document's number in each of two int32

Read = Callable[[np.ndarray], list[np.ndarray]]  # numbers of documents to their token ids


class Lane:
  """The rows of one lane, forever."""

  def __init__(
    self, read: Read, lane: int, lanes: int, *, length: int, window: int, mean: float, seed: int
  ):
    """Starts at the first document.

    Args:
      read: makes documents by their number in the order of all epochs.
      lane: b.
      lanes: B.
      length: T.
      window: rows that the documents of a window are to fill.
      mean: tokens of a document, about.
      seed: of the order of the rows.
    """
    self._read, self._lane, self._lanes, self._seed = read, lane, lanes, seed
    self._length, self._room = length, window * length
    self._chunk = int(np.clip(self._room / max(mean, 1), 1, 4096))  # documents read together
    self.place = (0, 0)

  @property
  def place(self) -> tuple[int, int]:
    """How many documents come before the window, and how many of its rows are given."""
    return self._first, self._given

  @place.setter
  def place(self, place: tuple[int, int]):
    self._first, self._given = self._next, _ = place
    self._ahead, self._rows = [], None

  def row(self) -> list[np.ndarray]:
    """Pieces of documents that make the next row."""
    while self._rows is None or self._given >= len(self._rows):
      if self._rows is not None:
        self._first, self._given = self._next, 0
      self._rows = self._pack()
    self._given += 1
    return self._rows[self._given - 1]

  def _pack(self) -> list[list[np.ndarray]]:
    """Reads a window, up to document `_next`, and packs it."""
    documents, tokens = [], 0
    self._next = self._first
    while True:
      if not self._ahead:
        self._ahead = self._read(self._lane + self._lanes * (self._next + np.arange(self._chunk)))
      if documents and tokens + len(self._ahead[0]) > self._room:
        break
      documents.append(self._ahead.pop(0))
      tokens += len(documents[-1])
      self._next += 1
    rows = packing.rows_of(documents, length=self._length)
    order = np.random.default_rng((self._seed, self._lane, self._first)).permutation(len(rows))
    return [rows[index] for index in order]


class Batches(grain.DatasetIterator):
  """Batches of the rows of lanes, of which this process has some.

  The state is that of its own lanes, {'places': [n, 2]}.
  """

  def __init__(self, lanes: Sequence[Lane | None], *, length: int, pad_id: int):
    """Takes the B lanes, None where another process has it."""
    super().__init__()
    self._lanes, self._length, self._pad_id = lanes, length, pad_id

  def __next__(self) -> types.LMBatch:
    rows = [lane.row() if lane else [] for lane in self._lanes]
    return packing.batch_of(rows, length=self._length, pad_id=self._pad_id)

  def get_state(self):
    return {'places': [lane.place for lane in self._lanes if lane]}

  def set_state(self, state):
    for lane, place in zip(filter(None, self._lanes), state['places'], strict=True):
      lane.place = tuple(place)


class _Dataset(grain.IterDataset):
  """What Grain prefetches from."""

  def __init__(self, make: Callable[[], Batches]):
    super().__init__()
    self._make = make

  def __iter__(self):
    return self._make()


class Gathered(Iterator[types.LMBatch]):
  """An iterator over batches whose state has the places of all lanes, B x [document, row].

  Any number of processes resumes from it. `get_state` must be called on all of them.
  """

  def __init__(self, make: Callable[[], Batches], held: np.ndarray):
    """Prefetches batches in the background; `held` says which of the B lanes they have."""
    self._held = held
    self._batches = iter(
      grain.experimental.ThreadPrefetchIterDataset(_Dataset(make), prefetch_buffer_size=PREFETCHED)
    )

  def __next__(self) -> types.LMBatch:
    return next(self._batches)

  def close(self) -> None:
    """Stops making batches."""
    self._batches.close()

  def get_state(self) -> dict[str, Any]:
    """The places of all lanes."""
    places = np.zeros((len(self._held), 3), np.int32)
    own = np.array(self._batches.get_state()['places'], np.int64).reshape(-1, 2)
    places[self._held] = np.stack([own[:, 0] >> HALF, own[:, 0] % 2**HALF, own[:, 1]], axis=1)
    # Processes that have the same lane are at the same place.
    places = np.max(processes.all_gather(places), axis=0).astype(np.int64)
    first = (places[:, 0] << HALF) + places[:, 1]
    return {'places': np.stack([first, places[:, 2]], axis=1).tolist()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Resumes behind the batch at which `get_state` was called.

    Raises:
      UserError: it was called with batches of another size, which stand elsewhere in the data.
    """
    places = state['places']
    if len(places) != len(self._held):
      raise UserError(
        f'the checkpoint has the place in the texts for a batch_size of {len(places)}, and the '
        f'config has {len(self._held)}: set config.batch_size (for ptx: config.ptx.batch_size) to '
        f'{len(places)}. Texts that are tokenized during training need the same one to resume.'
      )
    self._batches.set_state({'places': [places[lane] for lane in np.flatnonzero(self._held)]})


def window_rows(batch_size: int, length: int) -> int:
  """Rows of a window, so that the windows of all lanes have AHEAD tokens."""
  return int(np.clip(AHEAD // (batch_size * length), LEAST, MOST))

"""Packs documents while training: those of mixtures, and those that do not fit into memory.

Letters: B batch, T sequence length.

Sequence b of every batch comes from lane b, which reads the documents b, b + B, b + 2 B, ... of the
shuffled order of all epochs. A lane reads a window, as many documents as fill some sequences, packs
it (the longest documents first, each into the first sequence with room), returns the sequences in
random order, and continues with the next window. A sequence thus depends only on its lane: a
process reads only the documents of its own sequences. The place of a lane (the first document of
its window, and the number of sequences returned from the window) does not depend on the number of
processes, so a run can be resumed with another number.
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

WINDOW_TOKENS = 2**21  # tokens in the windows of all lanes together, within the limits below
# Sequences per window. Windows of 64 pack as well as all documents together; windows of 8 leave 3
# to 9 % more padding.
MIN_WINDOW, MAX_WINDOW = 8, 64
PREFETCH = 4  # batches
LOW_BITS = 30  # a document number is gathered as two int32: its low bits, and the others

Read = Callable[[np.ndarray], list[np.ndarray]]  # document numbers -> token ids of each document


class Lane:
  """An endless source of the sequences of one lane."""

  def __init__(
    self, read: Read, lane: int, lanes: int, *, length: int, window: int, mean: float, seed: int
  ):
    """Starts at the first document.

    Args:
      read: Returns documents by their number in the shuffled order of all epochs.
      lane: b, index of this lane.
      lanes: B, number of lanes.
      length: T.
      window: Number of sequences that the documents of a window should fill.
      mean: Approximate number of tokens per document.
      seed: Random seed of the order of the sequences in a window.
    """
    self._read, self._lane, self._lanes, self._seed = read, lane, lanes, seed
    self._length, self._room = length, window * length
    self._chunk = int(np.clip(self._room / max(mean, 1), 1, 4096))  # documents read together
    self.place = (0, 0)

  @property
  def place(self) -> tuple[int, int]:
    """(first document of the window, number of sequences returned from the window)."""
    return self._first, self._returned

  @place.setter
  def place(self, place: tuple[int, int]):
    self._first, self._returned = self._next, _ = place
    self._read_ahead, self._sequences = [], None

  def next_sequence(self) -> list[np.ndarray]:
    """Returns the pieces of documents in the next sequence."""
    while self._sequences is None or self._returned >= len(self._sequences):
      if self._sequences is not None:
        self._first, self._returned = self._next, 0
      self._sequences = self._pack()
    self._returned += 1
    return self._sequences[self._returned - 1]

  def _pack(self) -> list[list[np.ndarray]]:
    """Reads a window, moves `_next` to the document after it, and returns its sequences."""
    documents, tokens = [], 0
    self._next = self._first
    while True:
      if not self._read_ahead:
        numbers = self._lane + self._lanes * (self._next + np.arange(self._chunk))
        self._read_ahead = self._read(numbers)
      if documents and tokens + len(self._read_ahead[0]) > self._room:
        break
      documents.append(self._read_ahead.pop(0))
      tokens += len(documents[-1])
      self._next += 1
    sequences = packing.assign(documents, length=self._length)
    rng = np.random.default_rng((self._seed, self._lane, self._first))
    return [sequences[index] for index in rng.permutation(len(sequences))]


class LocalBatches(grain.DatasetIterator):
  """Batches [B, T] with the sequences of this process; those of other processes are padding.

  The state is {'places': [n, 2]}, the places of the n lanes of this process.
  """

  def __init__(self, lanes: Sequence[Lane | None], *, length: int, pad_id: int):
    """Stores the B lanes; None for the lanes of other processes."""
    super().__init__()
    self._lanes, self._length, self._pad_id = lanes, length, pad_id

  def __next__(self) -> types.LMBatch:
    sequences = [lane.next_sequence() if lane else [] for lane in self._lanes]
    return packing.to_batch(sequences, length=self._length, pad_id=self._pad_id)

  def get_state(self):
    return {'places': [lane.place for lane in self._lanes if lane]}

  def set_state(self, state):
    for lane, place in zip(filter(None, self._lanes), state['places'], strict=True):
      lane.place = tuple(place)


class _Dataset(grain.IterDataset):
  """The dataset that Grain prefetches from."""

  def __init__(self, make: Callable[[], LocalBatches]):
    super().__init__()
    self._make = make

  def __iter__(self):
    return self._make()


class Batches(Iterator[types.LMBatch]):
  """An iterator over batches whose state holds the places of all lanes, of all processes.

  The state can be restored with any number of processes. `get_state` must be called on all of them.
  """

  def __init__(self, make: Callable[[], LocalBatches], local: np.ndarray):
    """Starts to prefetch batches.

    Args:
      make: Returns the batches of this process.
      local: [B] bool, the lanes of this process.
    """
    self._local = local
    self._batches = iter(
      grain.experimental.ThreadPrefetchIterDataset(_Dataset(make), prefetch_buffer_size=PREFETCH)
    )

  def __next__(self) -> types.LMBatch:
    return next(self._batches)

  def close(self) -> None:
    """Stops prefetching."""
    self._batches.close()

  def get_state(self) -> dict[str, Any]:
    """Returns {'places': [B, 2]}: (first document of the window, sequences returned) per lane."""
    places = np.zeros((len(self._local), 3), np.int32)
    local = np.array(self._batches.get_state()['places'], np.int64).reshape(-1, 2)
    high, low = local[:, 0] >> LOW_BITS, local[:, 0] % 2**LOW_BITS
    places[self._local] = np.stack([high, low, local[:, 1]], axis=1)
    # Processes that share a lane are at the same position in it.
    places = np.max(processes.all_gather(places), axis=0).astype(np.int64)
    first = (places[:, 0] << LOW_BITS) + places[:, 1]
    return {'places': np.stack([first, places[:, 2]], axis=1).tolist()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Resumes after the batch at which `get_state` was called.

    Raises:
      UserError: The state was saved with another batch size.
    """
    places = state['places']
    if len(places) != len(self._local):
      raise UserError(
        f'the checkpoint has a position in the texts for a batch_size of {len(places)}, but the '
        f'config has {len(self._local)}: set config.batch_size (for ptx: config.ptx.batch_size) to '
        f'{len(places)}. Texts that are packed during training can only be resumed with the same '
        'batch size.'
      )
    self._batches.set_state({'places': [places[lane] for lane in np.flatnonzero(self._local)]})


def window_size(batch_size: int, length: int) -> int:
  """Returns the sequences per window with which all windows together hold WINDOW_TOKENS."""
  return int(np.clip(WINDOW_TOKENS // (batch_size * length), MIN_WINDOW, MAX_WINDOW))

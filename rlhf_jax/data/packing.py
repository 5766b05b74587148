"""Packs several short documents into one sequence, to reduce padding.

Letters: N sequences, T sequence length.

`segments` numbers the documents of a sequence 1, 2, ... and is 0 at padding. Models attend only
within a segment, and positions start at 0 in each document, so a document has the same
log-probabilities packed as alone. Each document goes into the first open sequence with enough room
(first fit). At most OPEN_SEQUENCES are open, so the time is linear in the number of documents. See
Krell et al. 2021 for the padding that first fit leaves (https://arxiv.org/abs/2107.02027). `lanes`
packs documents that do not fit into memory.
"""

from collections.abc import Sequence

import numpy as np

from rlhf_jax import types

OPEN_SEQUENCES = 64


def pack(documents: Sequence[np.ndarray], *, length: int, pad_id: int) -> types.LMBatch:
  """Packs documents, in their order.

  Args:
    documents: One int32 array of token ids per document. Documents of fewer than two tokens have no
      token to predict and are left out.
    length: T, at least 2. A longer document is cut into pieces that overlap by one token, so that
      every token except the document's first is a target exactly once.
    pad_id: Token id of padding.

  Returns:
    LMBatch of NumPy arrays [N, T]. `loss_mask` is True at every token except padding and the first
    token of each piece, which has no token before it.
  """
  return to_batch(_first_fit(_pieces(documents, length), length), length=length, pad_id=pad_id)


def assign(documents: Sequence[np.ndarray], *, length: int) -> list[list[np.ndarray]]:
  """Returns the documents, or pieces of longer ones, of each sequence.

  Unlike `pack`, packs the longest first. Arguments as for `pack`.
  """
  return _first_fit(sorted(_pieces(documents, length), key=len, reverse=True), length)


def _pieces(documents: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
  if length < 2:
    raise ValueError(f'length={length} must be at least 2: shorter sequences have no target')
  return [
    document[start : start + length]
    for document in documents
    for start in range(0, len(document) - 1, length - 1)
  ]


def _first_fit(pieces: list[np.ndarray], length: int) -> list[list[np.ndarray]]:
  sequences = first_fit([len(piece) for piece in pieces], length=length, smallest=2)
  return [[pieces[index] for index in sequence] for sequence in sequences]


def first_fit(sizes: Sequence[int], *, length: int, smallest: int) -> list[list[int]]:
  """Assigns documents to sequences by first fit.

  Args:
    sizes: Number of tokens of each document, from `smallest` to `length`.
    length: T.
    smallest: Room below which a sequence is closed.

  Returns:
    The indices of the documents of each sequence.
  """
  sequences = []
  open_indices = []  # indices of the open sequences, oldest first
  room = []  # tokens that each open sequence has room for
  for index, size in enumerate(sizes):
    for slot, left in enumerate(room):  # noqa: B007
      if left >= size:
        break
    else:
      slot = len(open_indices)
      open_indices.append(len(sequences))
      room.append(length)
      sequences.append([])
    sequences[open_indices[slot]].append(index)
    room[slot] -= size
    if room[slot] < smallest or len(open_indices) > OPEN_SEQUENCES:
      slot = slot if room[slot] < smallest else 0
      del open_indices[slot], room[slot]
  return sequences


def assign_lanes(sizes: np.ndarray, *, length: int) -> np.ndarray:
  """Assigns examples of several sequences each to rows with a lane for each of them.

  All sequences of an example are in the same row, one in each lane. From the longest example to the
  shortest, each goes into the first open row with enough room in every lane.

  Args:
    sizes: [N, lanes] int, tokens of each sequence, at most `length`.
    length: Tokens of a lane.

  Returns:
    [rows, M] int32, the examples of each row, then -1; M is the largest number in a row.
  """
  rows, still_open, room = [], [], np.zeros((0, sizes.shape[1]), int)
  for number in np.argsort(-sizes.max(axis=1), kind='stable'):
    fits = np.flatnonzero((room >= sizes[number]).all(axis=1))
    if not len(fits):
      still_open.append(len(rows))
      rows.append([])
      room = np.concatenate([room, np.full((1, sizes.shape[1]), length)])
      fits = [len(room) - 1]
    rows[still_open[fits[0]]].append(int(number))
    room[fits[0]] -= sizes[number]
    if len(still_open) > OPEN_SEQUENCES:
      fullest = int(np.argmin(room.min(axis=1)))
      del still_open[fullest]
      room = np.delete(room, fullest, axis=0)
  index = np.full((len(rows), max(map(len, rows))), -1, np.int32)
  for number, row in enumerate(rows):
    index[number, : len(row)] = row
  return index


def to_batch(
  sequences: Sequence[Sequence[np.ndarray]], *, length: int, pad_id: int
) -> types.LMBatch:
  """Returns the LMBatch [N, T] of N sequences, each a list of pieces; see `pack`."""
  shape = (len(sequences), length)
  tokens = np.full(shape, pad_id, np.int32)
  segments = np.zeros(shape, np.int32)
  positions = np.zeros(shape, np.int32)
  loss_mask = np.zeros(shape, bool)
  for index, pieces in enumerate(sequences):
    start = 0
    for segment, piece in enumerate(pieces, start=1):
      stop = start + len(piece)
      tokens[index, start:stop] = piece
      segments[index, start:stop] = segment
      positions[index, start:stop] = np.arange(stop - start)
      loss_mask[index, start + 1 : stop] = True
      start = stop
  return types.LMBatch(tokens, segments, positions, loss_mask)

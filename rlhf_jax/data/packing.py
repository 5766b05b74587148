"""Several short documents in one row, so that no row is mostly padding.

Letters: N rows, T row length.

A row's documents are numbered 1, 2, ... in `segments`, with 0 at padding; models attend within
equal segments only, and positions start again with each document, so a packed document has the
same log-probabilities as one alone in its row. Documents go, in their order, into the first of
the open rows with room (first fit); only the OPEN_ROWS newest are considered, so the time is
linear in the number of documents. See Krell et al. 2021 for how near first fit comes to full
rows (https://arxiv.org/abs/2107.02027). `lanes` packs documents that are more than fit the memory.
"""

from collections.abc import Sequence

import numpy as np

from rlhf_jax import types

OPEN_ROWS = 64


def pack(documents: Sequence[np.ndarray], *, length: int, pad_id: int) -> types.LMBatch:
  """Packs documents into rows.

  Args:
    documents: token ids, int32, one array each. Those of fewer than two tokens hold nothing to
      predict and are left out.
    length: T, at least 2. A longer document is cut into pieces that overlap by one token, so
      that every token but a document's first is a target exactly once.
    pad_id: id in padded slots.

  Returns:
    LMBatch of NumPy arrays [N, T]. `loss_mask` is True at every real token but the first of each
    piece, which has nothing before it to be predicted from.
  """
  return batch_of(_first_fit(_pieces(documents, length), length), length=length, pad_id=pad_id)


def rows_of(documents: Sequence[np.ndarray], *, length: int) -> list[list[np.ndarray]]:
  """The documents (or pieces of longer ones) of each row, the longest packed first; else as `pack`."""
  return _first_fit(sorted(_pieces(documents, length), key=len, reverse=True), length)


def pad(documents: Sequence[np.ndarray], *, length: int, pad_id: int) -> types.LMBatch:
  """One document (or piece of a longer one) a row, right-padded; else as `pack`."""
  return batch_of([[piece] for piece in _pieces(documents, length)], length=length, pad_id=pad_id)


def _pieces(documents: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
  if length < 2:
    raise ValueError(f'rows of {length} tokens hold no target')
  return [
    document[start : start + length]
    for document in documents
    for start in range(0, len(document) - 1, length - 1)
  ]


def _first_fit(pieces: list[np.ndarray], length: int) -> list[list[np.ndarray]]:
  rows = []
  open_rows = []  # Indices into rows, oldest first, and beside them the room each has left.
  room = []
  for piece in pieces:
    size = len(piece)
    for slot, left in enumerate(room):  # noqa: B007
      if left >= size:
        break
    else:
      slot = len(open_rows)
      open_rows.append(len(rows))
      room.append(length)
      rows.append([])
    rows[open_rows[slot]].append(piece)
    room[slot] -= size
    # Less than two tokens of room is no room for anything.
    if room[slot] < 2 or len(open_rows) > OPEN_ROWS:
      slot = slot if room[slot] < 2 else 0
      del open_rows[slot], room[slot]
  return rows


def batch_of(rows: Sequence[Sequence[np.ndarray]], *, length: int, pad_id: int) -> types.LMBatch:
  """LMBatch [N, T] of the pieces in each of N rows; see `pack`."""
  tokens = np.full((len(rows), length), pad_id, np.int32)
  segments = np.zeros((len(rows), length), np.int32)
  positions = np.zeros((len(rows), length), np.int32)
  loss_mask = np.zeros((len(rows), length), bool)
  for index, row in enumerate(rows):
    start = 0
    for segment, piece in enumerate(row, start=1):
      stop = start + len(piece)
      tokens[index, start:stop] = piece
      segments[index, start:stop] = segment
      positions[index, start:stop] = np.arange(stop - start)
      loss_mask[index, start + 1 : stop] = True
      start = stop
  return types.LMBatch(tokens, segments, positions, loss_mask)

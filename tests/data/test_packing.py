"""Packing against sequences packed by hand, and invariants for random documents."""

import time

import numpy as np
import pytest

from rlhf_jax.data import packing

F, T = False, True


def documents(*lengths):
  """Returns documents of distinct tokens: 10, 11, ... in the first, 20, 21, ... in the second."""
  return [np.arange(10 * i, 10 * i + n, dtype=np.int32) for i, n in enumerate(lengths, start=1)]


def test_first_fit_by_hand():
  # Rows of 6: 3 opens row 0 (3 left); 4 opens row 1 (2 left); 2 goes into row 0 (1 left, closed);
  # 2 goes into row 1 (full); 1 is left out.
  batch = packing.pack(documents(3, 4, 2, 2, 1), length=6, pad_id=9)
  np.testing.assert_array_equal(batch.tokens, [[10, 11, 12, 30, 31, 9], [20, 21, 22, 23, 40, 41]])
  np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
  np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
  np.testing.assert_array_equal(batch.loss_mask, [[F, T, T, F, T, F], [F, T, T, T, F, T]])
  assert [leaf.dtype for leaf in (batch.tokens, batch.segments, batch.positions)] == [np.int32] * 3


def test_long_documents_overlap_by_one():
  # 10 .. 16 in rows of 3: the last token of a piece is the first input of the next.
  batch = packing.pack(documents(7), length=3, pad_id=0)
  np.testing.assert_array_equal(batch.tokens, [[10, 11, 12], [12, 13, 14], [14, 15, 16]])
  np.testing.assert_array_equal(batch.tokens[batch.loss_mask], [11, 12, 13, 14, 15, 16])
  # One more token: the last piece has the minimum length.
  batch = packing.pack(documents(8), length=3, pad_id=0)
  np.testing.assert_array_equal(batch.tokens[-1], [16, 17, 0])


@pytest.mark.parametrize('length', [2, 7, 32])
def test_any_documents(length):
  """Every bigram of every document is an (input, target) pair once, within one segment."""
  rng = np.random.default_rng(length)
  docs = [rng.integers(0, 50, n).astype(np.int32) for n in rng.integers(0, 3 * length, 300)]
  batch = packing.pack(docs, length=length, pad_id=0)
  want = sorted((a, b) for doc in docs for a, b in zip(doc.tolist(), doc[1:].tolist()))
  rows, columns = np.nonzero(batch.loss_mask)
  got = sorted(zip(batch.tokens[rows, columns - 1].tolist(), batch.tokens[rows, columns].tolist()))
  assert got == want
  # The input of a target is the token before it in the same document.
  np.testing.assert_array_equal(batch.segments[rows, columns], batch.segments[rows, columns - 1])
  np.testing.assert_array_equal(
    batch.positions[rows, columns], batch.positions[rows, columns - 1] + 1
  )
  # Segment numbers increase from 1 without gaps; padding is only at the end.
  for segments, positions in zip(batch.segments, batch.positions):
    real = segments[segments > 0]
    assert real[0] == 1 and set(np.diff(real)) <= {0, 1}
    np.testing.assert_array_equal(segments[len(real) :], 0)
    np.testing.assert_array_equal(positions[: len(real)] == 0, np.diff(real, prepend=0) == 1)
  again = packing.pack(docs, length=length, pad_id=0)
  np.testing.assert_array_equal(batch.tokens, again.tokens)


def test_rows_are_nearly_full_and_many_documents_take_seconds():
  docs = [np.ones(n, np.int32) for n in np.random.default_rng(0).integers(2, 200, 20_000)]
  start = time.perf_counter()
  batch = packing.pack(docs, length=256, pad_id=0)
  assert time.perf_counter() - start < 10
  assert np.mean(batch.segments > 0) > 0.95


def test_rows_of_one_token_are_refused():
  with pytest.raises(ValueError, match='length=1 must be at least 2'):
    packing.pack(documents(3), length=1, pad_id=0)

"""Batches for training, from checkpointable iterators that never end, and for evaluation.

Letters: B batch, K completions of one prompt, P prompt length, T row length, N examples or packed
rows.

Each epoch has an order of its own, the same for the same seed and any number of processes, and an
iterator's state is its position, so `get_state` and `set_state` resume at the exact batch. Fewer
examples than a batch are repeated within it. Few examples are tokenized once, before the first
batch; of more, only the indices are shuffled, and an example is read and tokenized when it is
drawn, in the background: see `rows`, and `lanes` for packed texts.

Batches are pytrees of `rlhf_jax.types` with NumPy arrays, always of the same shape. Prompts to
respond to are left-padded, everything else is right-padded. With several processes each draws all
indices and makes only the rows that its devices hold: see `sharding.local_rows`.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
from typing import Any

from absl import logging
import grain
import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import lanes as lanes_lib
from rlhf_jax.data import lazy
from rlhf_jax.data import packing
from rlhf_jax.data import rows as rows_lib
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

# Batches are made ahead of time in the background.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

FEW = 10_000  # held-out rows, whose batches are kept
PACKED_BATCHES = 8  # of held-out texts that are packed together

# Indices [B], and which of them to make rows of, bool [B], to a batch.
Collate = Callable[[np.ndarray, np.ndarray], Any]


# Iterators.


def lm_iterator(
  texts: Sequence[str | formats.Completion],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  length: int,
  seed: int,
  pack: bool = True,
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over LMBatch [B, T] of whole texts, each followed by the EOS.

  Args:
    texts: documents; of a Completion prompt and completion are tokenized apart.
    tokenizer: as `tokenizers.load` gives it.
    batch_size: B.
    length: T. Longer texts are cut into several pieces.
    seed: decides the order.
    pack: whether rows hold several documents; see `packing`.

  Returns:
    (iterator, N): an epoch is N rows, N / batch_size steps; of texts that are tokenized as they are
    drawn about N, as a sample of them packs.

  Raises:
    UserError: there is nothing to learn from.
  """
  rows = rows_lib.texts(texts, tokenizer)
  if rows.all is None and pack:
    return _stream(rows, tokenizer, batch_size=batch_size, length=length, seed=seed)
  collate, count = _lm(rows, tokenizer, length=length, pack=pack)
  return _iterate(collate, range(count), batch_size, seed)


def completion_iterator(
  examples: Sequence[formats.Completion],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_length: int,
  seed: int,
  pairs: bool = False,
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over LMBatch [B, T], one prompt and completion a row.

  Only the completion's tokens, its EOS included, are targets. T = max_length; see `rows.fit` for
  what becomes of longer ones. With `pairs` they are Pairs [B, P + R] instead, P the length of the
  longest prompt and R of the longest completion. Other arguments, result and errors as for
  `lm_iterator`.
  """
  collate = _completions(examples, tokenizer, max_length=max_length, pairs=pairs)
  return _iterate(collate, range(len(examples)), batch_size, seed)


def comparison_iterator(
  examples: Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_length: int,
  seed: int,
  append_eos: bool = True,
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over Comparisons [B, K, T], K that of the example with the most completions.

  T = max_length; all completions of a prompt follow the same tokens, and end with the EOS if
  `append_eos`; see `rows.fit` for what becomes of longer ones. Other arguments, result and errors as
  for `lm_iterator`.
  """
  collate = _comparisons(examples, tokenizer, max_length=max_length, append_eos=append_eos)
  return _iterate(collate, range(len(examples)), batch_size, seed)


def prompt_iterator(
  examples: Sequence[formats.Prompt],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_prompt_length: int,
  seed: int,
  on_long: str = 'error',
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over pairs of Prompts [B, P] and int32 [B], indices into `examples`.

  Args:
    max_prompt_length: P.
    on_long: for prompts of more than P tokens: 'error', 'truncate_left' (the oldest tokens go, a
      leading BOS stays) or 'drop'.

  Returns:
    (iterator, N), as does `lm_iterator`; N is the number of prompts that were not dropped.

  Raises:
    UserError: a prompt is longer than P (on_long='error'), has no token, or none is left; or as
      for `lm_iterator`, as are the other arguments.
  """
  collate, indices = _prompts(
    examples, tokenizer, max_prompt_length=max_prompt_length, on_long=on_long
  )
  return _iterate(collate, indices, batch_size, seed)


def _check_sizes(count: int, batch_size: int) -> None:
  if batch_size < 1:
    raise UserError(f'batch_size {batch_size} must be positive.')
  if not count:
    raise UserError(
      'the data have no token to learn from: there are no examples, or only empty texts.'
    )


def _iterate(
  collate: Collate, indices: Sequence[int] | np.ndarray, batch_size: int, seed: int
) -> tuple[grain.DatasetIterator, int]:
  _check_sizes(len(indices), batch_size)
  if len(indices) < batch_size:
    logging.info(
      '%d examples are fewer than the batch size, %d: they are repeated within a batch.',
      len(indices),
      batch_size,
    )
  held = sharding.local_rows(batch_size)
  dataset = _order(indices, seed).batch(batch_size, drop_remainder=True)
  return iter(dataset.map(lambda drawn: collate(drawn, held)).to_iter_dataset(_READ)), len(indices)


def _order(indices: Sequence[int] | np.ndarray, seed: int) -> grain.MapDataset:
  """Indices in the order of all epochs."""
  source = (
    grain.MapDataset.range(len(indices))
    if isinstance(indices, range)
    else grain.MapDataset.source(indices)
  )
  return source.seed(seed).shuffle().repeat()


def _stream(
  rows: rows_lib.Rows, tokenizer: formats.Tokenizer, *, batch_size: int, length: int, seed: int
) -> tuple[lanes_lib.Batches, int]:
  """Packs documents as they are drawn: see `lanes`."""
  packed = len(packing.assign([row.prompt for row in rows.sample], length=length))
  _check_sizes(packed, batch_size)
  order, held = _order(range(len(rows)), seed), sharding.local_rows(batch_size)
  read = lambda numbers: [row.prompt for row in rows.take([order[int(n)] for n in numbers])]
  sizes = dict(
    length=length,
    window=lanes_lib.window_size(batch_size, length),
    mean=sum(row.tokens for row in rows.sample) / len(rows.sample),
  )

  def make():
    lanes = [
      lanes_lib.Lane(read, lane, batch_size, seed=seed, **sizes) if here else None
      for lane, here in enumerate(held)
    ]
    return lanes_lib.LocalBatches(lanes, length=length, pad_id=tokenizer.pad_token_id)

  return lanes_lib.Batches(make, held), max(1, round(packed * len(rows) / len(rows.sample)))


# Held-out batches.


class Batches(Iterable[tuple[Any, np.ndarray]]):
  """Pairs of a batch and valid, bool [B], made anew each time that they are gone through."""

  def __init__(self, make: Callable[[], Iterator[tuple[Any, np.ndarray]]]):
    self._make = make

  def __iter__(self):
    return self._make()


def lm_batches(
  texts: Sequence[str | formats.Completion],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  length: int,
  pack: bool = True,
) -> Iterable[tuple[types.LMBatch, np.ndarray]]:
  """All texts once, in order, for evaluation: pairs of LMBatch [B, T] and valid, bool [B].

  The last batch is filled with copies of its first row, where `valid` is False and no token is a
  target: sums and counts over targets need no more care. No texts make no batches. Batches of few
  texts are a list, else they are made as they are gone through. Arguments as for `lm_iterator`.
  """
  rows = rows_lib.texts(texts, tokenizer)
  if rows.all is None and pack:
    return Batches(lambda: _packed_in_order(rows, tokenizer, batch_size, length))
  collate, count = _lm(rows, tokenizer, length=length, pack=pack)
  return _in_order(collate, range(count), batch_size)


def _packed_in_order(
  rows: rows_lib.Rows, tokenizer: formats.Tokenizer, batch_size: int, length: int
) -> Iterator[tuple[types.LMBatch, np.ndarray]]:
  """Batches of some documents packed together at a time."""
  rest, documents, tokens = [], [], 0
  for row in itertools.chain(rows.each('packing'), [None]):
    if row:
      documents.append(row.prompt)
      tokens += row.tokens
    if not row or tokens >= batch_size * length * PACKED_BATCHES:
      rest += packing.assign(documents, length=length)
      documents, tokens = [], 0
      last = 0 if row else -len(rest) % batch_size
      for start in range(0, len(rest) + last - batch_size + 1, batch_size):
        some = rest[start : start + batch_size]
        some_batch = packing.to_batch(
          some + [some[0]] * (batch_size - len(some)), length=length, pad_id=tokenizer.pad_token_id
        )
        yield _without_copies(some_batch, len(some))
      rest = rest[len(rest) // batch_size * batch_size :]


def completion_batches(
  examples: Sequence[formats.Completion],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_length: int,
  pairs: bool = False,
) -> Iterable[tuple[types.LMBatch | types.Pairs, np.ndarray]]:
  """As `lm_batches`, for `completion_iterator`."""
  collate = _completions(examples, tokenizer, max_length=max_length, pairs=pairs)
  return _in_order(collate, range(len(examples)), batch_size)


def comparison_batches(
  examples: Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_length: int,
  append_eos: bool = True,
) -> Iterable[tuple[types.Comparisons, np.ndarray]]:
  """As `lm_batches`, for `comparison_iterator`."""
  collate = _comparisons(examples, tokenizer, max_length=max_length, append_eos=append_eos)
  return _in_order(collate, range(len(examples)), batch_size)


def prompt_batches(
  examples: Sequence[formats.Prompt],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_prompt_length: int,
  on_long: str = 'error',
) -> Iterable[tuple[tuple[types.Prompts, np.ndarray], np.ndarray]]:
  """As `lm_batches`, for pairs of Prompts [B, P] and indices [B]; see `prompt_iterator`."""
  collate, indices = _prompts(
    examples, tokenizer, max_prompt_length=max_prompt_length, on_long=on_long
  )
  return _in_order(collate, indices, batch_size)


def _in_order(
  collate: Collate, indices: Sequence[int] | np.ndarray, batch_size: int
) -> Iterable[tuple[Any, np.ndarray]]:
  def batches():
    for start in range(0, len(indices), batch_size):
      drawn = np.asarray(indices[start : start + batch_size], np.int64)
      count = len(drawn)
      drawn = np.append(drawn, np.full(batch_size - count, drawn[0]))
      yield _without_copies(collate(drawn, np.ones(batch_size, bool)), count)

  return [*batches()] if len(indices) <= FEW else Batches(batches)


def _without_copies(batch: Any, count: int) -> tuple[Any, np.ndarray]:
  """The batch with no target in rows from `count` on, and which rows are before it."""
  valid = np.arange(len(jax.tree.leaves(batch)[0])) < count
  if isinstance(batch, types.LMBatch):
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & valid[:, None])
  elif isinstance(batch, types.Pairs):
    batch = dataclasses.replace(batch, response_mask=batch.response_mask & valid[:, None])
  elif isinstance(batch, types.Comparisons):
    batch = dataclasses.replace(batch, present=batch.present & valid[:, None])
  return batch, valid


def split(
  examples: Sequence[Any], *, holdout: float, seed: int
) -> tuple[Sequence[Any], Sequence[Any]]:
  """Splits examples by prompt into (training, held out), each in their first order.

  All examples of a prompt land on the same side: else what is held out would be answers to prompts
  that were trained on. Equal texts count as examples of one prompt. Where all examples have the
  same prompt, such as none, equal examples stay together.

  Args:
    examples: texts, or examples with a prompt, at least two different ones.
    holdout: fraction to hold out, above 0 and below 1; see `held_out`.
    seed: the same seed, fraction and examples give the same split, in whatever order they are.

  Raises:
    UserError: the fraction is out of range or all examples are the same.
  """
  if not 0 < holdout < 1:
    raise UserError(
      f'cannot hold out {holdout} of the examples: config.data.held_out must be between 0 and 1.'
    )
  keys = _hashes((e if isinstance(e, str) else e.prompt for e in examples), seed, len(examples))
  if len(np.unique(keys)) == 1:
    keys = _hashes(map(repr, examples), seed, len(examples))
  if len(np.unique(keys)) < 2:
    raise UserError(
      f'cannot hold out {holdout} of {len(examples)} examples, which are all the '
      'same: give different ones, or set config.data.held_out_path.'
    )
  held = held_out(keys, holdout)
  return lazy.take(examples, np.flatnonzero(~held)), lazy.take(examples, np.flatnonzero(held))


def _hashes(texts: Iterable[str], seed: int, count: int) -> np.ndarray:
  """64 bits of each text and a seed, the same in every process and run, [N] uint64."""
  digest = lambda text: hashlib.blake2b(
    f'{seed}:{text}'.encode('utf-8', 'surrogatepass'), digest_size=8
  ).digest()
  return np.fromiter((int.from_bytes(digest(text), 'little') for text in texts), np.uint64, count)


def held_out(keys: np.ndarray, holdout: float) -> np.ndarray:
  """Which of N examples are held out, [N] bool, by whole groups of equal keys.

  Groups are taken in the order of their keys. One that would exceed `holdout` of the examples is
  passed over, so that the fraction is as near below as groups allow; at least the smallest group
  is held out, and not all.

  Args:
    keys: [N] uint64 hashes, of at least two groups.
    holdout: fraction, above 0 and below 1.
  """
  groups, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
  room = min(max(round(holdout * len(keys)), 1), len(keys) - 1)
  chosen = np.zeros(len(groups), bool)
  for group, size in enumerate(sizes.tolist()):
    if size <= room:
      chosen[group] = True
      room -= size
    if not room:
      break
  if not chosen.any():
    chosen[np.argmin(sizes)] = True
  return chosen[inverse]


# The function from indices to a batch.


def _lm(
  rows: rows_lib.Rows, tokenizer: formats.Tokenizer, *, length: int, pack: bool
) -> tuple[Collate, int]:
  arrange = packing.pack if pack else packing.pad
  packed = arrange(
    [row.prompt for row in rows.each('packing')], length=length, pad_id=tokenizer.pad_token_id
  )
  return lambda drawn, held: jax.tree.map(lambda array: array[drawn], packed), len(packed.tokens)


def _completions(
  examples: Sequence[formats.Completion],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  pairs: bool,
) -> Collate:
  rows = rows_lib.answered(examples, tokenizer, max_length=max_length)
  if pairs:
    return _collate(rows, rows_lib.pair_batch(rows, tokenizer, max_length=max_length))
  return _collate(rows, rows_lib.completion_batch(tokenizer, max_length=max_length))


def _comparisons(
  examples: Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  append_eos: bool,
) -> Collate:
  rows = rows_lib.answered(examples, tokenizer, max_length=max_length, append_eos=append_eos)
  return _collate(rows, rows_lib.comparison_batch(rows, tokenizer, max_length=max_length))


def as_read(
  examples: Sequence[formats.Prompt], tokenizer: formats.Tokenizer, *, max_prompt_length: int
) -> list[formats.Prompt]:
  """Prompts with the text that on_long='truncate_left' leaves of them, which the policy reads.

  Args:
    examples: of a batch.
    tokenizer: the policy's.
    max_prompt_length: P.
  """
  rows = tokenizers.encode(tokenizer, [e.prompt for e in examples])
  long = [index for index, row in enumerate(rows) if len(row) > max_prompt_length]
  texts = tokenizers.decode_prompts(
    tokenizer,
    [
      rows_lib.truncate_left(rows[index], max_prompt_length, tokenizer.bos_token_id)
      for index in long
    ],
  )
  read = list(examples)
  for index, text in zip(long, texts):
    read[index] = dataclasses.replace(read[index], prompt=text)
  return read


def _prompts(
  examples: Sequence[formats.Prompt],
  tokenizer: formats.Tokenizer,
  *,
  max_prompt_length: int,
  on_long: str,
) -> tuple[Collate, Sequence[int] | np.ndarray]:
  rows, indices = rows_lib.prompts(
    examples, tokenizer, max_prompt_length=max_prompt_length, on_long=on_long
  )
  collate = _collate(rows, rows_lib.prompt_batch(tokenizer, max_prompt_length=max_prompt_length))
  return lambda drawn, held: (collate(drawn, held), np.asarray(drawn, np.int32)), indices


def _collate(rows: rows_lib.Rows, batch: rows_lib.Batch) -> Collate:
  def collate(drawn: np.ndarray, local: np.ndarray) -> Any:
    here = iter(rows.take(np.asarray(drawn)[local]))
    return batch([next(here) if is_local else None for is_local in local])

  return collate

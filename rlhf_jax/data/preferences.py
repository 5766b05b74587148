"""Pairs and labelled completions for preference optimization, and batches of them.

An example is two sequences with one prompt: the chosen and the rejected completion of a pair, or a
labelled completion and the completion of another prompt, on which KTO estimates a KL divergence
(Ethayarajh et al. 2024, §4.1, https://arxiv.org/abs/2402.01306).

A row of a batch holds the first sequences of its examples in lane 0 and the second ones in lane 1.
It has one example, or with packing as many as fit into both lanes; see `packing`.

Letters: B rows, M examples of a row, T length of a lane, N examples.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
from typing import Any

import jax
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import lazy
from rlhf_jax.data import mixtures
from rlhf_jax.data import packing
from rlhf_jax.data import progress
from rlhf_jax.data import tokenized
from rlhf_jax.errors import UserError

LABELS = {0.0: False, 1.0: True}
MAX_SHIFT = 64  # see `_shift`


class DerivedExamples(Sequence):
  """Examples that are made from others when they are accessed."""

  def __init__(
    self,
    examples: Sequence[formats.Comparison],
    entries: np.ndarray,
    make: Callable[..., formats.Comparison],
  ):
    """Stores the arguments; `make(examples, *entries[i])` returns example i."""
    self._examples, self._entries, self._make = examples, entries, make

  def __len__(self):
    return len(self._entries)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    return self._make(self._examples, *map(int, self._entries[index]))

  def record(self, index: int) -> Any:
    """See `lazy.Examples.record`."""
    return self._examples.record(int(self._entries[index][0]))


def pairs(comparisons: Sequence[formats.Comparison]) -> Sequence[formats.Comparison]:
  """Returns every pair (better, worse) of completions with different ranks.

  A ranking of K completions without ties becomes K (K - 1) / 2 pairs, and the best of K with the
  others tied K - 1 pairs.

  Raises:
    UserError: No prompt has two completions of different ranks.
  """
  entries = [
    (number, better, worse)
    for number, example in enumerate(progress.bar(comparisons, 'making pairs', 'prompts'))
    for better, rank in enumerate(example.ranks)
    for worse, other in enumerate(example.ranks)
    if rank < other
  ]
  if not entries:
    raise UserError(
      'the data have no prompt with a better and a worse completion. Add such prompts, or learn '
      "from labelled completions with config.dpo.loss='kto'."
    )
  return _derive(comparisons, entries, _pair)


def _pair(comparisons, number, better, worse):
  example = comparisons[number]
  return formats.Comparison(
    example.prompt,
    (example.completions[better], example.completions[worse]),
    (0, 1),
    margin=example.margin,
  )


def labelled(
  comparisons: Sequence[formats.Comparison], *, both: bool = True
) -> Sequence[formats.Comparison]:
  """Returns completions with a label, each with the completion of another prompt.

  A single completion has its label in the data. Of several, the best ones are desirable, the worst
  ones undesirable, and those in between are left out.

  Args:
    comparisons: Completions with labels, or ranked completions.
    both: Whether the data must have desirable and undesirable completions, as training needs them.

  Returns:
    Comparisons whose first completion has the rating 1 if it is desirable, else 0. The second one
    answers another prompt if there is one. Each completion is used twice, once in either place.

  Raises:
    UserError: A label is not true or false, there are none, or all are the same despite `both`.
  """
  entries, prompts = [], []
  for number, example in enumerate(progress.bar(comparisons, 'reading labels', 'prompts')):
    for column, label in _labels(comparisons, number, example):
      entries.append((number, column, label))
      prompts.append(hash(example.prompt))
  if not entries:
    raise UserError(
      "config.dpo.loss='kto' needs desirable or undesirable completions, but the data have only "
      'ties. Add completions with labels, or of different ranks.'
    )
  if both and len({label for *_, label in entries}) < 2:
    raise UserError(
      "config.dpo.loss='kto' needs desirable and undesirable completions, but all labels of the "
      'data are the same. Add completions of the other kind.'
    )
  other = np.roll(np.array(entries)[:, :2], -_shift(np.array(prompts)), axis=0)
  return _derive(comparisons, np.concatenate([entries, other], axis=1), _labelled)


def _labels(comparisons, number, example):
  """Returns pairs (index of a completion, whether it is desirable)."""
  if len(example.completions) > 1:
    worst = max(example.ranks)
    ends = [(column, rank) for column, rank in enumerate(example.ranks) if rank in (0, worst)]
    return [(column, rank == 0) for column, rank in ends] if worst else []
  if example.ratings is None or example.ratings[0] not in LABELS:
    raise UserError(
      f'example {number}{lazy.place(comparisons, number)} has the rating '
      f"{example.ratings and example.ratings[0]}, but config.dpo.loss='kto' needs a label that is "
      'true or false. Replace ratings by labels.'
    )
  return [(0, LABELS[example.ratings[0]])]


def _shift(prompts: np.ndarray) -> int:
  """Returns by how much to rotate the completions so that few meet their own prompt.

  Args:
    prompts: [N] a number for each prompt.
  """
  shifts = range(1, max(2, min(len(prompts), MAX_SHIFT)))
  return min(shifts, key=lambda shift: np.sum(prompts == np.roll(prompts, -shift)))


def _labelled(comparisons, number, column, label, other, other_column):
  example = comparisons[number]
  completions = example.completions[column], comparisons[other].completions[other_column]
  return formats.Comparison(example.prompt, completions, (0, 1), (float(label), 0.0))


def _derive(comparisons, entries, make):
  entries = np.asarray(entries)
  derived = DerivedExamples(comparisons, entries, make)
  if isinstance(comparisons, mixtures.Mixture):
    bounds = np.searchsorted(entries[:, 0], comparisons.starts)
    parts = [
      DerivedExamples(comparisons, entries[a:b], make) for a, b in itertools.pairwise(bounds)
    ]
    return comparisons.with_parts(parts)
  return derived[:] if isinstance(comparisons, list) else derived


@dataclasses.dataclass(frozen=True)
class Rows:
  """Tokenized examples, arranged in rows.

  Attributes:
    data: Tokenized examples with two completions each.
    index: [rows, M] int32, the examples of each row; -1 where there is none.
    collate: (rows to take [B], bool [B]: the rows of this process) -> types.Preferences.
    max_length: T.
    bos: BOS of the tokenizer, or None.
  """

  data: tokenized.TokenizedData
  index: np.ndarray
  collate: Callable[[np.ndarray, np.ndarray], types.Preferences]
  max_length: int
  bos: int | None

  def digest(self) -> str:
    """Returns a hash of the tokens of all examples, in order."""
    digest = hashlib.sha256()
    for item in self.data.iterate('hashing'):
      prompt, completions = tokenized.truncate(item, self.max_length, self.bos)
      for ids in (prompt, *completions):
        digest.update(len(ids).to_bytes(8, 'little') + ids.astype('<i4').tobytes())
    return digest.hexdigest()


def arrange(
  examples: Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  pack: bool = False,
  encoder_decoder: bool = False,
) -> Rows:
  """Tokenizes examples and arranges them in rows.

  Args:
    examples: Result of `pairs` or `labelled`.
    tokenizer: Tokenizer, as `tokenizers.load` returns it.
    max_length: T. `tokenized.truncate` cuts longer examples.
    pack: Whether a row may hold several examples.
    encoder_decoder: Whether the sequences are types.Pairs, without packing.

  Raises:
    UserError: The examples of a mixture are to be packed.
  """
  if pack and isinstance(examples, mixtures.Mixture):
    raise UserError(
      'config.dpo.pack: the examples of config.data.mixture are drawn by weight, so they cannot be '
      'packed. Set it to False.'
    )
  data = tokenized.completions(examples, tokenizer, max_length=max_length)
  bos, index = tokenizer.bos_token_id, np.arange(len(data), dtype=np.int32)[:, None]
  if pack:
    sizes = []
    for item in data.iterate('packing'):
      prompt, completions = tokenized.truncate(item, max_length, bos)
      sizes.append([len(prompt) + len(completion) for completion in completions])
    index = packing.assign_lanes(np.array(sizes), length=max_length)
  if encoder_decoder:
    batcher = tokenized.pair_batcher(data, tokenizer, max_length=max_length)
    to_sequences = lambda items: _side_by_side(items, batcher)
  else:
    to_sequences = tokenized.lane_batcher(tokenizer, max_length=max_length)

  def collate(chosen, local):
    numbers = np.where(np.asarray(local)[:, None], index[chosen], -1)
    items = dict(zip(numbers[numbers >= 0].tolist(), data.take(numbers[numbers >= 0])))
    rows = [[items[number] for number in row.tolist() if number >= 0] for row in numbers]
    label = lambda item: bool(item.example.ratings and item.example.ratings[0])
    return types.Preferences(
      sequences=to_sequences(rows),
      index=index[chosen],
      present=index[chosen] >= 0,
      desirable=_of_examples(rows, index.shape[1], bool, label),
      margin=_of_examples(rows, index.shape[1], np.float32, lambda item: item.example.margin),
    )

  return Rows(data, index, collate, max_length, bos)


def _of_examples(rows, width, dtype, value):
  """Returns an array [B, M] of a value of each example."""
  array = np.zeros((len(rows), width), dtype)
  for number, row in enumerate(rows):
    array[number, : len(row)] = [value(item) for item in row]
  return array


def _side_by_side(rows, batcher):
  """Returns types.Pairs of arrays [B, 2, ...], from rows of at most one example."""
  items = [
    dataclasses.replace(row[0], completions=(row[0].completions[lane],)) if row else None
    for row in rows
    for lane in (0, 1)
  ]
  return jax.tree.map(lambda x: x.reshape((-1, 2) + x.shape[1:]), batcher(items))

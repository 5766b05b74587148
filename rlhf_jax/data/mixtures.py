"""Mixtures: examples of several sources, each drawn with a probability that its weight gives.

Example n of a run comes from source i with probability w_i / (w_1 + w_2 + ...), independently of
all other n. Every source has epochs of its own, each shuffled differently: all of its examples are
drawn once before any is drawn again. Example n depends on n, the seed, the weights and the numbers
of examples, but not on the examples before it. So a position is all that a run must store to
resume, with any number of processes.

Letters: n position in the run, S sources.
"""

from collections.abc import Sequence
import sys
import threading
from typing import Any

import grain
import numpy as np

from rlhf_jax.data import lazy
from rlhf_jax.errors import UserError

BLOCK = 4096  # positions whose sources are drawn together


class Mixture(Sequence):
  """The examples of several sources, those of one after those of the other.

  Attributes:
    names: S names, for messages.
    weights: [S] positive weights, float64.
    parts: S sequences of examples.
    starts: [S + 1] number of examples before each source, and in all.
  """

  def __init__(self, names: Sequence[str], weights: Sequence[float], parts: Sequence[Sequence]):
    self.names, self.weights, self.parts = names, np.array(weights, np.float64), parts
    self.starts = np.cumsum([0, *map(len, parts)])

  def __len__(self):
    return int(self.starts[-1])

  def __getitem__(self, index):
    if isinstance(index, slice):
      return lazy.Chosen(self, range(*index.indices(len(self))))
    part, inner = self._find(index)
    return part[inner]

  def record(self, index: int) -> Any:
    """See `lazy.Examples.record`; AttributeError if the source has no records."""
    part, inner = self._find(index)
    return part.record(inner)

  def _find(self, index: int) -> tuple[Sequence, int]:
    index = range(len(self))[index]
    number = int(np.searchsorted(self.starts, index, 'right')) - 1
    return self.parts[number], index - int(self.starts[number])

  def split(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Returns the indices, in increasing order, that belong to each source."""
    indices = np.asarray(indices, np.int64)
    return np.split(indices, np.searchsorted(indices, self.starts[1:-1]))

  def take(self, indices: np.ndarray) -> 'Mixture':
    """Returns a mixture of the examples at some indices, in increasing order."""
    chosen = zip(self.parts, self.split(indices), self.starts)
    return self.with_parts([lazy.take(part, inner - start) for part, inner, start in chosen])

  def with_parts(self, parts: Sequence[Sequence]) -> 'Mixture':
    """Returns a mixture of other examples of the same sources, with the same weights."""
    return Mixture(self.names, self.weights, parts)


def take(examples: Sequence, indices: np.ndarray) -> Sequence:
  """Returns the examples at some indices, in increasing order; those of a mixture as a mixture."""
  if isinstance(examples, Mixture):
    return examples.take(indices)
  return lazy.take(examples, indices)


def order(examples: Sequence, indices: Sequence[int] | np.ndarray, seed: int) -> grain.MapDataset:
  """Returns the endless order in which examples are drawn: n -> index of an example.

  Args:
    examples: Examples; of a Mixture they are drawn by weight, else each epoch is a permutation.
    indices: Indices of the examples to draw, in increasing order.
    seed: Random seed.

  Raises:
    UserError: A source has no example to draw.
  """
  if not isinstance(examples, Mixture):
    return _shuffle(indices, seed)
  orders = []
  for number, (name, chosen) in enumerate(zip(examples.names, examples.split(indices))):
    if not len(chosen):
      raise UserError(
        f'source {name!r} of the mixture has no example left to draw: all are held out or dropped. '
        'Add examples, or remove the source.'
      )
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    orders.append(_shuffle(chosen, own_seed))
  draws = Draws(examples.weights, seed)

  def example(n: int) -> int:
    source, count = draws[int(n)]
    return int(orders[source][count])

  return grain.MapDataset.range(sys.maxsize).map(example)


def _shuffle(indices: Sequence[int] | np.ndarray, seed: int) -> grain.MapDataset:
  """Returns the indices of all epochs, each epoch shuffled differently."""
  source = (
    grain.MapDataset.range(len(indices))
    if isinstance(indices, range)
    else grain.MapDataset.source(indices)
  )
  return source.seed(seed).shuffle().repeat()


class Draws:
  """The source of every position, and how often it was drawn before; thread-safe.

  The positions of block b are drawn by a generator that is seeded with (seed, b).
  """

  def __init__(self, weights: np.ndarray, seed: int):
    """Stores the weights [S] and the seed."""
    self._limits = np.cumsum(weights / np.sum(weights))[:-1]
    self._seed, self._size = seed, len(weights)
    self._before = [np.zeros(self._size, np.int64)]  # draws of each source before block 0, 1, ...
    self._last, self._lock = (-1, None, None), threading.Lock()

  def __getitem__(self, n: int) -> tuple[int, int]:
    block, place = divmod(n, BLOCK)
    with self._lock:
      while len(self._before) <= block:
        sources = self._sources(len(self._before) - 1)
        self._before.append(self._before[-1] + np.bincount(sources, minlength=self._size))
      if self._last[0] != block:
        sources = self._sources(block)
        drawn = np.cumsum(sources[:, None] == np.arange(self._size), axis=0)
        counts = drawn[np.arange(BLOCK), sources] - 1 + self._before[block][sources]
        self._last = block, sources, counts
      _, sources, counts = self._last
    return int(sources[place]), int(counts[place])

  def _sources(self, block: int) -> np.ndarray:
    """Returns the sources [BLOCK] of the positions of a block."""
    uniform = np.random.default_rng([self._seed, block]).random(BLOCK)
    return np.searchsorted(self._limits, uniform, 'right')

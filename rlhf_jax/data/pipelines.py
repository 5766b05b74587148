"""Makes batches for training, from endless checkpointable iterators, and for evaluation.

Letters: B batch, K completions of one prompt, P prompt length, R response length, T sequence
length, N examples or packed sequences.

Each epoch is shuffled differently; the order depends on the seed but not on the number of
processes. The examples of a `mixtures.Mixture` are drawn by the weights of its sources, each with
epochs of its own; N is then the number of examples of all sources. The state of an iterator is its
position, so `get_state` and `set_state` resume at the exact batch. If there are fewer examples than
a batch needs, they are repeated within it. Few examples are tokenized once, before the first batch.
Otherwise only indices are shuffled, and an example is read and tokenized in the background when a
batch needs it: see `tokenized`, and `lanes` for packed texts.

Batches are pytrees of `rlhf_jax.types` with NumPy arrays of constant shape. Prompts are padded on
the left, everything else on the right. Each process iterates over all indices but makes only the
examples of its own devices: see `sharding.local_rows`.
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
from rlhf_jax.data import mixtures
from rlhf_jax.data import packing
from rlhf_jax.data import preferences
from rlhf_jax.data import tokenized
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

# Batches are made ahead of time in the background.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

MAX_IN_MEMORY = 10_000  # held-out examples; the batches of more are not kept in memory
PACKED_BATCHES = 8  # batches of held-out texts that are packed together

# (indices [B], bool [B]: the examples of this process) -> batch.
Collate = Callable[[np.ndarray, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class EpisodeSettings:
  """How episodes become batches.

  Attributes:
    max_length: Most tokens of an episode, and of a row of several; see tokenized.episodes.
    pack: Whether a row may hold several episodes. Then `batch_size` counts rows.
    pairs: Whether an encoder reads the prompt; episodes are then not packed.
    mean, std: See tokenized.episodes.
  """

  max_length: int
  pack: bool = False
  pairs: bool = False
  mean: float = 0.0
  std: float = 1.0


# Iterators.


def lm_iterator(
  texts: Sequence[str | formats.Completion],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  length: int,
  seed: int,
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over LMBatch [B, T] of texts, each followed by the EOS; see `packing`.

  Args:
    texts: Texts or Completions; the prompt and completion of a Completion are tokenized separately.
    tokenizer: Tokenizer, as `tokenizers.load` returns it.
    batch_size: B.
    length: T. Longer texts are cut into several pieces.
    seed: Random seed of the order.

  Returns:
    (iterator, N). An epoch has N sequences, N / batch_size steps. If texts are a mixture or are
    tokenized while training, N is an estimate from a sample.

  Raises:
    UserError: No text has a token to predict, or a source of a mixture has none at all.
  """
  data = tokenized.texts(texts, tokenizer)
  if isinstance(texts, mixtures.Mixture) or data.all is None:
    return _stream(data, tokenizer, batch_size=batch_size, length=length, seed=seed)
  collate, count = _lm(data, tokenizer, length=length)
  return _iterate(collate, texts, range(count), batch_size, seed)


def completion_iterator(
  examples: Sequence[formats.Completion] | Sequence[formats.Conversation],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_length: int,
  seed: int,
  pairs: bool = False,
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over LMBatch [B, T], with one prompt and completion per sequence.

  Only the tokens of the completion and its EOS are targets; in a conversation, those of all
  answers. T = max_length; `tokenized.truncate` cuts longer examples. If `pairs`, batches are
  Pairs [B, P + R] instead, with P the length of the longest prompt and R of the longest completion.
  Other arguments, result and errors as for `lm_iterator`.
  """
  collate = _completions(examples, tokenizer, max_length=max_length, pairs=pairs)
  return _iterate(collate, examples, range(len(examples)), batch_size, seed)


def comparison_iterator(
  examples: Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_length: int,
  seed: int,
  append_eos: bool = True,
  annotators: Sequence[str] | None = None,
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over Comparisons [B, K, T].

  K is the largest number of completions of a prompt. T = max_length; `tokenized.truncate` cuts
  longer examples. All completions of a prompt follow the same prompt tokens, and end with the EOS
  if `append_eos`. For `annotators` see `tokenized.comparison_batcher`. Other arguments, result and
  errors as for `lm_iterator`.
  """
  sizes = dict(max_length=max_length, append_eos=append_eos)
  collate = _comparisons(examples, tokenizer, annotators=annotators, **sizes)
  return _iterate(collate, examples, range(len(examples)), batch_size, seed)


def preference_iterator(
  rows: preferences.Rows, *, batch_size: int, seed: int
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over Preferences of B rows; see `preferences.arrange`.

  Other arguments, result and errors as for `lm_iterator`.
  """
  return _iterate(rows.collate, rows.data.examples, range(len(rows.index)), batch_size, seed)


def episode_iterator(
  examples: Sequence[formats.Episode],
  tokenizer: formats.Tokenizer,
  settings: EpisodeSettings,
  *,
  batch_size: int,
  seed: int,
) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over Episodes of `batch_size` rows; result and errors as `lm_iterator`."""
  if settings.pack and isinstance(examples, mixtures.Mixture):
    raise UserError(
      'episodes of a mixture cannot be packed, because a row would hold several sources: set '
      'config.ilql.pack to False'
    )
  collate, count = _episodes(examples, tokenizer, settings)
  return _iterate(collate, examples, range(count), batch_size, seed)


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
    examples: Prompts.
    tokenizer: Tokenizer, as `tokenizers.load` returns it.
    batch_size: B.
    max_prompt_length: P.
    seed: Random seed of the order.
    on_long: What to do with prompts of more than P tokens: 'error', 'truncate_left' (removes the
      oldest tokens but not a leading BOS) or 'drop'.

  Returns:
    (iterator, N), as for `lm_iterator`. N does not count dropped prompts.

  Raises:
    UserError: A prompt is longer than P and on_long='error', a prompt has no tokens, or no prompt
      is left.
  """
  collate, indices = _prompts(
    examples, tokenizer, max_prompt_length=max_prompt_length, on_long=on_long
  )
  return _iterate(collate, examples, indices, batch_size, seed)


def _check_sizes(count: int, batch_size: int) -> None:
  if batch_size < 1:
    raise UserError(f'batch_size={batch_size} must be positive.')
  if not count:
    raise UserError(
      'the data has no token to learn from: there are no examples, or all texts are empty.'
    )


def _iterate(
  collate: Collate,
  examples: Sequence[Any],
  indices: Sequence[int] | np.ndarray,
  batch_size: int,
  seed: int,
) -> tuple[grain.DatasetIterator, int]:
  _check_sizes(len(indices), batch_size)
  if len(indices) < batch_size:
    logging.info(
      '%d examples are fewer than the batch size %d and are repeated within a batch.',
      len(indices),
      batch_size,
    )
  local = sharding.local_rows(batch_size)
  order = mixtures.order(examples, indices, seed)
  dataset = order.batch(batch_size, drop_remainder=True)
  dataset = dataset.map(lambda chosen: collate(chosen, local))
  return iter(dataset.to_iter_dataset(_READ)), len(indices)


def _stream(
  data: tokenized.TokenizedData,
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  length: int,
  seed: int,
) -> tuple[lanes_lib.Batches, int]:
  """Returns an iterator that tokenizes and packs while training (see `lanes`), and estimates N."""
  order = mixtures.order(data.examples, range(len(data)), seed)
  local = sharding.local_rows(batch_size)
  sample = data.sample
  if isinstance(data.examples, mixtures.Mixture):  # by weight
    sample = data.take([order[n] for n in range(len(sample))])
  packed = len(packing.assign([item.prompt for item in sample], length=length))
  _check_sizes(packed, batch_size)
  read = lambda numbers: [item.prompt for item in data.take([order[int(n)] for n in numbers])]
  sizes = dict(
    length=length,
    window=lanes_lib.window_size(batch_size, length),
    mean=sum(item.num_tokens for item in sample) / len(sample),
  )

  def make():
    lanes = [
      lanes_lib.Lane(read, lane, batch_size, seed=seed, **sizes) if is_local else None
      for lane, is_local in enumerate(local)
    ]
    return lanes_lib.LocalBatches(lanes, length=length, pad_id=tokenizer.pad_token_id)

  return lanes_lib.Batches(make, local), max(1, round(packed * len(data) / len(sample)))


# Held-out batches.


class Batches(Iterable[tuple[Any, np.ndarray]]):
  """Iterable over pairs of a batch and valid, bool [B]; makes them anew in each iteration."""

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
) -> Iterable[tuple[types.LMBatch, np.ndarray]]:
  """Returns pairs of LMBatch [B, T] and valid, bool [B], with all texts once, in order.

  The last batch is filled with copies of its first sequence, for which `valid` is False and no
  token is a target, so sums and counts over targets are correct. Without texts there are no
  batches. The batches of few texts are a list; otherwise they are made in each iteration. Arguments
  as for `lm_iterator`.
  """
  data = tokenized.texts(texts, tokenizer)
  if data.all is None:
    return Batches(lambda: _packed_in_order(data, tokenizer, batch_size, length))
  collate, count = _lm(data, tokenizer, length=length)
  return _in_order(collate, range(count), batch_size)


def _packed_in_order(
  data: tokenized.TokenizedData, tokenizer: formats.Tokenizer, batch_size: int, length: int
) -> Iterator[tuple[types.LMBatch, np.ndarray]]:
  """Iterates over the batches of `lm_batches`; packs the texts of PACKED_BATCHES at a time."""
  sequences, documents, num_tokens = [], [], 0
  for item in itertools.chain(data.iterate('packing'), [None]):
    if item:
      documents.append(item.prompt)
      num_tokens += item.num_tokens
    if not item or num_tokens >= batch_size * length * PACKED_BATCHES:
      sequences += packing.assign(documents, length=length)
      documents, num_tokens = [], 0
      missing = 0 if item else -len(sequences) % batch_size  # in the last batch
      for start in range(0, len(sequences) + missing - batch_size + 1, batch_size):
        chosen = sequences[start : start + batch_size]
        filled = chosen + [chosen[0]] * (batch_size - len(chosen))
        batch = packing.to_batch(filled, length=length, pad_id=tokenizer.pad_token_id)
        yield _mask_copies(batch, len(chosen))
      sequences = sequences[len(sequences) // batch_size * batch_size :]


def completion_batches(
  examples: Sequence[formats.Completion] | Sequence[formats.Conversation],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_length: int,
  pairs: bool = False,
) -> Iterable[tuple[types.LMBatch | types.Pairs, np.ndarray]]:
  """Returns the pairs of `lm_batches`, with the batches of `completion_iterator`."""
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
  """Returns the pairs of `lm_batches`, with the batches of `comparison_iterator`."""
  collate = _comparisons(examples, tokenizer, max_length=max_length, append_eos=append_eos)
  return _in_order(collate, range(len(examples)), batch_size)


def preference_batches(
  rows: preferences.Rows, *, batch_size: int
) -> Iterable[tuple[types.Preferences, np.ndarray]]:
  """Returns the pairs of `lm_batches`, with the batches of `preference_iterator`."""
  return _in_order(rows.collate, range(len(rows.index)), batch_size)


def episode_batches(
  examples: Sequence[formats.Episode],
  tokenizer: formats.Tokenizer,
  settings: EpisodeSettings,
  *,
  batch_size: int,
) -> Iterable[tuple[types.Episodes, np.ndarray]]:
  """Returns the pairs of `lm_batches`, with the batches of `episode_iterator`."""
  collate, count = _episodes(examples, tokenizer, settings)
  return _in_order(collate, range(count), batch_size)


def prompt_batches(
  examples: Sequence[formats.Prompt],
  tokenizer: formats.Tokenizer,
  *,
  batch_size: int,
  max_prompt_length: int,
  on_long: str = 'error',
) -> Iterable[tuple[tuple[types.Prompts, np.ndarray], np.ndarray]]:
  """Returns the pairs of `lm_batches`, with (Prompts, indices) as in `prompt_iterator` as batch."""
  collate, indices = _prompts(
    examples, tokenizer, max_prompt_length=max_prompt_length, on_long=on_long
  )
  return _in_order(collate, indices, batch_size)


def _in_order(
  collate: Collate, indices: Sequence[int] | np.ndarray, batch_size: int
) -> Iterable[tuple[Any, np.ndarray]]:
  def batches():
    for start in range(0, len(indices), batch_size):
      chosen = np.asarray(indices[start : start + batch_size], np.int64)
      count = len(chosen)
      chosen = np.append(chosen, np.full(batch_size - count, chosen[0]))
      yield _mask_copies(collate(chosen, np.ones(batch_size, bool)), count)

  return [*batches()] if len(indices) <= MAX_IN_MEMORY else Batches(batches)


def _mask_copies(batch: Any, count: int) -> tuple[Any, np.ndarray]:
  """Returns (batch without targets in examples from `count` on, valid: True before `count`)."""
  valid = np.arange(len(jax.tree.leaves(batch)[0])) < count
  if isinstance(batch, types.LMBatch):
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & valid[:, None])
  elif isinstance(batch, types.Pairs):
    batch = dataclasses.replace(batch, response_mask=batch.response_mask & valid[:, None])
  elif isinstance(batch, types.Episodes):
    batch = dataclasses.replace(batch, mask=batch.mask & valid[:, None])
  elif isinstance(batch, (types.Comparisons, types.Preferences)):
    batch = dataclasses.replace(batch, present=batch.present & valid[:, None])
  return batch, valid


def split(
  examples: Sequence[Any], *, holdout: float, seed: int
) -> tuple[Sequence[Any], Sequence[Any]]:
  """Splits examples by prompt into (training, held out), each in the original order.

  All examples of a prompt are in the same part, so that no held-out prompt is trained on. Equal
  texts count as examples of one prompt. If all examples have the same prompt, for example an empty
  one, only equal examples stay together.

  Args:
    examples: Texts, or examples with a prompt; at least two must differ.
    holdout: Fraction to hold out, above 0 and below 1; see `choose_held_out`.
    seed: Random seed. The split does not depend on the order of the examples.

  Raises:
    UserError: The fraction is out of range or all examples are the same.
  """
  if not 0 < holdout < 1:
    raise UserError(
      f'cannot hold out {holdout} of the examples: config.data.held_out must be above 0 and below '
      '1.'
    )
  keys = _hashes((e if isinstance(e, str) else e.prompt for e in examples), seed, len(examples))
  if len(np.unique(keys)) == 1:
    keys = _hashes(map(repr, examples), seed, len(examples))
  if len(np.unique(keys)) < 2:
    raise UserError(
      f'cannot hold out {holdout} of {len(examples)} examples, which are all the same. Provide '
      'different examples, or set config.data.held_out_path.'
    )
  held = choose_held_out(keys, holdout)
  return tuple(mixtures.take(examples, np.flatnonzero(part)) for part in (~held, held))


def _hashes(texts: Iterable[str], seed: int, count: int) -> np.ndarray:
  """Returns a hash of each text and the seed, [N] uint64, the same in every process and run."""
  digest = lambda text: hashlib.blake2b(
    f'{seed}:{text}'.encode('utf-8', 'surrogatepass'), digest_size=8
  ).digest()
  return np.fromiter((int.from_bytes(digest(text), 'little') for text in texts), np.uint64, count)


def choose_held_out(keys: np.ndarray, holdout: float) -> np.ndarray:
  """Chooses groups of equal keys to hold out, and returns whether each example is, [N] bool.

  Groups are taken in the order of their keys. A group that would exceed `holdout` of the examples
  is skipped, so the fraction is at most `holdout`, except that at least the smallest group is held
  out. Never holds out all groups.

  Args:
    keys: [N] uint64 hashes, with at least two different values.
    holdout: Fraction to hold out, above 0 and below 1.
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


# Functions that return the Collate function.


def _lm(
  data: tokenized.TokenizedData, tokenizer: formats.Tokenizer, *, length: int
) -> tuple[Collate, int]:
  documents = [item.prompt for item in data.iterate('packing')]
  packed = packing.pack(documents, length=length, pad_id=tokenizer.pad_token_id)
  return lambda chosen, _: jax.tree.map(lambda array: array[chosen], packed), len(packed.tokens)


def _completions(
  examples: Sequence[formats.Completion] | Sequence[formats.Conversation],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  pairs: bool,
) -> Collate:
  data = tokenized.completions(examples, tokenizer, max_length=max_length)
  if pairs:
    return _collate(data, tokenized.pair_batcher(data, tokenizer, max_length=max_length))
  return _collate(data, tokenized.completion_batcher(tokenizer, max_length=max_length))


def _comparisons(
  examples: Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  append_eos: bool,
  annotators: Sequence[str] | None = None,
) -> Collate:
  data = tokenized.completions(examples, tokenizer, max_length=max_length, append_eos=append_eos)
  to_batch = tokenized.comparison_batcher(
    data, tokenizer, max_length=max_length, annotators=annotators
  )
  return _collate(data, to_batch)


def _episodes(
  examples: Sequence[formats.Episode], tokenizer: formats.Tokenizer, settings: EpisodeSettings
) -> tuple[Collate, int]:
  data = tokenized.episodes(
    examples,
    tokenizer,
    max_length=settings.max_length,
    mean=settings.mean,
    std=settings.std,
  )
  length = max(settings.max_length - 1, 1)
  rows = tokenized.episode_rows(data, length, settings.pack)
  to_batch = (
    tokenized.episode_pair_batcher(data, tokenizer)
    if settings.pairs
    else tokenized.episode_batcher(tokenizer, length=length)
  )

  def collate(chosen: np.ndarray, local: np.ndarray) -> types.Episodes:
    return to_batch(
      [data.take(rows[i]) if is_local else None for i, is_local in zip(chosen, local)]
    )

  return collate, len(rows)


def truncate_prompts(
  examples: Sequence[formats.Prompt], tokenizer: formats.Tokenizer, *, max_prompt_length: int
) -> list[formats.Prompt]:
  """Returns prompts with the text that the policy reads if on_long='truncate_left'.

  Args:
    examples: Prompts of a batch.
    tokenizer: The policy's tokenizer.
    max_prompt_length: P.
  """
  prompts = tokenizers.encode(tokenizer, [e.prompt for e in examples])
  long = [index for index, ids in enumerate(prompts) if len(ids) > max_prompt_length]
  texts = tokenizers.decode_prompts(
    tokenizer,
    [
      tokenized.truncate_left(prompts[index], max_prompt_length, tokenizer.bos_token_id)
      for index in long
    ],
  )
  truncated = list(examples)
  for index, text in zip(long, texts):
    truncated[index] = dataclasses.replace(truncated[index], prompt=text)
  return truncated


def longest_prompt(examples: Sequence[formats.Prompt], tokenizer: formats.Tokenizer) -> int:
  """Returns the number of tokens of the longest prompt of some examples."""
  chunks = (examples[i : i + tokenized.CHUNK] for i in range(0, len(examples), tokenized.CHUNK))
  encoded = (tokenizers.encode(tokenizer, [e.prompt for e in chunk]) for chunk in chunks)
  return max(len(ids) for prompts in encoded for ids in prompts)


def _prompts(
  examples: Sequence[formats.Prompt],
  tokenizer: formats.Tokenizer,
  *,
  max_prompt_length: int,
  on_long: str,
) -> tuple[Collate, Sequence[int] | np.ndarray]:
  data, indices = tokenized.prompts(
    examples, tokenizer, max_prompt_length=max_prompt_length, on_long=on_long
  )
  to_batch = tokenized.prompt_batcher(tokenizer, max_prompt_length=max_prompt_length)
  collate = _collate(data, to_batch)
  return lambda chosen, local: (collate(chosen, local), np.asarray(chosen, np.int32)), indices


def _collate(data: tokenized.TokenizedData, to_batch: tokenized.ToBatch) -> Collate:
  def collate(chosen: np.ndarray, local: np.ndarray) -> Any:
    items = iter(data.take(np.asarray(chosen)[local]))
    return to_batch([next(items) if is_local else None for is_local in local])

  return collate

"""Batches for training, from checkpointable iterators that never end, and for evaluation.

Letters: B batch, K completions of one prompt, P prompt length, T row length, N examples or packed
rows.

Everything is tokenized once, before the first batch. What Grain then shuffles and repeats is only
the indices 0 .. N-1: each epoch has an order of its own, the same for the same seed, and an
iterator's state is its position, so `get_state` and `set_state` resume at the exact batch. Fewer
examples than a batch are repeated within it. With several processes each makes every batch whole,
the same on all of them, and puts on its devices what these hold of it: see `sharding.put_rows`.

Batches are pytrees of `rlhf_jax.types` with NumPy arrays, always of the same shape. Prompts to
respond to are left-padded, everything else is right-padded.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

from absl import logging
import grain
import jax
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import packing
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

# Batches are made ahead of time in the background; making one is a few copies.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)

Collate = Callable[[np.ndarray], Any]


# Iterators.


def lm_iterator(texts: Sequence[str | formats.Completion], tokenizer: formats.Tokenizer, *,
                batch_size: int, length: int, seed: int,
                pack: bool = True) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over LMBatch [B, T] of whole texts, each followed by the EOS.

  Args:
    texts: documents; of a Completion prompt and completion are tokenized apart.
    tokenizer: as `tokenizers.load` gives it.
    batch_size: B.
    length: T. Longer texts are cut into several pieces.
    seed: decides the order.
    pack: whether rows hold several documents; see `packing`.

  Returns:
    (iterator, N): an epoch is N rows, N / batch_size steps.

  Raises:
    UserError: there is nothing to learn from.
  """
  collate, count = _lm(texts, tokenizer, length=length, pack=pack)
  return _iterate(collate, np.arange(count), batch_size, seed)


def completion_iterator(examples: Sequence[formats.Completion], tokenizer: formats.Tokenizer, *,
                        batch_size: int, max_length: int, seed: int, pairs: bool = False,
                        ) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over LMBatch [B, T], one prompt and completion a row.

  Only the completion's tokens, its EOS included, are targets. T = max_length; see `_fit` for what
  becomes of longer ones. With `pairs` they are Pairs [B, P + R] instead, P the length of the
  longest prompt and R of the longest completion. Other arguments, result and errors as for
  `lm_iterator`.
  """
  collate, count = _completions(examples, tokenizer, max_length=max_length, pairs=pairs)
  return _iterate(collate, np.arange(count), batch_size, seed)


def comparison_iterator(examples: Sequence[formats.Comparison], tokenizer: formats.Tokenizer, *,
                        batch_size: int, max_length: int, seed: int, append_eos: bool = True,
                        ) -> tuple[grain.DatasetIterator, int]:
  """Iterates forever over Comparisons [B, K, T], K that of the example with the most completions.

  T = max_length; all completions of a prompt follow the same tokens, and end with the EOS if
  `append_eos`; see `_fit` for what becomes of longer ones. Other arguments, result and errors as
  for `lm_iterator`.
  """
  collate, count = _comparisons(examples, tokenizer, max_length=max_length, append_eos=append_eos)
  return _iterate(collate, np.arange(count), batch_size, seed)


def prompt_iterator(examples: Sequence[formats.Prompt], tokenizer: formats.Tokenizer, *,
                    batch_size: int, max_prompt_length: int, seed: int, on_long: str = 'error',
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
  collate, indices = _prompts(examples, tokenizer, max_prompt_length=max_prompt_length,
                              on_long=on_long)
  return _iterate(collate, indices, batch_size, seed)


def _iterate(collate: Collate, indices: np.ndarray, batch_size: int,
             seed: int) -> tuple[grain.DatasetIterator, int]:
  if batch_size < 1:
    raise UserError(f'batch_size {batch_size} has to be positive.')
  if not len(indices):
    raise UserError('the data have no token to learn from: there are no examples, or only empty '
                    'texts.')
  if len(indices) < batch_size:
    logging.info('%d examples are fewer than the batch size, %d: they are repeated within a batch.',
                 len(indices), batch_size)
  dataset = grain.MapDataset.source(indices).seed(seed).shuffle().repeat()
  dataset = dataset.batch(batch_size, drop_remainder=True).map(collate)
  return iter(dataset.to_iter_dataset(_READ)), len(indices)


# Held-out batches.


def lm_batches(texts: Sequence[str | formats.Completion], tokenizer: formats.Tokenizer, *,
               batch_size: int, length: int, pack: bool = True) -> list[tuple[types.LMBatch, np.ndarray]]:
  """All texts once, in order, for evaluation: pairs of LMBatch [B, T] and valid, bool [B].

  The last batch is filled with copies of its first row, where `valid` is False and no token is a
  target: sums and counts over targets need no more care. No texts make no batches. Arguments as
  for `lm_iterator`.
  """
  collate, count = _lm(texts, tokenizer, length=length, pack=pack)
  return _in_order(collate, np.arange(count), batch_size)


def completion_batches(examples: Sequence[formats.Completion], tokenizer: formats.Tokenizer, *,
                       batch_size: int, max_length: int, pairs: bool = False,
                       ) -> list[tuple[Any, np.ndarray]]:
  """As `lm_batches`, for prompts and completions; see `completion_iterator`."""
  collate, count = _completions(examples, tokenizer, max_length=max_length, pairs=pairs)
  return _in_order(collate, np.arange(count), batch_size)


def comparison_batches(
    examples: Sequence[formats.Comparison], tokenizer: formats.Tokenizer, *, batch_size: int, max_length: int,
    append_eos: bool = True,
) -> list[tuple[types.Comparisons, np.ndarray]]:
  """As `lm_batches`, for Comparisons [B, K, T]; rows that fill up have `present` False."""
  collate, count = _comparisons(examples, tokenizer, max_length=max_length, append_eos=append_eos)
  return _in_order(collate, np.arange(count), batch_size)


def prompt_batches(
    examples: Sequence[formats.Prompt], tokenizer: formats.Tokenizer, *, batch_size: int,
    max_prompt_length: int, on_long: str = 'error',
) -> list[tuple[tuple[types.Prompts, np.ndarray], np.ndarray]]:
  """As `lm_batches`, for pairs of Prompts [B, P] and indices [B]; see `prompt_iterator`."""
  collate, indices = _prompts(examples, tokenizer, max_prompt_length=max_prompt_length,
                              on_long=on_long)
  return _in_order(collate, indices, batch_size)


def _in_order(collate: Collate, indices: np.ndarray,
              batch_size: int) -> list[tuple[Any, np.ndarray]]:
  batches = []
  for start in range(0, len(indices), batch_size):
    rows = indices[start:start + batch_size]
    valid = np.arange(batch_size) < len(rows)
    rows = np.append(rows, np.full(batch_size - len(rows), rows[0]))
    batch = collate(rows)
    if isinstance(batch, types.LMBatch):
      batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & valid[:, None])
    elif isinstance(batch, types.Pairs):
      batch = dataclasses.replace(batch, response_mask=batch.response_mask & valid[:, None])
    elif isinstance(batch, types.Comparisons):
      batch = dataclasses.replace(batch, present=batch.present & valid[:, None])
    batches.append((batch, valid))
  return batches


def split(examples: Sequence[Any], *, holdout: float, seed: int) -> tuple[list[Any], list[Any]]:
  """Splits examples at random into (training, held out), each in their first order.

  Args:
    examples: at least two.
    holdout: fraction to hold out, above 0 and below 1; at least one example goes to either side.
    seed: the same seed, fraction and number of examples give the same split.

  Raises:
    UserError: the fraction is out of range or there is only one example.
  """
  if not 0 < holdout < 1 or len(examples) < 2:
    raise UserError(f'cannot hold out {holdout} of {len(examples)} examples: the fraction must be '
                    'between 0 and 1 and the examples at least two.')
  count = min(max(round(holdout * len(examples)), 1), len(examples) - 1)
  held = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
  return ([example for index, example in enumerate(examples) if index not in held],
          [example for index, example in enumerate(examples) if index in held])


# Tokenizing, and the function from indices to a batch.


def _lm(texts: Sequence[str | formats.Completion], tokenizer: formats.Tokenizer, *, length: int,
        pack: bool) -> tuple[Collate, int]:
  parts = [(e, '') if isinstance(e, str) else (e.prompt, e.completion) for e in texts]
  encoded = tokenizers.encode_joined(tokenizer, [a for a, _ in parts], [b for _, b in parts])
  tokenizers.warn_unknown(tokenizer, encoded)
  documents = [tokenizers.end(tokenizer, row) for row in encoded]
  arrange = packing.pack if pack else packing.pad
  rows = arrange(documents, length=length, pad_id=tokenizer.pad_token_id)
  return _take(rows), len(rows.tokens)


def _take(rows: Any) -> Collate:
  return lambda indices: jax.tree.map(lambda array: array[indices], rows)


def _completions(examples: Sequence[formats.Completion], tokenizer: formats.Tokenizer, *,
                 max_length: int, pairs: bool) -> tuple[Collate, int]:
  fitted = _fitted(tokenizer, [e.prompt for e in examples], [(e.completion,) for e in examples],
                   max_length)
  fitted = [(prompt, completion) for prompt, (completion,) in fitted]
  collate = (_pairs if pairs else _one_row)(fitted, tokenizer.pad_token_id, max_length)
  return collate, len(fitted)


def _pairs(fitted: list[tuple[np.ndarray, np.ndarray]], pad_id: int, max_length: int) -> Collate:
  del max_length  # they fit it already
  for number, (prompt, _) in enumerate(fitted):
    if not len(prompt):
      raise UserError(f'example {number} has an empty prompt, and an encoder has to read something. '
                      'Give it a prompt.')
  width = max((len(prompt) for prompt, _ in fitted), default=0)
  slots = max((len(completion) for _, completion in fitted), default=0)

  def collate(indices: np.ndarray) -> types.Pairs:
    tokens = np.full((len(indices), width + slots), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, index in enumerate(indices):
      prompt, completion = fitted[index]
      here = slice(width - len(prompt), width + len(completion))
      tokens[row, here], mask[row, here] = np.concatenate([prompt, completion]), True
    return types.Pairs(tokens, mask, mask[:, width:].copy())

  return collate


def _one_row(fitted: list[tuple[np.ndarray, np.ndarray]], pad_id: int, max_length: int) -> Collate:
  def collate(indices: np.ndarray) -> types.LMBatch:
    tokens = np.full((len(indices), max_length), pad_id, np.int32)
    real = np.zeros((len(indices), max_length), bool)
    loss_mask = np.zeros((len(indices), max_length), bool)
    for row, index in enumerate(indices):
      prompt, completion = fitted[index]
      size = len(prompt) + len(completion)
      tokens[row, :size] = np.concatenate([prompt, completion])
      real[row, :size] = True
      # Without any prompt there is nothing that the first token could be predicted from.
      loss_mask[row, max(len(prompt), 1):size] = True
    positions = np.where(real, np.arange(max_length, dtype=np.int32), 0)
    return types.LMBatch(tokens, real.astype(np.int32), positions, loss_mask)

  return collate


def _comparisons(examples: Sequence[formats.Comparison], tokenizer: formats.Tokenizer, *,
                 max_length: int, append_eos: bool) -> tuple[Collate, int]:
  pairs = _fitted(tokenizer, [e.prompt for e in examples], [e.completions for e in examples],
                  max_length, append_eos=append_eos)
  pad_id = tokenizer.pad_token_id
  most = max((len(e.completions) for e in examples), default=0)

  def collate(indices: np.ndarray) -> types.Comparisons:
    shape = len(indices), most
    tokens = np.full((*shape, max_length), pad_id, np.int32)
    mask = np.zeros((*shape, max_length), bool)
    present = np.zeros(shape, bool)
    ranks = np.zeros(shape, np.int32)
    ratings = np.zeros(shape, np.float32)
    margin = np.zeros(len(indices), np.float32)
    for row, index in enumerate(indices):
      example, (prompt, completions) = examples[index], pairs[index]
      count = len(completions)
      for column, completion in enumerate(completions):
        size = len(prompt) + len(completion)
        tokens[row, column, :size] = np.concatenate([prompt, completion])
        mask[row, column, :size] = True
      present[row, :count] = True
      ranks[row, :count] = example.ranks
      ratings[row, :count] = 0.0 if example.ratings is None else example.ratings
      margin[row] = example.margin
    return types.Comparisons(tokens, mask, present, ranks, ratings, margin)

  return collate, len(pairs)


def _fitted(tokenizer: formats.Tokenizer, prompts: Sequence[str],
            completions: Sequence[Sequence[str]], max_length: int, *,
            append_eos: bool = True) -> list[tuple[np.ndarray, list[np.ndarray]]]:
  """Token ids of prompts and of their completions, cut where they do not fit; says how many."""
  flat = tokenizers.encode_continuation(tokenizer, [text for each in completions for text in each])
  asked = tokenizers.encode(tokenizer, prompts)
  tokenizers.warn_unknown(tokenizer, asked + flat)
  ended = iter([tokenizers.end(tokenizer, row) for row in flat] if append_eos else flat)
  pairs, cut_prompts, cut_completions = [], 0, 0
  for prompt, each in zip(asked, completions):
    whole = [next(ended) for _ in each]
    pair = _fit(prompt, whole, max_length, tokenizer.bos_token_id)
    cut_prompts += len(pair[0]) < len(prompt)
    cut_completions += any(len(a) < len(b) for a, b in zip(pair[1], whole))
    pairs.append(pair)
  if cut_prompts or cut_completions:
    logging.warning('of %d examples, %d lost the beginning of the prompt and %d the end of a '
                    'completion, to fit %d tokens (config.data.max_length).',
                    len(pairs), cut_prompts, cut_completions, max_length)
  return pairs


def _fit(prompt: np.ndarray, completions: list[np.ndarray], max_length: int,
         bos: int | None) -> tuple[np.ndarray, list[np.ndarray]]:
  """Cuts a prompt and its completions so that each fits a row together with it.

  The prompt loses its oldest tokens (but a leading BOS) until the longest completion fits, though
  it keeps what half a row holds; then completions lose their ends, EOS and all.
  """
  longest = max(map(len, completions))
  room = max(max_length - longest, max_length // 2)
  prompt = _truncate_left(prompt, room, bos)
  return prompt, [completion[:max_length - len(prompt)] for completion in completions]


def _truncate_left(prompt: np.ndarray, length: int, bos: int | None) -> np.ndarray:
  if len(prompt) <= length:
    return prompt
  if bos is not None and prompt[0] == bos and length > 1:
    return np.concatenate([prompt[:1], prompt[len(prompt) - length + 1:]])
  return prompt[len(prompt) - length:]


def _prompts(examples: Sequence[formats.Prompt], tokenizer: formats.Tokenizer, *,
             max_prompt_length: int, on_long: str) -> tuple[Collate, np.ndarray]:
  if on_long not in ('error', 'truncate_left', 'drop'):
    raise UserError(f"config.data.on_long is {on_long!r}; it must be 'error', 'truncate_left' or "
                    "'drop'.")
  encoded = tokenizers.encode(tokenizer, [e.prompt for e in examples])
  tokenizers.warn_unknown(tokenizer, encoded)
  rows, kept, long = [], [], 0
  for index, row in enumerate(encoded):
    if not len(row):
      raise UserError(f'prompt {index} is empty, and this tokenizer begins no text with a BOS: '
                      'there is nothing to respond to. Remove the example.')
    if len(row) > max_prompt_length:
      long += 1
      if on_long == 'error':
        raise UserError(
            f'prompt {index} has {len(row)} tokens, more than config.data.max_prompt_length = '
            f'{max_prompt_length}: {examples[index].prompt[:60]!r}... Raise max_prompt_length, or '
            "set config.data.on_long to 'truncate_left' or 'drop'.")
    rows.append(_truncate_left(row, max_prompt_length, tokenizer.bos_token_id))
    if on_long != 'drop' or len(row) <= max_prompt_length:
      kept.append(index)
  if examples and not kept:
    raise UserError(f'no prompt of {len(examples)} has at most config.data.max_prompt_length = '
                    f'{max_prompt_length} tokens. Raise it.')
  if long:
    logging.warning('%d of %d prompts are longer than %d tokens; on_long is %r.', long,
                    len(examples), max_prompt_length, on_long)
  pad_id = tokenizer.pad_token_id

  def collate(indices: np.ndarray) -> tuple[types.Prompts, np.ndarray]:
    tokens = np.full((len(indices), max_prompt_length), pad_id, np.int32)
    mask = np.zeros((len(indices), max_prompt_length), bool)
    for row, index in enumerate(indices):
      tokens[row, max_prompt_length - len(rows[index]):] = rows[index]
      mask[row, max_prompt_length - len(rows[index]):] = True
    return types.Prompts(tokens, mask), np.asarray(indices, np.int32)

  return collate, np.array(kept, np.int32)

"""Examples to rows of tokens, and rows to batches.

Letters: B batch, K completions of one prompt, P prompt length, R response length, T row length.

A row is what the tokenizer makes of one example. Where the examples are few all rows are made
before the first batch and kept; else each is made when it is drawn, in the background, and what
is said of all of them (tokens that do not fit, unknown ones) is said of a sample.

A batch has the shape of all its B rows on every process, and holds only those that this process
puts on its devices, see `sharding.local_rows`: the others are None here and padding there.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
from typing import Any

from absl import logging
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import lazy
from rlhf_jax.data import progress
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

KEPT = 2**23  # tokens of all rows, below which they are kept: 32 MiB
BESIDES = 32  # tokens that a row's objects take the memory of
SAMPLE = 4096  # rows of a sample at most
SAMPLE_TOKENS = 2**19  # of a sample at most, but for its last rows
TOGETHER = 64  # rows of a sample made at once
GOLDEN = 0.6180339887498949  # multiples of it, without their whole part, lie evenly from 0 to 1


@dataclasses.dataclass(frozen=True)
class Row:
  """The tokens of one example.

  Attributes:
    example: what it was made of.
    prompt: int32 [P]; of a text all of it.
    completions: K arrays, int32 [R]; none of a text or prompt.
  """

  example: Any
  prompt: np.ndarray
  completions: tuple[np.ndarray, ...] = ()

  @property
  def tokens(self) -> int:
    return len(self.prompt) + sum(map(len, self.completions))


class Rows:
  """The rows of a sequence of examples.

  Attributes:
    examples: what they are made of.
    all: every row where they are kept, else None.
    sample: rows that stand for all of them: all that are kept, or some from everywhere in the data.
  """

  def __init__(self, examples: Sequence[Any], encode: Callable[[Sequence[Any]], list[Row]]):
    """Makes the rows, or a sample of them; `encode` makes rows of examples."""
    self.examples, self._encode = examples, encode
    self.sample, whole = self._draw()
    self.all = None
    if whole:
      self.all = self.sample
    else:
      size = sum(row.tokens + BESIDES for row in self.sample) / len(self.sample)
      if size * len(examples) <= KEPT:
        self.all = self.sample = encode(list(examples))

  def _draw(self) -> tuple[list[Row], bool]:
    """Rows of a sample, and whether they are all there are."""
    count = len(self.examples)
    indices = np.arange(count)
    if count > SAMPLE:
      indices = (np.arange(1, SAMPLE + 1) * GOLDEN % 1 * count).astype(np.int64)
    rows, tokens = [], 0
    while len(rows) < len(indices) and tokens < SAMPLE_TOKENS:
      rows += self._encode([self.examples[i] for i in indices[len(rows) : len(rows) + TOGETHER]])
      tokens += sum(row.tokens for row in rows[-TOGETHER:])
    return rows, len(rows) == count

  def __len__(self):
    return len(self.examples)

  def take(self, indices: Sequence[int] | np.ndarray) -> list[Row]:
    """Rows by their index."""
    if self.all is not None:
      return [self.all[index] for index in indices]
    return self._encode([self.examples[index] for index in indices])

  def each(self, what: str) -> Iterator[Row]:
    """All rows in order, not held where they are not kept; `what` is done to them, for a bar."""
    if self.all is not None:
      yield from self.all
      return
    for start in progress.bar(range(0, len(self), SAMPLE), what, 'thousands of examples'):
      yield from self.take(range(start, min(start + SAMPLE, len(self))))

  def of_all(self) -> str:
    """What to say before the number of rows that a warning is about."""
    return '' if self.all is not None else 'a sample of '


def warn_unknown(tokenizer: formats.Tokenizer, rows: Rows) -> None:
  """See `tokenizers.warn_unknown`; each text counts."""
  tokenizers.warn_unknown(
    tokenizer, [ids for row in rows.sample for ids in (row.prompt, *row.completions)]
  )


# Texts.


def texts(examples: Sequence[str | formats.Completion], tokenizer: formats.Tokenizer) -> Rows:
  """Rows of whole texts with their EOS; prompt and completion are tokenized apart."""

  def encode(chosen):
    parts = [
      (each, '') if isinstance(each, str) else (each.prompt, each.completion) for each in chosen
    ]
    ids = tokenizers.encode_joined(tokenizer, [a for a, _ in parts], [b for _, b in parts])
    return [Row(None, tokenizers.append_eos(tokenizer, row)) for row in ids]

  rows = Rows(examples, encode)
  warn_unknown(tokenizer, rows)
  return rows


# Prompts with one or more completions.


def answered(
  examples: Sequence[formats.Completion] | Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  append_eos: bool = True,
) -> Rows:
  """Rows of prompts with their completions; says how many `fit` cuts."""

  def encode(chosen):
    texts = [
      each.completions if isinstance(each, formats.Comparison) else (each.completion,)
      for each in chosen
    ]
    flat = tokenizers.encode_continuation(tokenizer, [text for each in texts for text in each])
    ended = iter([tokenizers.append_eos(tokenizer, ids) for ids in flat] if append_eos else flat)
    asked = tokenizers.encode(tokenizer, [each.prompt for each in chosen])
    return [
      Row(example, prompt, tuple(next(ended) for _ in each))
      for example, prompt, each in zip(chosen, asked, texts)
    ]

  rows = Rows(examples, encode)
  warn_unknown(tokenizer, rows)
  cut_prompts, cut_completions = 0, 0
  for row in rows.sample:
    prompt, completions = fit(row, max_length, tokenizer.bos_token_id)
    cut_prompts += len(prompt) < len(row.prompt)
    cut_completions += any(len(a) < len(b) for a, b in zip(completions, row.completions))
  if cut_prompts or cut_completions:
    logging.warning(
      'of %s%d examples, %d lost the beginning of the prompt and %d the end of a '
      'completion, to fit %d tokens (config.data.max_length).',
      rows.of_all(),
      len(rows.sample),
      cut_prompts,
      cut_completions,
      max_length,
    )
  return rows


def fit(row: Row, max_length: int, bos: int | None) -> tuple[np.ndarray, list[np.ndarray]]:
  """Cuts a prompt and its completions so that each fits a row together with it.

  The prompt loses its oldest tokens (but a leading BOS) until the longest completion fits, though
  it keeps what half a row holds; then completions lose their ends, EOS and all.
  """
  longest = max(map(len, row.completions))
  room = max(max_length - longest, max_length // 2)
  prompt = truncate_left(row.prompt, room, bos)
  return prompt, [completion[: max_length - len(prompt)] for completion in row.completions]


def truncate_left(prompt: np.ndarray, length: int, bos: int | None) -> np.ndarray:
  """The newest `length` tokens of a prompt; a leading BOS stays."""
  if len(prompt) <= length:
    return prompt
  if bos is not None and prompt[0] == bos and length > 1:
    return np.concatenate([prompt[:1], prompt[len(prompt) - length + 1 :]])
  return prompt[len(prompt) - length :]


Batch = Callable[[Sequence[Row | None]], Any]  # B rows to a batch


def completion_batch(tokenizer: formats.Tokenizer, *, max_length: int) -> Batch:
  """Rows to LMBatch [B, T], T = max_length."""

  def batch(rows):
    tokens = np.full((len(rows), max_length), tokenizer.pad_token_id, np.int32)
    real = np.zeros((len(rows), max_length), bool)
    loss_mask = np.zeros((len(rows), max_length), bool)
    for number, row in _here(rows):
      prompt, (completion,) = fit(row, max_length, tokenizer.bos_token_id)
      size = len(prompt) + len(completion)
      tokens[number, :size] = np.concatenate([prompt, completion])
      real[number, :size] = True
      # Without any prompt there is nothing that the first token could be predicted from.
      loss_mask[number, max(len(prompt), 1) : size] = True
    positions = np.where(real, np.arange(max_length, dtype=np.int32), 0)
    return types.LMBatch(tokens, real.astype(np.int32), positions, loss_mask)

  return batch


def pair_batch(rows: Rows, tokenizer: formats.Tokenizer, *, max_length: int) -> Batch:
  """Rows to Pairs [B, P + R], P the length of the longest prompt and R of the longest completion.

  Raises:
    UserError: a prompt has no tokens.
  """
  width, slots = 0, 0
  for number, row in enumerate(rows.each('measuring')):
    prompt, (completion,) = fit(row, max_length, tokenizer.bos_token_id)
    width, slots = max(width, len(prompt)), max(slots, len(completion))
    if not len(prompt):
      raise UserError(
        f'example {number}{lazy.place(rows.examples, number)} has an empty prompt, and '
        'an encoder must read something. Give it a prompt.'
      )

  def batch(rows):
    tokens = np.full((len(rows), width + slots), tokenizer.pad_token_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for number, row in _here(rows):
      prompt, (completion,) = fit(row, max_length, tokenizer.bos_token_id)
      here = slice(width - len(prompt), width + len(completion))
      tokens[number, here], mask[number, here] = np.concatenate([prompt, completion]), True
    return types.Pairs(tokens, mask, mask[:, width:].copy())

  return batch


def comparison_batch(rows: Rows, tokenizer: formats.Tokenizer, *, max_length: int) -> Batch:
  """Rows to Comparisons [B, K, T], K that of the example with the most completions."""
  examples = rows.examples if rows.all is None else [row.example for row in rows.all]
  most = max((len(example.completions) for example in examples), default=0)

  def batch(rows):
    shape = len(rows), most
    tokens = np.full((*shape, max_length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((*shape, max_length), bool)
    present = np.zeros(shape, bool)
    ranks = np.zeros(shape, np.int32)
    ratings = np.zeros(shape, np.float32)
    margin = np.zeros(len(rows), np.float32)
    for number, row in _here(rows):
      example, (prompt, completions) = row.example, fit(row, max_length, tokenizer.bos_token_id)
      count = len(completions)
      for column, completion in enumerate(completions):
        size = len(prompt) + len(completion)
        tokens[number, column, :size] = np.concatenate([prompt, completion])
        mask[number, column, :size] = True
      present[number, :count] = True
      ranks[number, :count] = example.ranks
      ratings[number, :count] = 0.0 if example.ratings is None else example.ratings
      margin[number] = example.margin
    return types.Comparisons(tokens, mask, present, ranks, ratings, margin)

  return batch


def _here(rows: Sequence[Row | None]) -> Iterator[tuple[int, Row]]:
  return ((number, row) for number, row in enumerate(rows) if row is not None)


# Prompts alone.


def prompts(
  examples: Sequence[formats.Prompt],
  tokenizer: formats.Tokenizer,
  *,
  max_prompt_length: int,
  on_long: str,
) -> tuple[Rows, np.ndarray | range]:
  """Rows of prompts, and the indices of those to draw; see `pipelines.prompt_iterator`.

  Whether a prompt is too long is known from its tokens alone: but for 'truncate_left' all of them
  are tokenized here.
  """
  if on_long not in ('error', 'truncate_left', 'drop'):
    raise UserError(
      f"config.data.on_long is {on_long!r}; it must be 'error', 'truncate_left' or 'drop'."
    )

  def encode(chosen):
    ids = tokenizers.encode(tokenizer, [each.prompt for each in chosen])
    return [Row(None, row) for row in ids]

  rows = Rows(examples, encode)
  warn_unknown(tokenizer, rows)
  if rows.all is None and on_long == 'truncate_left':
    long = sum(len(row.prompt) > max_prompt_length for row in rows.sample)
    indices, seen = range(len(rows)), len(rows.sample)
  else:
    sizes = np.fromiter((len(row.prompt) for row in rows.each('tokenizing')), np.int32, len(rows))
    _check_prompts(rows, sizes, max_prompt_length, on_long)
    long, seen = np.count_nonzero(sizes > max_prompt_length), len(rows)
    indices = np.flatnonzero(sizes <= max_prompt_length) if on_long == 'drop' else range(len(rows))
  if len(rows) and not len(indices):
    raise UserError(
      f'no prompt of {len(rows)} has at most config.data.max_prompt_length = '
      f'{max_prompt_length} tokens. Raise it.'
    )
  if long:
    logging.warning(
      '%d of %s%d prompts are longer than %d tokens; on_long is %r.',
      long,
      rows.of_all() if seen < len(rows) else '',
      seen,
      max_prompt_length,
      on_long,
    )
  return rows, indices


def _check_prompts(rows: Rows, sizes: np.ndarray, max_prompt_length: int, on_long: str) -> None:
  """Raises UserError at the first prompt without tokens, or with too many where on_long='error'."""
  wrong = sizes == 0
  if on_long == 'error':
    wrong |= sizes > max_prompt_length
  if not wrong.any():
    return
  index = int(np.argmax(wrong))
  where = lazy.place(rows.examples, index)
  if not sizes[index]:
    raise UserError(
      f'prompt {index}{where} is empty, and this tokenizer begins no text with a '
      'BOS: there is nothing to respond to. Remove the example.'
    )
  raise UserError(
    f'prompt {index}{where} has {sizes[index]} tokens, more than config.data.max_prompt_length = '
    f'{max_prompt_length}: {rows.examples[index].prompt[:60]!r}... Raise max_prompt_length, or '
    "set config.data.on_long to 'truncate_left' or 'drop'."
  )


def prompt_batch(tokenizer: formats.Tokenizer, *, max_prompt_length: int) -> Batch:
  """Rows to Prompts [B, P], P = max_prompt_length.

  Raises:
    UserError: by the batch, where a prompt has no tokens.
  """

  def batch(rows):
    tokens = np.full((len(rows), max_prompt_length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), max_prompt_length), bool)
    for number, row in _here(rows):
      ids = truncate_left(row.prompt, max_prompt_length, tokenizer.bos_token_id)
      if not len(ids):
        raise UserError(
          'a prompt is empty, and this tokenizer begins no text with a BOS: there is '
          'nothing to respond to. Remove the example: a warning at the start names it.'
        )
      tokens[number, max_prompt_length - len(ids) :] = ids
      mask[number, max_prompt_length - len(ids) :] = True
    return types.Prompts(tokens, mask)

  return batch

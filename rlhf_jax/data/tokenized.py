"""Tokenizes examples and makes batches of them.

Letters: B batch, K completions of one prompt, P prompt length, R response length, T sequence
length.

Few examples are tokenized before the first batch and kept in memory. Otherwise an example is
tokenized when a batch needs it, in the background, and warnings (truncated texts, unknown tokens)
are based on a sample.

A batch has the shape of all B examples on every process but contains only the examples of the
process, see `sharding.local_rows`. The others are None before batching and padding in the batch.
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
from rlhf_jax.data import packing
from rlhf_jax.data import progress
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

MAX_IN_MEMORY = 2**23  # tokens (32 MiB); examples with more are not kept in memory
OVERHEAD = 32  # memory of the Python objects of an example, in tokens
SAMPLE_SIZE = 4096  # maximum number of examples in a sample
SAMPLE_TOKENS = 2**19  # number of tokens after which a sample is complete
CHUNK = 64  # a sample is tokenized in batches of this many examples
GOLDEN = 0.6180339887498949  # the fractional parts of its multiples are spread evenly over [0, 1)


@dataclasses.dataclass(frozen=True)
class Tokenized:
  """The token ids of one example.

  Attributes:
    example: The example, or None if batches do not need it.
    prompt: int32 [P]; all ids if the example is a text.
    completions: K arrays, int32 [R]; empty if the example is a text or a prompt. Of a conversation
      there is one, all after its prompt.
    targets: bool [R], the tokens of answers in a conversation; None if all tokens of the completion
      are targets.
  """

  example: Any
  prompt: np.ndarray
  completions: tuple[np.ndarray, ...] = ()
  targets: np.ndarray | None = None

  @property
  def num_tokens(self) -> int:
    return len(self.prompt) + sum(map(len, self.completions))


class TokenizedData:
  """Tokenized examples, in memory if they are few.

  Attributes:
    examples: The examples.
    all: All tokenized examples if they are in memory, else None.
    sample: `all`, or else tokenized examples from all parts of the data.
  """

  def __init__(self, examples: Sequence[Any], encode: Callable[[Sequence[Any]], list[Tokenized]]):
    """Tokenizes all examples, or a sample of them, with `encode`."""
    self.examples, self._encode = examples, encode
    self.sample, complete = self._sample()
    self.all = None
    if complete:
      self.all = self.sample
    else:
      size = sum(item.num_tokens + OVERHEAD for item in self.sample) / len(self.sample)
      if size * len(examples) <= MAX_IN_MEMORY:
        self.all = self.sample = encode(list(examples))

  def _sample(self) -> tuple[list[Tokenized], bool]:
    """Returns (a sample of tokenized examples, whether it contains all examples)."""
    count = len(self.examples)
    indices = np.arange(count)
    if count > SAMPLE_SIZE:
      indices = (np.arange(1, SAMPLE_SIZE + 1) * GOLDEN % 1 * count).astype(np.int64)
    sample, num_tokens = [], 0
    while len(sample) < len(indices) and num_tokens < SAMPLE_TOKENS:
      chunk = self._encode([self.examples[i] for i in indices[len(sample) : len(sample) + CHUNK]])
      num_tokens += sum(item.num_tokens for item in chunk)
      sample += chunk
    return sample, len(sample) == count

  def __len__(self):
    return len(self.examples)

  def take(self, indices: Sequence[int] | np.ndarray) -> list[Tokenized]:
    """Returns the tokenized examples at some indices."""
    if self.all is not None:
      return [self.all[index] for index in indices]
    return self._encode([self.examples[index] for index in indices])

  def iterate(self, what: str) -> Iterator[Tokenized]:
    """Iterates over all tokenized examples in order, without storing them.

    Args:
      what: Description of the work, for a progress bar.
    """
    if self.all is not None:
      yield from self.all
      return
    for start in progress.bar(range(0, len(self), SAMPLE_SIZE), what, 'thousands of examples'):
      yield from self.take(range(start, min(start + SAMPLE_SIZE, len(self))))

  def sample_note(self) -> str:
    """Returns '' or 'a sample of ', to precede the number of examples in a warning."""
    return '' if self.all is not None else 'a sample of '


def warn_unknown(tokenizer: formats.Tokenizer, data: TokenizedData) -> None:
  """Calls `tokenizers.warn_unknown` with every prompt and completion of the sample."""
  tokenizers.warn_unknown(
    tokenizer, [ids for item in data.sample for ids in (item.prompt, *item.completions)]
  )


# Texts.


def texts(
  examples: Sequence[str | formats.Completion], tokenizer: formats.Tokenizer
) -> TokenizedData:
  """Tokenizes texts and appends the EOS. A prompt and its completion are tokenized separately."""

  def encode(chunk):
    parts = [
      (each, '') if isinstance(each, str) else (each.prompt, each.completion) for each in chunk
    ]
    joined = tokenizers.encode_joined(tokenizer, [a for a, _ in parts], [b for _, b in parts])
    return [Tokenized(None, tokenizers.append_eos(tokenizer, ids)) for ids in joined]

  data = TokenizedData(examples, encode)
  warn_unknown(tokenizer, data)
  return data


# Prompts with one or more completions.


def completions(
  examples: Sequence[formats.Completion]
  | Sequence[formats.Conversation]
  | Sequence[formats.Comparison],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  append_eos: bool = True,
) -> TokenizedData:
  """Tokenizes prompts with their completions, and warns if `truncate` will shorten some."""

  def encode(chunk):
    if isinstance(chunk[0], formats.Conversation):
      return _conversations(chunk, tokenizer)
    texts = [
      each.completions if isinstance(each, formats.Comparison) else (each.completion,)
      for each in chunk
    ]
    flat = tokenizers.encode_continuation(tokenizer, [text for each in texts for text in each])
    ended = iter([tokenizers.append_eos(tokenizer, ids) for ids in flat] if append_eos else flat)
    prompts = tokenizers.encode(tokenizer, [each.prompt for each in chunk])
    return [
      Tokenized(example, prompt, tuple(next(ended) for _ in each))
      for example, prompt, each in zip(chunk, prompts, texts)
    ]

  data = TokenizedData(examples, encode)
  warn_unknown(tokenizer, data)
  cut_prompts, cut_completions = 0, 0
  for item in data.sample:
    prompt, completions = truncate(item, max_length, tokenizer.bos_token_id)
    cut_prompts += len(prompt) < len(item.prompt)
    cut_completions += any(len(a) < len(b) for a, b in zip(completions, item.completions))
  _warn_truncated(data, cut_prompts, cut_completions, max_length)
  return data


def _warn_truncated(data, cut_prompts, cut_completions, max_length):
  """Warns if examples of the sample are cut, given the numbers of those that are."""
  if cut_prompts or cut_completions:
    logging.warning(
      'of %s%d examples, %d lost the start of the prompt and %d the end of a completion, to fit '
      'into %d tokens (config.data.max_length).',
      data.sample_note(),
      len(data.sample),
      cut_prompts,
      cut_completions,
      max_length,
    )


def _conversations(
  examples: Sequence[formats.Conversation], tokenizer: formats.Tokenizer
) -> list[Tokenized]:
  """Tokenizes the parts of conversations separately, and appends the EOS to the last answer."""
  prompts = tokenizers.encode(tokenizer, [each.prompt for each in examples])
  rest = [text for each in examples for text in each.parts[1:]]
  pieces, found = iter(tokenizers.encode_continuation(tokenizer, rest)), []
  for example, prompt in zip(examples, prompts):
    parts = [next(pieces) for _ in example.parts[1:]]
    parts[-1] = tokenizers.append_eos(tokenizer, parts[-1])
    targets = np.concatenate([np.full(len(part), n % 2 == 0) for n, part in enumerate(parts)])
    found.append(Tokenized(None, prompt, (np.concatenate(parts),), targets))
  return found


def truncate(
  item: Tokenized, max_length: int, bos: int | None
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Cuts a prompt and its completions so that the prompt and any one completion fit together.

  First the prompt loses its oldest tokens, except a leading BOS, until the longest completion fits
  or the prompt has max_length // 2 tokens. Then completions lose their ends, with the EOS.

  Returns:
    (prompt, completions).
  """
  longest = max(map(len, item.completions))
  room = max(max_length - longest, max_length // 2)
  prompt = truncate_left(item.prompt, room, bos)
  return prompt, [completion[: max_length - len(prompt)] for completion in item.completions]


def truncate_left(prompt: np.ndarray, length: int, bos: int | None) -> np.ndarray:
  """Returns the last `length` tokens of a prompt; a leading BOS is kept as the first of them."""
  if len(prompt) <= length:
    return prompt
  if bos is not None and prompt[0] == bos and length > 1:
    return np.concatenate([prompt[:1], prompt[len(prompt) - length + 1 :]])
  return prompt[len(prompt) - length :]


ToBatch = Callable[[Sequence[Tokenized | None]], Any]  # B tokenized examples -> batch


def completion_batcher(tokenizer: formats.Tokenizer, *, max_length: int) -> ToBatch:
  """Returns a function that makes an LMBatch [B, T], T = max_length."""

  def batch(items):
    tokens = np.full((len(items), max_length), tokenizer.pad_token_id, np.int32)
    real = np.zeros((len(items), max_length), bool)
    loss_mask = np.zeros((len(items), max_length), bool)
    for index, item in _local(items):
      prompt, (completion,) = truncate(item, max_length, tokenizer.bos_token_id)
      size = len(prompt) + len(completion)
      tokens[index, :size] = np.concatenate([prompt, completion])
      real[index, :size] = True
      targets = True if item.targets is None else item.targets[: len(completion)]
      loss_mask[index, len(prompt) : size] = targets
      loss_mask[index, :1] = False  # the first token has no token before it
    positions = np.where(real, np.arange(max_length, dtype=np.int32), 0)
    return types.LMBatch(tokens, real.astype(np.int32), positions, loss_mask)

  return batch


def pair_batcher(data: TokenizedData, tokenizer: formats.Tokenizer, *, max_length: int) -> ToBatch:
  """Returns a function that makes Pairs [B, P + R].

  P is the length of the longest prompt and R of the longest completion.

  Raises:
    UserError: A prompt has no tokens.
  """
  prompt_length, response_length = 0, 0
  for index, item in enumerate(data.iterate('measuring')):
    prompt, completions = truncate(item, max_length, tokenizer.bos_token_id)
    prompt_length = max(prompt_length, len(prompt))
    response_length = max(response_length, *map(len, completions))
    if not len(prompt):
      raise UserError(
        f'example {index}{lazy.place(data.examples, index)} has an empty prompt, but a '
        'completion needs a token before it. Add a prompt.'
      )

  def batch(items):
    shape = (len(items), prompt_length + response_length)
    tokens = np.full(shape, tokenizer.pad_token_id, np.int32)
    mask = np.zeros(shape, bool)
    for index, item in _local(items):
      prompt, (completion,) = truncate(item, max_length, tokenizer.bos_token_id)
      span = slice(prompt_length - len(prompt), prompt_length + len(completion))
      tokens[index, span], mask[index, span] = np.concatenate([prompt, completion]), True
    return types.Pairs(tokens, mask, mask[:, prompt_length:].copy())

  return batch


def lane_batcher(
  tokenizer: formats.Tokenizer, *, max_length: int
) -> Callable[[Sequence[Sequence[Tokenized]]], types.LMBatch]:
  """Returns a function that makes an LMBatch of arrays [B, 2, T] from B rows of examples.

  Lane k of a row holds the prompt and completion k of each of its examples, one after the other.
  Example m of a row is segment m + 1 in both lanes. Only tokens of completions are targets.
  """

  def batch(rows):
    shape = (len(rows), 2, max_length)
    tokens = np.full(shape, tokenizer.pad_token_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for index, row in enumerate(rows):
      starts = [0, 0]
      for segment, item in enumerate(row, start=1):
        prompt, completions = truncate(item, max_length, tokenizer.bos_token_id)
        for lane, completion in enumerate(completions):
          size = len(prompt) + len(completion)
          span = slice(starts[lane], starts[lane] + size)
          tokens[index, lane, span] = np.concatenate([prompt, completion])
          segments[index, lane, span] = segment
          positions[index, lane, span] = np.arange(size)
          # The first token of a sequence has no token before it, so it is not a target.
          loss_mask[index, lane, span.start + max(len(prompt), 1) : span.stop] = True
          starts[lane] = span.stop
    return types.LMBatch(tokens, segments, positions, loss_mask)

  return batch


def comparison_batcher(
  data: TokenizedData,
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  annotators: Sequence[str] | None = None,
) -> ToBatch:
  """Returns a function that makes Comparisons [B, K, T].

  K is the largest number of completions of a prompt. The batches name annotators by their index in
  `annotators`; they have none if it is None.
  """
  numbers = {name: number for number, name in enumerate(annotators or ())}
  examples = data.examples if data.all is None else [item.example for item in data.all]
  max_completions = max((len(example.completions) for example in examples), default=0)

  def batch(items):
    shape = len(items), max_completions
    tokens = np.full((*shape, max_length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((*shape, max_length), bool)
    present = np.zeros(shape, bool)
    ranks = np.zeros(shape, np.int32)
    ratings = np.zeros(shape, np.float32)
    margin = np.zeros(len(items), np.float32)
    annotator = np.full(len(items), -1, np.int32)
    for index, item in _local(items):
      prompt, completions = truncate(item, max_length, tokenizer.bos_token_id)
      count = len(completions)
      for column, completion in enumerate(completions):
        size = len(prompt) + len(completion)
        tokens[index, column, :size] = np.concatenate([prompt, completion])
        mask[index, column, :size] = True
      example = item.example
      present[index, :count] = True
      ranks[index, :count] = example.ranks
      ratings[index, :count] = 0.0 if example.ratings is None else example.ratings
      margin[index] = example.margin
      annotator[index] = numbers.get(example.annotator, -1)
    named = None if annotators is None else annotator
    return types.Comparisons(tokens, mask, present, ranks, ratings, margin, named)

  return batch


def _local(items: Sequence[Tokenized | None]) -> Iterator[tuple[int, Tokenized]]:
  """Iterates over (index, example) of the examples of this process."""
  return ((index, item) for index, item in enumerate(items) if item is not None)


# Episodes.


@dataclasses.dataclass(frozen=True)
class TokenizedEpisode:
  """The token ids of an episode that fits into the batch.

  Attributes:
    prompt: int32 [P].
    tokens: int32 [R], all tokens after the prompt.
    mask: bool [R], True at the assistant's tokens.
    rewards: float32 [R], the reward of each of the assistant's tokens.
    cut_prompt: Whether the start of the prompt was cut off.
    cut_end: Whether the end of the episode was cut off.
  """

  prompt: np.ndarray
  tokens: np.ndarray
  mask: np.ndarray
  rewards: np.ndarray
  cut_prompt: bool = False
  cut_end: bool = False

  @property
  def num_tokens(self) -> int:
    return len(self.prompt) + len(self.tokens)


def episodes(
  examples: Sequence[formats.Episode],
  tokenizer: formats.Tokenizer,
  *,
  max_length: int,
  mean: float = 0.0,
  std: float = 1.0,
) -> TokenizedData:
  """Tokenizes episodes and truncates them, with a warning; the EOS ends each.

  An episode that is too long loses the start of its prompt and then its end, as in `truncate`. The
  sum of the rewards of the lost tokens is added to the last action that is left.

  Args:
    examples: Episodes with rewards.
    tokenizer: Tokenizer.
    max_length: Most tokens of an episode.
    mean, std: The return of an episode, the sum of its rewards, becomes (return - mean) / std:
      rewards are divided by `std`, and the last one is reduced by mean / std.

  Raises:
    UserError: The rewards of an episode do not fit its tokens; see `token_rewards`.
  """

  def fitted_rewards(example, *args):
    try:
      return token_rewards(example, *args)
    except UserError as error:
      index = next(i for i, each in enumerate(examples) if each == example)
      raise UserError(f'example {index}{lazy.place(examples, index)} {error}') from error

  def encode(chunk):
    found = []
    for example, item in zip(chunk, _conversations(chunk, tokenizer)):
      (tokens,), mask = item.completions, item.targets
      rewards = fitted_rewards(example, tokens, mask, tokenizer.eos_token_id) / np.float32(std)
      rewards[-1] -= mean / std
      episode = TokenizedEpisode(item.prompt, tokens, mask, rewards)
      found.append(truncate_episode(episode, max_length, tokenizer.bos_token_id))
    return found

  data = TokenizedData(examples, encode)
  tokenizers.warn_unknown(
    tokenizer, [ids for item in data.sample for ids in (item.prompt, item.tokens)]
  )
  cut_prompts = sum(item.cut_prompt for item in data.sample)
  cut_ends = sum(item.cut_end for item in data.sample)
  _warn_truncated(data, cut_prompts, cut_ends, max_length)
  return data


def token_rewards(
  example: formats.Episode, tokens: np.ndarray, mask: np.ndarray, eos_id: int
) -> np.ndarray:
  """Returns the reward of each token of an episode after its prompt, float32 [R].

  The reward of an episode is that of its last token, the reward of a turn that of its last token.

  Args:
    example: Episode.
    tokens: int32 [R]; the last one is the EOS.
    mask: bool [R], True at the assistant's tokens.
    eos_id: Id of the EOS.

  Raises:
    UserError: There are rewards per token, but not one for each; or a turn has no tokens. The
      message is to follow the number and the place of the example, as in `episodes`.
  """
  length, given = len(tokens), len(example.rewards)
  rewards = np.zeros(length, np.float32)
  if example.level == 'episode':
    rewards[-1] = example.rewards[0]
    return rewards
  if example.level == 'turn':
    ends = np.flatnonzero(mask & ~np.append(mask[1:], False))
    if given != len(ends):
      raise UserError(
        f'has {given} rewards for {len(ends)} turns of the assistant that have tokens '
        f'and are apart from each other: {example.prompt[:60]!r}... Use another '
        'config.data.chat_template.'
      )
    rewards[ends] = example.rewards
    return rewards
  if given not in (length, length - (tokens[-1] == eos_id)):
    raise UserError(
      f'has {given} rewards for {length} tokens, the EOS included: '
      f'{example.parts[1][:60]!r}... Give one reward per token of config.tokenizer, with or '
      'without one for the EOS, or one number for the episode.'
    )
  rewards[:given] = example.rewards
  return rewards


def truncate_episode(item: TokenizedEpisode, max_length: int, bos: int | None) -> TokenizedEpisode:
  """Cuts an episode to `max_length` tokens; see `episodes`."""
  if item.num_tokens <= max_length:
    return item
  prompt, (tokens,) = truncate(Tokenized(None, item.prompt, (item.tokens,)), max_length, bos)
  mask, rewards = item.mask[: len(tokens)], item.rewards[: len(tokens)].copy()
  if mask.any():
    rewards[np.flatnonzero(mask)[-1]] += item.rewards[len(tokens) :].sum()
  cut_prompt, cut_end = len(prompt) < len(item.prompt), len(tokens) < len(item.tokens)
  return TokenizedEpisode(prompt, tokens, mask, rewards, cut_prompt, cut_end)


def episode_rows(data: TokenizedData, length: int, pack: bool) -> Sequence[Sequence[int]]:
  """Returns the indices of the episodes in each row of `length` tokens; see `episode_batcher`."""
  if not pack:
    return [(index,) for index in range(len(data))]
  sizes = [max(item.num_tokens - 1, 1) for item in data.iterate('packing')]
  order = np.argsort(sizes, kind='stable')[::-1]
  rows = packing.first_fit([sizes[index] for index in order], length=length, smallest=1)
  return [[int(order[index]) for index in row] for row in rows]


def episode_batcher(tokenizer: formats.Tokenizer, *, length: int) -> Callable[..., Any]:
  """Returns a function that makes Episodes [B, T] for a decoder, from rows of episodes.

  The last token of an episode is only an action, so an episode takes one token less than it has.

  Args:
    tokenizer: Tokenizer.
    length: T.
  """

  def batch(rows):
    out = _empty_episodes(len(rows), length, length, tokenizer.pad_token_id)
    for index, items in _local(rows):
      start = 0
      for segment, item in enumerate(items, start=1):
        ids = np.concatenate([item.prompt, item.tokens])
        stop = start + len(ids) - 1
        out.tokens[index, start:stop], out.actions[index, start:stop] = ids[:-1], ids[1:]
        out.segments[index, start:stop] = segment
        out.positions[index, start:stop] = np.arange(stop - start)
        # The first token of a sequence has no state before it, so it is not an action.
        skipped = 0 if len(item.prompt) else 1
        _put_actions(out, index, stop - len(item.tokens) + skipped, item, skipped)
        start = stop
    return out

  return batch


def episode_pair_batcher(
  data: TokenizedData, tokenizer: formats.Tokenizer
) -> Callable[..., types.Episodes]:
  """Returns a function that makes Episodes [B, P + R] for an encoder-decoder.

  P is the length of the longest prompt and R of the longest completion.

  Raises:
    UserError: A prompt has no tokens, or an episode has several turns.
  """
  prompt_length, length = 0, 0
  for index, item in enumerate(data.iterate('measuring')):
    prompt_length, length = max(prompt_length, len(item.prompt)), max(length, len(item.tokens))
    if not len(item.prompt) or not item.mask.all():
      raise UserError(
        f'example {index}{lazy.place(data.examples, index)} has an empty prompt or several turns, '
        'but an encoder-decoder model reads one prompt and writes one completion.'
      )

  def batch(rows):
    out = _empty_episodes(len(rows), prompt_length + length, length, tokenizer.pad_token_id)
    for index, (item,) in _local(rows):
      size = len(item.tokens)
      span = slice(prompt_length - len(item.prompt), prompt_length + size)
      out.tokens[index, span] = np.concatenate([item.prompt, item.tokens])
      out.segments[index, span] = 1
      out.positions[index, span] = np.arange(len(item.prompt) + size)
      out.actions[index, :size] = item.tokens
      _put_actions(out, index, 0, item, 0)
    return out

  return batch


def _empty_episodes(rows: int, length: int, actions: int, pad_id: int) -> types.Episodes:
  zeros = lambda size, dtype: np.zeros((rows, size), dtype)
  return types.Episodes(
    tokens=np.full((rows, length), pad_id, np.int32),
    segments=zeros(length, np.int32),
    positions=zeros(length, np.int32),
    actions=np.full((rows, actions), pad_id, np.int32),
    mask=zeros(actions, bool),
    last=zeros(actions, bool),
    rewards=zeros(actions, np.float32),
  )


def _put_actions(
  out: types.Episodes, row: int, start: int, item: TokenizedEpisode, skipped: int
) -> None:
  """Writes masks and rewards of an episode, without its first `skipped` tokens, from `start` on."""
  mask = item.mask[skipped:]
  span = slice(start, start + len(mask))
  out.mask[row, span] = mask
  out.rewards[row, span] = np.where(mask, item.rewards[skipped:], 0.0)
  if mask.any():
    out.last[row, start + np.flatnonzero(mask)[-1]] = True


# Prompts without completions.


def prompts(
  examples: Sequence[formats.Prompt],
  tokenizer: formats.Tokenizer,
  *,
  max_prompt_length: int,
  on_long: str,
) -> tuple[TokenizedData, np.ndarray | range]:
  """Tokenizes prompts; see `pipelines.prompt_iterator` for the arguments.

  All prompts are tokenized here to find those that are too long, except if on_long='truncate_left'.

  Returns:
    (tokenized prompts, indices of the prompts to use).
  """
  if on_long not in ('error', 'truncate_left', 'drop'):
    raise UserError(
      f"config.data.on_long is {on_long!r}; it must be 'error', 'truncate_left' or 'drop'."
    )

  def encode(chunk):
    prompts = tokenizers.encode(tokenizer, [each.prompt for each in chunk])
    return [Tokenized(None, prompt) for prompt in prompts]

  data = TokenizedData(examples, encode)
  warn_unknown(tokenizer, data)
  if data.all is None and on_long == 'truncate_left':
    long = sum(len(item.prompt) > max_prompt_length for item in data.sample)
    indices, seen = range(len(data)), len(data.sample)
  else:
    lengths = (len(item.prompt) for item in data.iterate('tokenizing'))
    lengths = np.fromiter(lengths, np.int32, len(data))
    _check_prompts(data, lengths, max_prompt_length, on_long)
    long, seen = np.count_nonzero(lengths > max_prompt_length), len(data)
    indices = range(len(data))
    if on_long == 'drop':
      indices = np.flatnonzero(lengths <= max_prompt_length)
  if len(data) and not len(indices):
    raise UserError(
      f'none of {len(data)} prompts has at most config.data.max_prompt_length={max_prompt_length} '
      'tokens. Raise it.'
    )
  if long:
    logging.warning(
      '%d of %s%d prompts are longer than %d tokens; on_long is %r.',
      long,
      data.sample_note() if seen < len(data) else '',
      seen,
      max_prompt_length,
      on_long,
    )
  return data, indices


def _check_prompts(
  data: TokenizedData, lengths: np.ndarray, max_prompt_length: int, on_long: str
) -> None:
  """Raises UserError if a prompt has no tokens, or too many and on_long='error'."""
  wrong = lengths == 0
  if on_long == 'error':
    wrong |= lengths > max_prompt_length
  if not wrong.any():
    return
  index = int(np.argmax(wrong))
  where = lazy.place(data.examples, index)
  if not lengths[index]:
    raise UserError(
      f'prompt {index}{where} is empty, and the tokenizer adds no BOS, so it has no tokens. Remove '
      'the example.'
    )
  raise UserError(
    f'prompt {index}{where} has {lengths[index]} tokens, more than config.data.max_prompt_length='
    f'{max_prompt_length}: {data.examples[index].prompt[:60]!r}... Raise max_prompt_length, or '
    "set config.data.on_long to 'truncate_left' or 'drop'."
  )


def prompt_batcher(tokenizer: formats.Tokenizer, *, max_prompt_length: int) -> ToBatch:
  """Returns a function that makes Prompts [B, P], P = max_prompt_length.

  The function raises UserError if a prompt has no tokens.
  """

  def batch(items):
    tokens = np.full((len(items), max_prompt_length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(items), max_prompt_length), bool)
    for index, item in _local(items):
      ids = truncate_left(item.prompt, max_prompt_length, tokenizer.bos_token_id)
      if not len(ids):
        raise UserError(
          'a prompt is empty, and the tokenizer adds no BOS, so it has no tokens. Remove the '
          'example: a warning at the start of the run names it.'
        )
      tokens[index, max_prompt_length - len(ids) :] = ids
      mask[index, max_prompt_length - len(ids) :] = True
    return types.Prompts(tokens, mask)

  return batch

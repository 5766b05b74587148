"""Where a finished response ends for whoever reads it: at a token, or at a string of its text.

What stands behind becomes padding: no reward model sees it, and no loss counts it where the result
is what a policy is trained on.

Letters: B batch, P prompt length, R response length, T = P + R.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np
import transformers

from rlhf_jax import errors
from rlhf_jax import types
from rlhf_jax.data import tokenizers

Tokenizer = transformers.PreTrainedTokenizerFast
REPLACEMENT = '\ufffd'  # stands for bytes that are no character, as the first of several are


def truncate(
  rollout: types.Rollout, *, tokens: tuple[int, ...], after: int = 0, pad_id: int
) -> tuple[types.Rollout, Bool[Array, ' B']]:
  """Truncates responses behind the first of some tokens. To be jitted with keywords static.

  A response without any of them stays as it is; what it is paid instead of its score is the
  caller's choice. As `postprocess_fn_from_hparams` and `filter_fn_from_hparams` of
  https://github.com/openai/lm-human-preferences/blob/master/lm_human_preferences/lm_tasks.py,
  which have one token.

  Args:
    rollout: Rollout, as a rule made with `ignore_eos`.
    tokens: ids, a tuple.
    after: response position from which on they count; tokens before it end nothing.
    pad_id: what fills the positions behind.

  Returns:
    Rollout and found [B] bool: whether there is such a token.
  """
  response_length = rollout.response_mask.shape[1]
  ends = jnp.isin(rollout.tokens[:, -response_length:], jnp.array(tokens, jnp.int32))
  ends = ends & rollout.response_mask & (jnp.arange(response_length) >= after)[None]
  keep = jnp.cumsum(ends, axis=1) - ends == 0
  return _mask_tokens(rollout, keep, pad_id, jnp), jnp.any(ends, axis=1)


def truncate_at_strings(
  rollout: types.Rollout, tokenizer: Tokenizer, strings: Sequence[str], *, after: int = 0
) -> tuple[types.Rollout, Bool[np.ndarray, ' B']]:
  """Truncates responses behind the token that completes the first of some strings, on the host.

  The text is that of all tokens of `response_mask`, special ones spelled out. A string may end
  inside of a token, which then stays. Exact for byte-level BPE, also where characters are split
  into several tokens. Not for a byte-fallback tokenizer (SentencePiece's) where the character
  completed last is spelled in bytes and more such bytes follow: its decoder needs to see their end.

  Args:
    rollout: Rollout of NumPy arrays.
    tokenizer: the policy's.
    strings: texts, none empty.
    after: tokens of the response that a string must go beyond, such as `min_new_tokens`.

  Returns:
    Rollout of NumPy arrays and found [B] bool: whether there is such a string.

  Raises:
    UserError: a string is empty.
  """
  _check_not_empty(strings)
  mask = rollout.response_mask
  response = rollout.tokens[:, -mask.shape[1] :]
  lengths = _lengths_at_strings(
    [row[real] for row, real in zip(response, mask)], tokenizer, strings, after
  )
  keep = np.ones(mask.shape, bool)
  for row, length in enumerate(lengths):
    if length:
      keep[row, np.flatnonzero(mask[row])[length - 1] + 1 :] = False
  return _mask_tokens(rollout, keep, tokenizer.pad_token_id, np), lengths > 0


def single_tokens(tokenizer: Tokenizer, strings: Sequence[str]) -> dict[str, int]:
  """The strings that are one token each: {string: id}.

  As `Sampling.stop_tokens` they end a response on the device. Their string can be spelled by other
  tokens too, so `truncate_at_strings` is needed all the same. With `min_new_tokens` stop tokens are
  forbidden at first, where strings are ignored only.

  Raises:
    UserError: a string is empty.
  """
  _check_not_empty(strings)
  rows = tokenizers.encode_continuation(tokenizer, strings)
  texts = tokenizers.decode_continuation(tokenizer, rows, skip_special_tokens=False)
  return {
    string: int(row[0])
    for string, row, text in zip(strings, rows, texts)
    if len(row) == 1 and string in text
  }


def single_token(tokenizer: Tokenizer, text: str, *, name: str) -> int:
  """The id of a text that must be one token.

  Args:
    tokenizer: the policy's.
    text: such as '.'.
    name: of the setting, for the message.

  Raises:
    UserError: it is several tokens, or none.
  """
  ids = single_tokens(tokenizer, (text,))
  if text not in ids:
    raise errors.UserError(
      f'{name}={text!r} must be one token of the tokenizer; use stop strings for longer ones'
    )
  return ids[text]


def _check_not_empty(strings):
  if not all(strings):
    raise errors.UserError(
      'a stop string is empty, and would end every response at once: remove it'
    )


def _mask_tokens(rollout, keep, pad_id, xp):
  """A rollout without the tokens where `keep` [B, R] is False; xp is numpy or jax.numpy."""
  prompt = rollout.tokens.shape[1] - keep.shape[1]
  keep_sequence = xp.concatenate([xp.ones((keep.shape[0], prompt), bool), keep], axis=1)
  return rollout.replace(
    tokens=xp.where(keep_sequence, rollout.tokens, pad_id),
    mask=rollout.mask & keep_sequence,
    response_mask=rollout.response_mask & keep,
    logprobs=xp.where(keep, rollout.logprobs, 0.0),
  )


def _lengths_at_strings(rows, tokenizer, strings, after):
  """Of each row of ids, how many complete the first of the strings; 0 where none does. int [B].

  Found by bisection: what the text of some tokens holds, that of more tokens holds too.
  """

  def decode(rows):
    return tokenizers.decode_continuation(tokenizer, rows, skip_special_tokens=False)

  starts = [len(text.rstrip(REPLACEMENT)) for text in decode([row[:after] for row in rows])]

  def complete(index, lengths):
    """Whether rows of these lengths hold a string that goes beyond the first `after` tokens."""
    texts = decode([rows[i][:length] for i, length in zip(index, lengths)])
    return np.array(
      [
        any(text.find(string, max(0, starts[i] - len(string) + 1)) >= 0 for string in strings)
        for i, text in zip(index, texts)
      ],
      bool,
    )

  high = np.array([len(row) for row in rows], int)
  index = np.flatnonzero(complete(range(len(rows)), high))
  low, high = np.zeros(len(index), int), high[index]
  while np.any(high - low > 1):
    middle = (low + high) // 2
    enough = complete(index, middle)
    low, high = np.where(enough, low, middle), np.where(enough, middle, high)
  lengths = np.zeros(len(rows), int)
  lengths[index] = high
  return lengths

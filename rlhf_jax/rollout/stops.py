"""Truncates finished responses after a token, or after a string in their text.

Everything after that becomes padding: a reward model does not see it, and a loss does not count it
if the policy is trained on the truncated rollout.

Letters: B batch, P prompt length, R response length, T = P + R.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np
import transformers

from rlhf_jax import errors
from rlhf_jax import types
from rlhf_jax.data import tokenizers
from rlhf_jax.rollout import sampling as sampling_lib

Tokenizer = transformers.PreTrainedTokenizerFast
REPLACEMENT = '\ufffd'  # decoded from bytes that are not a full character


def truncate(
  rollout: types.Rollout, *, tokens: tuple[int, ...], after: int = 0, pad_id: int
) -> tuple[types.Rollout, Bool[Array, ' B']]:
  """Truncates responses after the first of some tokens. Jit with the keyword arguments static.

  A response without these tokens is not changed; the caller may replace its score. See
  `postprocess_fn_from_hparams` and `filter_fn_from_hparams` in
  https://github.com/openai/lm-human-preferences/blob/master/lm_human_preferences/lm_tasks.py,
  which truncate after a single token.

  Args:
    rollout: Rollout, usually sampled with `ignore_eos`.
    tokens: Token ids, a tuple.
    after: Position in the response before which the tokens are ignored.
    pad_id: Token id of padding.

  Returns:
    (Rollout, found [B] bool: whether the response has one of the tokens).
  """
  response_length = rollout.response_mask.shape[1]
  ends = jnp.isin(rollout.tokens[:, -response_length:], jnp.array(tokens, jnp.int32))
  ends = ends & rollout.response_mask & (jnp.arange(response_length) >= after)[None]
  keep = jnp.cumsum(ends, axis=1) - ends == 0
  return _mask_tokens(rollout, keep, pad_id, jnp), jnp.any(ends, axis=1)


def truncate_at_strings(
  rollout: types.Rollout, tokenizer: Tokenizer, strings: Sequence[str], *, after: int = 0
) -> tuple[types.Rollout, Bool[np.ndarray, ' B']]:
  """Truncates responses after the token that completes the first of some strings, on the host.

  Strings are searched in the text of all tokens in `response_mask`, special tokens included. If a
  string ends inside a token, the whole token is kept. The result is exact for byte-level BPE, even
  if a character has several tokens. It is not exact for a byte-fallback tokenizer (SentencePiece's)
  if the last character of the string is encoded as bytes and other such bytes follow, because the
  decoder must see all of them.

  Args:
    rollout: Rollout of NumPy arrays.
    tokenizer: Tokenizer of the policy.
    strings: Texts; none may be empty.
    after: Number of tokens after which the string must end, such as `min_new_tokens`.

  Returns:
    (Rollout of NumPy arrays, found [B] bool: whether the response has one of the strings).

  Raises:
    UserError: A string is empty.
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
  """Returns {string: id} of the strings that are a single token.

  As `Sampling.stop_tokens`, they can end a response on the device. Other tokens may spell the same
  string, so `truncate_at_strings` is still needed.

  Raises:
    UserError: A string is empty.
  """
  _check_not_empty(strings)
  rows = tokenizers.encode_continuation(tokenizer, strings)
  texts = tokenizers.decode_continuation(tokenizer, rows, skip_special_tokens=False)
  return {
    string: int(row[0])
    for string, row, text in zip(strings, rows, texts)
    if len(row) == 1 and string in text
  }


def sampling_of(
  tokenizer: Any, *, stop: Sequence[str] = (), min_new_tokens: int = 0, **settings: Any
) -> sampling_lib.Sampling:
  """Returns the Sampling with the EOS, padding and stop tokens of a tokenizer.

  With `min_new_tokens` a stop string may appear early without ending the response, but a stop token
  could not be sampled early. So there are no stop tokens then: `truncate_at_strings` finds all stop
  strings in the text. `settings` are other fields of Sampling. Without stop strings, `tokenizer`
  needs no more than its `eos_token_id` and `pad_token_id`.

  Raises:
    UserError: A string is empty.
  """
  single = single_tokens(tokenizer, stop) if stop and not min_new_tokens else {}
  return sampling_lib.Sampling(
    min_new_tokens=min_new_tokens,
    eos_id=tokenizer.eos_token_id,
    pad_id=tokenizer.pad_token_id,
    stop_tokens=tuple(single.values()),
    **settings,
  )


def single_token(tokenizer: Tokenizer, text: str, *, name: str) -> int:
  """Returns the id of a text that must be one token.

  Args:
    tokenizer: Tokenizer of the policy.
    text: Text, such as '.'.
    name: Name of the setting, for the error message.

  Raises:
    UserError: The text is not exactly one token.
  """
  ids = single_tokens(tokenizer, (text,))
  if text not in ids:
    raise errors.UserError(
      f'{name}={text!r} must be one token of the tokenizer; use stop strings for longer texts'
    )
  return ids[text]


def _check_not_empty(strings):
  if not all(strings):
    raise errors.UserError(
      'a stop string is empty and would end every response immediately: remove it'
    )


def _mask_tokens(rollout, keep, pad_id, xp):
  """Masks the response tokens for which `keep` [B, R] is False; xp is numpy or jax.numpy."""
  prompt = rollout.tokens.shape[1] - keep.shape[1]
  keep_sequence = xp.concatenate([xp.ones((keep.shape[0], prompt), bool), keep], axis=1)
  return rollout.replace(
    tokens=xp.where(keep_sequence, rollout.tokens, pad_id),
    mask=rollout.mask & keep_sequence,
    response_mask=rollout.response_mask & keep,
    logprobs=xp.where(keep, rollout.logprobs, 0.0),
  )


def _lengths_at_strings(rows, tokenizer, strings, after):
  """Returns the number of tokens of each response that complete the first string, [B] int.

  0 means that there is no string. Uses bisection: if the first tokens contain a string, so do more
  tokens.
  """

  def decode(rows):
    return tokenizers.decode_continuation(tokenizer, rows, skip_special_tokens=False)

  starts = [len(text.rstrip(REPLACEMENT)) for text in decode([row[:after] for row in rows])]

  def complete(index, lengths):
    """Returns whether rows, cut to these lengths, have a string that ends after `after` tokens."""
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

"""Scores by a reward model: of the rollout's own tokens, or of its text in another tokenizer.

Letters: B batch, T sequence length.
"""

import functools

import jax
import numpy as np

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.data import tokenizers
from rlhf_jax.rewards import scoring

# One program for all members of an ensemble that are alike.
_score = functools.partial(jax.jit, static_argnames=('model',))(scoring.score)


def same_tokenizer(a, b):
  """Whether two tokenizers give every text the same ids."""
  return a.get_vocab() == b.get_vocab() and a.bos_token_id == b.bos_token_id \
      and a.eos_token_id == b.eos_token_id


def of_tokens(model, params):
  """Scorer of rollouts whose policy and reward model share a tokenizer.

  Args:
    model: Model of the reward model.
    params: {'backbone', 'head'}.

  Returns:
    Function from a Rollout to scores [B] float32, on the device.
  """
  return lambda rollout: _score(params, rollout.tokens, rollout.mask, model=model)


def of_texts(model, params, tokenizer, *, max_length, mesh):
  """Scorer of strings, for a reward model that has its own tokenizer.

  Args:
    model: Model of the reward model.
    params: {'backbone', 'head'}.
    tokenizer: the reward model's.
    max_length: T, tokens of a row.
    mesh: device mesh; rows are split over it.

  Returns:
    Function (prompts, responses, ended) -> [n] float32 NumPy; `ended`
    says which responses finished, and so get an EOS. Encoders read prompt and response as one
    text between the tokenizer's own ends.
  """
  def token_rows(prompts, responses, ended):
    if isinstance(model, models.Encoder):
      # Word pieces differ at the joint of two texts, and an encoder was always shown an end.
      texts = map(''.join, zip(prompts, responses))
      return [tokenizers.end(tokenizer, row) for row in tokenizers.encode(tokenizer, texts)]
    rows = [np.concatenate(pair) for pair in zip(
        tokenizers.encode(tokenizer, prompts),
        tokenizers.encode_continuation(tokenizer, responses))]
    return [tokenizers.end(tokenizer, row) if end else row for row, end in zip(rows, ended)]

  def apply(prompts, responses, ended):
    rows = token_rows(prompts, responses, ended)
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) > max_length:
      raise errors.UserError(
          f'the reward model reads {max_length} tokens, but prompt and response number '
          f'{longest} have {len(rows[longest])} in its tokenizer: raise '
          'config.reward.max_length or lower config.sampling.max_new_tokens')
    tokens = np.full((len(rows), max_length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), max_length), bool)
    for i, row in enumerate(rows):
      tokens[i, :len(row)], mask[i, :len(row)] = row, True
    tokens, mask = sharding.put_rows((tokens, mask), mesh)
    return processes.host(_score(params, tokens, mask, model=model))

  return apply

"""Scores by a reward model: of the rollout's own tokens, or of its text in another tokenizer.

Letters: B batch, T sequence length.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import json

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np
import transformers

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import tokenizers
from rlhf_jax.models import base
from rlhf_jax.rewards import scoring

Tokenizer = transformers.PreTrainedTokenizerFast
# Tokenizers that hold the same tokens may differ in case, accents, spaces, digits and scripts.
PROBES = (
  '',
  'a',
  ' a',
  'A b',
  'Hello,  World!\n',
  "it's\tna\u00efve \ufb01 1234567",
  '\u4f60\u597d \U0001f600 \u0391',
)
# Of an added token: where in a text it is found.
FOUND = 'single_word', 'lstrip', 'rstrip', 'normalized'
# One program for all members of an ensemble that are alike.
_score = functools.partial(jax.jit, static_argnames=('model',))(scoring.score)


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
  """Whether two tokenizers, used as in data/tokenizers.py, make the same ids of every text.

  What makes ids of texts must be the same; so must a BOS in front, and an EOS behind the prompt,
  which an encoder-decoder's has. Their padding tokens may differ: no id that anybody reads is one.
  """
  ids = lambda of, tokenizer: [row.tolist() for row in of(tokenizer, PROBES)]
  if a.eos_token_id != b.eos_token_id or any(
    ids(of, a) != ids(of, b) for of in (tokenizers.encode, tokenizers.encode_continuation)
  ):
    return False
  padding = {t.pad_token for t in (a, b) if t.pad_token_id != t.eos_token_id}
  (components, *tokens), (others, *their_tokens) = _encoding(a), _encoding(b)
  return components == others and all(
    mine.get(text) == theirs.get(text)
    for mine, theirs in zip(tokens, their_tokens)
    for text in (mine.keys() | theirs.keys()) - padding
  )


def _encoding(tokenizer):
  """What a tokenizer makes ids of texts with, but for the special tokens at their ends.

  See the components at https://huggingface.co/docs/tokenizers/components. The post-processor adds
  special tokens, of which `tokenizers.encode` takes the BOS alone, and decoders make no ids.

  Returns:
    The components' settings, {text: id}, and {text: where it is found} of added tokens.
  """
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  components = {name: state[name] for name in ('normalizer', 'pre_tokenizer', 'model')}
  del components['model']['vocab']
  added = {token['content']: [token[name] for name in FOUND] for token in state['added_tokens']}
  return components, tokenizer.get_vocab(), added


def of_tokens(
  model: base.Base, params: dict[str, PyTree]
) -> Callable[[types.Rollout], Float[Array, ' B']]:
  """Scorer of rollouts whose policy and reward model share a tokenizer.

  Args:
    model: Model of the reward model.
    params: {'backbone', 'head'}.

  Returns:
    Function from a Rollout to scores [B] float32, on the device.
  """
  return lambda rollout: _score(params, rollout.tokens, rollout.mask, model=model)


def of_texts(
  model: base.Base,
  params: dict[str, PyTree],
  tokenizer: Tokenizer,
  *,
  max_length: int,
  mesh: jax.sharding.Mesh,
) -> Callable[..., Float[np.ndarray, ' n']]:
  """Scorer of strings, for a reward model that has its own tokenizer.

  Args:
    model: Model of the reward model.
    params: {'backbone', 'head'}.
    tokenizer: the reward model's.
    max_length: T, tokens of a row.
    mesh: device mesh; rows are split over it.

  Returns:
    Function (prompts, responses, ended) -> [n] float32 NumPy; see `padded_texts`.
  """

  def apply(prompts, responses, ended):
    rows = padded_texts(model, tokenizer, prompts, responses, ended, max_length=max_length)
    return processes.to_host(_score(params, *sharding.put_rows(rows, mesh), model=model))

  return apply


def padded_texts(
  model: base.Base,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  responses: Sequence[str],
  ended: Sequence[bool],
  *,
  max_length: int,
) -> tuple[Int[np.ndarray, 'n T'], Bool[np.ndarray, 'n T']]:
  """Prompts and responses as a reward model with its own tokenizer reads them.

  Args:
    model: Model of the reward model.
    tokenizer: the reward model's.
    prompts: n texts.
    responses: n texts.
    ended: n bools: which responses finished, and so get an EOS. Encoders read prompt and response
      as one text between the tokenizer's own ends.
    max_length: T.

  Returns:
    Tokens [n, T] int32 and their mask [n, T] bool.

  Raises:
    UserError: one of them has more than T tokens.
  """
  rows = _token_rows(model, tokenizer, prompts, responses, ended)
  longest = max(range(len(rows)), key=lambda i: len(rows[i]))
  if len(rows[longest]) > max_length:
    raise errors.UserError(
      f'the reward model reads {max_length} tokens, but prompt and response number '
      f'{longest} have {len(rows[longest])} in its tokenizer: raise '
      'config.reward.max_length or lower config.sampling.max_new_tokens'
    )
  return right_padded(rows, max_length, tokenizer.pad_token_id)


def right_padded(
  rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int
) -> tuple[Int[np.ndarray, 'n T'], Bool[np.ndarray, 'n T']]:
  """Pads rows of token ids to `length`.

  Returns:
    Tokens [n, length] int32 and their mask [n, length] bool.
  """
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  return tokens, mask


def with_eos(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[bool]:
  """Which rows of token ids end with the EOS: n bools."""
  return [bool(row) and row[-1] == tokenizer.eos_token_id for row in rows]


def _token_rows(model, tokenizer, prompts, responses, ended):
  if isinstance(model, models.Encoder):
    # Word pieces differ at the joint of two texts, and an encoder was always shown an end.
    texts = map(''.join, zip(prompts, responses))
    return [tokenizers.end(tokenizer, row) for row in tokenizers.encode(tokenizer, texts)]
  rows = [
    np.concatenate(pair)
    for pair in zip(
      tokenizers.encode(tokenizer, prompts), tokenizers.encode_continuation(tokenizer, responses)
    )
  ]
  return [tokenizers.end(tokenizer, row) if end else row for row, end in zip(rows, ended)]

"""Scores by a reward model, on the rollout's tokens or on its text in the model's own tokenizer.

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
# Texts with case, accents, spaces, digits and scripts, on which tokenizers may differ.
PROBES = (
  '',
  'a',
  ' a',
  'A b',
  'Hello,  World!\n',
  "it's\tna\u00efve \ufb01 1234567",
  '\u4f60\u597d \U0001f600 \u0391',
)
# Options of an added token that decide where it matches in a text.
MATCH_OPTIONS = 'single_word', 'lstrip', 'rstrip', 'normalized'
# Jitted once, so that ensemble members of the same architecture share one compiled program.
_score = functools.partial(jax.jit, static_argnames=('model',))(scoring.score)


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
  """Returns whether two tokenizers, used as in data/tokenizers.py, encode every text alike.

  They must have the same vocabulary, normalizer, pre-tokenizer and model, and the same BOS before
  and EOS after a prompt (encoder-decoders have an EOS there). Their padding tokens may differ,
  because padding is masked.
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
  """Returns all settings of a tokenizer that affect encoding, except special tokens at the ends.

  See the components at https://huggingface.co/docs/tokenizers/components. The post-processor adds
  special tokens, of which `tokenizers.encode` keeps only the BOS; decoders do not affect encoding.

  Returns:
    Settings of the components, {token: id}, and {added token: values of its MATCH_OPTIONS}.
  """
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  components = {name: state[name] for name in ('normalizer', 'pre_tokenizer', 'model')}
  del components['model']['vocab']
  added = {
    token['content']: [token[name] for name in MATCH_OPTIONS] for token in state['added_tokens']
  }
  return components, tokenizer.get_vocab(), added


def of_tokens(
  model: base.Base, params: dict[str, PyTree]
) -> Callable[[types.Rollout], Float[Array, ' B *heads']]:
  """Returns a scorer for rollouts of a policy that shares the reward model's tokenizer.

  Args:
    model: Model of the reward model.
    params: {'backbone', 'head'}.

  Returns:
    Function from a Rollout to scores [B] float32 on the device; see scoring.score.
  """
  return lambda rollout: _score(params, rollout.tokens, rollout.mask, model=model)


def of_texts(
  model: base.Base,
  params: dict[str, PyTree],
  tokenizer: Tokenizer,
  *,
  max_length: int,
  mesh: jax.sharding.Mesh,
) -> Callable[..., Float[np.ndarray, ' n *heads']]:
  """Returns a scorer of strings, for a reward model with its own tokenizer.

  Args:
    model: Model of the reward model.
    params: {'backbone', 'head'}.
    tokenizer: Tokenizer of the reward model.
    max_length: T, length that sequences are padded to.
    mesh: Device mesh, over which sequences are split.

  Returns:
    Function (prompts, responses, ended) -> [n] float32 NumPy array; see `padded_texts` and
    scoring.score.
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
  """Encodes prompts and responses for a reward model with its own tokenizer.

  Args:
    model: Model of the reward model.
    tokenizer: Tokenizer of the reward model.
    prompts: n texts.
    responses: n texts.
    ended: n bools: whether a response ended and so gets an EOS. Ignored for encoders, which read
      prompt and response as one text between the tokenizer's special tokens.
    max_length: T, length that sequences are padded to.

  Returns:
    Tokens [n, T] int32 and their mask [n, T] bool.

  Raises:
    UserError: A prompt and its response have more than T tokens.
  """
  rows = _token_rows(model, tokenizer, prompts, responses, ended)
  longest = max(range(len(rows)), key=lambda i: len(rows[i]))
  if len(rows[longest]) > max_length:
    raise errors.UserError(
      f'the reward model reads {max_length} tokens, but prompt and response number '
      f'{longest} have {len(rows[longest])} tokens in its tokenizer: raise '
      'config.reward.max_length or lower config.sampling.max_new_tokens'
    )
  return right_padded(rows, max_length, tokenizer.pad_token_id)


def right_padded(
  rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int
) -> tuple[Int[np.ndarray, 'n T'], Bool[np.ndarray, 'n T']]:
  """Right-pads sequences of token ids to `length`.

  Returns:
    Tokens [n, length] int32 and their mask [n, length] bool.
  """
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  return tokens, mask


def left_padded(
  rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int
) -> types.Prompts:
  """Left-pads sequences of token ids to `length`."""
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :] = row
    mask[i, length - len(row) :] = True
  return types.Prompts(tokens, mask)


def rollout_of(
  prompts: Sequence[Sequence[int] | np.ndarray],
  responses: Sequence[Sequence[int] | np.ndarray],
  lengths: tuple[int, int],
  pad_id: int,
) -> types.Rollout:
  """Pads given prompts and responses to a Rollout without log-probabilities.

  Args:
    prompts: n sequences of token ids.
    responses: n sequences of token ids.
    lengths: (P, R).
    pad_id: Id of the padding token.

  Returns:
    Rollout of NumPy arrays.
  """
  left = left_padded(prompts, lengths[0], pad_id)
  tokens, mask = right_padded(responses, lengths[1], pad_id)
  return types.Rollout(
    tokens=np.concatenate([left.tokens, tokens], axis=1),
    mask=np.concatenate([left.mask, mask], axis=1),
    response_mask=mask,
    logprobs=np.zeros(mask.shape, np.float32),
  )


def with_eos(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[bool]:
  """Returns n bools: whether each sequence of token ids ends with the EOS."""
  return [bool(row) and row[-1] == tokenizer.eos_token_id for row in rows]


def _token_rows(model, tokenizer, prompts, responses, ended):
  if isinstance(model, models.Encoder):
    # Prompt and response must be encoded as one text, because word pieces can span the boundary.
    # Encoders always get an end token, because they were trained with one.
    texts = map(''.join, zip(prompts, responses))
    return [tokenizers.append_eos(tokenizer, row) for row in tokenizers.encode(tokenizer, texts)]
  rows = [
    np.concatenate(pair)
    for pair in zip(
      tokenizers.encode(tokenizer, prompts), tokenizers.encode_continuation(tokenizer, responses)
    )
  ]
  return [tokenizers.append_eos(tokenizer, row) if end else row for row, end in zip(rows, ended)]

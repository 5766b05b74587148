"""Gives exported reward models a padding token other than the EOS, as transformers requires.

Letters: V vocabulary, D width.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import transformers

from rlhf_jax import sharding
from rlhf_jax.data import tokenizers
from rlhf_jax.models import base

MULTIPLE = 64  # of the vocabulary size, so that it divides over devices


def with_pad_token(
  model: base.Base,
  params: PyTree,
  tokenizer: transformers.PreTrainedTokenizerFast,
  mesh: jax.sharding.Mesh,
) -> tuple[base.Base, PyTree, transformers.PreTrainedTokenizerFast]:
  """Adds a padding token to a decoder that pads with the EOS, as GPT-2 does.

  We read a score at the EOS. Sequence classifiers of transformers read it at the last token that is
  not the padding token, which would be the token before the EOS if the EOS were the padding token
  (`GenericForSequenceClassification`, https://github.com/huggingface/transformers).

  Args:
    model: Model.
    params: All of its parameters, without adapters.
    tokenizer: Its tokenizer, which is not modified.
    mesh: Device mesh.

  Returns:
    Model, parameters and tokenizer; unchanged if padding token and EOS already differ. If the
    embedding has no free row, rows of zeros are added; no score depends on them.
  """
  # In transformers encoder-decoders look for the EOS, and encoders read the first token.
  encoder = model.encoder_decoder or not model.has_token_states
  if encoder or tokenizer.pad_token_id != tokenizer.eos_token_id:
    return model, params, tokenizer
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.add_special_tokens({'pad_token': tokenizers.PAD})
  size = max(tokenizer.get_vocab().values()) + 1
  if size <= model.vocab_size:
    return model, params, tokenizer
  size = -(-size // MULTIPLE) * MULTIPLE
  grow = jax.jit(
    lambda x: jnp.pad(x, ((0, size - x.shape[0]), (0, 0))), out_shardings=sharding.replicated(mesh)
  )
  embed = params['embed'] | {'embedding': grow(params['embed']['embedding'])}
  config = dataclasses.replace(model.config, vocab_size=size)
  return dataclasses.replace(model, config=config), params | {'embed': embed}, tokenizer

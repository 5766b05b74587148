"""The padding token of an exported reward model, which transformers reads scores by.

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

MULTIPLE = 64  # vocabularies of such a size divide over devices


def apart(
  model: base.Base,
  params: PyTree,
  tokenizer: transformers.PreTrainedTokenizerFast,
  mesh: jax.sharding.Mesh,
) -> tuple[base.Base, PyTree, transformers.PreTrainedTokenizerFast]:
  """Gives a decoder a padding token of its own where it is padded with the EOS, as GPT-2 is.

  Its score is read at the EOS, and transformers' sequence classifiers read theirs at the last token
  that is not the padding token: with the EOS for padding, at the token before
  (`GenericForSequenceClassification`, https://github.com/huggingface/transformers).

  Args:
    model: Model.
    params: all of its parameters, without adapters.
    tokenizer: its tokenizer; not changed.
    mesh: device mesh.

  Returns:
    Model, parameters and tokenizer; the same where the padding token is another already. Where the
    embedding has no row to spare it gets some of zeros, which no score depends on.
  """
  # These find the EOS, or the first token.
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

"""Gemma (Mesnard et al. 2024, https://arxiv.org/abs/2403.08295): Llama with scaled embeddings and norms of 1 + w."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from rlhf_jax.models import llama

ARCHITECTURE = 'GemmaForCausalLM'
CLASSIFIER = 'GemmaForSequenceClassification'
PREFIX, UNEMBED = llama.PREFIX, llama.UNEMBED
IGNORED_TENSORS, RULES = llama.IGNORED_TENSORS, llama.RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Gemma config.json that change what is computed, and the special token ids."""

  num_key_value_heads: int = 16
  head_dim: int = 256
  max_position_embeddings: int = 8192
  hidden_act: str = 'gelu_pytorch_tanh'
  tie_word_embeddings: bool = True
  attention_bias: bool = False

  MODEL_TYPE = 'gemma'
  ONLY = llama.BaseConfig.ONLY | {'use_bidirectional_attention': False}

  @classmethod
  def take(cls, fields, **taken):
    taken = super().take(fields, **taken)
    if taken['hidden_act'] == 'gelu':  # What the first files say, and do not mean.
      taken['hidden_act'] = 'gelu_pytorch_tanh'
    fields.only('hidden_activation', taken['hidden_act'])
    return taken


class Norm(nnx.Module):
  """RMSNorm times 1 + offset; in float32. Arguments as for `layers.LayerNorm`."""

  def __init__(self, config, *, dtype, rngs, width=None):
    del rngs
    self.offset = nnx.Param(jnp.zeros(width or config.block_width))
    self.epsilon, self.dtype = config.norm_epsilon, dtype

  def __call__(self, x):
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    scale = 1 + self.offset[...].astype(jnp.float32)
    return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Block(llama.Block):
  """One layer."""

  Norm = Norm


class Embedder(llama.Embedder):
  """What stands before and after the blocks."""

  Norm = Norm

  def embed_inputs(self, tokens, positions, length):
    x, table = super().embed_inputs(tokens, positions, length)
    return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype), table


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  return offsets(llama.sources(config))


def offsets(found):
  """Sources {path: Source} with the norms' scales as what is added to 1."""
  return {path.replace('norm/scale', 'norm/offset'): source for path, source in found.items()}

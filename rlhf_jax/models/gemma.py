"""Gemma (Mesnard et al. 2024, https://arxiv.org/abs/2403.08295).

Gemma is Llama with scaled embeddings, and norms whose parameter is the scale minus 1.
"""

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
  """The fields of a Gemma config.json that affect the computation, and the special token ids."""

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
    if taken['hidden_act'] == 'gelu':  # The first files say 'gelu' but mean the approximation.
      taken['hidden_act'] = 'gelu_pytorch_tanh'
    fields.only('hidden_activation', taken['hidden_act'])
    return taken


class Norm(nnx.Module):
  """RMSNorm with scale 1 + offset, in float32; see `layers.LayerNorm` for the arguments."""

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
  """One layer, with Gemma's RMSNorm."""

  Norm = Norm


class Embedder(llama.Embedder):
  """The parameters outside of the blocks; embeddings are multiplied by sqrt(D)."""

  Norm = Norm

  def embed_inputs(self, tokens, positions, length):
    x, table = super().embed_inputs(tokens, positions, length)
    return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype), table


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  return offsets(llama.sources(config))


def offsets(mapping):
  """Renames the scales of norms to offsets in the sources {path: Source} of parameters."""
  return {path.replace('norm/scale', 'norm/offset'): source for path, source in mapping.items()}

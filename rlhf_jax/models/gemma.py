"""Gemma (Mesnard et al. 2024, https://arxiv.org/abs/2403.08295): Llama with scaled embeddings and norms of 1 + w."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from rlhf_jax.models import llama

ARCHITECTURE = 'GemmaForCausalLM'
CLASSIFIER = 'GemmaForSequenceClassification'
PREFIX, IGNORED_TENSORS, RULES = llama.PREFIX, llama.IGNORED_TENSORS, llama.RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Gemma config.json that change what is computed, and the special token ids."""
  attention_bias: bool

  MODEL_TYPE = 'gemma'
  DEFAULTS = llama.BaseConfig.DEFAULTS | {
      'num_key_value_heads': 16, 'head_dim': 256, 'max_position_embeddings': 8192,
      'hidden_act': 'gelu_pytorch_tanh', 'tie_word_embeddings': True, 'attention_bias': False}

  @classmethod
  def take(cls, fields):
    fields.only('use_bidirectional_attention', False)
    taken = {'attention_bias': fields.flag('attention_bias')} | super().take(fields)
    if taken['hidden_act'] == 'gelu':  # What the first files say, and do not mean.
      taken['hidden_act'] = 'gelu_pytorch_tanh'
    fields.only('hidden_activation', taken['hidden_act'])
    return taken


class Norm(nnx.Module):
  """RMSNorm times 1 + offset; in float32."""

  def __init__(self, width, config, *, dtype, rngs):
    del rngs
    self.offset = nnx.Param(jnp.zeros(width))
    self.epsilon, self.dtype = config.rms_norm_eps, dtype

  def __call__(self, x):
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    scale = 1 + self.offset[...].astype(jnp.float32)
    return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Block(llama.Block):
  """One layer."""
  Norm = Norm


class Ends(llama.Ends):
  """What stands before and after the blocks."""
  Norm = Norm

  def begin(self, tokens, positions, slots):
    x, shared = super().begin(tokens, positions, slots)
    return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype), shared


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  return {path.replace('norm/scale', 'norm/offset'): source for path, source in llama.sources(config).items()}

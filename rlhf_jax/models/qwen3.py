"""Qwen 3 (Yang et al. 2025, https://arxiv.org/abs/2505.09388): Llama with norms over each head's query and key.

Layers may see windows of the text as in Qwen 2.
"""

import dataclasses

from rlhf_jax.models import layers
from rlhf_jax.models import llama
from rlhf_jax.models import qwen2
from rlhf_jax.models.naming import Source

ARCHITECTURE = 'Qwen3ForCausalLM'
CLASSIFIER = 'Qwen3ForSequenceClassification'
PREFIX, IGNORED_TENSORS, RULES = llama.PREFIX, llama.IGNORED_TENSORS, llama.RULES
Ends = llama.Ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(qwen2.Config):
  """The fields of a Qwen 3 config.json that change what is computed, and the special token ids."""
  attention_bias: bool

  MODEL_TYPE = 'qwen3'
  DEFAULTS = qwen2.Config.DEFAULTS | {'head_dim': 128, 'attention_bias': False}

  @classmethod
  def take(cls, fields):
    return {'attention_bias': fields.flag('attention_bias')} | super().take(fields)


class Attention(layers.Attention):
  """The projections, with an RMSNorm of each head of queries and keys."""
  Norm = llama.Norm

  def __init__(self, config, *, bias, dtype, rngs):
    super().__init__(config, bias=bias, dtype=dtype, rngs=rngs)
    self.query_norm = self.Norm(config.head_width, config, dtype=dtype, rngs=rngs)
    self.key_norm = self.Norm(config.head_width, config, dtype=dtype, rngs=rngs)

  def project(self, x):
    queries, keys, values = super().project(x)
    return self.query_norm(queries), self.key_norm(keys), values


class Block(llama.Block):
  """One layer."""
  Attention = Attention


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  norms = {f'blocks/attention/{ours}_norm/scale': Source(f'layers.{{layer}}.self_attn.{theirs}_norm.weight')
           for ours, theirs in (('query', 'q'), ('key', 'k'))}
  return llama.sources(config) | norms

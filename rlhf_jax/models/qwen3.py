"""Qwen 3 (Yang et al. 2025, https://arxiv.org/abs/2505.09388).

Qwen 3 is Llama with a norm over each head's query and key. Layers may have sliding windows, as in
Qwen 2.
"""

import dataclasses

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import llama
from rlhf_jax.models import naming
from rlhf_jax.models import qwen2

ARCHITECTURE = 'Qwen3ForCausalLM'
CLASSIFIER = 'Qwen3ForSequenceClassification'
PREFIX, UNEMBED = llama.PREFIX, llama.UNEMBED
IGNORED_TENSORS, RULES = llama.IGNORED_TENSORS, llama.RULES
Embedder = llama.Embedder

# {path of a query or key norm: name of its tensor}.
HEAD_NORMS = {
  f'blocks/attention/{ours}_norm': f'layers.{{layer}}.self_attn.{theirs}_norm'
  for ours, theirs in (('query', 'q'), ('key', 'k'))
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(qwen2.Config):
  """The fields of a Qwen 3 config.json that affect the computation, and the special token ids."""

  head_dim: int = 128
  attention_bias: bool = False

  MODEL_TYPE = 'qwen3'
  out_bias = hf_config.alias('attention_bias')


class Attention(layers.Attention):
  """The projections of attention, with an RMSNorm over each head's query and key."""

  Norm = layers.RMSNorm

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.query_norm = self.Norm(config, dtype=dtype, rngs=rngs, width=config.head_width)
    self.key_norm = self.Norm(config, dtype=dtype, rngs=rngs, width=config.head_width)

  def project(self, x):
    queries, keys, values = super().project(x)
    return self.query_norm(queries), self.key_norm(keys), values


class Block(llama.Block):
  """One layer, with norms over each head's query and key."""

  Attention = Attention


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  return llama.sources(config) | naming.scales(HEAD_NORMS)

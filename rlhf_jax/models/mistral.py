"""Mistral (Jiang et al. 2023, https://arxiv.org/abs/2310.06825): Llama with sliding windows."""

import dataclasses

from rlhf_jax.models import llama

ARCHITECTURE = 'MistralForCausalLM'
CLASSIFIER = 'MistralForSequenceClassification'
PREFIX, UNEMBED = llama.PREFIX, llama.UNEMBED
IGNORED_TENSORS, RULES = llama.IGNORED_TENSORS, llama.RULES
Block, Embedder, sources = llama.Block, llama.Embedder, llama.sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Mistral config.json that affect the computation, and the special token ids."""

  num_key_value_heads: int = 8
  max_position_embeddings: int = 131072
  hidden_act: str = 'silu'
  sliding_window: int | None = 4096

  MODEL_TYPE = 'mistral'

  @property
  def windows(self):
    return (self.sliding_window or 0,) * self.depth

"""Mistral (Jiang et al. 2023, https://arxiv.org/abs/2310.06825): Llama whose tokens see a window of the text."""

import dataclasses

from rlhf_jax.models import llama

ARCHITECTURE = 'MistralForCausalLM'
CLASSIFIER = 'MistralForSequenceClassification'
PREFIX, IGNORED_TENSORS, RULES = llama.PREFIX, llama.IGNORED_TENSORS, llama.RULES
Block, Ends, sources = llama.Block, llama.Ends, llama.sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Mistral config.json that change what is computed, and the special token ids."""
  sliding_window: int | None

  MODEL_TYPE = 'mistral'
  DEFAULTS = llama.BaseConfig.DEFAULTS | {
      'hidden_act': 'silu', 'num_key_value_heads': 8, 'max_position_embeddings': 131072, 'sliding_window': 4096}

  @classmethod
  def take(cls, fields):
    return super().take(fields) | {'sliding_window': fields.integer('sliding_window', None)}

  @property
  def windows(self):
    return (self.sliding_window or 0,) * self.depth

"""Qwen 2 and 2.5 (Yang et al. 2024, https://arxiv.org/abs/2407.10671): Llama with biases of queries, keys and values.

The upper layers may see a window of the text.
"""

import dataclasses

from rlhf_jax.models import layers
from rlhf_jax.models import llama
from rlhf_jax.models import windowed
from rlhf_jax.models.naming import Source

ARCHITECTURE = 'Qwen2ForCausalLM'
CLASSIFIER = 'Qwen2ForSequenceClassification'
PREFIX, IGNORED_TENSORS, RULES = llama.PREFIX, llama.IGNORED_TENSORS, llama.RULES
Ends = llama.Ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Qwen 2 config.json that change what is computed, and the special token ids."""
  use_sliding_window: bool
  max_window_layers: int
  sliding_window: int | None
  layer_types: tuple

  MODEL_TYPE = 'qwen2'
  DEFAULTS = llama.BaseConfig.DEFAULTS | {
      'hidden_act': 'silu', 'num_key_value_heads': 32, 'max_position_embeddings': 32768,
      'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 28}

  @classmethod
  def take(cls, fields):
    fields.only('use_mrope', False)
    taken = super().take(fields)
    used, first = fields.flag('use_sliding_window'), fields.integer('max_window_layers', least=0)
    if not used:
      fields.raw('sliding_window', None)
    slides = used and 'sliding_window' in fields
    kinds = windowed.take(fields, depth=taken['num_hidden_layers'], slides=lambda layer: slides and layer >= first)
    return taken | kinds | {'use_sliding_window': used, 'max_window_layers': first}

  @property
  def windows(self):
    return windowed.windows(self)


class Attention(layers.Attention):
  """The projections, the last of which has no bias."""

  def __init__(self, config, *, bias, dtype, rngs):
    del bias
    super().__init__(config, bias=True, dtype=dtype, rngs=rngs)
    self.out = layers.Linear(self.out.in_features, self.out.out_features, bias=False, dtype=dtype, rngs=rngs)


class Block(llama.Block):
  """One layer."""
  Attention = Attention


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  biases = {f'blocks/attention/{ours}/bias': Source(f'layers.{{layer}}.self_attn.{theirs}.bias')
            for ours, theirs in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj'))}
  return llama.sources(config) | biases

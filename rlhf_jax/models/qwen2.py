"""Qwen 2 and 2.5 (Yang et al. 2024, https://arxiv.org/abs/2407.10671).

Qwen 2 is Llama with biases of queries, keys and values. Upper layers may have sliding windows.
"""

import dataclasses

from rlhf_jax.models import llama
from rlhf_jax.models import windowed

ARCHITECTURE = 'Qwen2ForCausalLM'
CLASSIFIER = 'Qwen2ForSequenceClassification'
PREFIX, UNEMBED = llama.PREFIX, llama.UNEMBED
IGNORED_TENSORS, RULES = llama.IGNORED_TENSORS, llama.RULES
Block, Embedder, sources = llama.Block, llama.Embedder, llama.sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(windowed.Config):
  """The fields of a Qwen 2 config.json that affect the computation, and the special token ids."""

  num_key_value_heads: int = 32
  max_position_embeddings: int = 32768
  hidden_act: str = 'silu'
  use_sliding_window: bool = False
  max_window_layers: int = 28

  MODEL_TYPE = 'qwen2'
  ONLY = windowed.Config.ONLY | {'use_mrope': False}
  attention_bias, out_bias = True, False

  @classmethod
  def take(cls, fields, **taken):
    used, first = fields.flag('use_sliding_window'), fields.integer('max_window_layers', least=0)
    if not used:
      fields.raw('sliding_window', None)
    has_windows = used and 'sliding_window' in fields
    return super().take(
      fields,
      is_sliding=lambda layer: has_windows and layer >= first,
      use_sliding_window=used,
      max_window_layers=first,
      **taken,
    )

"""Gemma 2 (Riviere et al. 2024, https://arxiv.org/abs/2408.00118).

Gemma 2 is Gemma with soft caps on attention scores and logits, additional norms after attention
and MLP, and sliding windows in every other layer.
"""

import dataclasses

from rlhf_jax.models import gemma
from rlhf_jax.models import layers
from rlhf_jax.models import llama
from rlhf_jax.models import naming
from rlhf_jax.models import windowed

ARCHITECTURE = 'Gemma2ForCausalLM'
CLASSIFIER = 'Gemma2ForSequenceClassification'
PREFIX, UNEMBED = llama.PREFIX, llama.UNEMBED
IGNORED_TENSORS, RULES = llama.IGNORED_TENSORS, llama.RULES
Embedder = gemma.Embedder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(windowed.Config):
  """The fields of a Gemma 2 config.json that affect the computation, and the special token ids."""

  num_key_value_heads: int = 4
  head_dim: int = 256
  max_position_embeddings: int = 8192
  tie_word_embeddings: bool = True
  attention_bias: bool = False
  query_pre_attn_scalar: int = 256
  attn_logit_softcapping: float | None = 50.0
  final_logit_softcapping: float | None = 30.0

  MODEL_TYPE = 'gemma2'
  ONLY = windowed.Config.ONLY | {'use_bidirectional_attention': False}

  @classmethod
  def take(cls, fields, **taken):
    activation = fields.choice('hidden_activation', layers.ACTIVATIONS, 'gelu_pytorch_tanh')
    taken = super().take(
      fields, is_sliding=cls.sliding_rule(fields), hidden_act=activation, **taken
    )
    # Old files repeat these two fields under other names.
    fields.only('hidden_act', activation)
    fields.only('sliding_window_size', taken['sliding_window'])
    return taken

  def to_hf(self):
    fields = super().to_hf()
    fields['hidden_activation'] = fields.pop('hidden_act')
    return fields

  @classmethod
  def sliding_rule(cls, fields):
    """Returns a function from a layer to whether it has a window, for files without layer_types."""
    del fields
    return lambda layer: layer % 2 == 0

  @property
  def score_cap(self):
    return self.attn_logit_softcapping or 0.0

  @property
  def logit_cap(self):
    return self.final_logit_softcapping or 0.0

  @property
  def query_scale(self):
    return self.query_pre_attn_scalar**-0.5


class Block(gemma.Block):
  """One layer, with norms before and after attention and MLP."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.attention_post_norm = self.Norm(config, dtype=dtype, rngs=rngs)
    self.mlp_post_norm = self.Norm(config, dtype=dtype, rngs=rngs)

  def __call__(self, x, layer, table, attend):
    attended, kv_cache = self.self_attention(self.attention_norm(x), layer, table, attend)
    x = layers.take_last(x, attended) + self.attention_post_norm(attended)
    return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), kv_cache


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  names = {
    'attention_post_norm': 'post_attention',
    'mlp_norm': 'pre_feedforward',
    'mlp_post_norm': 'post_feedforward',
  }
  norms = naming.scales(
    {f'blocks/{ours}': f'layers.{{layer}}.{theirs}_layernorm' for ours, theirs in names.items()}
  )
  return gemma.sources(config) | gemma.offsets(norms)

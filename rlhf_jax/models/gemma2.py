"""Gemma 2 (Riviere et al. 2024, https://arxiv.org/abs/2408.00118).

Gemma with soft caps on attention scores and logits, norms after attention and MLP too, and
windows of the text in every other layer.
"""

import dataclasses

from rlhf_jax.models import gemma
from rlhf_jax.models import layers
from rlhf_jax.models import llama
from rlhf_jax.models import windowed
from rlhf_jax.models.naming import Source

ARCHITECTURE = 'Gemma2ForCausalLM'
CLASSIFIER = 'Gemma2ForSequenceClassification'
PREFIX, IGNORED_TENSORS, RULES = llama.PREFIX, llama.IGNORED_TENSORS, llama.RULES
Ends = gemma.Ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Gemma 2 config.json that change what is computed, and the special token ids."""
  attention_bias: bool
  query_pre_attn_scalar: int
  attn_logit_softcapping: float | None
  final_logit_softcapping: float | None
  sliding_window: int | None
  layer_types: tuple

  MODEL_TYPE = 'gemma2'
  DEFAULTS = llama.BaseConfig.DEFAULTS | {
      'num_key_value_heads': 4, 'head_dim': 256, 'max_position_embeddings': 8192, 'tie_word_embeddings': True,
      'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False, 'query_pre_attn_scalar': 256,
      'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0, 'sliding_window': 4096}
  ACTIVATION = 'hidden_activation'

  @classmethod
  def take(cls, fields):
    fields.only('use_bidirectional_attention', False)
    own = dict(
        attention_bias=fields.flag('attention_bias'),
        query_pre_attn_scalar=fields.integer('query_pre_attn_scalar'),
        attn_logit_softcapping=fields.number('attn_logit_softcapping', None),
        final_logit_softcapping=fields.number('final_logit_softcapping', None))
    taken = own | super().take(fields)
    taken |= windowed.take(fields, depth=taken['num_hidden_layers'], slides=cls.sliding_rule(fields))
    # Old files say these twice.
    fields.only('hidden_act', taken['hidden_act'])
    fields.only('sliding_window_size', taken['sliding_window'])
    return taken

  @classmethod
  def sliding_rule(cls, fields):
    """Layer -> whether it sees a window, in files that do not say it of each."""
    del fields
    return lambda layer: layer % 2 == 0

  @property
  def windows(self):
    return windowed.windows(self)

  @property
  def score_cap(self):
    return self.attn_logit_softcapping or 0.0

  @property
  def logit_cap(self):
    return self.final_logit_softcapping or 0.0

  @property
  def query_scale(self):
    return self.query_pre_attn_scalar ** -0.5


class Block(gemma.Block):
  """One layer; there are norms on both sides of attention and MLP."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.attention_post_norm = self.Norm(config.width, config, dtype=dtype, rngs=rngs)
    self.mlp_post_norm = self.Norm(config.width, config, dtype=dtype, rngs=rngs)

  def __call__(self, x, layer, table, attend):
    """Applies the layer; see llama.Block."""
    del layer
    mixed, memory = self.mix(self.attention_norm(x), table, attend)
    x = layers.tail(x, mixed) + self.attention_post_norm(mixed)
    return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), memory


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  norms = {f'blocks/{ours}/offset': Source(f'layers.{{layer}}.{theirs}_layernorm.weight')
           for ours, theirs in (('attention_post_norm', 'post_attention'), ('mlp_norm', 'pre_feedforward'),
                                ('mlp_post_norm', 'post_feedforward'))}
  return gemma.sources(config) | norms

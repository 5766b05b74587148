"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971).

Includes the grouped queries of Llama 2 and the rope scaling of Llama 3.1. Most later decoders are
Llama with a few changes: their files define only the changes and import the rest from here.
"""

import dataclasses

from rlhf_jax.models import blocks
from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import naming
from rlhf_jax.models import rope

ARCHITECTURE = 'LlamaForCausalLM'
CLASSIFIER = 'LlamaForSequenceClassification'
PREFIX, UNEMBED = 'model.', 'lm_head.weight'
# Buffers in old files.
IGNORED_TENSORS = r'(^|\.)rotary_emb\.inv_freq$'
RULES = blocks.RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(hf_config.Config):
  """The fields of config.json that Llama and all families derived from it have."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  hidden_act: str
  rms_norm_eps: float = 1e-6
  rope: rope.Rope
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02

  # These apply only to families that do not read the biases as fields.
  ONLY = hf_config.Config.ONLY | {'attention_bias': False, 'mlp_bias': False}
  attention_bias = mlp_bias = False
  gated = True
  kv_heads = hf_config.alias('num_key_value_heads')
  head_width = hf_config.alias('head_dim')
  norm_epsilon = hf_config.alias('rms_norm_eps')

  @classmethod
  def take(cls, fields, **taken):
    sizes = fields.integers('hidden_size', 'num_attention_heads', 'max_position_embeddings')
    width, heads, max_positions = sizes.values()
    if 'head_dim' not in fields:
      hf_config.check_divides(
        sizes, 'num_attention_heads', 'hidden_size', ', or head_dim must be set'
      )
    head_width = fields.integer('head_dim', width // heads)
    sizes |= {
      'head_dim': head_width,
      'num_key_value_heads': fields.integer('num_key_value_heads', heads),
    }
    ropes = cls.take_ropes(fields, head_width=head_width, max_positions=max_positions)
    return super().take(fields, **sizes, **ropes, **taken)

  @classmethod
  def take_ropes(cls, fields, *, head_width, max_positions):
    """Reads the rotary positions, {field of the Config: rope.Rope}; see rope.from_hf."""
    return {'rope': rope.from_hf(fields, head_width=head_width, max_positions=max_positions)}

  def check(self):
    hf_config.check_divides(vars(self), 'num_key_value_heads', 'num_attention_heads')

  def to_hf(self):
    fields = super().to_hf()
    del fields['rope']
    return fields | self.rope.to_hf()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
  """The fields of a Llama config.json that affect the computation, and the special token ids."""

  max_position_embeddings: int = 2048
  hidden_act: str = 'silu'
  attention_bias: bool = False
  mlp_bias: bool = False

  MODEL_TYPE = 'llama'
  ONLY = BaseConfig.ONLY | {'rope_interleaved': False}


class Block(blocks.Block):
  """One layer, with RMSNorm."""

  Norm = layers.RMSNorm


class Embedder(blocks.RotaryEmbedder):
  """The parameters outside of the blocks: the embedding of tokens and the final RMSNorm."""

  Norm = layers.RMSNorm


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  layer = 'layers.{layer}'
  mapping = naming.embeddings({'embed': 'embed_tokens'})
  mapping |= naming.scales(
    {
      'norm': 'norm',
      'blocks/attention_norm': f'{layer}.input_layernorm',
      'blocks/mlp_norm': f'{layer}.post_attention_layernorm',
    }
  )
  for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o')):
    mapping |= naming.torch_linear(
      f'blocks/attention/{ours}',
      f'{layer}.self_attn.{theirs}_proj',
      bias=config.out_bias if ours == 'out' else config.attention_bias,
    )
  mlp = {f'blocks/mlp/{name}': f'{layer}.mlp.{name}_proj' for name in ('gate', 'up', 'down')}
  return mapping | naming.linears(mlp, bias=config.mlp_bias)

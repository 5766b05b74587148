"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971; grouped queries: Llama 2; rope scaling: Llama 3.1).

Most decoders since are Llama with a few changes; their files say these and take the rest from here.
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
# Buffers that old files hold beside the parameters.
IGNORED_TENSORS = r'(^|\.)rotary_emb\.inv_freq$'
RULES = blocks.RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(hf_config.Config):
  """The fields that the config.json of Llama and of all its relatives have."""

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

  # Of families that have biases as fields they are taken already.
  ONLY = hf_config.Config.ONLY | {'attention_bias': False, 'mlp_bias': False}
  attention_bias = mlp_bias = False
  gated = True
  kv_heads = hf_config.alias('num_key_value_heads')
  head_width = hf_config.alias('head_dim')
  norm_epsilon = hf_config.alias('rms_norm_eps')

  @classmethod
  def take(cls, fields, **taken):
    sizes = fields.integers('hidden_size', 'num_attention_heads', 'max_position_embeddings')
    width, heads, limit = sizes.values()
    if 'head_dim' not in fields:
      hf_config.check_divides(sizes, 'num_attention_heads', 'hidden_size', ', or head_dim be given')
    head_width = fields.integer('head_dim', width // heads)
    sizes |= {
      'head_dim': head_width,
      'num_key_value_heads': fields.integer('num_key_value_heads', heads),
    }
    ropes = cls.take_ropes(fields, head_width=head_width, limit=limit)
    return super().take(fields, **sizes, **ropes, **taken)

  @classmethod
  def take_ropes(cls, fields, *, head_width, limit):
    """Takes {name: rope.Rope} of the family's fields; see rope.from_hf."""
    return {'rope': rope.from_hf(fields, head_width=head_width, limit=limit)}

  def check(self):
    hf_config.check_divides(vars(self), 'num_key_value_heads', 'num_attention_heads')

  def to_hf(self):
    fields = super().to_hf()
    del fields['rope']
    return fields | self.rope.to_hf()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
  """The fields of a Llama config.json that change what is computed, and the special token ids."""

  max_position_embeddings: int = 2048
  hidden_act: str = 'silu'
  attention_bias: bool = False
  mlp_bias: bool = False

  MODEL_TYPE = 'llama'
  ONLY = BaseConfig.ONLY | {'rope_interleaved': False}


class Block(blocks.Block):
  """One layer."""

  Norm = layers.RMSNorm


class Embedder(blocks.RotaryEmbedder):
  """What stands before and after the blocks."""

  Norm = layers.RMSNorm


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  layer = 'layers.{layer}'
  found = naming.embeddings({'embed': 'embed_tokens'})
  found |= naming.scales(
    {
      'norm': 'norm',
      'blocks/attention_norm': f'{layer}.input_layernorm',
      'blocks/mlp_norm': f'{layer}.post_attention_layernorm',
    }
  )
  for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o')):
    found |= naming.torch_linear(
      f'blocks/attention/{ours}',
      f'{layer}.self_attn.{theirs}_proj',
      bias=config.out_bias if ours == 'out' else config.attention_bias,
    )
  mlp = {f'blocks/mlp/{name}': f'{layer}.mlp.{name}_proj' for name in ('gate', 'up', 'down')}
  return found | naming.linears(mlp, bias=config.mlp_bias)

"""GPT-NeoX (Black et al. 2022, https://arxiv.org/abs/2204.06745) and Pythia."""

import dataclasses

from rlhf_jax.models import blocks
from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import naming
from rlhf_jax.models import rope

ARCHITECTURE = 'GPTNeoXForCausalLM'
CLASSIFIER = 'GPTNeoXForSequenceClassification'
PREFIX = 'gpt_neox.'
UNEMBED = 'embed_out.weight'
# Causal masks and rotary frequencies in old files.
IGNORED_TENSORS = r'(^|\.)attention\.(bias|masked_bias|rotary_emb\.inv_freq)$'
RULES = blocks.RULES

Embedder = blocks.RotaryEmbedder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hf_config.Config):
  """The fields of a GPT-NeoX config.json that affect the computation, and the special token ids."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int = 2048
  hidden_act: str = 'gelu'
  layer_norm_eps: float = 1e-5
  rope: rope.Rope
  use_parallel_residual: bool = True
  attention_bias: bool = True
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02

  MODEL_TYPE = 'gpt_neox'

  @classmethod
  def take(cls, fields, **taken):
    fields.raw('is_decoder', False)  # transformers defines this field but ignores it.
    sizes = fields.integers('hidden_size', 'num_attention_heads', 'max_position_embeddings')
    width, heads, max_positions = sizes.values()
    hf_config.check_divides(sizes, 'num_attention_heads', 'hidden_size')
    rotary = _rope(fields, head_width=width // heads, max_positions=max_positions)
    return super().take(fields, **sizes, rope=rotary, **taken)

  def to_hf(self):
    fields = super().to_hf()
    del fields['rope']
    # For this family, every version of transformers reads these names and not the usual ones.
    return fields | {
      'rotary_emb_base': self.rope.theta,
      'rotary_pct': self.rope.rotary_fraction,
      'rope_scaling': self.rope.scaling(),
    }


def _rope(fields, *, head_width, max_positions):
  """Reads the rotary positions; NeoX has its own names for the base and the rotated fraction."""
  renamed = {
    name: fields.raw(name, None) for name in ('rope_parameters', 'rope_scaling', rope.ORIGINAL)
  }
  renamed['rope_theta'] = fields.number('rotary_emb_base', 10000.0)
  renamed['partial_rotary_factor'] = fields.number('rotary_pct', 0.25)
  rotary = rope.from_hf(
    hf_config.Fields(renamed), head_width=head_width, max_positions=max_positions, partial=True
  )
  # Some versions of transformers also write both under the usual names, but do not read them.
  fields.only('rope_theta', rotary.theta)
  fields.only('partial_rotary_factor', rotary.rotary_fraction)
  return rotary


class Block(blocks.Block):
  """One layer; the MLP reads the input of attention (in "parallel") or the sum after attention."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.parallel = config.use_parallel_residual

  def __call__(self, x, layer, table, attend):
    if not self.parallel:
      return super().__call__(x, layer, table, attend)
    attended, kv_cache = self.self_attention(self.attention_norm(x), layer, table, attend)
    x = layers.take_last(x, attended)
    return x + attended + self.mlp(self.mlp_norm(x)), kv_cache


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  layer, bias = 'layers.{layer}', config.attention_bias
  mapping = naming.embeddings({'embed': 'embed_in'})
  mapping |= naming.norms(
    {
      'norm': 'final_layer_norm',
      'blocks/attention_norm': f'{layer}.input_layernorm',
      'blocks/mlp_norm': f'{layer}.post_attention_layernorm',
    }
  )
  # One tensor has the query, key and value of each head in turn.
  for name, columns in zip(('query', 'key', 'value'), naming.interleaved(3, config.head_width)):
    mapping |= naming.torch_linear(
      f'blocks/attention/{name}', f'{layer}.attention.query_key_value', bias=bias, columns=columns
    )
  mapping |= naming.torch_linear('blocks/attention/out', f'{layer}.attention.dense', bias=bias)
  return mapping | naming.linears(
    {
      'blocks/mlp/up': f'{layer}.mlp.dense_h_to_4h',
      'blocks/mlp/down': f'{layer}.mlp.dense_4h_to_h',
    },
    bias=True,
  )

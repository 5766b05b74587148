"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971; grouped queries: Llama 2; rope scaling: Llama 3.1).

Letters: B batch, T tokens, L layers, V vocabulary, D width, N heads, K key/value heads, H head
width, F feed-forward width.
"""

import dataclasses

from flax import nnx
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models.naming import Source, torch_linear

ARCHITECTURE = 'LlamaForCausalLM'
CLASSIFIER = 'LlamaForSequenceClassification'
PREFIX = 'model.'
# Buffers that old files hold beside the parameters.
IGNORED_TENSORS = r'(^|\.)rotary_emb\.inv_freq$'

RULES = (
    (r'(^|/)embed/embedding$', P('tensor', 'fsdp')),
    (r'(^|/)blocks/attention/(query|key|value)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/attention/(query|key|value)/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/attention/out/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/mlp/(gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/mlp/(gate|up)/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/(attention/out|mlp/down)/bias$', P()),
    (r'(^|/)blocks/(attention_norm|mlp_norm)/scale$', P()),
    (r'(^|/)norm/scale$', P()),
    (r'(^|/)unembed/kernel$', P('fsdp', 'tensor')),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields of a Llama config.json that change what is computed, and the special token ids."""
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  hidden_act: str
  rms_norm_eps: float
  rope: layers.Rope
  attention_bias: bool
  mlp_bias: bool
  tie_word_embeddings: bool
  initializer_range: float
  bos_token_id: int | None
  eos_token_id: int | tuple | None
  pad_token_id: int | None

  @classmethod
  def from_hf(cls, fields):
    """Reads a config.json dict.

    Raises:
      UserError: naming a field that is missing, unknown or not supported.
    """
    fields = hf_config.Fields(fields)
    fields.only('is_encoder_decoder', False)
    fields.only('rope_interleaved', False)
    width = fields.integer('hidden_size')
    heads = fields.integer('num_attention_heads')
    if 'head_dim' not in fields and width % heads:
      raise hf_config.refusal('num_attention_heads', heads, f'must divide hidden_size={width}, or head_dim be given')
    config = cls(
        vocab_size=fields.integer('vocab_size'),
        hidden_size=width,
        intermediate_size=fields.integer('intermediate_size'),
        num_hidden_layers=fields.integer('num_hidden_layers'),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer('num_key_value_heads', heads),
        head_dim=fields.integer('head_dim', width // heads),
        max_position_embeddings=fields.integer('max_position_embeddings', 2048),
        hidden_act=fields.choice('hidden_act', layers.ACTIVATIONS, 'silu'),
        rms_norm_eps=fields.number('rms_norm_eps', 1e-6),
        rope=layers.Rope.from_hf(fields),
        attention_bias=fields.flag('attention_bias', False),
        mlp_bias=fields.flag('mlp_bias', False),
        tie_word_embeddings=fields.flag('tie_word_embeddings', False),
        initializer_range=fields.number('initializer_range', 0.02),
        bos_token_id=fields.token_id('bos_token_id'),
        eos_token_id=fields.token_id('eos_token_id'),
        pad_token_id=fields.token_id('pad_token_id'),
    )
    fields.finish()
    if heads % config.num_key_value_heads:
      raise hf_config.refusal('num_key_value_heads', config.num_key_value_heads,
                              f'must divide num_attention_heads={heads}')
    if config.head_dim % 2:
      raise hf_config.refusal('head_dim', config.head_dim, 'must be even for rotary positions')
    return config

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    fields = dataclasses.asdict(self)
    del fields['rope']
    return {'model_type': 'llama', **fields, **self.rope.to_hf()}

  @property
  def width(self):
    return self.hidden_size

  @property
  def depth(self):
    return self.num_hidden_layers

  @property
  def heads(self):
    return self.num_attention_heads

  @property
  def kv_heads(self):
    return self.num_key_value_heads

  @property
  def head_width(self):
    return self.head_dim

  @property
  def max_length(self):
    return self.max_position_embeddings

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0."""
    del path
    return self.initializer_range


class Norm(nnx.RMSNorm):
  """RMSNorm; statistics in float32."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config.width, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)


class MLP(nnx.Module):
  """down(act(gate x) * up x)."""

  def __init__(self, config, *, dtype, rngs):
    shared = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
    self.activation = config.hidden_act
    self.gate = layers.Linear(config.width, config.intermediate_size, **shared)
    self.up = layers.Linear(config.width, config.intermediate_size, **shared)
    self.down = layers.Linear(config.intermediate_size, config.width, **shared)

  def __call__(self, x):
    return self.down(layers.ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """One layer."""

  def __init__(self, config, *, dtype, rngs):
    self.attention_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.attention = layers.Attention(config, bias=config.attention_bias, dtype=dtype, rngs=rngs)
    self.mlp_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.mlp = MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x, layer, table, attend):
    """Applies the layer.

    Args:
      x: [B, T, D].
      layer: int32 scalar, number of the layer.
      table: cosines and sines of the positions.
      attend: (queries [B, T, N, H], keys and values [B, T, K, H]) -> ([B, T, N * H], memory).

    Returns:
      x of the next layer, and what `attend` returned beside the mixed values.
    """
    del layer
    queries, keys, values = self.attention.project(self.attention_norm(x))
    queries = layers.rotate(queries, table) * self.attention.head_width ** -0.5
    mixed, memory = attend(queries, layers.rotate(keys, table), values)
    x = x + self.attention.out(mixed)
    return x + self.mlp(self.mlp_norm(x)), memory


class Ends(nnx.Module):
  """What stands before and after the blocks."""

  def __init__(self, config, *, dtype, rngs):
    self.rope, self.head_width = config.rope, config.head_width
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.norm = Norm(config, dtype=dtype, rngs=rngs)

  def begin(self, tokens, positions):
    """tokens and positions [B, T] -> x [B, T, D] and the rotary table that all blocks share."""
    return self.embed(tokens), self.rope.table(positions, self.head_width)


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  layer = 'layers.{layer}'
  found = {
      'embed/embedding': Source('embed_tokens.weight'),
      'norm/scale': Source('norm.weight'),
      'blocks/attention_norm/scale': Source(f'{layer}.input_layernorm.weight'),
      'blocks/mlp_norm/scale': Source(f'{layer}.post_attention_layernorm.weight'),
  }
  for ours, theirs in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj'), ('out', 'o_proj')):
    found |= torch_linear(f'blocks/attention/{ours}', f'{layer}.self_attn.{theirs}', bias=config.attention_bias)
  for name in ('gate', 'up', 'down'):
    found |= torch_linear(f'blocks/mlp/{name}', f'{layer}.mlp.{name}_proj', bias=config.mlp_bias)
  return found

"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971; grouped queries: Llama 2; rope scaling: Llama 3.1).

Most decoders since are Llama with a few changes; their files say these and take the rest from here.

Letters: B batch, T tokens, S slots that the positions of a call can reach, L layers, V vocabulary,
D width, N heads, K key/value heads, H head width, F feed-forward width.
"""

import dataclasses

from flax import nnx
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import rope
from rlhf_jax.models.naming import Source
from rlhf_jax.models.naming import torch_linear

ARCHITECTURE = 'LlamaForCausalLM'
CLASSIFIER = 'LlamaForSequenceClassification'
PREFIX = 'model.'
# Buffers that old files hold beside the parameters.
IGNORED_TENSORS = r'(^|\.)rotary_emb\.inv_freq$'

# All norms of the relatives too: of queries and keys, after attention and MLP, with offsets for scales.
RULES = (
    (r'(^|/)embed/embedding$', P('tensor', 'fsdp')),
    (r'(^|/)blocks/attention/(query|key|value)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/attention/(query|key|value)/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/attention/out/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/mlp/(gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/mlp/(gate|up)/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/(attention/out|mlp/down)/bias$', P()),
    (r'(^|/)(blocks/(attention/)?\w+_)?norm/(scale|offset)$', P()),
    (r'(^|/)unembed/kernel$', P('fsdp', 'tensor')),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(layers.DecoderConfig):
  """The fields that the config.json of Llama and of all its relatives have.

  What a family says beyond its fields:
    MODEL_TYPE: its name.
    DEFAULTS: what transformers takes for fields that a config.json does not have.
    ACTIVATION: its name for the field hidden_act.
    attention_bias, mlp_bias: whether the linear maps have biases.
  """
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
  rope: rope.Rope
  tie_word_embeddings: bool
  initializer_range: float
  bos_token_id: int | None
  eos_token_id: int | tuple | None
  pad_token_id: int | None

  DEFAULTS = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'initializer_range': 0.02}
  ACTIVATION = 'hidden_act'
  attention_bias = False
  mlp_bias = False

  @classmethod
  def from_hf(cls, fields):
    """Reads a config.json dict.

    Raises:
      UserError: naming a field that is missing, unknown or not supported.
    """
    fields = hf_config.Fields({**cls.DEFAULTS, **fields})
    config = cls(**cls.take(fields))
    fields.finish()
    if config.heads % config.kv_heads:
      raise hf_config.refusal('num_key_value_heads', config.kv_heads,
                              f'must divide num_attention_heads={config.heads}')
    return config

  @classmethod
  def take(cls, fields):
    """Takes {name: value} of all the family's fields from `hf_config.Fields`."""
    fields.only('is_encoder_decoder', False)
    # Of families that have these as fields they are taken already.
    fields.only('attention_bias', False)
    fields.only('mlp_bias', False)
    width, heads = fields.integer('hidden_size'), fields.integer('num_attention_heads')
    if 'head_dim' not in fields and width % heads:
      raise hf_config.refusal('num_attention_heads', heads, f'must divide hidden_size={width}, or head_dim be given')
    head_dim, positions = fields.integer('head_dim', width // heads), fields.integer('max_position_embeddings')
    return dict(
        vocab_size=fields.integer('vocab_size'),
        hidden_size=width,
        intermediate_size=fields.integer('intermediate_size'),
        num_hidden_layers=fields.integer('num_hidden_layers'),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer('num_key_value_heads', heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        hidden_act=fields.choice(cls.ACTIVATION, layers.ACTIVATIONS),
        rms_norm_eps=fields.number('rms_norm_eps'),
        **cls.take_ropes(fields, head_width=head_dim, limit=positions),
        tie_word_embeddings=fields.flag('tie_word_embeddings'),
        initializer_range=fields.number('initializer_range'),
        bos_token_id=fields.token_id('bos_token_id'),
        eos_token_id=fields.token_id('eos_token_id'),
        pad_token_id=fields.token_id('pad_token_id'),
    )

  @classmethod
  def take_ropes(cls, fields, *, head_width, limit):
    """Takes {name: rope.Rope} of the family's fields; see rope.from_hf."""
    return {'rope': rope.from_hf(fields, head_width=head_width, limit=limit)}

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    fields = dataclasses.asdict(self)
    del fields['rope']
    fields[self.ACTIVATION] = fields.pop('hidden_act')
    return {'model_type': self.MODEL_TYPE, **fields, **self.rope.to_hf()}

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

  @property
  def query_scale(self):
    """What queries are multiplied by."""
    return self.head_dim ** -0.5

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0."""
    del path
    return self.initializer_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
  """The fields of a Llama config.json that change what is computed, and the special token ids."""
  attention_bias: bool
  mlp_bias: bool

  MODEL_TYPE = 'llama'
  DEFAULTS = BaseConfig.DEFAULTS | {
      'hidden_act': 'silu', 'max_position_embeddings': 2048, 'attention_bias': False, 'mlp_bias': False}

  @classmethod
  def take(cls, fields):
    fields.only('rope_interleaved', False)
    own = dict(attention_bias=fields.flag('attention_bias'), mlp_bias=fields.flag('mlp_bias'))
    return own | super().take(fields)


class Norm(nnx.RMSNorm):
  """RMSNorm; statistics in float32."""

  def __init__(self, width, config, *, dtype, rngs):
    super().__init__(width, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)


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
  # The relatives' blocks put others in their place.
  Norm, Attention = Norm, layers.Attention

  def __init__(self, config, *, dtype, rngs):
    shared = dict(dtype=dtype, rngs=rngs)
    self.attention_norm = self.Norm(config.width, config, **shared)
    self.attention = self.Attention(config, bias=config.attention_bias, **shared)
    self.mlp_norm = self.Norm(config.width, config, **shared)
    self.mlp = MLP(config, **shared)
    self.query_scale = config.query_scale

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
    mixed, memory = self.mix(self.attention_norm(x), table, attend)
    x = layers.tail(x, mixed) + mixed
    return x + self.mlp(self.mlp_norm(x)), memory

  def mix(self, x, table, attend):
    """Attention of a layer to x [B, T, D]: [B, T, D], and the memory from `attend`."""
    queries, keys, values = self.attention.project(x)
    queries = rope.rotate(queries, table) * self.query_scale
    mixed, memory = attend(queries, rope.rotate(keys, table), values)
    return self.attention.out(mixed), memory


class Ends(nnx.Module):
  """What stands before and after the blocks."""
  Norm = Norm

  def __init__(self, config, *, dtype, rngs):
    self.rope = config.rope
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.norm = self.Norm(config.width, config, dtype=dtype, rngs=rngs)

  def begin(self, tokens, positions, slots):
    """tokens and positions [B, T], and S -> x [B, T, D] and the rotary table that all blocks share."""
    return self.embed(tokens), self.rope.table(positions, slots)

  def finish(self, x):
    """x after the blocks -> hidden states [B, T, D]."""
    return self.norm(x)


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

"""OPT (Zhang et al. 2022, https://arxiv.org/abs/2205.01068).

Letters: B batch, T tokens, L layers, V vocabulary, D width of the blocks, E width of the word
embeddings and of the hidden states that the logits are read from (D but for opt-350m), N heads,
H head width, F feed-forward width.
"""

import dataclasses

from flax import nnx
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models.naming import Source
from rlhf_jax.models.naming import torch_linear

ARCHITECTURE = 'OPTForCausalLM'
CLASSIFIER = 'OPTForSequenceClassification'
PREFIX = 'model.decoder.'
# A number that old files hold beside the parameters.
IGNORED_TENSORS = r'(^|\.)version$'

# The first rows of the table of positions belong to no token.
POSITION_OFFSET = 2
NORM_EPSILON = 1e-5

# The positions (2050) divide by little, so their table is split along its width only.
RULES = (
    (r'(^|/)embed/embedding$', P('tensor', 'fsdp')),
    (r'(^|/)positions/embedding$', P(None, 'fsdp')),
    (r'(^|/)project_(in|out)/kernel$', P('fsdp', None)),
    (r'(^|/)blocks/attention/(query|key|value)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/attention/(query|key|value)/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/attention/out/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/mlp/up/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/mlp/up/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/(attention/out|mlp/down)/bias$', P()),
    (r'(^|/)blocks/(attention_norm|mlp_norm)/(scale|bias)$', P()),
    (r'(^|/)norm/(scale|bias)$', P()),
    (r'(^|/)unembed/kernel$', P('fsdp', 'tensor')),
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.UsualNames, layers.DecoderConfig):
  """The fields of an OPT config.json that change what is computed, and the special token ids."""
  vocab_size: int
  hidden_size: int
  word_embed_proj_dim: int
  ffn_dim: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  activation_function: str
  do_layer_norm_before: bool
  _remove_final_layer_norm: bool
  layer_norm_elementwise_affine: bool
  enable_bias: bool
  tie_word_embeddings: bool
  init_std: float
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
    width = fields.integer('hidden_size')
    config = cls(
        vocab_size=fields.integer('vocab_size'),
        hidden_size=width,
        word_embed_proj_dim=fields.integer('word_embed_proj_dim', width),
        ffn_dim=fields.integer('ffn_dim'),
        num_hidden_layers=fields.integer('num_hidden_layers'),
        num_attention_heads=fields.integer('num_attention_heads'),
        max_position_embeddings=fields.integer('max_position_embeddings', 2048),
        activation_function=fields.choice('activation_function', layers.ACTIVATIONS, 'relu'),
        do_layer_norm_before=fields.flag('do_layer_norm_before', True),
        _remove_final_layer_norm=fields.flag('_remove_final_layer_norm', False),
        layer_norm_elementwise_affine=fields.flag('layer_norm_elementwise_affine', True),
        enable_bias=fields.flag('enable_bias', True),
        tie_word_embeddings=fields.flag('tie_word_embeddings', True),
        init_std=fields.number('init_std', 0.02),
        bos_token_id=fields.token_id('bos_token_id'),
        eos_token_id=fields.token_id('eos_token_id'),
        pad_token_id=fields.token_id('pad_token_id'),
    )
    fields.finish()
    if width % config.num_attention_heads:
      raise hf_config.refusal('num_attention_heads', config.num_attention_heads, f'must divide hidden_size={width}')
    return config

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    return {'model_type': 'opt', **dataclasses.asdict(self)}

  @property
  def width(self):
    """E."""
    return self.word_embed_proj_dim

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0."""
    del path
    return self.init_std

  @property
  def projected(self):
    """Whether E differs from D."""
    return self.word_embed_proj_dim != self.hidden_size

  @property
  def final_norm(self):
    """Whether a norm follows the last block."""
    return self.do_layer_norm_before and not self._remove_final_layer_norm


class Norm(layers.LayerNorm):
  """LayerNorm of D, with or without parameters."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config.hidden_size, epsilon=NORM_EPSILON, affine=config.layer_norm_elementwise_affine, dtype=dtype,
                     rngs=rngs)


class Block(nnx.Module):
  """One layer; its norms stand before attention and MLP or, in opt-350m, after the sums."""

  def __init__(self, config, *, dtype, rngs):
    self.attention_norm = Norm(config, dtype=dtype, rngs=rngs)
    # The shared projections are of the config's width, which inside the blocks is D.
    inner = dataclasses.replace(config, word_embed_proj_dim=config.hidden_size)
    self.attention = layers.Attention(inner, bias=config.enable_bias, dtype=dtype, rngs=rngs)
    self.mlp_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.mlp = layers.MLP(config.hidden_size, config.ffn_dim, activation=config.activation_function,
                          bias=config.enable_bias, dtype=dtype, rngs=rngs)
    self.norm_first = config.do_layer_norm_before

  def __call__(self, x, layer, shared, attend):
    """Applies the layer.

    Args:
      x: [B, T, D].
      layer: int32 scalar, number of the layer.
      shared: None; positions are in x already.
      attend: (queries, keys, values [B, T, N, H]) -> ([B, T, D], memory).

    Returns:
      x of the next layer, and what `attend` returned beside the mixed values.
    """
    del layer, shared
    queries, keys, values = self.attention.project(self.attention_norm(x) if self.norm_first else x)
    mixed, memory = attend(queries * self.attention.head_width ** -0.5, keys, values)
    x = layers.tail(x, mixed) + self.attention.out(mixed)
    if self.norm_first:
      return x + self.mlp(self.mlp_norm(x)), memory
    x = self.attention_norm(x)
    return self.mlp_norm(x + self.mlp(x)), memory


class Ends(nnx.Module):
  """What stands before and after the blocks."""

  def __init__(self, config, *, dtype, rngs):
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.positions = nnx.Embed(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size,
                               dtype=dtype, rngs=rngs)
    self.projected, self.final_norm = config.projected, config.final_norm
    if self.projected:
      shared = dict(bias=False, dtype=dtype, rngs=rngs)
      self.project_in = layers.Linear(config.width, config.hidden_size, **shared)
      self.project_out = layers.Linear(config.hidden_size, config.width, **shared)
    if self.final_norm:
      self.norm = Norm(config, dtype=dtype, rngs=rngs)

  def begin(self, tokens, positions, slots):
    """tokens and positions [B, T], and S, the slots they can reach -> x [B, T, D], and None for the blocks."""
    del slots
    x = self.embed(tokens)
    if self.projected:
      x = self.project_in(x)
    return x + self.positions(positions + POSITION_OFFSET), None

  def finish(self, x):
    """x after the blocks -> hidden states [B, T, E]."""
    if self.final_norm:
      x = self.norm(x)
    return self.project_out(x) if self.projected else x


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  layer = 'layers.{layer}'
  found = {
      'embed/embedding': Source('embed_tokens.weight'),
      'positions/embedding': Source('embed_positions.weight'),
  }
  if config.projected:
    for name in ('project_in', 'project_out'):
      found |= torch_linear(name, name, bias=False)
  for ours, theirs in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj'), ('out', 'out_proj')):
    found |= torch_linear(f'blocks/attention/{ours}', f'{layer}.self_attn.{theirs}', bias=config.enable_bias)
  for ours, theirs in (('up', 'fc1'), ('down', 'fc2')):
    found |= torch_linear(f'blocks/mlp/{ours}', f'{layer}.{theirs}', bias=config.enable_bias)
  norms = [('blocks/attention_norm', f'{layer}.self_attn_layer_norm'), ('blocks/mlp_norm', f'{layer}.final_layer_norm')]
  if config.final_norm:
    norms.append(('norm', 'final_layer_norm'))
  for ours, theirs in norms if config.layer_norm_elementwise_affine else ():
    found |= {f'{ours}/scale': Source(f'{theirs}.weight'), f'{ours}/bias': Source(f'{theirs}.bias')}
  return found

"""GPT-2 (Radford et al. 2019).

Letters: B batch, T tokens, L layers, V vocabulary, D width, N heads, H head width, F
feed-forward width.
"""

import dataclasses

from flax import nnx
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models.naming import conv1d
from rlhf_jax.models.naming import side_by_side
from rlhf_jax.models.naming import Source

ARCHITECTURE = 'GPT2LMHeadModel'
CLASSIFIER = 'GPT2ForSequenceClassification'
PREFIX = 'transformer.'
# Causal masks that old files hold beside the parameters.
IGNORED_TENSORS = r'(^|\.)attn\.(bias|masked_bias)$'

# The vocabulary (50257) divides by nothing, so the embedding is split along its width only.
RULES = (
    (r'(^|/)(embed|positions)/embedding$', P(None, 'fsdp')),
    (r'(^|/)blocks/attention/(query|key|value)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/attention/(query|key|value)/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/attention/out/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/mlp/up/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/mlp/up/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/(attention/out|mlp/down)/bias$', P()),
    (r'(^|/)blocks/(attention_norm|mlp_norm)/(scale|bias)$', P()),
    (r'(^|/)norm/(scale|bias)$', P()),
    (r'(^|/)unembed/kernel$', P('fsdp', None)),
)


@dataclasses.dataclass(frozen=True)
class Config(layers.DecoderConfig):
  """The fields of a GPT-2 config.json that change what is computed, and the special token ids."""
  vocab_size: int
  n_positions: int
  n_embd: int
  n_layer: int
  n_head: int
  n_inner: int | None
  activation_function: str
  layer_norm_epsilon: float
  scale_attn_weights: bool
  scale_attn_by_inverse_layer_idx: bool
  reorder_and_upcast_attn: bool
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
    fields.only('add_cross_attention', False)
    fields.only('is_encoder_decoder', False)
    positions = fields.integer('n_positions', 1024)
    fields.only('n_ctx', positions)
    config = cls(
        vocab_size=fields.integer('vocab_size'),
        n_positions=positions,
        n_embd=fields.integer('n_embd'),
        n_layer=fields.integer('n_layer'),
        n_head=fields.integer('n_head'),
        n_inner=fields.integer('n_inner', None),
        activation_function=fields.choice('activation_function', layers.ACTIVATIONS, 'gelu_new'),
        layer_norm_epsilon=fields.number('layer_norm_epsilon', 1e-5),
        scale_attn_weights=fields.flag('scale_attn_weights', True),
        scale_attn_by_inverse_layer_idx=fields.flag('scale_attn_by_inverse_layer_idx', False),
        # Scaling before and softmax in float32 is what we always do; kept to write it back.
        reorder_and_upcast_attn=fields.flag('reorder_and_upcast_attn', False),
        tie_word_embeddings=fields.flag('tie_word_embeddings', True),
        initializer_range=fields.number('initializer_range', 0.02),
        bos_token_id=fields.token_id('bos_token_id'),
        eos_token_id=fields.token_id('eos_token_id'),
        pad_token_id=fields.token_id('pad_token_id'),
    )
    fields.finish()
    if config.n_embd % config.n_head:
      raise hf_config.refusal('n_head', config.n_head, f'must divide n_embd={config.n_embd}')
    return config

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    return {'model_type': 'gpt2', **dataclasses.asdict(self)}

  @property
  def width(self):
    return self.n_embd

  @property
  def depth(self):
    return self.n_layer

  @property
  def heads(self):
    return self.n_head

  @property
  def kv_heads(self):
    return self.n_head

  @property
  def head_width(self):
    return self.n_embd // self.n_head

  @property
  def max_length(self):
    return self.n_positions

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0.

    The two outputs a layer that the residual stream adds up are smaller by sqrt(2 L)
    (Radford et al. 2019, §2.3, as in their code).
    """
    if path.endswith(('attention/out/kernel', 'mlp/down/kernel')):
      return self.initializer_range * (2 * self.n_layer) ** -0.5
    return self.initializer_range

  @property
  def inner(self):
    """F."""
    return self.n_inner or 4 * self.n_embd


class Norm(layers.LayerNorm):
  """LayerNorm of D."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config.width, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
  """One layer."""

  def __init__(self, config, *, dtype, rngs):
    self.attention_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.attention = layers.Attention(config, bias=True, dtype=dtype, rngs=rngs)
    self.mlp_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.mlp = layers.MLP(config.width, config.inner, activation=config.activation_function, bias=True, dtype=dtype,
                          rngs=rngs)
    self.scale = config.head_width ** -0.5 if config.scale_attn_weights else 1.0
    self.scale_by_layer = config.scale_attn_by_inverse_layer_idx

  def __call__(self, x, layer, shared, attend):
    """Applies the layer.

    Args:
      x: [B, T, D].
      layer: int32 scalar, number of the layer from 0.
      shared: None; positions are in x already.
      attend: (queries, keys, values [B, T, N, H]) -> ([B, T, D], memory).

    Returns:
      x of the next layer, and what `attend` returned beside the mixed values.
    """
    del shared
    queries, keys, values = self.attention.project(self.attention_norm(x))
    scale = self.scale / (layer + 1).astype(queries.dtype) if self.scale_by_layer else self.scale
    mixed, memory = attend(queries * scale, keys, values)
    x = layers.tail(x, mixed) + self.attention.out(mixed)
    return x + self.mlp(self.mlp_norm(x)), memory


class Ends(nnx.Module):
  """What stands before and after the blocks."""

  def __init__(self, config, *, dtype, rngs):
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.positions = nnx.Embed(config.n_positions, config.width, dtype=dtype, rngs=rngs)
    self.norm = Norm(config, dtype=dtype, rngs=rngs)

  def begin(self, tokens, positions, slots):
    """tokens and positions [B, T], and S, the slots they can reach -> x [B, T, D], and None for the blocks."""
    del slots
    return self.embed(tokens) + self.positions(positions), None

  def finish(self, x):
    """x after the blocks -> hidden states [B, T, D]."""
    return self.norm(x)


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  layer = 'h.{layer}'
  found = {
      'embed/embedding': Source('wte.weight'),
      'positions/embedding': Source('wpe.weight'),
      'norm/scale': Source('ln_f.weight'),
      'norm/bias': Source('ln_f.bias'),
  }
  for ours, theirs in (('attention_norm', 'ln_1'), ('mlp_norm', 'ln_2')):
    found[f'blocks/{ours}/scale'] = Source(f'{layer}.{theirs}.weight')
    found[f'blocks/{ours}/bias'] = Source(f'{layer}.{theirs}.bias')
  for name, columns in zip(('query', 'key', 'value'), side_by_side(*[config.width] * 3)):
    found |= conv1d(f'blocks/attention/{name}', f'{layer}.attn.c_attn', columns=columns)
  found |= conv1d('blocks/attention/out', f'{layer}.attn.c_proj')
  found |= conv1d('blocks/mlp/up', f'{layer}.mlp.c_fc')
  found |= conv1d('blocks/mlp/down', f'{layer}.mlp.c_proj')
  return found

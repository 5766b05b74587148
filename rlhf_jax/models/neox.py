"""GPT-NeoX (Black et al. 2022, https://arxiv.org/abs/2204.06745) and Pythia.

Letters: B batch, T tokens, S slots that the positions of a call can reach, L layers, V vocabulary,
D width, N heads, H head width, F feed-forward width.
"""

import dataclasses

from flax import nnx
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import rope
from rlhf_jax.models.naming import Source
from rlhf_jax.models.naming import taking_turns
from rlhf_jax.models.naming import torch_linear

ARCHITECTURE = 'GPTNeoXForCausalLM'
CLASSIFIER = 'GPTNeoXForSequenceClassification'
PREFIX = 'gpt_neox.'
UNEMBED = 'embed_out.weight'
# Causal masks and frequencies that old files hold beside the parameters.
IGNORED_TENSORS = r'(^|\.)attention\.(bias|masked_bias|rotary_emb\.inv_freq)$'

RULES = (
    (r'(^|/)embed/embedding$', P('tensor', 'fsdp')),
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
  """The fields of a GPT-NeoX config.json that change what is computed, and the special token ids."""
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  hidden_act: str
  layer_norm_eps: float
  rope: rope.Rope
  use_parallel_residual: bool
  attention_bias: bool
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
    fields.raw('is_decoder', False)  # Theirs has it and reads it nowhere.
    width = fields.integer('hidden_size')
    heads = fields.integer('num_attention_heads')
    if width % heads:
      raise hf_config.refusal('num_attention_heads', heads, f'must divide hidden_size={width}')
    positions = fields.integer('max_position_embeddings', 2048)
    config = cls(
        vocab_size=fields.integer('vocab_size'),
        hidden_size=width,
        intermediate_size=fields.integer('intermediate_size'),
        num_hidden_layers=fields.integer('num_hidden_layers'),
        num_attention_heads=heads,
        max_position_embeddings=positions,
        hidden_act=fields.choice('hidden_act', layers.ACTIVATIONS, 'gelu'),
        layer_norm_eps=fields.number('layer_norm_eps', 1e-5),
        rope=_rope(fields, head_width=width // heads, limit=positions),
        use_parallel_residual=fields.flag('use_parallel_residual', True),
        attention_bias=fields.flag('attention_bias', True),
        tie_word_embeddings=fields.flag('tie_word_embeddings', False),
        initializer_range=fields.number('initializer_range', 0.02),
        bos_token_id=fields.token_id('bos_token_id'),
        eos_token_id=fields.token_id('eos_token_id'),
        pad_token_id=fields.token_id('pad_token_id'),
    )
    fields.finish()
    return config

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    fields = dataclasses.asdict(self)
    del fields['rope']
    # The family's own words, which readers old and new know; they do not read the usual ones beside them.
    turning = {'rotary_emb_base': self.rope.theta, 'rotary_pct': self.rope.part, 'rope_scaling': self.rope.scaling()}
    return {'model_type': 'gpt_neox', **fields, **turning}

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0."""
    del path
    return self.initializer_range


def _rope(fields, *, head_width, limit):
  """Takes the rotary positions; files have two words of their own for the base and the part of a head that turns."""
  renamed = {name: fields.raw(name, None) for name in ('rope_parameters', 'rope_scaling', rope.ORIGINAL)}
  renamed['rope_theta'] = fields.number('rotary_emb_base', 10000.0)
  renamed['partial_rotary_factor'] = fields.number('rotary_pct', 0.25)
  found = rope.from_hf(hf_config.Fields(renamed), head_width=head_width, limit=limit, partial=True)
  # Some versions of transformers write the same under the usual names too, and read them nowhere.
  fields.only('rope_theta', found.theta)
  fields.only('partial_rotary_factor', found.part)
  return found


class Norm(layers.LayerNorm):
  """LayerNorm of D."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config.width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
  """One layer; the MLP reads what attention reads (beside it, "parallel") or the sum after it."""

  def __init__(self, config, *, dtype, rngs):
    self.attention_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.attention = layers.Attention(config, bias=config.attention_bias, dtype=dtype, rngs=rngs)
    self.mlp_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.mlp = layers.MLP(config.width, config.intermediate_size, activation=config.hidden_act, bias=True,
                          dtype=dtype, rngs=rngs)
    self.parallel = config.use_parallel_residual

  def __call__(self, x, layer, table, attend):
    """Applies the layer.

    Args:
      x: [B, T, D].
      layer: int32 scalar, number of the layer.
      table: cosines and sines of the positions.
      attend: (queries, keys, values [B, T, N, H]) -> ([B, T, D], memory).

    Returns:
      x of the next layer, and what `attend` returned beside the mixed values.
    """
    del layer
    queries, keys, values = self.attention.project(self.attention_norm(x))
    queries = rope.rotate(queries, table) * self.attention.head_width ** -0.5
    mixed, memory = attend(queries, rope.rotate(keys, table), values)
    x = layers.tail(x, mixed)
    attended = x + self.attention.out(mixed)
    return attended + self.mlp(self.mlp_norm(x if self.parallel else attended)), memory


class Ends(nnx.Module):
  """What stands before and after the blocks."""

  def __init__(self, config, *, dtype, rngs):
    self.rope = config.rope
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.norm = Norm(config, dtype=dtype, rngs=rngs)

  def begin(self, tokens, positions, slots):
    """tokens and positions [B, T], and S -> x [B, T, D] and the rotary table that all blocks share."""
    return self.embed(tokens), self.rope.table(positions, slots)

  def finish(self, x):
    """x after the blocks -> hidden states [B, T, D]."""
    return self.norm(x)


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  layer = 'layers.{layer}'
  found = {'embed/embedding': Source('embed_in.weight')}
  for ours, theirs in (('norm', 'final_layer_norm'), ('blocks/attention_norm', f'{layer}.input_layernorm'),
                       ('blocks/mlp_norm', f'{layer}.post_attention_layernorm')):
    found |= {f'{ours}/scale': Source(f'{theirs}.weight'), f'{ours}/bias': Source(f'{theirs}.bias')}
  # One tensor of all heads' query, key and value, head by head.
  for name, columns in zip(('query', 'key', 'value'), taking_turns(3, config.head_width)):
    found |= torch_linear(f'blocks/attention/{name}', f'{layer}.attention.query_key_value',
                          bias=config.attention_bias, columns=columns)
  found |= torch_linear('blocks/attention/out', f'{layer}.attention.dense', bias=config.attention_bias)
  found |= torch_linear('blocks/mlp/up', f'{layer}.mlp.dense_h_to_4h', bias=True)
  found |= torch_linear('blocks/mlp/down', f'{layer}.mlp.dense_4h_to_h', bias=True)
  return found

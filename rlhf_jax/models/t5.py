"""T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683), T5 v1.1 and Flan-T5.

The versions differ in their config.json. The original T5 has a ReLU, tied embeddings, and hidden
states scaled by D^-0.5 before the unembedding. T5 v1.1, from which Flan-T5 (Chung et al. 2022,
https://arxiv.org/abs/2210.11416) was tuned, has gated GELUs, an untied unembedding and no scale.

The reward models that we train read the score from the decoder's state with a linear head, saved as
'score.weight'. transformers' T5ForSequenceClassification has a dense layer and a tanh before the
head ('pooled'). We read and write such folders too. transformers cannot load our linear head: it
would use randomly initialized layers instead.

Letters: D width, H head width.
"""

import dataclasses
import math

from flax import nnx
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax.models import blocks
from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import naming

ARCHITECTURE = 'T5ForConditionalGeneration'
CLASSIFIER = 'T5ForSequenceClassification'
PREFIX, UNEMBED = '', 'lm_head.weight'
# Tensors of Hugging Face files that are not read: copies of the embedding, and in old files an
# unused bias.
IGNORED_TENSORS = (
  r'((en|de)coder\.embed_tokens\.weight|EncDecAttention\.relative_attention_bias\.weight)$'
)
RULES = ((r'(^|/)distances/embedding$', P()),) + blocks.RULES

# {feed_forward_proj: activation}; 'gated-gelu' is the tanh approximation.
FEED_FORWARD = {
  **{name: name for name in layers.ACTIVATIONS},
  **{f'gated-{name}': name for name in layers.ACTIVATIONS},
  'gated-gelu': 'gelu_new',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hf_config.Config):
  """The fields of a T5 config.json that affect the computation, and the special token ids.

  Attributes:
    n_positions: Sequence length that the model was made for. Longer ones work too, because
      positions are relative.
    pooled: Whether a reward model has transformers' dense layer and tanh before the head.
  """

  n_positions: int = 512
  d_model: int
  d_kv: int = 64
  d_ff: int
  num_layers: int
  num_decoder_layers: int
  num_heads: int
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  feed_forward_proj: str = 'relu'
  layer_norm_epsilon: float = 1e-6
  initializer_factor: float = 1.0
  tie_word_embeddings: bool = True
  scale_decoder_outputs: bool
  pooled: bool = False
  decoder_start_token_id: int

  MODEL_TYPE = 't5'
  ONLY = {'is_encoder_decoder': True, 'is_decoder': False, 'tie_encoder_decoder': False}
  attention_bias = mlp_bias = False
  query_scale = 1.0
  width, inner, depth = map(hf_config.alias, ('d_model', 'd_ff', 'num_layers'))
  heads, head_width = map(hf_config.alias, ('num_heads', 'd_kv'))
  max_length = hf_config.alias('n_positions')
  norm_epsilon = hf_config.alias('layer_norm_epsilon')

  @classmethod
  def take(cls, fields, **taken):
    depth, tied = fields.integer('num_layers'), fields.flag('tie_word_embeddings')
    kind = fields.choice('feed_forward_proj', FEED_FORWARD)
    # transformers derives these from `feed_forward_proj` and also writes them.
    fields.only('is_gated_act', kind.startswith('gated-'))
    fields.only('dense_act_fn', FEED_FORWARD[kind])
    pad, start = fields.token_id('pad_token_id'), fields.token_id('decoder_start_token_id')
    return super().take(
      fields,
      num_layers=depth,
      num_decoder_layers=fields.integer('num_decoder_layers', depth),
      feed_forward_proj=kind,
      tie_word_embeddings=tied,
      scale_decoder_outputs=fields.flag('scale_decoder_outputs', tied),
      pad_token_id=pad,
      decoder_start_token_id=pad if start is None else start,
      **taken,
    )

  def check(self):
    start, buckets = self.decoder_start_token_id, self.relative_attention_num_buckets
    if not isinstance(start, int) or not 0 <= start < self.vocab_size:
      raise hf_config.refusal(
        'decoder_start_token_id', start, 'must be a token id; the default is pad_token_id'
      )
    if self.scale_decoder_outputs and not self.tie_word_embeddings:
      raise hf_config.refusal('scale_decoder_outputs', True, 'needs tie_word_embeddings=true')
    if buckets < 4:
      raise hf_config.refusal('relative_attention_num_buckets', buckets, 'must be at least 4')
    if self.relative_attention_max_distance <= buckets // 2:
      raise hf_config.refusal(
        'relative_attention_max_distance',
        self.relative_attention_max_distance,
        f'must be more than half of relative_attention_num_buckets={buckets}',
      )

  def to_hf(self):
    fields = super().to_hf() | {'is_encoder_decoder': True}
    return {name: value for name, value in fields.items() if name != 'pooled' or value}

  def for_tensors(self, names):
    """See hf_config.Config.

    config.json leaves two things open. transformers 5 writes `tie_word_embeddings: true` for every
    T5, and a separate field for the scale, which used to follow from it. Also, no field tells
    whether a reward model has a dense layer.
    """
    untied = not self.scale_decoder_outputs and 'lm_head.weight' in names
    return dataclasses.replace(
      self,
      tie_word_embeddings=self.tie_word_embeddings and not untied,
      pooled='classification_head.dense.weight' in names,
    )

  @property
  def gated(self):
    return self.feed_forward_proj.startswith('gated-')

  @property
  def activation(self):
    return FEED_FORWARD[self.feed_forward_proj]

  @property
  def head(self):
    return 'classification_head.out_proj' if self.pooled else super().head

  def std(self, path):
    """See hf_config.Config.

    The kernel of the queries is scaled by H^-0.5 because the queries are not. The unembedding is
    initialized like any other kernel (as in t5x, https://github.com/google-research/t5x). With
    transformers' standard deviation of 1, the first logits would be as large as D^0.5.
    """
    fan_in = self.d_model
    if path == 'embed/embedding':
      fan_in = 1
    elif path.endswith('query/kernel'):
      fan_in = self.d_model * self.d_kv
    elif path.endswith('out/kernel'):
      fan_in = self.num_heads * self.d_kv
    elif path.endswith('down/kernel'):
      fan_in = self.d_ff
    return self.initializer_factor * fan_in**-0.5


def causal_buckets(count, max_distance, length):
  """Returns the bucket of each distance 0 .. length - 1 in one direction.

  Half of the buckets have one distance each. The others widen logarithmically up to
  `max_distance`; larger distances are all in the last bucket (Raffel et al. 2020, §2.1). The
  bucket of a distance at an edge depends on rounding, so this uses float32, as transformers does.

  Args:
    count: Number of buckets.
    max_distance: Distance from which all are in the last bucket; more than count // 2.
    length: Number of distances.

  Returns:
    [length] int32 numpy array.
  """
  exact = count // 2
  distances = np.arange(length)
  ratios = np.maximum(distances, exact).astype(np.float32) / np.float32(exact)
  logs = np.log(ratios.astype(np.float64)).astype(np.float32)
  wide = exact + (
    logs / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
  ).astype(np.int32)
  return np.where(distances < exact, distances, np.minimum(wide, count - 1)).astype(np.int32)


class EncoderBlock(blocks.Block):
  """One layer of the encoder, with RMSNorm."""

  Norm = layers.RMSNorm


class DecoderBlock(EncoderBlock):
  """One layer of the decoder; see families.DecoderBlock."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.cross_norm = self.Norm(config, dtype=dtype, rngs=rngs)
    self.cross = layers.Attention(config, dtype=dtype, rngs=rngs)

  def __call__(self, x, layer, attend, cross_attend):
    attended, kv_cache = self.self_attention(self.attention_norm(x), layer, None, attend)
    x = x + attended
    x = x + self.cross.out(cross_attend(self.cross.queries(self.cross_norm(x))))
    return x + self.mlp(self.mlp_norm(x)), kv_cache


class Side(nnx.Module):
  """The parameters of the encoder or the decoder outside of its blocks.

  They are the final norm and the relative position biases of the attention.
  """

  def __init__(self, config, *, dtype, rngs):
    self.count, self.max_distance = (
      config.relative_attention_num_buckets,
      config.relative_attention_max_distance,
    )
    self.distances = nnx.Embed(self.count, config.heads, rngs=rngs)
    self.norm = layers.RMSNorm(config, dtype=dtype, rngs=rngs)

  def bidirectional_bias(self, length):
    """See families.Side. Each direction, back and forward, has half of the buckets."""
    count = self.count // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    bucket = causal_buckets(count, self.max_distance, length)[np.abs(offset)] + count * (offset > 0)
    return self._bias(bucket)

  def causal_bias(self, index, query_length, key_length):
    """See families.Side."""
    back = (index + jnp.arange(query_length))[:, None] - jnp.arange(key_length)[None, :]
    table = jnp.asarray(causal_buckets(self.count, self.max_distance, key_length))
    return self._bias(table[jnp.clip(back, 0, key_length - 1)])

  def _bias(self, bucket):
    return (
      self.distances.embedding[...].astype(jnp.float32)[bucket].transpose(2, 0, 1)[None, :, None]
    )


class Embedder(nnx.Module):
  """The embedding that encoder and decoder share, and the pooler if the config is `pooled`."""

  def __init__(self, config, *, dtype, rngs):
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    if config.pooled:
      self.pooler = layers.Linear(config.width, config.width, bias=True, dtype=dtype, rngs=rngs)


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  prefix = 'transformer.' if config.pooled else ''
  mapping = naming.embeddings({'embed': f'{prefix}shared'})
  for side in ('encoder', 'decoder'):
    mapping |= _side_sources(side, prefix + side, config)
  if config.pooled:
    mapping |= naming.linears({'pooler': 'classification_head.dense'}, bias=True)
  return mapping


def _side_sources(side, prefix, config):
  """Returns the sources of the encoder's or the decoder's parameters."""
  parts = {'attention': 'SelfAttention', 'cross': 'EncDecAttention', 'mlp': 'DenseReluDense'}
  if side == 'encoder':
    del parts['cross']
  kernels = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
  mlp = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'} if config.gated else {'up': 'wi', 'down': 'wo'}
  mapping = naming.scales({f'{side}/norm': f'{prefix}.final_layer_norm'})
  mapping |= naming.embeddings(
    {f'{side}/distances': f'{prefix}.block.0.layer.0.SelfAttention.relative_attention_bias'}
  )
  for number, (part, name) in enumerate(parts.items()):
    layer = f'{prefix}.block.{{layer}}.layer.{number}'
    mapping |= naming.scales({f'{side}/blocks/{part}_norm': f'{layer}.layer_norm'})
    mapping |= naming.linears(
      {
        f'{side}/blocks/{part}/{ours}': f'{layer}.{name}.{theirs}'
        for ours, theirs in (mlp if part == 'mlp' else kernels).items()
      },
      bias=False,
    )
  return mapping

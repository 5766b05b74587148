"""T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683), T5 v1.1 and Flan-T5.

What tells the generations apart is in config.json: the first has a ReLU, one matrix for embedding
and unembedding, and hidden states scaled by D^-0.5 in front of it; T5 v1.1, from which Flan-T5
(Chung et al. 2022, https://arxiv.org/abs/2210.11416) was tuned, has gated GELUs, two matrices and no
scale.

A reward model of ours reads its score from the decoder's state with a linear head, kept as
'score.weight'. transformers' T5ForSequenceClassification has a dense layer and a tanh in between
('pooled'); its folders are read and written as such, but of a linear head it knows nothing, and
would put random layers in its place.

Letters: B batch, T tokens, S keys, P prompt length, V vocabulary, D width, N heads, H head width, F
feed-forward width.
"""

import dataclasses
import math

from flax import nnx
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models.naming import Source
from rlhf_jax.models.naming import torch_linear

ARCHITECTURE = 'T5ForConditionalGeneration'
CLASSIFIER = 'T5ForSequenceClassification'
PREFIX = ''
# Copies of the embedding, and a bias that old files hold and nothing reads.
IGNORED_TENSORS = r'((en|de)coder\.embed_tokens\.weight|EncDecAttention\.relative_attention_bias\.weight)$'

RULES = (
    (r'(^|/)embed/embedding$', P('tensor', 'fsdp')),
    (r'(^|/)distances/embedding$', P()),
    (r'(^|/)blocks/(attention|cross)/(query|key|value)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/(attention|cross)/out/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/mlp/(gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/(attention_norm|cross_norm|mlp_norm)/scale$', P()),
    (r'(^|/)norm/scale$', P()),
    (r'(^|/)pooler/kernel$', P('fsdp', 'tensor')),
    (r'(^|/)pooler/bias$', P('tensor')),
    (r'(^|/)unembed/kernel$', P('fsdp', 'tensor')),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields of a T5 config.json that change what is computed, and the special token ids.

  Attributes:
    n_positions: tokens of a row that the model was made for; distances have no end, so more will do.
    pooled: between decoder and score lies transformers' dense layer with its tanh.
  """
  vocab_size: int
  n_positions: int
  d_model: int
  d_kv: int
  d_ff: int
  num_layers: int
  num_decoder_layers: int
  num_heads: int
  relative_attention_num_buckets: int
  relative_attention_max_distance: int
  feed_forward_proj: str
  layer_norm_epsilon: float
  initializer_factor: float
  tie_word_embeddings: bool
  scale_decoder_outputs: bool
  pooled: bool
  decoder_start_token_id: int
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
    fields.only('is_encoder_decoder', True)
    fields.only('is_decoder', False)
    fields.only('tie_encoder_decoder', False)
    depth = fields.integer('num_layers')
    tied = fields.flag('tie_word_embeddings', True)
    kind = fields.choice('feed_forward_proj', FEED_FORWARD, 'relu')
    # What transformers derives from `feed_forward_proj` and writes beside it.
    fields.only('is_gated_act', kind.startswith('gated-'))
    fields.only('dense_act_fn', FEED_FORWARD[kind])
    pad = fields.token_id('pad_token_id')
    start = fields.token_id('decoder_start_token_id')
    config = cls(
        vocab_size=fields.integer('vocab_size'),
        n_positions=fields.integer('n_positions', 512),
        d_model=fields.integer('d_model'),
        d_kv=fields.integer('d_kv', 64),
        d_ff=fields.integer('d_ff'),
        num_layers=depth,
        num_decoder_layers=fields.integer('num_decoder_layers', depth),
        num_heads=fields.integer('num_heads'),
        relative_attention_num_buckets=fields.integer('relative_attention_num_buckets', 32),
        relative_attention_max_distance=fields.integer('relative_attention_max_distance', 128),
        feed_forward_proj=kind,
        layer_norm_epsilon=fields.number('layer_norm_epsilon', 1e-6),
        initializer_factor=fields.number('initializer_factor', 1.0),
        tie_word_embeddings=tied,
        scale_decoder_outputs=fields.flag('scale_decoder_outputs', tied),
        pooled=fields.flag('pooled', False),
        decoder_start_token_id=pad if start is None else start,
        bos_token_id=fields.token_id('bos_token_id'),
        eos_token_id=fields.token_id('eos_token_id'),
        pad_token_id=pad,
    )
    fields.finish()
    config.check()
    return config

  def check(self):
    """Raises UserError where fields do not go together."""
    start, buckets = self.decoder_start_token_id, self.relative_attention_num_buckets
    if not isinstance(start, int) or not 0 <= start < self.vocab_size:
      raise hf_config.refusal('decoder_start_token_id', start, 'must be a token id; without it pad_token_id counts')
    if self.scale_decoder_outputs and not self.tie_word_embeddings:
      raise hf_config.refusal('scale_decoder_outputs', True, 'needs tie_word_embeddings=true')
    if buckets < 4:
      raise hf_config.refusal('relative_attention_num_buckets', buckets, 'must be at least 4')
    if self.relative_attention_max_distance <= buckets // 2:
      raise hf_config.refusal('relative_attention_max_distance', self.relative_attention_max_distance,
                              f'must be more than half of relative_attention_num_buckets={buckets}')

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    fields = {'model_type': 't5', 'is_encoder_decoder': True, **dataclasses.asdict(self)}
    return {name: value for name, value in fields.items() if name != 'pooled' or value}

  def for_tensors(self, names):
    """This config as the tensors of these names want it.

    transformers 5 writes `tie_word_embeddings: true` for every T5, and apart from it the scale, by
    which one could tell before; nor does config.json say whether there is a dense layer.
    """
    untied = not self.scale_decoder_outputs and 'lm_head.weight' in names
    return dataclasses.replace(self, tie_word_embeddings=self.tie_word_embeddings and not untied,
                               pooled='classification_head.dense.weight' in names)

  @property
  def width(self):
    return self.d_model

  @property
  def heads(self):
    return self.num_heads

  @property
  def kv_heads(self):
    return self.num_heads

  @property
  def head_width(self):
    return self.d_kv

  @property
  def max_length(self):
    return self.n_positions

  @property
  def gated(self):
    return self.feed_forward_proj.startswith('gated-')

  @property
  def activation(self):
    return FEED_FORWARD[self.feed_forward_proj]

  @property
  def head(self):
    """The name of the score's tensors."""
    return 'classification_head.out_proj' if self.pooled else 'score'

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0.

    Queries are not scaled by H^-0.5, their kernel is instead. The unembedding starts like any other
    kernel (as in t5x, https://github.com/google-research/t5x), not with transformers' deviation of 1,
    which would make the first logits as large as D^0.5.
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
    return self.initializer_factor * fan_in ** -0.5


# The activation by the kind of feed-forward layer. 'gated-gelu' is the tanh approximation, 'gelu' is not.
FEED_FORWARD = {**{name: name for name in layers.ACTIVATIONS},
                **{f'gated-{name}': name for name in layers.ACTIVATIONS}, 'gated-gelu': 'gelu_new'}


def buckets_one_way(count, max_distance, length):
  """The bucket of each distance 0 .. length - 1 on one side.

  Half of the buckets are for one distance each, the others widen up to `max_distance`, from where on
  all share the last (Raffel et al. 2020, §2.1). Distances on the edge of two buckets go where
  float32 arithmetic puts them, so that is what is used here too.

  Args:
    count: of buckets.
    max_distance: more than count // 2.
    length: of the table.

  Returns:
    [length] int32 numpy array.
  """
  exact = count // 2
  distances = np.arange(length)
  ratios = np.maximum(distances, exact).astype(np.float32) / np.float32(exact)
  logs = np.log(ratios.astype(np.float64)).astype(np.float32)
  wide = exact + (logs / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)).astype(np.int32)
  return np.where(distances < exact, distances, np.minimum(wide, count - 1)).astype(np.int32)


class Norm(nnx.RMSNorm):
  """RMSNorm; statistics in float32."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config.width, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)


class MLP(nnx.Module):
  """down(act(up x)), or down(act(gate x) * up x)."""

  def __init__(self, config, *, dtype, rngs):
    shared = dict(bias=False, dtype=dtype, rngs=rngs)
    self.activation, self.gated = config.activation, config.gated
    if self.gated:
      self.gate = layers.Linear(config.width, config.d_ff, **shared)
    self.up = layers.Linear(config.width, config.d_ff, **shared)
    self.down = layers.Linear(config.d_ff, config.width, **shared)

  def __call__(self, x):
    act = layers.ACTIVATIONS[self.activation]
    return self.down(act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x)))


class Attention(layers.Attention):
  """Projections without biases, whose keys and values may be of other states than the queries."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, bias=False, dtype=dtype, rngs=rngs)

  def queries(self, x):
    """[B, T, D] -> [B, T, N, H]."""
    return self._split(self.query(x))

  def keys_and_values(self, x):
    """[B, S, D] -> two [B, S, N, H]."""
    return self._split(self.key(x)), self._split(self.value(x))

  def _split(self, y):
    return y.reshape(*y.shape[:2], self.heads, self.head_width)


class EncoderBlock(nnx.Module):
  """One layer of the encoder."""

  def __init__(self, config, *, dtype, rngs):
    shared = dict(dtype=dtype, rngs=rngs)
    self.attention_norm = Norm(config, **shared)
    self.attention = Attention(config, **shared)
    self.mlp_norm = Norm(config, **shared)
    self.mlp = MLP(config, **shared)

  def __call__(self, x, attend):
    """Applies the layer.

    Args:
      x: [B, T, D].
      attend: (queries, keys, values [B, T, N, H]) -> [B, T, N * H].

    Returns:
      x of the next layer.
    """
    normed = self.attention_norm(x)
    x = x + self.attention.out(attend(self.attention.queries(normed), *self.attention.keys_and_values(normed)))
    return x + self.mlp(self.mlp_norm(x))


class DecoderBlock(nnx.Module):
  """One layer of the decoder."""

  def __init__(self, config, *, dtype, rngs):
    shared = dict(dtype=dtype, rngs=rngs)
    self.attention_norm = Norm(config, **shared)
    self.attention = Attention(config, **shared)
    self.cross_norm = Norm(config, **shared)
    self.cross = Attention(config, **shared)
    self.mlp_norm = Norm(config, **shared)
    self.mlp = MLP(config, **shared)

  def __call__(self, x, attend, read):
    """Applies the layer.

    Args:
      x: [B, T, D].
      attend: (queries, keys, values [B, T, N, H]) -> ([B, T, N * H], memory).
      read: (queries [B, T, N, H]) -> [B, T, N * H], from the encoder's states.

    Returns:
      x of the next layer, and what `attend` returned beside the mixed values.
    """
    normed = self.attention_norm(x)
    mixed, memory = attend(self.attention.queries(normed), *self.attention.keys_and_values(normed))
    x = x + self.attention.out(mixed)
    x = x + self.cross.out(read(self.cross.queries(self.cross_norm(x))))
    return x + self.mlp(self.mlp_norm(x)), memory


class Side(nnx.Module):
  """What encoder and decoder have beside their blocks: a norm at the end, and a bias by distance."""

  def __init__(self, config, *, dtype, rngs):
    self.count, self.max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    self.distances = nnx.Embed(self.count, config.heads, rngs=rngs)
    self.norm = Norm(config, dtype=dtype, rngs=rngs)

  def both_ways(self, length):
    """The bias [1, N, 1, T, T] float32 of the scores among T tokens that see each other: half of the buckets a side."""
    count = self.count // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    bucket = buckets_one_way(count, self.max_distance, length)[np.abs(offset)] + count * (offset > 0)
    return self._bias(bucket)

  def backwards(self, index, time, slots):
    """The bias [1, N, 1, T, S] float32 of T queries, the first at slot `index`, that see S slots up to their own."""
    back = (index + jnp.arange(time))[:, None] - jnp.arange(slots)[None, :]
    table = jnp.asarray(buckets_one_way(self.count, self.max_distance, slots))
    return self._bias(table[jnp.clip(back, 0, slots - 1)])

  def _bias(self, bucket):
    return self.distances.embedding[...].astype(jnp.float32)[bucket].transpose(2, 0, 1)[None, :, None]


class Ends(nnx.Module):
  """The embedding that both sides share, and the dense layer in front of the score where there is one."""

  def __init__(self, config, *, dtype, rngs):
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    if config.pooled:
      self.pooler = layers.Linear(config.width, config.width, bias=True, dtype=dtype, rngs=rngs)


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  prefix = 'transformer.' if config.pooled else ''
  found = {'embed/embedding': Source(f'{prefix}shared.weight')}
  for side in ('encoder', 'decoder'):
    found |= _side(side, prefix + side, config)
  if config.pooled:
    found |= torch_linear('pooler', 'classification_head.dense', bias=True)
  return found


def _side(side, theirs, config):
  """Those of the encoder or the decoder."""
  layer = f'{theirs}.block.{{layer}}.layer'
  parts = {'attention': 'SelfAttention'} | ({'cross': 'EncDecAttention'} if side == 'decoder' else {})
  found = {
      f'{side}/norm/scale': Source(f'{theirs}.final_layer_norm.weight'),
      f'{side}/distances/embedding': Source(
          f'{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'),
  }
  for number, (part, name) in enumerate(parts.items()):
    found[f'{side}/blocks/{part}_norm/scale'] = Source(f'{layer}.{number}.layer_norm.weight')
    for ours, letter in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o')):
      found |= torch_linear(f'{side}/blocks/{part}/{ours}', f'{layer}.{number}.{name}.{letter}', bias=False)
  last = f'{layer}.{len(parts)}'
  found[f'{side}/blocks/mlp_norm/scale'] = Source(f'{last}.layer_norm.weight')
  names = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'} if config.gated else {'up': 'wi', 'down': 'wo'}
  for ours, name in names.items():
    found |= torch_linear(f'{side}/blocks/mlp/{ours}', f'{last}.DenseReluDense.{name}', bias=False)
  return found

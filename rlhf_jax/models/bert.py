"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), as a reward model.

It reads texts and writes none: the model is transformers' BertForSequenceClassification, whose score
looks at the first token through a dense layer and a tanh. A text is one segment: token types are 0.

Letters: B batch, T tokens, D width, N heads, H head width, F feed-forward width.
"""

import dataclasses

from flax import nnx
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models.naming import Source
from rlhf_jax.models.naming import torch_linear

ARCHITECTURE = CLASSIFIER = 'BertForSequenceClassification'
PREFIX = ''
# A buffer of old files, and the pretraining's heads.
IGNORED_TENSORS = r'(embeddings\.position_ids$|^cls\.)'

RULES = (
    (r'(^|/)(embed|positions|types)/embedding$', P(None, 'fsdp')),
    (r'(^|/)blocks/attention/(query|key|value)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/attention/(query|key|value)/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/attention/out/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/mlp/up/kernel$', P(None, 'fsdp', 'tensor')),
    (r'(^|/)blocks/mlp/up/bias$', P(None, 'tensor')),
    (r'(^|/)blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
    (r'(^|/)blocks/(attention/out|mlp/down)/bias$', P()),
    (r'(^|/)blocks/(attention_norm|mlp_norm)/(scale|bias)$', P()),
    (r'(^|/)norm/(scale|bias)$', P()),
    (r'(^|/)pooler/kernel$', P('fsdp', 'tensor')),
    (r'(^|/)pooler/bias$', P('tensor')),
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.UsualNames):
  """The fields of a BERT config.json that change what is computed, and the special token ids.

  Attributes:
    tie_word_embeddings: true, as there is no unembedding.
    head: name of the score's tensors.
    first_position: of a text.
  """
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  type_vocab_size: int
  hidden_act: str
  layer_norm_eps: float
  initializer_range: float
  bos_token_id: int | None
  eos_token_id: int | tuple | None
  pad_token_id: int | None
  tie_word_embeddings = True
  head = 'classifier'
  first_position = 0

  @classmethod
  def from_hf(cls, fields):
    """Reads a config.json dict.

    Raises:
      UserError: naming a field that is missing, unknown or not supported.
    """
    fields = hf_config.Fields(fields)
    fields.only('is_decoder', False)
    fields.only('is_encoder_decoder', False)
    fields.only('add_cross_attention', False)
    fields.only('position_embedding_type', 'absolute')
    fields.flag('tie_word_embeddings', True)
    config = cls(
        vocab_size=fields.integer('vocab_size'),
        hidden_size=fields.integer('hidden_size'),
        intermediate_size=fields.integer('intermediate_size'),
        num_hidden_layers=fields.integer('num_hidden_layers'),
        num_attention_heads=fields.integer('num_attention_heads'),
        max_position_embeddings=fields.integer('max_position_embeddings', 512),
        type_vocab_size=fields.integer('type_vocab_size', 2),
        hidden_act=fields.choice('hidden_act', layers.ACTIVATIONS, 'gelu'),
        layer_norm_eps=fields.number('layer_norm_eps', 1e-12),
        initializer_range=fields.number('initializer_range', 0.02),
        bos_token_id=fields.token_id('bos_token_id'),
        eos_token_id=fields.token_id('eos_token_id'),
        pad_token_id=fields.token_id('pad_token_id'),
    )
    fields.finish()
    config.check()
    return config

  def check(self):
    """Raises UserError where fields do not go together."""
    if self.hidden_size % self.num_attention_heads:
      raise hf_config.refusal('num_attention_heads', self.num_attention_heads,
                              f'must divide hidden_size={self.hidden_size}')

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    return {'model_type': 'bert', **dataclasses.asdict(self)}

  @property
  def max_length(self):
    return self.max_position_embeddings - self.first_position

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0."""
    del path
    return self.initializer_range


class Norm(layers.LayerNorm):
  """LayerNorm of D."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config.width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
  """One layer; its norms stand behind the sums."""

  def __init__(self, config, *, dtype, rngs):
    self.attention = layers.Attention(config, bias=True, dtype=dtype, rngs=rngs)
    self.attention_norm = Norm(config, dtype=dtype, rngs=rngs)
    self.mlp = layers.MLP(config.width, config.intermediate_size, activation=config.hidden_act, bias=True,
                          dtype=dtype, rngs=rngs)
    self.mlp_norm = Norm(config, dtype=dtype, rngs=rngs)

  def __call__(self, x, attend):
    """Applies the layer.

    Args:
      x: [B, T, D].
      attend: (queries, keys, values [B, T, N, H]) -> [B, T, D].

    Returns:
      x of the next layer.
    """
    queries, keys, values = self.attention.project(x)
    mixed = attend(queries * self.attention.head_width ** -0.5, keys, values)
    x = self.attention_norm(x + self.attention.out(mixed))
    return self.mlp_norm(x + self.mlp(x))


class Ends(nnx.Module):
  """What stands before and after the blocks."""

  def __init__(self, config, *, dtype, rngs):
    shared = dict(dtype=dtype, rngs=rngs)
    self.first_position = config.first_position
    self.embed = nnx.Embed(config.vocab_size, config.width, **shared)
    self.positions = nnx.Embed(config.max_position_embeddings, config.width, **shared)
    self.types = nnx.Embed(config.type_vocab_size, config.width, **shared)
    self.norm = Norm(config, **shared)
    self.pooler = layers.Linear(config.width, config.width, bias=True, **shared)

  def begin(self, tokens, positions):
    """tokens and positions [B, T], the latter counted from 0 -> x [B, T, D]."""
    places = self.positions(positions + self.first_position)
    return self.norm(self.embed(tokens) + places + self.types(jnp.zeros_like(tokens)))

  def finish(self, first):
    """The first token's state [B, D] after the blocks -> what the classifier reads."""
    return jnp.tanh(self.pooler(first))


def sources(config, *, top='bert', pooler='bert.pooler.dense'):
  """Where each parameter lies in a Hugging Face file: {path: Source}.

  Args:
    config: Config.
    top: what the names begin with.
    pooler: name of the dense layer that looks at the first token.
  """
  del config
  layer = f'{top}.encoder.layer.{{layer}}'
  found = {f'{ours}/embedding': Source(f'{top}.embeddings.{theirs}_embeddings.weight')
           for ours, theirs in (('embed', 'word'), ('positions', 'position'), ('types', 'token_type'))}
  for ours, theirs in (('norm', f'{top}.embeddings'), ('blocks/attention_norm', f'{layer}.attention.output'),
                       ('blocks/mlp_norm', f'{layer}.output')):
    found[f'{ours}/scale'] = Source(f'{theirs}.LayerNorm.weight')
    found[f'{ours}/bias'] = Source(f'{theirs}.LayerNorm.bias')
  for ours, theirs in (('attention/query', 'attention.self.query'), ('attention/key', 'attention.self.key'),
                       ('attention/value', 'attention.self.value'), ('attention/out', 'attention.output.dense'),
                       ('mlp/up', 'intermediate.dense'), ('mlp/down', 'output.dense')):
    found |= torch_linear(f'blocks/{ours}', f'{layer}.{theirs}', bias=True)
  return found | torch_linear('pooler', pooler, bias=True)

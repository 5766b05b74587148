"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), as a reward model.

BERT does not generate text. The model is transformers' BertForSequenceClassification, whose head
reads the first token's state through a dense layer and a tanh. All token types are 0.

Letters: B batch, T tokens, D width.
"""

import dataclasses

from flax import nnx
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import blocks
from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import naming

ARCHITECTURE = CLASSIFIER = 'BertForSequenceClassification'
PREFIX, UNEMBED = '', None
# A buffer that old checkpoints contain, and the pretraining heads.
IGNORED_TENSORS = r'(embeddings\.position_ids$|^cls\.)'
RULES = ((r'(^|/)(embed|types)/embedding$', P(None, 'fsdp')),) + blocks.RULES

Block = blocks.Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hf_config.Config):
  """The fields of a BERT config.json that affect the computation, and the special token ids."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  hidden_act: str = 'gelu'
  layer_norm_eps: float = 1e-12
  initializer_range: float = 0.02

  MODEL_TYPE = 'bert'
  ONLY = hf_config.Config.ONLY | {
    'is_decoder': False,
    'add_cross_attention': False,
    'position_embedding_type': 'absolute',
  }
  tie_word_embeddings = True
  head = 'classifier'
  norm_first = False

  @classmethod
  def take(cls, fields, **taken):
    fields.flag('tie_word_embeddings', True)  # has no effect without an unembedding
    return super().take(fields, **taken)

  @property
  def max_length(self):
    return self.max_position_embeddings - self.first_position


class Embedder(blocks.LearnedEmbedder):
  """The parameters outside of the blocks: embeddings, their norm, and the pooler."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.types = nnx.Embed(config.type_vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.pooler = layers.Linear(config.width, config.width, bias=True, dtype=dtype, rngs=rngs)

  def embed_inputs(self, tokens, positions, length):
    x, table = super().embed_inputs(tokens, positions, length)
    return self.norm(x + self.types(jnp.zeros_like(tokens))), table

  def pool(self, x):
    """Maps the first token's state x [B, D] after the blocks to the state that the head reads."""
    return jnp.tanh(self.pooler(x))


def sources(config, *, prefix='bert', pooler='bert.pooler.dense'):
  """Returns the source of each parameter in Hugging Face files, {path: Source}.

  Args:
    config: Config.
    prefix: Prefix of tensor names.
    pooler: Name of the pooler's dense layer.
  """
  del config
  layer = f'{prefix}.encoder.layer.{{layer}}'
  kinds = {'embed': 'word', 'positions': 'position', 'types': 'token_type'}
  mapping = naming.embeddings(
    {ours: f'{prefix}.embeddings.{theirs}_embeddings' for ours, theirs in kinds.items()}
  )
  mapping |= naming.norms(
    {
      'norm': f'{prefix}.embeddings.LayerNorm',
      'blocks/attention_norm': f'{layer}.attention.output.LayerNorm',
      'blocks/mlp_norm': f'{layer}.output.LayerNorm',
    }
  )
  parts = {
    'attention/query': 'attention.self.query',
    'attention/key': 'attention.self.key',
    'attention/value': 'attention.self.value',
    'attention/out': 'attention.output.dense',
    'mlp/up': 'intermediate.dense',
    'mlp/down': 'output.dense',
  }
  maps = {f'blocks/{ours}': f'{layer}.{theirs}' for ours, theirs in parts.items()}
  return mapping | naming.linears({'pooler': pooler, **maps}, bias=True)

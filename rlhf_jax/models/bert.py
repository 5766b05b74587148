"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), as a reward model.

It reads texts and writes none: the model is transformers' BertForSequenceClassification, whose score
looks at the first token through a dense layer and a tanh. A text is one segment: token types are 0.

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
# A buffer of old files, and the pretraining's heads.
IGNORED_TENSORS = r'(embeddings\.position_ids$|^cls\.)'
RULES = ((r'(^|/)(embed|types)/embedding$', P(None, 'fsdp')),) + blocks.RULES

Block = blocks.Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hf_config.Config):
  """The fields of a BERT config.json that change what is computed, and the special token ids."""

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
    fields.flag('tie_word_embeddings', True)  # There is no unembedding.
    return super().take(fields, **taken)

  @property
  def max_length(self):
    return self.max_position_embeddings - self.first_position


class Embedder(blocks.LearnedEmbedder):
  """What stands before and after the blocks."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.types = nnx.Embed(config.type_vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.pooler = layers.Linear(config.width, config.width, bias=True, dtype=dtype, rngs=rngs)

  def embed_inputs(self, tokens, positions, length):
    x, table = super().embed_inputs(tokens, positions, length)
    return self.norm(x + self.types(jnp.zeros_like(tokens))), table

  def pool(self, x):
    """The first token's state [B, D] after the blocks -> what the classifier reads."""
    return jnp.tanh(self.pooler(x))


def sources(config, *, top='bert', pooler='bert.pooler.dense'):
  """Where each parameter lies in a Hugging Face file: {path: Source}.

  Args:
    config: Config.
    top: what the names begin with.
    pooler: name of the dense layer that looks at the first token.
  """
  del config
  layer = f'{top}.encoder.layer.{{layer}}'
  kinds = {'embed': 'word', 'positions': 'position', 'types': 'token_type'}
  found = naming.embeddings(
    {ours: f'{top}.embeddings.{theirs}_embeddings' for ours, theirs in kinds.items()}
  )
  found |= naming.norms(
    {
      'norm': f'{top}.embeddings.LayerNorm',
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
  return found | naming.linears({'pooler': pooler, **maps}, bias=True)

"""OPT (Zhang et al. 2022, https://arxiv.org/abs/2205.01068).

Letters: B batch, T tokens, D width of the blocks, E width of the token embeddings and of the
hidden states that the unembedding reads (equal to D except in opt-350m).
"""

import dataclasses

from jax.sharding import PartitionSpec as P

from rlhf_jax.models import blocks
from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import naming

ARCHITECTURE = 'OPTForCausalLM'
CLASSIFIER = 'OPTForSequenceClassification'
PREFIX = 'model.decoder.'
UNEMBED = 'lm_head.weight'
# A version number in old files.
IGNORED_TENSORS = r'(^|\.)version$'
RULES = ((r'(^|/)project_(in|out)/kernel$', P('fsdp', None)),) + blocks.RULES

Block = blocks.Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hf_config.Config):
  """The fields of an OPT config.json that affect the computation, and the special token ids."""

  hidden_size: int
  word_embed_proj_dim: int
  ffn_dim: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int = 2048
  activation_function: str = 'relu'
  do_layer_norm_before: bool = True
  _remove_final_layer_norm: bool = False
  layer_norm_elementwise_affine: bool = True
  enable_bias: bool = True
  tie_word_embeddings: bool = True
  init_std: float = 0.02

  MODEL_TYPE = 'opt'
  norm_epsilon = 1e-5
  first_position = 2
  width = hf_config.alias('word_embed_proj_dim')
  block_width = hf_config.alias('hidden_size')
  inner = hf_config.alias('ffn_dim')
  activation = hf_config.alias('activation_function')
  attention_bias = mlp_bias = hf_config.alias('enable_bias')
  norm_first = hf_config.alias('do_layer_norm_before')
  norm_affine = hf_config.alias('layer_norm_elementwise_affine')
  initializer_range = hf_config.alias('init_std')

  @classmethod
  def take(cls, fields, **taken):
    width = fields.integer('hidden_size')
    embed_width = fields.integer('word_embed_proj_dim', width)
    return super().take(fields, hidden_size=width, word_embed_proj_dim=embed_width, **taken)

  @property
  def projected(self):
    """Whether E differs from D."""
    return self.word_embed_proj_dim != self.hidden_size

  @property
  def has_final_norm(self):
    """Whether a norm follows the last block."""
    return self.do_layer_norm_before and not self._remove_final_layer_norm


class Embedder(blocks.LearnedEmbedder):
  """The parameters outside of the blocks, with maps between E and D, and an optional final norm."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.projected, self.has_final_norm = config.projected, config.has_final_norm
    if self.projected:
      shared = dict(bias=False, dtype=dtype, rngs=rngs)
      self.project_in = layers.Linear(config.width, config.hidden_size, **shared)
      self.project_out = layers.Linear(config.hidden_size, config.width, **shared)
    if not self.has_final_norm:
      del self.norm

  def embed_inputs(self, tokens, positions, length):
    del length
    x = self.embed(tokens)
    if self.projected:
      x = self.project_in(x)
    return x + self.positions(positions + self.first_position), None

  def final_norm(self, x):
    """Returns the hidden states [B, T, E] from the last block's output x."""
    if self.has_final_norm:
      x = self.norm(x)
    return self.project_out(x) if self.projected else x


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  layer = 'layers.{layer}'
  mapping = naming.embeddings({'embed': 'embed_tokens', 'positions': 'embed_positions'})
  if config.projected:
    mapping |= naming.linears({name: name for name in ('project_in', 'project_out')}, bias=False)
  attention = {
    f'blocks/attention/{ours}': f'{layer}.self_attn.{theirs}_proj'
    for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'out'))
  }
  mlp = {'blocks/mlp/up': f'{layer}.fc1', 'blocks/mlp/down': f'{layer}.fc2'}
  mapping |= naming.linears(attention | mlp, bias=config.enable_bias)
  norms = {
    'blocks/attention_norm': f'{layer}.self_attn_layer_norm',
    'blocks/mlp_norm': f'{layer}.final_layer_norm',
  }
  if config.has_final_norm:
    norms['norm'] = 'final_layer_norm'
  return mapping | naming.norms(norms if config.layer_norm_elementwise_affine else {})

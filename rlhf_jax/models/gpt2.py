"""GPT-2 (Radford et al. 2019).

Letters: L layers.
"""

import dataclasses

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import blocks
from rlhf_jax.models import hf_config
from rlhf_jax.models import naming

ARCHITECTURE = 'GPT2LMHeadModel'
CLASSIFIER = 'GPT2ForSequenceClassification'
PREFIX = 'transformer.'
UNEMBED = 'lm_head.weight'
# Causal masks in old files.
IGNORED_TENSORS = r'(^|\.)attn\.(bias|masked_bias)$'
# No mesh size divides the vocabulary (50257), so the embedding is sharded along its width only.
RULES = (
  (r'(^|/)embed/embedding$', P(None, 'fsdp')),
  (r'(^|/)unembed/kernel$', P('fsdp', None)),
) + blocks.RULES

Embedder = blocks.LearnedEmbedder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hf_config.Config):
  """The fields of a GPT-2 config.json that affect the computation, and the special token ids.

  Attributes:
    reorder_and_upcast_attn: No effect here, because queries are always scaled first and softmax is
      always float32; stored only to be written to config.json again.
  """

  n_positions: int = 1024
  n_embd: int
  n_layer: int
  n_head: int
  n_inner: int | None = None
  activation_function: str = 'gelu_new'
  layer_norm_epsilon: float = 1e-5
  scale_attn_weights: bool = True
  scale_attn_by_inverse_layer_idx: bool = False
  reorder_and_upcast_attn: bool = False
  tie_word_embeddings: bool = True
  initializer_range: float = 0.02

  MODEL_TYPE = 'gpt2'
  ONLY = hf_config.Config.ONLY | {'add_cross_attention': False}
  width, depth, heads = map(hf_config.alias, ('n_embd', 'n_layer', 'n_head'))
  max_length = hf_config.alias('n_positions')
  activation = hf_config.alias('activation_function')
  norm_epsilon = hf_config.alias('layer_norm_epsilon')

  @classmethod
  def take(cls, fields, **taken):
    taken = super().take(fields, **taken)
    fields.only('n_ctx', taken['n_positions'])
    return taken

  def check(self):
    hf_config.check_divides(vars(self), 'n_head', 'n_embd')

  @property
  def inner(self):
    return self.n_inner or 4 * self.n_embd

  @property
  def query_scale(self):
    return self.head_width**-0.5 if self.scale_attn_weights else 1.0

  def std(self, path):
    """See hf_config.Config.

    The two kernels per layer whose outputs are added to the residual stream are smaller by a
    factor of sqrt(2 L) (Radford et al. 2019, §2.3, as in their code).
    """
    if path.endswith(('attention/out/kernel', 'mlp/down/kernel')):
      return self.initializer_range * (2 * self.n_layer) ** -0.5
    return self.initializer_range


class Block(blocks.Block):
  """One layer, whose attention scores can be divided by its number, counted from 1."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.scale_by_layer = config.scale_attn_by_inverse_layer_idx

  def scale(self, layer, dtype):
    if self.scale_by_layer:
      return self.query_scale / jnp.asarray(layer + 1, dtype)
    return self.query_scale


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  layer = 'h.{layer}'
  mapping = naming.embeddings({'embed': 'wte', 'positions': 'wpe'})
  mapping |= naming.norms(
    {'norm': 'ln_f', 'blocks/attention_norm': f'{layer}.ln_1', 'blocks/mlp_norm': f'{layer}.ln_2'}
  )
  for name, columns in zip(('query', 'key', 'value'), naming.concatenated(*[config.width] * 3)):
    mapping |= naming.conv1d(f'blocks/attention/{name}', f'{layer}.attn.c_attn', columns=columns)
  mapping |= naming.conv1d('blocks/attention/out', f'{layer}.attn.c_proj')
  mapping |= naming.conv1d('blocks/mlp/up', f'{layer}.mlp.c_fc')
  return mapping | naming.conv1d('blocks/mlp/down', f'{layer}.mlp.c_proj')

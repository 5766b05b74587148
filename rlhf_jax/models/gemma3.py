"""The text model of Gemma 3 (Kamath et al. 2025, https://arxiv.org/abs/2503.19786).

It is Gemma 2 with a norm over each head's query and key instead of the cap on attention scores,
sliding windows in five of six layers, and different rotary positions in these layers.

Letters: B batch, T tokens, H head width.
"""

import dataclasses

import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import gemma
from rlhf_jax.models import gemma2
from rlhf_jax.models import hf_config
from rlhf_jax.models import llama
from rlhf_jax.models import naming
from rlhf_jax.models import qwen3
from rlhf_jax.models import rope
from rlhf_jax.models import windowed

ARCHITECTURE = 'Gemma3ForCausalLM'
CLASSIFIER = 'Gemma3TextForSequenceClassification'
PREFIX, UNEMBED = llama.PREFIX, llama.UNEMBED
IGNORED_TENSORS, RULES = llama.IGNORED_TENSORS, llama.RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
  """The fields of a Gemma 3 config.json that affect the computation, and the special token ids.

  Layers with full attention use `rope`; layers with windows use `local_rope`.
  """

  max_position_embeddings: int = 131072
  attn_logit_softcapping: float | None = None
  final_logit_softcapping: float | None = None
  local_rope: rope.Rope

  MODEL_TYPE = 'gemma3_text'

  @classmethod
  def from_hf(cls, fields):
    if 'gemma3' in (fields.get('family'), fields.get('model_type')) or 'text_config' in fields:
      raise hf_config.refusal(
        'model_type',
        'gemma3',
        (
          'this is a model of text and images, of which only the text model is supported, with '
          "model_type 'gemma3_text'. To save the text model with transformers, create a "
          'Gemma3ForCausalLM from the text_config and set its `model` to '
          '`model.language_model` of the Gemma3ForConditionalGeneration'
        ),
      )
    return super().from_hf(fields)

  @classmethod
  def take(cls, fields, **taken):
    # transformers defines this field for Gemma 3 but ignores it.
    fields.only('attn_logit_softcapping', None)
    return super().take(fields, **taken)

  @classmethod
  def sliding_rule(cls, fields):
    if 'layer_types' in fields:  # transformers also writes the pattern, but does not read it.
      fields.raw('_sliding_window_pattern', None)
    every = fields.integer('sliding_window_pattern', 6)
    return lambda layer: (layer + 1) % every != 0

  @classmethod
  def take_ropes(cls, fields, *, head_width, max_positions):
    name = 'rope_parameters'
    parameters = fields.raw(name, {})
    if not hasattr(parameters, 'keys'):
      raise hf_config.refusal(name, parameters, 'must be a dict')
    if 'rope_scaling' in fields:
      if parameters:
        raise UserError(
          'model config: rope_parameters and rope_scaling are both present; keep one of them'
        )
      name, parameters = 'rope_scaling', {windowed.FULL: fields.raw('rope_scaling')}
    parameters = hf_config.Fields(parameters)
    shared = dict(head_width=head_width, max_positions=max_positions)
    ropes = {
      'rope': rope.read(
        name, parameters.raw(windowed.FULL, {}), theta=fields.number('rope_theta', 1e6), **shared
      ),
      'local_rope': rope.read(
        name,
        parameters.raw(windowed.SLIDING, {}),
        theta=fields.number('rope_local_base_freq', 1e4),
        **shared,
      ),
    }
    parameters.refuse_unread()
    if any(isinstance(one, rope.Yarn) and not one.truncate for one in ropes.values()):
      raise hf_config.refusal(
        'truncate', False, 'transformers treats it as true in this family; set it to true'
      )
    return ropes

  def to_hf(self):
    fields = super().to_hf()
    del fields['local_rope']
    if self.local_rope.rope_type == 'default':
      return fields | {'rope_local_base_freq': self.local_rope.theta}
    # Only the newer field `rope_parameters` can hold RoPE scaling for both types of layers.
    del fields['rope_theta'], fields['rope_scaling']
    both = {windowed.FULL: self.rope, windowed.SLIDING: self.local_rope}
    return fields | {
      'rope_parameters': {
        layer_type: {'rope_type': one.rope_type, 'rope_theta': one.theta, **(one.scaling() or {})}
        for layer_type, one in both.items()
      }
    }


class Attention(qwen3.Attention):
  """The projections of attention, with a norm over each head's query and key."""

  Norm = gemma.Norm


class Block(gemma2.Block):
  """One layer, with the rotary positions of its type."""

  Attention = Attention

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.is_sliding = tuple(int(kind == windowed.SLIDING) for kind in config.layer_types)

  def __call__(self, x, layer, table, attend):
    """See blocks.Block; `table` is from `Embedder.embed_inputs`."""
    kind = jnp.array(self.is_sliding)[layer]
    return super().__call__(x, layer, [part[kind] for part in table], attend)


class Embedder(gemma.Embedder):
  """The parameters outside of the blocks, with rotary positions for both types of layers."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.local_rope = config.local_rope

  def embed_inputs(self, tokens, positions, length):
    """See blocks.Embedder; returns cosines and sines, each [2, B, T, 1, H / 2].

    The first axis is 0 for layers with full attention and 1 for those with a sliding window.
    """
    x, table = super().embed_inputs(tokens, positions, length)
    return x, [jnp.stack(parts) for parts in zip(table, self.local_rope.table(positions, length))]


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  return gemma2.sources(config) | gemma.offsets(naming.scales(qwen3.HEAD_NORMS))

"""The text model of Gemma 3 (Kamath et al. 2025, https://arxiv.org/abs/2503.19786).

Gemma 2 with norms over each head's query and key in place of the cap on attention scores, windows
of the text in five layers of six, and other rotary positions in these.

Letters: B batch, T tokens, S length that rotary tables are made for, D width, H head width.
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
  """The fields of a Gemma 3 config.json that change what is computed, and the special token ids.

  `rope` turns the layers that see the whole text, `local_rope` those with windows.
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
          "a model of texts and images, of which only the text model is supported, model_type 'gemma3_text'. To save "
          'it with transformers, make a Gemma3ForCausalLM of the text_config and set its `model` to '
          '`model.language_model` of the Gemma3ForConditionalGeneration'
        ),
      )
    return super().from_hf(fields)

  @classmethod
  def take(cls, fields, **taken):
    # Their model has this field and does not read it.
    fields.only('attn_logit_softcapping', None)
    return super().take(fields, **taken)

  @classmethod
  def sliding_rule(cls, fields):
    if 'layer_types' in fields:  # Written beside them, and not read.
      fields.raw('_sliding_window_pattern', None)
    every = fields.integer('sliding_window_pattern', 6)
    return lambda layer: (layer + 1) % every != 0

  @classmethod
  def take_ropes(cls, fields, *, head_width, limit):
    name = 'rope_parameters'
    given = fields.raw(name, {})
    if not hasattr(given, 'keys'):
      raise hf_config.refusal(name, given, 'must be a dict')
    if 'rope_scaling' in fields:
      if given:
        raise UserError(
          'model config: rope_parameters and rope_scaling are both present; keep one of them'
        )
      name, given = 'rope_scaling', {windowed.FULL: fields.raw('rope_scaling')}
    given, shared = hf_config.Fields(given), dict(head_width=head_width, limit=limit)
    taken = {
      'rope': rope.read(
        name, given.raw(windowed.FULL, {}), theta=fields.number('rope_theta', 1e6), **shared
      ),
      'local_rope': rope.read(
        name,
        given.raw(windowed.SLIDING, {}),
        theta=fields.number('rope_local_base_freq', 1e4),
        **shared,
      ),
    }
    given.refuse_unread()
    if any(isinstance(one, rope.Yarn) and not one.truncate for one in taken.values()):
      raise hf_config.refusal(
        'truncate', False, 'of this family transformers reads it as true; write that'
      )
    return taken

  def to_hf(self):
    fields = super().to_hf()
    del fields['local_rope']
    if self.local_rope.kind == 'default':
      return fields | {'rope_local_base_freq': self.local_rope.theta}
    # Only the newer spelling has scalings of both.
    del fields['rope_theta'], fields['rope_scaling']
    both = {windowed.FULL: self.rope, windowed.SLIDING: self.local_rope}
    return fields | {
      'rope_parameters': {
        kind: {'rope_type': one.kind, 'rope_theta': one.theta, **(one.scaling() or {})}
        for kind, one in both.items()
      }
    }


class Attention(qwen3.Attention):
  """The projections, with a norm of each head of queries and keys."""

  Norm = gemma.Norm


class Block(gemma2.Block):
  """One layer."""

  Attention = Attention

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.slides = tuple(int(kind == windowed.SLIDING) for kind in config.layer_types)

  def __call__(self, x, layer, table, attend):
    """See blocks.Block; `table` holds those of both kinds of layers, stacked."""
    kind = jnp.array(self.slides)[layer]
    return super().__call__(x, layer, [part[kind] for part in table], attend)


class Embedder(gemma.Embedder):
  """What stands before and after the blocks."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.local_rope = config.local_rope

  def embed_inputs(self, tokens, positions, length):
    """See blocks.Embedder; tables [2, B, T, 1, H / 2] of layers with full attention and windows."""
    x, table = super().embed_inputs(tokens, positions, length)
    return x, [jnp.stack(parts) for parts in zip(table, self.local_rope.table(positions, length))]


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  return gemma2.sources(config) | gemma.offsets(naming.scales(qwen3.HEAD_NORMS))

"""Phi-3, 3.5 and Phi-4-mini (Abdin et al. 2024, https://arxiv.org/abs/2404.14219).

Llama in files of other tensors, with windows of the text, rotary positions of a part of each head
in some, and LongRoPE.
"""

import dataclasses

from rlhf_jax.models import llama
from rlhf_jax.models import rope
from rlhf_jax.models.naming import side_by_side
from rlhf_jax.models.naming import Source
from rlhf_jax.models.naming import torch_linear

ARCHITECTURE = 'Phi3ForCausalLM'
CLASSIFIER = 'Phi3ForSequenceClassification'
PREFIX, IGNORED_TENSORS, RULES = llama.PREFIX, llama.IGNORED_TENSORS, llama.RULES
Block, Ends = llama.Block, llama.Ends

# Two older names of LongRoPE; what others call YaRN no Phi has.
ROPES = {'default': rope.Rope, 'longrope': rope.LongRope, 'su': rope.LongRope, 'yarn': rope.LongRope}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Phi-3 config.json that change what is computed, and the special token ids."""
  sliding_window: int | None

  MODEL_TYPE = 'phi3'
  DEFAULTS = llama.BaseConfig.DEFAULTS | {
      'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096,
      'original_max_position_embeddings': 4096}

  @classmethod
  def take(cls, fields):
    for name, supported in (('lm_head_bias', False), ('full_attn_mod', 1), ('interpolate_factor', 1)):
      fields.only(name, supported)
    return super().take(fields) | {'sliding_window': fields.integer('sliding_window', None)}

  @classmethod
  def take_ropes(cls, fields, *, head_width, limit):
    return {'rope': rope.from_hf(fields, head_width=head_width, limit=limit, partial=True, kinds=ROPES)}

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    fields = super().to_hf()
    if self.rope.kind == 'longrope':
      # Theirs takes it from here, whatever stands beside the factors.
      fields[rope.ORIGINAL] = self.rope.original_max_position_embeddings
    return fields

  @property
  def windows(self):
    return (self.sliding_window or 0,) * self.depth


def sources(config):
  """Where each parameter lies in a Hugging Face file: {path: Source}."""
  layer = 'layers.{layer}'
  found = {
      'embed/embedding': Source('embed_tokens.weight'),
      'norm/scale': Source('norm.weight'),
      'blocks/attention_norm/scale': Source(f'{layer}.input_layernorm.weight'),
      'blocks/mlp_norm/scale': Source(f'{layer}.post_attention_layernorm.weight'),
  }
  keys = config.kv_heads * config.head_width
  attention = zip(('query', 'key', 'value'), side_by_side(config.heads * config.head_width, keys, keys))
  for name, columns in attention:
    found |= torch_linear(f'blocks/attention/{name}', f'{layer}.self_attn.qkv_proj', bias=False, columns=columns)
  for name, columns in zip(('gate', 'up'), side_by_side(config.intermediate_size, config.intermediate_size)):
    found |= torch_linear(f'blocks/mlp/{name}', f'{layer}.mlp.gate_up_proj', bias=False, columns=columns)
  found |= torch_linear('blocks/attention/out', f'{layer}.self_attn.o_proj', bias=False)
  found |= torch_linear('blocks/mlp/down', f'{layer}.mlp.down_proj', bias=False)
  return found

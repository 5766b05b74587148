"""Phi-3, 3.5 and Phi-4-mini (Abdin et al. 2024, https://arxiv.org/abs/2404.14219).

Llama in files of other tensors, with windows of the text, rotary positions of a part of each head
in some, and LongRoPE.
"""

import dataclasses

from rlhf_jax.models import llama
from rlhf_jax.models import naming
from rlhf_jax.models import rope

ARCHITECTURE = 'Phi3ForCausalLM'
CLASSIFIER = 'Phi3ForSequenceClassification'
PREFIX, UNEMBED = llama.PREFIX, llama.UNEMBED
IGNORED_TENSORS, RULES = llama.IGNORED_TENSORS, llama.RULES
Block, Embedder = llama.Block, llama.Embedder

# Two older names of LongRoPE; what others call YaRN no Phi has.
ROPES = {
  'default': rope.Rope,
  'longrope': rope.LongRope,
  'su': rope.LongRope,
  'yarn': rope.LongRope,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Phi-3 config.json that change what is computed, and the special token ids."""

  max_position_embeddings: int = 4096
  hidden_act: str = 'silu'
  rms_norm_eps: float = 1e-5
  sliding_window: int | None = None

  MODEL_TYPE = 'phi3'
  ONLY = llama.BaseConfig.ONLY | {
    'lm_head_bias': False,
    'full_attn_mod': 1,
    'interpolate_factor': 1,
  }

  @classmethod
  def take_ropes(cls, fields, *, head_width, limit):
    return {
      'rope': rope.from_hf(
        fields, head_width=head_width, limit=limit, original=4096, partial=True, kinds=ROPES
      )
    }

  def to_hf(self):
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
  found, layer = llama.sources(config), 'layers.{layer}'
  queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
  for name, columns in zip(('query', 'key', 'value'), naming.concatenated(queries, keys, keys)):
    found |= naming.torch_linear(
      f'blocks/attention/{name}', f'{layer}.self_attn.qkv_proj', bias=False, columns=columns
    )
  for name, columns in zip(('gate', 'up'), naming.concatenated(config.inner, config.inner)):
    found |= naming.torch_linear(
      f'blocks/mlp/{name}', f'{layer}.mlp.gate_up_proj', bias=False, columns=columns
    )
  return found

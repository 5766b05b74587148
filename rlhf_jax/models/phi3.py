"""Phi-3, 3.5 and Phi-4-mini (Abdin et al. 2024, https://arxiv.org/abs/2404.14219).

Phi-3 is Llama with fused tensors in its files, sliding windows and LongRoPE; some models rotate
only a fraction of each head.
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

# 'su' and 'yarn' are older names of LongRoPE; no Phi model uses the YaRN of other families.
ROPE_TYPES = {
  'default': rope.Rope,
  'longrope': rope.LongRope,
  'su': rope.LongRope,
  'yarn': rope.LongRope,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of a Phi-3 config.json that affect the computation, and the special token ids."""

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
  def take_ropes(cls, fields, *, head_width, max_positions):
    return {
      'rope': rope.from_hf(
        fields,
        head_width=head_width,
        max_positions=max_positions,
        original_length=4096,
        partial=True,
        rope_types=ROPE_TYPES,
      )
    }

  def to_hf(self):
    fields = super().to_hf()
    if self.rope.rope_type == 'longrope':
      # transformers reads it here and ignores the one in `rope_scaling`.
      fields[rope.ORIGINAL] = self.rope.original_max_position_embeddings
    return fields

  @property
  def windows(self):
    return (self.sliding_window or 0,) * self.depth


def sources(config):
  """Returns the source of each parameter in Hugging Face files, {path: Source}."""
  mapping, layer = llama.sources(config), 'layers.{layer}'
  queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
  for name, columns in zip(('query', 'key', 'value'), naming.concatenated(queries, keys, keys)):
    mapping |= naming.torch_linear(
      f'blocks/attention/{name}', f'{layer}.self_attn.qkv_proj', bias=False, columns=columns
    )
  for name, columns in zip(('gate', 'up'), naming.concatenated(config.inner, config.inner)):
    mapping |= naming.torch_linear(
      f'blocks/mlp/{name}', f'{layer}.mlp.gate_up_proj', bias=False, columns=columns
    )
  return mapping

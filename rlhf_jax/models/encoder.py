"""An encoder as functions of its parameters: it reads a text, for a reward model to score.

Letters: B batch, T tokens, D width, V vocabulary, L layers.

Parameters are a plain dict of arrays; those under 'blocks' have a leading axis of layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.models import heads
from rlhf_jax.models import layers
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import stack
from rlhf_jax.models.families import FAMILIES


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder without its parameters; hashable, so static under jit.

  Attributes:
    family: a name in FAMILIES.
    config: the family's Config.
    dtype: of the computation, 'float32' or 'bfloat16'; softmax and norms are float32 always.
    remat: 'none', 'block' (recompute each block in the backward pass) or 'dots' (keep the
      outputs of its matmuls).
    unroll: layers unrolled in the scan; more is faster and compiles longer.
    lora: adapters its parameters hold, or None.
  """
  family: str
  config: Any
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int = 1
  lora: lora_lib.Lora | None = None
  encoder_decoder = False

  @property
  def width(self):
    """D."""
    return self.config.width

  @property
  def vocab_size(self):
    """V."""
    return self.config.vocab_size

  @property
  def max_length(self):
    """Tokens of the longest text; there are no positions for more."""
    return self.config.max_length

  @property
  def rules(self):
    """Sharding of the parameters and heads: tuple of (regex on the '/'-joined path, PartitionSpec)."""
    return lora_lib.rules(self._module.RULES) + self._module.RULES + heads.RULES

  @property
  def _module(self):
    return FAMILIES[self.family]

  @functools.partial(jax.jit, static_argnums=0)
  def init(self, key):
    """Draws parameters, without adapters.

    Args:
      key: random key.

    Returns:
      Pure dict of float32 arrays; under 'blocks' stacked on a leading L axis.
    """
    return stack.draw(key, self.shapes(), self.config.std)

  def shapes(self):
    """The tree of parameters, without adapters, as float32 ShapeDtypeStructs."""
    blocks = stack.shapes(self._module.Block, self.config, depth=self.config.depth)
    return stack.shapes(self._module.Ends, self.config) | {'blocks': blocks}

  def summary(self, params, tokens, mask):
    """The state [B, D] that a scalar head reads a text's score from: the first token's, pooled.

    Args:
      params: from `init` or `hf.load_reward`.
      tokens: [B, T] int32, padded on either side; those outside the mask are not read.
      mask: [B, T] bool.
    """
    ends = stack.build(self._module.Ends, self.config, self.dtype, params, lora=self.lora)
    x = ends.begin(jnp.where(mask, tokens, 0), jnp.where(mask, types.positions_from_mask(mask), 0))
    seen = mask[:, None, None, None, :]

    def attend(queries, keys, values):
      return layers.attend(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), seen)

    build = functools.partial(stack.build, self._module.Block, self.config, self.dtype, lora=self.lora,
                              prefix='blocks')
    x, _ = stack.scan(build, params['blocks'], lambda block, layer, x, memory: (block(x, attend), memory),
                      (sharding.split_rows(x), ()), remat=self.remat, unroll=self.unroll)
    first = jnp.argmax(mask, axis=1)
    return ends.finish(jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0])

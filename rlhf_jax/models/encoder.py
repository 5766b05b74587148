"""An encoder as functions of its parameters, for reward models.

Letters: B batch, T tokens, D width.

Parameters are a nested dict of arrays; those under 'blocks' have a leading axis of layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.models import base
from rlhf_jax.models import layers
from rlhf_jax.models import stack


@dataclasses.dataclass(frozen=True)
class Encoder(base.Base):
  """An encoder; see base.Base."""

  after_blocks = frozenset({'pooler'})

  def shapes(self):
    blocks = stack.shapes(self._module.Block, self.config, depth=self.config.depth)
    return stack.shapes(self._module.Embedder, self.config) | {'blocks': blocks}

  def summary(self, params, tokens, mask):
    """Returns the state of the first token after the pooler; see base.Base."""
    x = self.token_states(params, tokens, mask)
    embedder = stack.build_embedder(
      self._module.Embedder, self.config, self.dtype, params, lora=self.lora
    )
    first = jnp.argmax(mask, axis=1)
    return embedder.pool(jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0])

  def token_states(self, params, tokens, mask):
    """Computes the states of all tokens after the blocks, [B, T, D].

    Args:
      params: See base.Base.summary. Of the first k layers only, it returns their states.
      tokens: [B, T] int32; those outside the mask are not read.
      mask: [B, T] bool.
    """
    embedder = stack.build_embedder(
      self._module.Embedder, self.config, self.dtype, params, lora=self.lora
    )
    positions = jnp.where(mask, types.positions_from_mask(mask), 0)
    x, table = embedder.embed_inputs(jnp.where(mask, tokens, 0), positions, tokens.shape[1])
    visible = mask[:, None, None, None, :]

    def attend(queries, keys, values):
      return layers.attend(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), visible), ()

    def apply(block, layer, x, _):
      return block(x, layer, table, attend)

    carry, first_layer = (sharding.split_rows(x), ()), 0
    stacks = [params['blocks']] + ([params['top']['blocks']] if 'top' in params else [])
    for blocks in stacks:
      build = functools.partial(
        stack.build,
        self._module.Block,
        self.config,
        self.dtype,
        prefix='blocks',
        lora=self.lora if blocks is stacks[-1] else None,
      )
      carry = stack.scan(
        build, blocks, apply, carry, first=first_layer, remat=self.remat, unroll=self.unroll
      )
      first_layer += jax.tree.leaves(blocks)[0].shape[0]
    return carry[0]

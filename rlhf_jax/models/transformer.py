"""A decoder as functions of its parameters: stacked blocks under one scan, a cache of fixed length.

Letters: B batch, T tokens of this call, S cache length, L layers, V vocabulary, D width, K
key/value heads, H head width, R response length.

Parameters are a nested dict of arrays; those under 'blocks' have a leading axis of layers. If only
the top layers are trained (see trainable.py), they are under 'top/blocks' instead.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.models import attention
from rlhf_jax.models import base
from rlhf_jax.models import heads
from rlhf_jax.models import layers
from rlhf_jax.models import stack


@dataclasses.dataclass(frozen=True)
class Model(base.LanguageModel):
  """A decoder; see base.LanguageModel.

  Attributes:
    sequence_length: Length for rotary positions that depend on one (see rope.py); 0 for the
      length of the call or of its cache.
    plain_attention: Whether attention is always 'plain'; see attention.py.
  """

  sequence_length: int = 0
  plain_attention: bool = False

  def shapes(self):
    blocks = stack.shapes(self._module.Block, self.config, depth=self.config.depth)
    return self._with_unembed(stack.shapes(self._module.Embedder, self.config) | {'blocks': blocks})

  def with_max_length(self, length):
    return dataclasses.replace(self, sequence_length=length)

  def with_plain_attention(self):
    return dataclasses.replace(self, plain_attention=True)

  @property
  def _unrolled(self):
    return (self.unroll or stack.default_unroll(self.config.depth)) >= self.config.depth

  def init_cache(self, batch, length, *, unstacked=False):
    """Returns an empty cache.

    Args:
      batch, length: B and S.
      unstacked: Whether the layers are separate arrays, for parameters from `unstack`.

    Returns:
      Dict with 'k' and 'v' [L, B, K, S, H] (if unstacked, tuples of L arrays [B, K, S, H]),
      'segments' [B, S] int32, 0 in empty slots, and 'index', the first slot that the next call
      writes: a numpy int32, so it is static in the first call.
    """
    shape = (batch, self.config.kv_heads, length, self.config.head_width)
    if unstacked:
      empty = (sharding.split_rows(jnp.zeros(shape, self.dtype)),) * self.config.depth
    else:
      empty = sharding.split_rows(jnp.zeros((self.config.depth, *shape), self.dtype), axis=1)
    segments = sharding.split_rows(jnp.zeros((batch, length), jnp.int32))
    return {'k': empty, 'v': empty, 'segments': segments, 'index': np.int32(0)}

  def unstack(self, params):
    """See base.LanguageModel.

    If the layers are unrolled, and always on GPUs, each layer becomes a separate tree; otherwise
    every step would copy each layer out of the stack. On an H200, a step of 128 sequences, 24
    layers and width 2048 takes 5.8 ms with separate trees and 8.0 ms with the stack; the loop
    compiles in 32 instead of 6 seconds.
    """
    params = super().unstack(params)
    if not self._unrolled and sharding.platform() != 'gpu':
      return params
    params = params | {'blocks': stack.unstack(params['blocks'])}
    if 'top' in params:
      params = params | {'top': params['top'] | {'blocks': stack.unstack(params['top']['blocks'])}}
    return params

  def forward(
    self, params, tokens, positions, segments, cache=None, frozen_states=None, last_positions=None
  ):
    """Runs the backbone.

    A token attends to itself and to earlier tokens of its sequence with the same non-zero segment,
    including those in the cache. Tokens and positions at segment 0 are not read.

    Args:
      params: Parameters from `init` or `hf.load`.
      tokens, positions: [B, T] int32.
      segments: [B, T] int32, 0 at padding; or a bool mask if each sequence is a single segment,
        which cuDNN attention needs.
      cache: None, or a cache with at least T empty slots. This is not checked: a call that does
        not fit overwrites the last slots.
      frozen_states: None, or the result of `run_frozen_layers` for the same tokens, so that only
        the layers above them run. Not supported with a cache.
      last_positions: Number of positions, from the end, whose states are returned; None for all
        T. If the layers are unrolled, the last layer computes only these.

    Returns:
      Hidden states [B, T, D] (or [B, last_positions, D]) after the final norm, in the compute
      dtype; and None, or the cache with these tokens written and its index advanced by T.
    """
    single_segment, segments = segments.dtype == bool, segments.astype(jnp.int32)
    if cache is None:
      key_segments, index, kv_cache = segments, 0, ()
    else:
      index = cache['index']
      key_segments = jax.lax.dynamic_update_slice(cache['segments'], segments, (0, index))
      kv_cache = (cache['k'], cache['v'], index)
    last_positions = last_positions or tokens.shape[1]
    embedder, x, apply = self._embed_inputs(
      params, tokens, positions, segments, key_segments, index, last_positions, single_segment
    )
    carry = (x, kv_cache)
    carry = (
      self._scan_layers(params['blocks'], apply, carry, trainable='top' not in params)
      if frozen_states is None
      else (frozen_states, ())
    )
    if 'top' in params:
      carry = self._scan_layers(params['top']['blocks'], apply, carry, trainable=True)
    x, kv_cache = carry
    x = embedder.final_norm(x[:, -last_positions:])
    if cache is None:
      return x, None
    return x, {
      'k': kv_cache[0],
      'v': kv_cache[1],
      'segments': key_segments,
      'index': index + tokens.shape[1],
    }

  def run_frozen_layers(self, params, tokens, positions, segments):
    """Runs the frozen layers, which are below those under 'top'; policy and reference share them.

    Args:
      params, tokens, positions, segments: See `forward`.

    Returns:
      [B, T, D] in the compute dtype.
    """
    single_segment, segments = segments.dtype == bool, segments.astype(jnp.int32)
    _, x, apply = self._embed_inputs(
      params, tokens, positions, segments, segments, 0, tokens.shape[1], single_segment
    )
    return self._scan_layers(params['blocks'], apply, (x, ()), trainable=False)[0]

  def _embed_inputs(
    self, params, tokens, positions, segments, key_segments, index, last_positions, single_segment
  ):
    """Embeds the inputs and prepares attention.

    Returns:
      (embedder, x [B, T, D], function that applies a block, as in `stack.scan`).
    """
    embedder = stack.build_embedder(
      self._module.Embedder, self.config, self.dtype, params, lora=self.lora
    )
    real = segments != 0
    sequence_length = self.sequence_length or key_segments.shape[1]
    x, table = embedder.embed_inputs(
      jnp.where(real, tokens, 0), jnp.where(real, positions, 0), sequence_length
    )
    causal_attention = attention.causal(
      self.config,
      self.dtype,
      segments,
      key_segments,
      index=index,
      single_segment=single_segment,
      plain=self.plain_attention,
    )

    def apply(block, layer, x, kv_cache):
      # Only the last layer of an unrolled model can drop queries: in a scan, all layers have the
      # same shapes.
      num_queries = (
        last_positions if isinstance(layer, int) and layer == self.config.depth - 1 else x.shape[1]
      )

      def attend(queries, keys, values):
        keys, values, updated = stack.update_cache(kv_cache, layer, keys, values)
        return causal_attention(layer, queries[:, -num_queries:], keys, values), updated

      return block(x, layer, table, attend)

    return embedder, sharding.split_rows(x), apply

  def _scan_layers(self, params, apply, carry, *, trainable):
    """Applies the top blocks, with adapters, if `trainable`; otherwise the bottom blocks."""
    if self._unrolled and self.remat == 'none' and not isinstance(params, tuple):
      params = stack.unstack(params)
    depth = len(params) if isinstance(params, tuple) else jax.tree.leaves(params)[0].shape[0]
    build = functools.partial(
      stack.build,
      self._module.Block,
      self.config,
      self.dtype,
      lora=self.lora if trainable else None,
      prefix='blocks',
    )
    return stack.scan(
      build,
      params,
      apply,
      carry,
      first=self.config.depth - depth if trainable else 0,
      remat=self.remat,
      unroll=self.unroll,
    )

  def unembed(self, params, hidden):
    return layers.soft_cap(self._logits(params, hidden), self.config.logit_cap)

  def response_states(self, params, tokens, mask, response_length, frozen_states=None):
    hidden, _ = self.forward(
      params,
      tokens,
      types.positions_from_mask(mask),
      mask,
      frozen_states=frozen_states,
      last_positions=response_length + 1,
    )
    return hidden[:, :-1]

  def summary(self, params, tokens, mask):
    """Returns the state at the last real token; see base.Base."""
    hidden, _ = self.forward(params, tokens, types.positions_from_mask(mask), mask)
    return heads.last_token(hidden, mask)

  def prefill(self, params, tokens, mask, response_length):
    batch, length = tokens.shape
    hidden, cache = self.forward(
      params,
      tokens,
      types.positions_from_mask(mask),
      mask,
      self.init_cache(
        batch, length + response_length, unstacked=isinstance(params['blocks'], tuple)
      ),
      last_positions=1,
    )
    return hidden[:, -1], cache | {'position': jnp.sum(mask, axis=1, dtype=jnp.int32)}

  def step(self, params, token, active, cache):
    hidden, written = self.forward(
      params, token[:, None], cache['position'][:, None], active[:, None], cache
    )
    return hidden[:, 0], written | {'position': cache['position'] + 1}

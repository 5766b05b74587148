"""Blocks and embedders that most families share.

Letters: B batch, T tokens, S sequence length for rotary positions (see rope.py), D width, N heads,
K key/value heads, H head width.
"""

import abc

from flax import nnx
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import layers
from rlhf_jax.models import rope

# Sharding of all parameters that a family can have. The first rule that matches a path applies, so
# a family puts its own rules first. The axis of positions is not sharded, because few mesh sizes
# divide sizes like 2050.
RULES = (
  (r'(^|/)embed/embedding$', P('tensor', 'fsdp')),
  (r'(^|/)positions/embedding$', P(None, 'fsdp')),
  (r'(^|/)blocks/(attention|cross)/(query|key|value)/kernel$', P(None, 'fsdp', 'tensor')),
  (r'(^|/)blocks/(attention|cross)/(query|key|value)/bias$', P(None, 'tensor')),
  (r'(^|/)blocks/(attention|cross)/out/kernel$', P(None, 'tensor', 'fsdp')),
  (r'(^|/)blocks/mlp/(gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
  (r'(^|/)blocks/mlp/(gate|up)/bias$', P(None, 'tensor')),
  (r'(^|/)blocks/mlp/down/kernel$', P(None, 'tensor', 'fsdp')),
  (r'(^|/)blocks/((attention|cross)/out|mlp/down)/bias$', P()),
  (r'(^|/)(blocks/(attention/)?\w+_)?norm/(scale|bias|offset)$', P()),
  (r'(^|/)pooler/kernel$', P('fsdp', 'tensor')),
  (r'(^|/)pooler/bias$', P('tensor')),
  (r'(^|/)unembed/kernel$', P('fsdp', 'tensor')),
)


class Block(nnx.Module):
  """One layer: attention and an MLP, with norms before them or after the residual sums.

  Args:
    config: hf_config.Config of a family.
    dtype: Compute dtype.
  """

  # Families override these.
  Norm, Attention = layers.LayerNorm, layers.Attention

  def __init__(self, config, *, dtype, rngs):
    shared = dict(dtype=dtype, rngs=rngs)
    self.attention_norm = self.Norm(config, **shared)
    self.attention = self.Attention(config, **shared)
    self.mlp_norm = self.Norm(config, **shared)
    self.mlp = layers.MLP(config, **shared)
    self.norm_first, self.query_scale = config.norm_first, config.query_scale

  def __call__(self, x, layer, table, attend):
    """Applies the layer.

    Args:
      x: [B, T, D].
      layer: Index of the layer from 0, an int or an int32 scalar.
      table: Cosines and sines from `Rope.table`; None without rotary positions.
      attend: Function (queries [B, T, N, H], keys and values [B, T, K, H]) -> (outputs
        [B, t, N * H] of the last t positions, updated kv_cache of `stack.update_cache`).

    Returns:
      x [B, t, D] for the next layer, and the `kv_cache` from `attend`.
    """
    normed = self.attention_norm(x) if self.norm_first else x
    attended, kv_cache = self.self_attention(normed, layer, table, attend)
    x = layers.take_last(x, attended) + attended
    if self.norm_first:
      return x + self.mlp(self.mlp_norm(x)), kv_cache
    x = self.attention_norm(x)
    return self.mlp_norm(x + self.mlp(x)), kv_cache

  def self_attention(self, x, layer, table, attend):
    """Applies attention to x [B, T, D]; returns [B, t, D] and the `kv_cache` from `attend`."""
    queries, keys, values = self.attention.project(x)
    if table is not None:
      queries, keys = rope.rotate(queries, table), rope.rotate(keys, table)
    attended, kv_cache = attend(queries * self.scale(layer, queries.dtype), keys, values)
    return self.attention.out(attended), kv_cache

  def scale(self, layer, dtype):
    """Returns the factor that scales the queries of a layer: a float, or a scalar of `dtype`."""
    del layer, dtype
    return self.query_scale


class Embedder(nnx.Module):
  """The parameters outside of the blocks: the embedding of tokens and the final norm."""

  Norm = layers.LayerNorm

  def __init__(self, config, *, dtype, rngs):
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.norm = self.Norm(config, dtype=dtype, rngs=rngs)

  @abc.abstractmethod
  def embed_inputs(self, tokens, positions, length):
    """Embeds tokens and positions.

    Args:
      tokens: [B, T] int32.
      positions: [B, T] int32, counted from 0.
      length: S.

    Returns:
      x [B, T, D], and the cosines and sines from `Rope.table`, or None without rotary positions.
    """

  def final_norm(self, x):
    """Returns the hidden states [B, T, D] from the last block's output x."""
    return self.norm(x)


class RotaryEmbedder(Embedder):
  """An embedder for rotary positions, which the blocks apply to queries and keys."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.rope = config.rope

  def embed_inputs(self, tokens, positions, length):
    return self.embed(tokens), self.rope.table(positions, length)


class LearnedEmbedder(Embedder):
  """An embedder with a learned embedding per position."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.first_position = config.first_position
    self.positions = nnx.Embed(
      self.first_position + config.max_length, config.block_width, dtype=dtype, rngs=rngs
    )

  def embed_inputs(self, tokens, positions, length):
    del length
    return self.embed(tokens) + self.positions(positions + self.first_position), None

"""Blocks, and what stands before and after them: what most families share.

Letters: B batch, T tokens, S length that rotary tables are made for, V vocabulary, D width, N
heads, K key/value heads, H head width.
"""

from flax import nnx
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import layers
from rlhf_jax.models import rope

# Sharding of all parameters that a family can have. The first rule that fits a path counts, so a
# family that wants another one puts it in front. Numbers of positions (2050) divide by little.
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
  """One layer: attention and an MLP, each with a norm before it or, by the config, after its sum.

  Args:
    config: hf_config.Config of a family.
    dtype: of the computation.
  """

  # Families put others in their place.
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
      layer: int or int32 scalar, number of the layer from 0.
      table: cosines and sines of the positions; None where positions do not turn.
      attend: (queries [B, T, N, H], keys and values [B, T, K, H]) -> ([B, t, N * H], memory), of
        all T positions or the last t.

    Returns:
      x [B, t, D] of the next layer, and what `attend` returned beside the mixed values.
    """
    normed = self.attention_norm(x) if self.norm_first else x
    attended, memory = self.self_attention(normed, layer, table, attend)
    x = layers.take_last(x, attended) + attended
    if self.norm_first:
      return x + self.mlp(self.mlp_norm(x)), memory
    x = self.attention_norm(x)
    return self.mlp_norm(x + self.mlp(x)), memory

  def self_attention(self, x, layer, table, attend):
    """Attention of a layer to x [B, T, D]: [B, t, D], and the memory from `attend`."""
    queries, keys, values = self.attention.project(x)
    if table is not None:
      queries, keys = rope.rotate(queries, table), rope.rotate(keys, table)
    attended, memory = attend(queries * self.scale(layer, queries.dtype), keys, values)
    return self.attention.out(attended), memory

  def scale(self, layer, dtype):
    """What the queries of a layer are multiplied by, a float or a scalar of their dtype."""
    del layer, dtype
    return self.query_scale


class Embedder(nnx.Module):
  """What stands before and after the blocks: the embedding of tokens, and a norm."""

  Norm = layers.LayerNorm

  def __init__(self, config, *, dtype, rngs):
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    self.norm = self.Norm(config, dtype=dtype, rngs=rngs)

  def embed_inputs(self, tokens, positions, length):
    """What the blocks read.

    Args:
      tokens, positions: [B, T] int32; the latter are counted from 0.
      length: S.

    Returns:
      x [B, T, D], and what all blocks share: rotary tables or None.
    """
    raise NotImplementedError

  def final_norm(self, x):
    """x after the blocks -> hidden states [B, T, D]."""
    return self.norm(x)


class RotaryEmbedder(Embedder):
  """Positions turn queries and keys inside the blocks."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.rope = config.rope

  def embed_inputs(self, tokens, positions, length):
    return self.embed(tokens), self.rope.table(positions, length)


class LearnedEmbedder(Embedder):
  """Every position has an embedding of its own."""

  def __init__(self, config, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.first = config.first_position
    self.positions = nnx.Embed(
      self.first + config.max_length, config.block_width, dtype=dtype, rngs=rngs
    )

  def embed_inputs(self, tokens, positions, length):
    del length
    return self.embed(tokens) + self.positions(positions + self.first), None

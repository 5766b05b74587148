"""Layers that the model families share: attention, activations, linear maps, norms.

Letters: B batch, T queries, S keys (cache length where there is a cache), D width, N heads,
K key/value heads, G = N / K queries sharing one of them, H head width, F feed-forward width.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu_tanh(x):
  """Computes GELU's tanh approximation (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).

  The backward pass stores only x. What automatic differentiation would store is a third of the
  memory of a GPT-2 block.
  """
  return jax.nn.gelu(x, approximate=True)


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  scale, cubic = math.sqrt(2 / math.pi), 0.044715
  tanh = jnp.tanh(scale * (x + cubic * x * x * x))
  slope = 0.5 * (1 + tanh) + 0.5 * scale * x * (1 - tanh * tanh) * (1 + 3 * cubic * x * x)
  return 0.5 * x * (1 + tanh), dx * slope


ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_new': gelu_tanh,
  'gelu_pytorch_tanh': gelu_tanh,
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
}


def soft_cap(x, bound):
  """Returns bound * tanh(x / bound), or x if the bound is 0.

  See Gemma 2 (https://arxiv.org/abs/2408.00118), §2.
  """
  return bound * jnp.tanh(x / bound) if bound else x


def attention_mask(segments, key_segments, *, index, window=0):
  """Returns the mask of causal attention within equal non-zero segments.

  Args:
    segments: [B, T] int32, segments of the queries, 0 at padding.
    key_segments: [B, S] int32, segments of the keys, 0 at padding and in empty cache slots.
    index: Slot of the first query among the keys, an int or an int32 scalar.
    window: Number of slots that a token attends to, counted back from and including its own; 0
      for no limit.

  Returns:
    [B, 1, 1, T, S] bool, to broadcast over K and G.
  """
  back = (index + jnp.arange(segments.shape[1]))[:, None] - jnp.arange(key_segments.shape[1])[
    None, :
  ]
  causal = (back >= 0) & (back < window) if window else back >= 0
  queries = segments[:, :, None]
  same = (queries == key_segments[:, None, :]) & (queries != 0)
  return (same & causal[None])[:, None, None]


def attend(queries, keys, values, mask, *, bias=None, score_cap=0.0):
  """Computes grouped-query attention without repeating keys and values.

  Scores and softmax are float32. A query whose keys are all masked gets the mean of the values
  instead of NaN, which would spread; nothing reads it.

  Args:
    queries: [B, T, N, H], already scaled.
    keys, values: [B, K, S, H].
    mask: [B, 1, 1, T, S] bool (T or B may be 1).
    bias: None, or float32 added to the scores; broadcasts to [B, K, G, T, S].
    score_cap: See `hf_config.Config`.

  Returns:
    [B, T, N * H] in the dtype of the values.
  """
  batch, query_length, heads, head_width = queries.shape
  kv_heads, key_length = keys.shape[1:3]
  groups = heads // kv_heads
  rows = queries.reshape(batch, query_length, kv_heads, groups, head_width).transpose(0, 2, 3, 1, 4)
  rows = rows.reshape(batch, kv_heads, groups * query_length, head_width)
  # Batched matmuls, because XLA on the CPU transposes the scores of an einsum.
  scores = jnp.matmul(rows, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
  scores = soft_cap(scores.reshape(batch, kv_heads, groups, query_length, key_length), score_cap)
  scores = jnp.where(mask, scores if bias is None else scores + bias, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  weights = weights.reshape(batch, kv_heads, groups * query_length, key_length)
  # Dividing the output instead of the weights saves one pass over [T, S], and two in the gradient.
  if groups * query_length == 1:
    # For vector-matrix products, a sum is 20 % faster than a matmul in XLA on the CPU.
    mixed = jnp.sum(weights[:, :, 0, :, None] * values, axis=2, keepdims=True)
  else:
    mixed = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
  mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)
  mixed = mixed.reshape(batch, kv_heads, groups, query_length, head_width).transpose(0, 3, 1, 2, 4)
  return mixed.reshape(batch, query_length, heads * head_width)


def take_last(x, y):
  """Returns the last t positions of x [B, T, D], where t is the length of y [B, t, D].

  A layer that computes queries only at these positions takes them as its residual.
  """
  return x[:, x.shape[1] - y.shape[1] :]


def matmul(x, kernel, **options):
  """Computes x [..., D] @ kernel [D, F] with the leading axes of x flattened into one.

  Otherwise the gradient of the kernel contracts several axes, for which XLA on the CPU first
  transposes (and recomputes) the incoming gradient: 10 ms instead of 4 for an MLP of width 128 on
  2048 tokens.
  """
  rows = x.reshape(-1, x.shape[-1])
  return jnp.matmul(rows, kernel, **options).reshape(*x.shape[:-1], kernel.shape[-1])


def unembed(hidden, embedding):
  """Computes logits, hidden [..., D] times the transpose of embedding [V, D]: [..., V] float32.

  A decode step, whose hidden states are [B, D], computes embedding @ hidden.T instead: for B = 8,
  D = 768 and V = 50257, XLA on the CPU takes 9 instead of 13 ms, of which reading the embedding
  takes 7. The barriers keep XLA's simplifier from swapping the operands back.
  """
  embedding = embedding.astype(hidden.dtype)
  if hidden.ndim > 2:
    return matmul(hidden, embedding.T, preferred_element_type=jnp.float32)
  columns = jnp.matmul(
    embedding, jax.lax.optimization_barrier(hidden.T), preferred_element_type=jnp.float32
  )
  return jax.lax.optimization_barrier(columns).T


class LowRank(nnx.Module):
  """The low-rank adapter of a linear map, scale * x A B; see lora.py.

  Args:
    inputs, outputs: Widths of the map.
    rank: Number of columns of A.
    scale: Factor of the adapter's output.
    dtype: Compute dtype.
  """

  def __init__(self, inputs, outputs, rank, scale, *, dtype):
    self.scale, self.dtype = scale, dtype
    self.a = nnx.Param(jnp.zeros((inputs, rank)))
    self.b = nnx.Param(jnp.zeros((rank, outputs)))

  def __call__(self, x):
    return (x @ self.a[...].astype(self.dtype)) @ self.b[...].astype(self.dtype) * self.scale


class Linear(nnx.Linear):
  """A linear map [..., D] -> [..., F] that flattens the leading axes; see `matmul`."""

  def __init__(self, inputs, outputs, *, bias, dtype, rngs):
    super().__init__(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)
    self.lora = nnx.data(None)

  def __call__(self, x):
    rows = x.reshape(-1, x.shape[-1])
    y = super().__call__(rows)
    if self.lora is not None:
      y += self.lora(rows)
    return y.reshape(*x.shape[:-1], self.out_features)


class LayerNorm(nnx.LayerNorm):
  """LayerNorm with statistics in float32 and the variance of the centred values.

  Args:
    config: hf_config.Config of a family.
    dtype: Dtype of the output.
    width: Size of the normalized axis; None for the width of the blocks.
  """

  def __init__(self, config, *, dtype, rngs, width=None):
    affine = config.norm_affine
    super().__init__(
      width or config.block_width,
      epsilon=config.norm_epsilon,
      use_bias=affine,
      use_scale=affine,
      dtype=dtype,
      use_fast_variance=False,
      rngs=rngs,
    )


class RMSNorm(nnx.RMSNorm):
  """RMSNorm with statistics in float32; see `LayerNorm` for the arguments."""

  def __init__(self, config, *, dtype, rngs, width=None):
    super().__init__(
      width or config.block_width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs
    )


class MLP(nnx.Module):
  """The MLP of a block: down(act(up(x))), or if it is gated, down(act(gate(x)) * up(x)).

  Args:
    config: hf_config.Config of a family.
    dtype: Compute dtype.
  """

  def __init__(self, config, *, dtype, rngs):
    shared = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
    self.activation, self.gated = config.activation, config.gated
    if self.gated:
      self.gate = Linear(config.block_width, config.inner, **shared)
    self.up = Linear(config.block_width, config.inner, **shared)
    self.down = Linear(config.inner, config.block_width, **shared)

  def __call__(self, x):
    act = ACTIVATIONS[self.activation]
    return self.down(act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x)))


class Attention(nnx.Module):
  """The four linear projections of attention; the caller applies the mask and the cache.

  Args:
    config: hf_config.Config of a family.
    dtype: Compute dtype.
  """

  def __init__(self, config, *, dtype, rngs):
    self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
    width, shared = config.block_width, dict(dtype=dtype, rngs=rngs)
    inputs = dict(bias=config.attention_bias, **shared)
    self.query = Linear(width, self.heads * self.head_width, **inputs)
    self.key = Linear(width, self.kv_heads * self.head_width, **inputs)
    self.value = Linear(width, self.kv_heads * self.head_width, **inputs)
    self.out = Linear(self.heads * self.head_width, width, bias=config.out_bias, **shared)

  def queries(self, x):
    """Projects x [B, T, D] to queries [B, T, N, H]."""
    return self._split(self.query(x), self.heads)

  def keys_and_values(self, x):
    """Projects x [B, S, D] to keys and values [B, S, K, H]."""
    return self._split(self.key(x), self.kv_heads), self._split(self.value(x), self.kv_heads)

  def project(self, x):
    """Projects x [B, T, D] to queries [B, T, N, H], keys and values [B, T, K, H]."""
    return self.queries(x), *self.keys_and_values(x)

  def _split(self, y, heads):
    return y.reshape(*y.shape[:2], heads, self.head_width)

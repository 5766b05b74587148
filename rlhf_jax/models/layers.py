"""What the model families share: attention, activations, linear maps.

Letters: B batch, T queries, S keys (cache length where there is a cache), D width, N heads,
K key/value heads, G = N / K queries sharing one of them, H head width, F feed-forward width.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu_tanh(x):
  """GELU's tanh approximation (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).

  The backward pass keeps x alone; what automatic differentiation keeps is a third of all the
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
  """bound * tanh(x / bound), or x where the bound is 0 (Gemma 2, https://arxiv.org/abs/2408.00118, §2)."""
  return bound * jnp.tanh(x / bound) if bound else x


def attention_mask(segments, key_segments, *, index, window=0):
  """Who may look at whom: causally, within equal non-zero segments.

  Args:
    segments: [B, T] int32 of the queries, 0 at padding.
    key_segments: [B, S] int32 of the keys, 0 at padding and at cache slots not yet written.
    index: slot of the first query among the keys, an int or an int32 scalar.
    window: slots a token sees, counted back from itself; 0: all.

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
  """Grouped-query attention; keys and values are not repeated for the queries that share them.

  Scores and softmax are float32. A row whose mask is False everywhere gives the mean of the
  values, which nobody reads, and not NaN, which would spread.

  Args:
    queries: [B, T, N, H], already scaled.
    keys, values: [B, K, S, H].
    mask: [B, 1, 1, T, S] bool (T or B may be 1).
    bias: None, or float32 to add to the scores, of a shape that broadcasts to [B, K, G, T, S].
    score_cap: see `hf_config.Config`.

  Returns:
    [B, T, N * H] of the dtype of the values.
  """
  batch, query_length, heads, head_width = queries.shape
  kv_heads, key_length = keys.shape[1:3]
  groups = heads // kv_heads
  rows = queries.reshape(batch, query_length, kv_heads, groups, head_width).transpose(0, 2, 3, 1, 4)
  rows = rows.reshape(batch, kv_heads, groups * query_length, head_width)
  # Plain batched matrices: with one einsum each, XLA on the CPU transposes the scores instead.
  scores = jnp.matmul(rows, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
  scores = soft_cap(scores.reshape(batch, kv_heads, groups, query_length, key_length), score_cap)
  scores = jnp.where(mask, scores if bias is None else scores + bias, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  weights = weights.reshape(batch, kv_heads, groups * query_length, key_length)
  # Dividing the mixture and not the weights saves a pass over [T, S], and its gradient two.
  if (
    groups * query_length == 1
  ):  # A vector times a matrix each: XLA on the CPU is a fifth faster without a matmul.
    mixed = jnp.sum(weights[:, :, 0, :, None] * values, axis=2, keepdims=True)
  else:
    mixed = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
  mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)
  mixed = mixed.reshape(batch, kv_heads, groups, query_length, head_width).transpose(0, 3, 1, 2, 4)
  return mixed.reshape(batch, query_length, heads * head_width)


def take_last(x, y):
  """The last positions of x [B, T, D], as many as y [B, t, D] has: the residual of a layer whose queries are those."""
  return x[:, x.shape[1] - y.shape[1] :]


def matmul(x, kernel, **options):
  """x [..., D] @ kernel [D, F] over one flat axis of rows.

  With more axes the gradient of the kernel contracts several of them, for which XLA on the CPU
  first transposes (and recomputes) the incoming gradient: 10 ms against 4 for an MLP of width
  128 on 2048 tokens.
  """
  rows = x.reshape(-1, x.shape[-1])
  return jnp.matmul(rows, kernel, **options).reshape(*x.shape[:-1], kernel.shape[-1])


def unembed(hidden, embedding):
  """Logits hidden [..., D] @ embedding [V, D] transposed, [..., V] float32.

  A few rows, as a decode step has, are multiplied from the right: XLA on the CPU takes 9 ms so and
  13 ms otherwise for 8 rows, D 768 and V 50257, of which reading the embedding is 7. The barriers
  keep its simplifier from turning that round.
  """
  embedding = embedding.astype(hidden.dtype)
  if hidden.ndim > 2:
    return matmul(hidden, embedding.T, preferred_element_type=jnp.float32)
  columns = jnp.matmul(
    embedding, jax.lax.optimization_barrier(hidden.T), preferred_element_type=jnp.float32
  )
  return jax.lax.optimization_barrier(columns).T


class LowRank(nnx.Module):
  """s x A B: the adapter of a linear map; see lora.py.

  Args:
    inputs, outputs: of the map.
    rank: columns of A.
    scale: s.
    dtype: of the computation.
  """

  def __init__(self, inputs, outputs, rank, scale, *, dtype):
    self.scale, self.dtype = scale, dtype
    self.a = nnx.Param(jnp.zeros((inputs, rank)))
    self.b = nnx.Param(jnp.zeros((rank, outputs)))

  def __call__(self, rows):
    return (rows @ self.a[...].astype(self.dtype)) @ self.b[...].astype(self.dtype) * self.scale


class Linear(nnx.Linear):
  """x [..., D] -> [..., F] over one flat axis of rows; see `matmul`."""

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
  """LayerNorm; statistics in float32, the variance from the centred values.

  Args:
    config: hf_config.Config of a family.
    dtype: of the computation.
    width: of what is normed; None: D of the blocks.
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
  """RMSNorm; statistics in float32. Arguments as for `LayerNorm`."""

  def __init__(self, config, *, dtype, rngs, width=None):
    super().__init__(
      width or config.block_width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs
    )


class MLP(nnx.Module):
  """down(act(up x)), or with a gate down(act(gate x) * up x).

  Args:
    config: hf_config.Config of a family.
    dtype: of the computation.
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
  """The four projections of attention; mixing over time is the caller's, who owns mask and cache.

  Args:
    config: hf_config.Config of a family.
    dtype: of the computation.
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
    """[B, T, D] -> [B, T, N, H]."""
    return self._split(self.query(x), self.heads)

  def keys_and_values(self, x):
    """[B, S, D] -> two [B, S, K, H]."""
    return self._split(self.key(x), self.kv_heads), self._split(self.value(x), self.kv_heads)

  def project(self, x):
    """x [B, T, D] -> queries [B, T, N, H], keys and values [B, T, K, H]."""
    return self.queries(x), *self.keys_and_values(x)

  def _split(self, y, heads):
    return y.reshape(*y.shape[:2], heads, self.head_width)

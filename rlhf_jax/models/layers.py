"""What the model families share: attention, rotary positions, activations, feed-forward layers.

Letters: B batch, T queries, S keys (cache length where there is a cache), D width, N heads,
K key/value heads, G = N / K queries sharing one of them, H head width, F feed-forward width.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import hf_config


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


def attention_mask(segments, key_segments, *, index):
  """Who may look at whom: causally, within equal non-zero segments.

  Args:
    segments: [B, T] int32 of the queries, 0 at padding.
    key_segments: [B, S] int32 of the keys, 0 at padding and at cache slots not yet written.
    index: slot of the first query among the keys, an int or an int32 scalar.

  Returns:
    [B, 1, 1, T, S] bool, to broadcast over K and G.
  """
  slots = index + jnp.arange(segments.shape[1])
  causal = jnp.arange(key_segments.shape[1])[None, :] <= slots[:, None]
  queries = segments[:, :, None]
  same = (queries == key_segments[:, None, :]) & (queries != 0)
  return (same & causal[None])[:, None, None]


def attend(queries, keys, values, mask):
  """Grouped-query attention; keys and values are not repeated for the queries that share them.

  Scores and softmax are float32. A row whose mask is False everywhere gives the mean of the
  values, which nobody reads, and not NaN, which would spread.

  Args:
    queries: [B, T, N, H], already scaled.
    keys, values: [B, K, S, H].
    mask: [B, 1, 1, T, S] bool.

  Returns:
    [B, T, N * H] of the dtype of the values.
  """
  batch, time, heads, head_width = queries.shape
  kv_heads, slots = keys.shape[1:3]
  groups = heads // kv_heads
  rows = queries.reshape(batch, time, kv_heads, groups, head_width).transpose(0, 2, 3, 1, 4)
  rows = rows.reshape(batch, kv_heads, groups * time, head_width)
  # Plain batched matrices: with one einsum each, XLA on the CPU transposes the scores instead.
  scores = jnp.matmul(rows, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
  scores = jnp.where(mask, scores.reshape(batch, kv_heads, groups, time, slots), jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  weights = weights.reshape(batch, kv_heads, groups * time, slots)
  # Dividing the mixture and not the weights saves a pass over [T, S], and its gradient two.
  mixed = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
  mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)
  mixed = mixed.reshape(batch, kv_heads, groups, time, head_width).transpose(0, 3, 1, 2, 4)
  return mixed.reshape(batch, time, heads * head_width)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Frequencies of rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864).

  Attributes:
    theta: base of the frequencies.
    kind: 'default'; 'linear' divides all frequencies by `factor`; 'llama3' divides the low ones
      and blends towards the high ones (Llama 3.1's rule).
    factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: of 'llama3';
      'linear' has only the first.
  """
  theta: float = 10000.0
  kind: str = 'default'
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  @classmethod
  def from_hf(cls, fields):
    """Takes `rope_parameters`, or the older `rope_scaling` and `rope_theta`, from `hf_config.Fields`.

    Raises:
      UserError: for a kind of scaling not listed here, or parameters it does not have.
    """
    name = 'rope_parameters' if 'rope_parameters' in fields else 'rope_scaling'
    if name == 'rope_parameters' and 'rope_scaling' in fields:
      raise UserError('model config: rope_parameters and rope_scaling are both present; keep one of them')
    given = fields.raw(name, {})
    if not hasattr(given, 'keys'):
      raise hf_config.refusal(name, given, 'must be a dict')
    theta = fields.number('rope_theta', 10000.0)
    inner = hf_config.Fields(given)
    theta = inner.number('rope_theta', theta)
    older = inner.raw('type', 'default')
    kind = inner.raw('rope_type', older)
    if kind not in ('default', 'linear', 'llama3'):
      raise hf_config.refusal(f'{name}.rope_type', kind, "only 'default', 'linear' and 'llama3' are supported")
    inner.only('partial_rotary_factor', 1.0)
    parameters = {}
    if kind != 'default':
      parameters['factor'] = inner.number('factor')
    if kind == 'llama3':
      parameters['low_freq_factor'] = inner.number('low_freq_factor')
      parameters['high_freq_factor'] = inner.number('high_freq_factor')
      parameters['original_max_position_embeddings'] = inner.integer('original_max_position_embeddings')
    try:
      inner.finish()
    except UserError as error:
      raise UserError(f'{error} (inside {name} of type {kind!r})') from None
    return cls(theta=theta, kind=kind, **parameters)

  def to_hf(self):
    """The older spelling, `rope_theta` and `rope_scaling`, which old and new readers understand."""
    if self.kind == 'default':
      return {'rope_theta': self.theta, 'rope_scaling': None}
    scaling = {'rope_type': self.kind, 'factor': self.factor}
    if self.kind == 'llama3':
      scaling['low_freq_factor'] = self.low_freq_factor
      scaling['high_freq_factor'] = self.high_freq_factor
      scaling['original_max_position_embeddings'] = self.original_max_position_embeddings
    return {'rope_theta': self.theta, 'rope_scaling': scaling}

  def frequencies(self, head_width):
    """Radians per position of each pair of coordinates.

    Args:
      head_width: H, even.

    Returns:
      [H / 2] float32 numpy array.
    """
    frequencies = self.theta ** -(np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    if self.kind == 'linear':
      frequencies = frequencies / self.factor
    if self.kind == 'llama3':
      turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
      blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
      blend = np.clip(blend, 0, 1)
      frequencies = frequencies * (blend + (1 - blend) / self.factor)
    return frequencies.astype(np.float32)

  def table(self, positions, head_width):
    """Cosines and sines of all positions, computed once for all layers.

    Args:
      positions: [B, T] int32.
      head_width: H.

    Returns:
      Two [B, T, 1, H / 2] float32, to broadcast over heads.
    """
    angles = positions[:, :, None, None] * self.frequencies(head_width)[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, table):
  """Turns pairs (i, i + H/2) of coordinates by the angles of their positions.

  Args:
    x: [B, T, heads, H].
    table: cosines and sines from `Rope.table`.

  Returns:
    Same shape and dtype as x; the arithmetic is float32.
  """
  cos, sin = table
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def matmul(x, kernel, **options):
  """x [..., D] @ kernel [D, F] over one flat axis of rows.

  With more axes the gradient of the kernel contracts several of them, for which XLA on the CPU
  first transposes (and recomputes) the incoming gradient: 10 ms against 4 for an MLP of width
  128 on 2048 tokens.
  """
  rows = x.reshape(-1, x.shape[-1])
  return jnp.matmul(rows, kernel, **options).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Linear):
  """x [..., D] -> [..., F] over one flat axis of rows; see `matmul`."""

  def __init__(self, inputs, outputs, *, bias, dtype, rngs):
    super().__init__(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)


class Attention(nnx.Module):
  """The four projections of attention; mixing over time is the caller's, who owns mask and cache.

  Args:
    config: of a family, with width, heads, kv_heads and head_width.
    bias: whether the projections have biases.
    dtype: of the computation.
  """

  def __init__(self, config, *, bias, dtype, rngs):
    self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
    shared = dict(bias=bias, dtype=dtype, rngs=rngs)
    self.query = Linear(config.width, self.heads * self.head_width, **shared)
    self.key = Linear(config.width, self.kv_heads * self.head_width, **shared)
    self.value = Linear(config.width, self.kv_heads * self.head_width, **shared)
    self.out = Linear(self.heads * self.head_width, config.width, **shared)

  def project(self, x):
    """x [B, T, D] -> queries [B, T, N, H], keys and values [B, T, K, H]."""
    def split(y, heads):
      return y.reshape(*y.shape[:2], heads, self.head_width)
    return split(self.query(x), self.heads), split(self.key(x), self.kv_heads), split(self.value(x), self.kv_heads)

"""How the layers of a decoder attend, by device and length; `attention_impl` is the one place that chooses.

  plain   `layers.attend`: all scores at once. Short texts, and one token into a cache.
  blocks  block by block in JAX, on any device: memory grows with the length, not with its square.
  splash  the Pallas kernel that comes with JAX, on TPUs.
  cudnn   cuDNN's flash attention, on GPUs in bfloat16.

All follow the rules of `layers.attention_mask`. At padding they give finite numbers, not the same
ones. Through all but 'plain' only reverse-mode derivatives are possible.

Letters: B rows, T queries, S keys, N heads, K key/value heads, G = N / K, H head width; I and J blocks
of t queries and s keys.
"""

import functools
import math

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.models import layers

# Queries and keys of a block. On 2 CPU cores, 4 heads of width 64, forward and backward: 2 x 1024 tokens take
# 66 ms in blocks of 128, 80 of 256, 135 of 512, and 180 all at once.
BLOCK = {'cpu': 128, 'gpu': 256, 'tpu': 256}
# So many blocks of queries and of keys, at least: below, all at once is as fast or faster.
BLOCKS = 4
# Of the TPU: lengths are multiples of its lanes, and splash is given blocks of so many tokens.
LANES, SPLASH = 128, 512


def causal(config, dtype, segments, key_segments, *, index, single_segment):
  """Prepares attention for all layers of a pass.

  Args:
    config: hf_config.Config of a family.
    dtype: of queries, keys and values.
    segments: [B, T] int32 of the queries, 0 at padding.
    key_segments: [B, S] int32 of the keys.
    index: slot of the first query among the keys; a number, known while tracing, or an int32 scalar.
    single_segment: whether rows are known to have no segments but 0 and 1.

  Returns:
    (layer, queries [B, t, N, H] already scaled, keys and values [B, K, S, H]) -> [B, t, N * H], where the
    queries are the last t; layer is an int or an int32 scalar.
  """
  if _known(index):  # Nothing is written further on.
    key_segments = key_segments[:, : int(index) + segments.shape[1]]
  key_length = key_segments.shape[1]
  # A window as long as the keys is none.
  windows = [window if window < key_length else 0 for window in config.windows] or [0]
  window_sizes = sorted(set(windows))
  window_of_layer = [window_sizes.index(window) for window in windows]
  impl = attention_impl(
    config, dtype, *segments.shape, key_length, index=index, single_segment=single_segment
  )
  if impl == 'plain':
    masks = [
      layers.attention_mask(segments, key_segments, index=index, window=window)
      for window in window_sizes
    ]

    def attend(layer, queries, keys, values):
      keys, values = keys[:, :, :key_length], values[:, :, :key_length]
      mask = masks[0] if len(masks) == 1 else jnp.stack(masks)[jnp.array(window_of_layer)[layer]]
      return layers.attend(
        queries, keys, values, mask[..., -queries.shape[1] :, :], score_cap=config.score_cap
      )

    return attend
  if impl == 'blocks':
    function, rows = (
      functools.partial(blocks, index=index, score_cap=config.score_cap),
      (segments, key_segments),
    )
  elif impl == 'splash':
    function, rows = functools.partial(splash, score_cap=config.score_cap), (segments,)
  else:
    function, rows = cudnn, (segments,)
  functions = [
    functools.partial(on_shards, functools.partial(function, window=window))
    for window in window_sizes
  ]

  def attend(layer, queries, keys, values):
    operands = queries, keys[:, :, :key_length], values[:, :, :key_length], *rows
    if len(window_sizes) == 1:
      return functions[0](*operands)
    if isinstance(layer, int):
      return functions[window_of_layer[layer]](*operands)
    return jax.lax.switch(jnp.array(window_of_layer)[layer], functions, *operands)

  return attend


def attention_impl(config, dtype, batch, query_length, key_length, *, index, single_segment):
  """How to attend: 'plain', 'blocks', 'splash' or 'cudnn'; arguments as for `causal`, shapes as numbers."""
  platform = sharding.platform()
  full_sequence = query_length == key_length and _known(index)
  windowed = any(0 < window < key_length for window in config.windows)
  if full_sequence and _divides(batch, config.heads, config.kv_heads):
    if platform == 'tpu' and query_length >= LANES and config.head_width % 64 == 0:
      return 'splash'
    # It has neither segments without a bound on their number, nor caps. Windows would be as long as they
    # should, but over the real tokens only.
    if (
      platform == 'gpu'
      and single_segment
      and not windowed
      and not config.score_cap
      and config.head_width % 8 == 0
      and config.head_width <= 128
      and jnp.dtype(dtype).itemsize == 2
      and _ampere()
    ):
      return 'cudnn'
  return 'blocks' if min(query_length, key_length) >= BLOCKS * BLOCK[platform] else 'plain'


def _known(index):
  """Whether a slot is a number and not an array."""
  return isinstance(index, (int, np.integer))


def _divides(batch, *heads):
  """Whether rows and heads divide over the mesh, if there is one."""
  rows, tensor = sharding.shards()
  return batch % rows == 0 and all(number % tensor == 0 for number in heads)


def _ampere():
  """Whether the GPU, if it is here, is one that cuDNN has flash attention for; AMD's are 'gfx...'."""
  capability = str(getattr(jax.devices()[0], 'compute_capability', '8.0'))
  return capability[0].isdigit() and float(capability) >= 8


def on_shards(function, queries, keys, values, *rows):
  """Calls a function for the rows and heads of each device, where a mesh is set and they divide over it.

  Args:
    function: (queries, keys, values, *rows) -> [B, T, N * H].
    queries: [B, T, N, H].
    keys, values: [B, K, S, H].
    rows: arrays with an axis of rows first.
  """
  operands = queries, keys, values, *rows
  if sharding.shards() == (1, 1) or not _divides(queries.shape[0], queries.shape[2], keys.shape[1]):
    return function(*operands)
  over_rows = sharding.row_spec()
  over_time, over_heads = P(*over_rows, None, 'tensor'), P(*over_rows, 'tensor')
  return jax.shard_map(
    function,
    in_specs=(over_time, over_heads, over_heads) + (over_rows,) * len(rows),
    out_specs=over_time,
    check_vma=False,
  )(*operands)


def blocks(queries, keys, values, segments, key_segments, *, index, window, score_cap):
  """Attention block by block, with a running maximum; FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).

  Kept for the backward pass are the operands, the result and the logarithm of each softmax's
  denominator (§3.1, algorithms 1 and 2); blocks of scores are computed again. Blocks in which nobody
  sees anybody, above the diagonal or before the window, are left out if `index` is known.

  Args:
    queries: [B, t, N, H], already scaled; the last t of T.
    keys, values: [B, K, S, H].
    segments, key_segments, index, window: see `layers.attention_mask`.
    score_cap: see `hf_config.Config`.

  Returns:
    [B, t, N * H] of the dtype of the values; 0 for queries that see nothing.
  """
  batch, query_length, heads, width = queries.shape
  kv_heads, key_length = keys.shape[1:3]
  index, segments = index + segments.shape[1] - query_length, segments[:, -query_length:]
  block = BLOCK[sharding.platform()]
  t, s = min(block, query_length), min(block, key_length)
  grouped = queries.reshape(batch, query_length, kv_heads, heads // kv_heads, width).transpose(
    0, 2, 3, 1, 4
  )
  split = [
    _split_blocks(grouped, t, axis=3),
    _split_blocks(keys, s, axis=2),
    _split_blocks(values, s, axis=2),
    _split_blocks(segments, t, axis=1),
    _split_blocks(key_segments, s, axis=1),
  ]
  pairs = [
    (i, j)
    for i in range(len(split[0]))
    for j in range(len(split[1]))
    if not _known(index) or _can_attend(index + i * t, t, j * s, s, window)
  ]
  output = _blocks(*split, jnp.int32(index), np.array(pairs, np.int32), window, score_cap)
  output = output.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads * width)
  return output[:, :query_length]


def _split_blocks(x, size, *, axis):
  """x in blocks of `size` along an axis, filled up with zeros; the number of the block is a new first axis."""
  count = -(-x.shape[axis] // size)
  x = jnp.pad(
    x, [(0, count * size - length if i == axis else 0) for i, length in enumerate(x.shape)]
  )
  x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _can_attend(query, queries, key, keys, window):
  """Whether one of so many queries from slot `query` on may see one of the keys from slot `key` on."""
  return query + queries - 1 >= key and (not window or query - window < key + keys - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _blocks(queries, keys, values, segments, key_segments, index, pairs, window, score_cap):
  """Blocks of attention.

  Args:
    queries: [I, B, K, G, t, H].
    keys, values: [J, B, K, s, H].
    segments, key_segments: [I, B, t] and [J, B, s].
    index: int32 scalar.
    pairs: [., 2] int32, blocks of queries and of keys to bring together.
    window, score_cap: see `blocks`.

  Returns:
    [I, B, K, G, t, H] of the dtype of the values.
  """
  return _forward(queries, keys, values, segments, key_segments, index, pairs, window, score_cap)[0]


def _forward(queries, keys, values, segments, key_segments, index, pairs, window, score_cap):
  def step(carry, pair):
    output, running_max, total = carry
    i, j = pair
    scores, visible = _scores(queries, keys, segments, key_segments, index, pair, window, score_cap)
    new_max = jnp.maximum(
      running_max[i], jnp.max(scores, axis=-1, where=visible, initial=lowest, keepdims=True)
    )
    weights = jnp.where(visible, jnp.exp(scores - new_max), 0.0)
    correction = jnp.exp(running_max[i] - new_max)
    update = _matmul(weights.astype(values.dtype), values[j])
    return (
      output.at[i].set(correction * output[i] + update),
      running_max.at[i].set(new_max),
      total.at[i].set(correction * total[i] + weights.sum(axis=-1, keepdims=True)),
    ), None

  lowest = float(jnp.finfo(jnp.float32).min)
  column = jnp.zeros((*queries.shape[:-1], 1), jnp.float32)
  (output, running_max, total), _ = jax.lax.scan(
    step, (jnp.zeros(queries.shape, jnp.float32), column + lowest, column), pairs
  )
  any_visible = total > 0
  total = jnp.where(any_visible, total, 1.0)
  output = (output / total).astype(values.dtype)
  logsumexp = jnp.where(any_visible, running_max + jnp.log(total), 0.0)
  return output, (queries, keys, values, segments, key_segments, index, pairs, output, logsumexp)


def _backward(window, score_cap, residuals, gradient):
  queries, keys, values, segments, key_segments, index, pairs, output, logsumexp = residuals
  gradient = gradient.astype(values.dtype)
  # What a softmax takes off each of its gradients, sum_j p_j dp_j.
  delta = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)

  def step(carry, pair):
    d_queries, d_keys, d_values = carry
    i, j = pair
    scores, visible = _scores(queries, keys, segments, key_segments, index, pair, window, score_cap)
    weights = jnp.where(visible, jnp.exp(scores - logsumexp[i]), 0.0)
    d_scores = weights * (_matmul(gradient[i], values[j].swapaxes(-1, -2)) - delta[i])
    if score_cap:
      d_scores *= 1 - jnp.square(scores / score_cap)
    weights, d_scores = weights.astype(values.dtype), d_scores.astype(keys.dtype)
    return (
      d_queries.at[i].add(_matmul(d_scores, keys[j])),
      d_keys.at[j].add(_over_queries(d_scores, queries[i])),
      d_values.at[j].add(_over_queries(weights, gradient[i])),
    ), None

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, keys, values))
  gradients, _ = jax.lax.scan(step, zeros, pairs)
  return tuple(d.astype(x.dtype) for d, x in zip(gradients, (queries, keys, values))) + (None,) * 4


_blocks.defvjp(_forward, _backward)


def _scores(queries, keys, segments, key_segments, index, pair, window, score_cap):
  """Scores [B, K, G, t, s] float32 of a pair of blocks, and who sees whom, [B, 1, 1, t, s]."""
  i, j = pair
  t, s = segments.shape[-1], key_segments.shape[-1]
  # Masks are the same for all layers: if nothing tied them to the queries, JAX would compute those of all pairs
  # ahead of a scan over layers.
  queries, segments, index = jax.lax.optimization_barrier(
    (queries[i], segments[i], index + i * t - j * s)
  )
  visible = layers.attention_mask(segments, key_segments[j], index=index, window=window)
  return layers.soft_cap(_matmul(queries, keys[j].swapaxes(-1, -2)), score_cap), visible


def _matmul(rows, columns):
  """[B, K, G, t, x] @ [B, K, x, y] -> [B, K, G, t, y] float32, as one matrix for each key/value head."""
  flat = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
  product = jnp.matmul(flat, columns, preferred_element_type=jnp.float32)
  return product.reshape(*rows.shape[:-1], columns.shape[-1])


def _over_queries(left, right):
  """[B, K, G, t, x] and [B, K, G, t, y] -> [B, K, x, y] float32, summed over G and t."""
  left, right = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (left, right))
  return jnp.matmul(left.swapaxes(-1, -2), right, preferred_element_type=jnp.float32)


def splash(queries, keys, values, segments, *, window, score_cap, interpret=False):
  """Attention of whole texts with the Pallas kernel for TPUs; arguments and result as for `blocks`, S = T.

  The kernel has segments, a window, caps and grouped queries. Padding is a segment like any other, in
  which every token sees itself, so there is no softmax of nothing.
  """
  length, query_length = segments.shape[1], queries.shape[1]
  size = -(-length // LANES) * LANES
  fill = ((0, 0), (0, 0), (0, size - length), (0, 0))
  queries = jnp.pad(
    queries.swapaxes(1, 2), ((0, 0), (0, 0), (length - query_length, size - length), (0, 0))
  )
  keys, values = jnp.pad(keys, fill), jnp.pad(values, fill)
  segments = jnp.pad(segments, ((0, 0), (0, size - length)))
  visible = splash_attention.LocalMask((size, size), (window - 1 if window else None, 0), 0)
  block = math.gcd(size, SPLASH)
  sizes = splash_attention.BlockSizes(*[block] * 8)
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([visible] * queries.shape[1]),
    block_sizes=sizes,
    attn_logits_soft_cap=score_cap or None,
    interpret=interpret,
  )
  output = jax.vmap(kernel)(queries, keys, values, splash_attention.SegmentIds(segments, segments))
  return (
    output[:, :, length - query_length : length]
    .swapaxes(1, 2)
    .reshape(queries.shape[0], query_length, -1)
  )


def cudnn(queries, keys, values, segments, *, window):
  """Attention of one text a row with cuDNN; arguments and result as for `blocks`, S = T, no window.

  A mask would be a bias of [T, T]. But with the real tokens moved to the front, in their order, to be
  causal hides all padding from them, and their number is all that has to be said.
  """
  del window
  length, query_length = segments.shape[1], queries.shape[1]
  odd = length % 2  # Gradients are of an even number of slots only.
  queries = jnp.pad(queries, ((0, 0), (length - query_length, odd), (0, 0), (0, 0)))
  keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, odd), (0, 0))) for x in (keys, values))
  segments = jnp.pad(segments, ((0, 0), (0, odd)))
  order = jnp.argsort(segments == 0, axis=1, stable=True)
  back = jnp.argsort(order, axis=1)
  count = jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
  real = (jnp.arange(length + odd)[None] < count[:, None])[:, :, None, None]
  # What cuDNN writes beyond the real tokens, values or gradients, is not said.
  operands = queries, keys.swapaxes(1, 2), values.swapaxes(1, 2)
  operands = [jnp.where(real, _permute(x, order, back), 0) for x in operands]
  output = jax.nn.dot_product_attention(
    *operands,
    scale=1.0,
    is_causal=True,
    query_seq_lengths=count,
    key_value_seq_lengths=count,
    implementation='cudnn',
  )
  output = _permute(jnp.where(real, output, 0), back, order)[:, length - query_length : length]
  return output.reshape(*output.shape[:2], -1)


@jax.custom_vjp
def _permute(x, order, back):
  """x [B, T, N, H] in another order [B, T] along T; `back` undoes it. Its gradient is a gather, not a scatter."""
  return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


_permute.defvjp(
  lambda x, order, back: (_permute(x, order, back), (order, back)),
  lambda residuals, gradient: (_permute(gradient, *residuals[::-1]), None, None),
)

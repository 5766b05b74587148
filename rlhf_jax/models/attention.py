"""Implementations of causal attention; `attention_impl` chooses one by device and length.

  plain   `layers.attend`: all scores at once, for short sequences and for decoding one token.
  blocks  Block by block in JAX, on any device: memory is linear in the length, not quadratic.
  splash  The Pallas kernel that comes with JAX, on TPUs.
  cudnn   cuDNN's flash attention, on GPUs in bfloat16.

All of them mask as `layers.attention_mask` does. Outputs at padding are finite but differ between
implementations. All but 'plain' support reverse-mode differentiation only.

Letters: B batch, T queries, S keys, N heads, K key/value heads, G = N / K, H head width; I blocks
of t queries, J blocks of s keys.
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

# Queries or keys per block. On 2 CPU cores with 4 heads of width 64, forward and backward over
# 2 x 1024 tokens take 66 ms with blocks of 128, 80 with 256, 135 with 512, and 180 with 'plain'.
BLOCK_SIZE = {'cpu': 128, 'gpu': 256, 'tpu': 256}
# With fewer blocks of queries or of keys, 'plain' is as fast or faster.
MIN_BLOCKS = 4
# 'splash' pads lengths to a multiple of TPU_LANES, and uses blocks of at most SPLASH_BLOCK_SIZE
# tokens.
TPU_LANES, SPLASH_BLOCK_SIZE = 128, 512


def causal(config, dtype, segments, key_segments, *, index, single_segment, plain=False):
  """Returns the attention function of a forward pass, shared by all layers.

  Args:
    config: hf_config.Config of a family.
    dtype: Dtype of queries, keys and values.
    segments: [B, T] int32, segments of the queries, 0 at padding.
    key_segments: [B, S] int32, segments of the keys.
    index: Slot of the first query among the keys: a Python or numpy integer, or an int32 scalar.
    single_segment: Whether every sequence is known to have only the segments 0 and 1.
    plain: Whether to use 'plain' whatever the device and the lengths are.

  Returns:
    Function (layer, queries [B, t, N, H] already scaled, keys and values [B, K, S, H]) ->
    [B, t, N * H]. The queries are the last t of T; layer is an int or an int32 scalar.
  """
  if _is_static(index):  # Slots after the last query are empty.
    key_segments = key_segments[:, : int(index) + segments.shape[1]]
  key_length = key_segments.shape[1]
  # A window of at least S slots masks nothing.
  windows = [window if window < key_length else 0 for window in config.windows] or [0]
  window_sizes = sorted(set(windows))
  window_of_layer = [window_sizes.index(window) for window in windows]
  impl = (
    'plain'
    if plain
    else attention_impl(
      config, dtype, *segments.shape, key_length, index=index, single_segment=single_segment
    )
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
    function, batch_arrays = (
      functools.partial(blocks, index=index, score_cap=config.score_cap),
      (segments, key_segments),
    )
  elif impl == 'splash':
    function, batch_arrays = functools.partial(splash, score_cap=config.score_cap), (segments,)
  else:
    function, batch_arrays = cudnn, (segments,)
  functions = [
    functools.partial(on_shards, functools.partial(function, window=window))
    for window in window_sizes
  ]

  def attend(layer, queries, keys, values):
    operands = queries, keys[:, :, :key_length], values[:, :, :key_length], *batch_arrays
    if len(window_sizes) == 1:
      return functions[0](*operands)
    if isinstance(layer, int):
      return functions[window_of_layer[layer]](*operands)
    return jax.lax.switch(jnp.array(window_of_layer)[layer], functions, *operands)

  return attend


def attention_impl(config, dtype, batch, query_length, key_length, *, index, single_segment):
  """Chooses an implementation of attention.

  Args:
    config, dtype, index, single_segment: See `causal`.
    batch, query_length, key_length: B, T and S.

  Returns:
    'plain', 'blocks', 'splash' or 'cudnn'.
  """
  platform = sharding.platform()
  full_sequence = query_length == key_length and _is_static(index)
  windowed = any(0 < window < key_length for window in config.windows)
  if full_sequence and _divides(batch, config.heads, config.kv_heads):
    if platform == 'tpu' and query_length >= TPU_LANES and config.head_width % 64 == 0:
      return 'splash'
    # cuDNN has no score caps and no unbounded number of segments. Its windows would count real
    # tokens, not slots.
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
  is_long = min(query_length, key_length) >= MIN_BLOCKS * BLOCK_SIZE[platform]
  return 'blocks' if is_long else 'plain'


def _is_static(index):
  """Returns whether a slot is known while tracing: a number, not an array."""
  return isinstance(index, (int, np.integer))


def _divides(batch, *heads):
  """Returns whether the batch and the numbers of heads divide evenly over the mesh, if any."""
  data, tensor = sharding.shards()
  return batch % data == 0 and all(number % tensor == 0 for number in heads)


def _ampere():
  """Returns whether the GPU has cuDNN's flash attention: Ampere or later.

  Assumes that it has if no GPU is present, as when compiling for another machine. The compute
  capability of AMD's GPUs starts with 'gfx'.
  """
  capability = str(getattr(jax.devices()[0], 'compute_capability', '8.0'))
  return capability[0].isdigit() and float(capability) >= 8


def on_shards(function, queries, keys, values, *batch_arrays):
  """Calls an attention function on each device's shard of the sequences and heads.

  Calls it on the full arrays if no mesh is set or if they do not divide over it.

  Args:
    function: (queries, keys, values, *batch_arrays) -> [B, T, N * H].
    queries: [B, T, N, H].
    keys, values: [B, K, S, H].
    batch_arrays: Arrays whose first axis is B.

  Returns:
    [B, T, N * H].
  """
  operands = queries, keys, values, *batch_arrays
  if sharding.shards() == (1, 1) or not _divides(queries.shape[0], queries.shape[2], keys.shape[1]):
    return function(*operands)
  batch_spec = sharding.row_spec()
  # Heads are the third axis of queries and outputs, the second of keys and values.
  query_spec, key_spec = P(*batch_spec, None, 'tensor'), P(*batch_spec, 'tensor')
  return jax.shard_map(
    function,
    in_specs=(query_spec, key_spec, key_spec) + (batch_spec,) * len(batch_arrays),
    out_specs=query_spec,
    check_vma=False,
  )(*operands)


def blocks(queries, keys, values, segments, key_segments, *, index, window, score_cap):
  """Computes attention block by block, with a running maximum.

  See FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691), §3.1, algorithms 1 and 2. The
  backward pass stores the operands, the output and the log of each softmax's denominator; it
  recomputes blocks of scores. If `index` is static, blocks that are masked everywhere because they
  lie above the diagonal or before the window are skipped.

  Args:
    queries: [B, t, N, H], already scaled; the last t of T.
    keys, values: [B, K, S, H].
    segments, key_segments, index, window: See `layers.attention_mask`.
    score_cap: See `hf_config.Config`.

  Returns:
    [B, t, N * H] in the dtype of the values; 0 for queries whose keys are all masked.
  """
  batch, query_length, heads, width = queries.shape
  kv_heads, key_length = keys.shape[1:3]
  index, segments = index + segments.shape[1] - query_length, segments[:, -query_length:]
  block_size = BLOCK_SIZE[sharding.platform()]
  t, s = min(block_size, query_length), min(block_size, key_length)
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
    if not _is_static(index) or _can_attend(index + i * t, t, j * s, s, window)
  ]
  output = _blocks(*split, jnp.int32(index), np.array(pairs, np.int32), window, score_cap)
  output = output.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads * width)
  return output[:, :query_length]


def _split_blocks(x, size, *, axis):
  """Splits an axis of x, padded with zeros, into blocks of `size`, numbered by a new first axis."""
  count = -(-x.shape[axis] // size)
  x = jnp.pad(
    x, [(0, count * size - length if i == axis else 0) for i, length in enumerate(x.shape)]
  )
  x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _can_attend(first_query, num_queries, first_key, num_keys, window):
  """Returns whether any query of one block may attend to any key of another, by their slots."""
  last_query, last_key = first_query + num_queries - 1, first_key + num_keys - 1
  return last_query >= first_key and (not window or first_query - window < last_key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _blocks(queries, keys, values, segments, key_segments, index, pairs, window, score_cap):
  """Computes `blocks` on operands that are split into blocks, with its own backward pass.

  Args:
    queries: [I, B, K, G, t, H].
    keys, values: [J, B, K, s, H].
    segments, key_segments: [I, B, t] and [J, B, s].
    index: int32 scalar.
    pairs: [pairs, 2] int32, each a block of queries and a block of keys that it attends to.
    window, score_cap: See `blocks`.

  Returns:
    [I, B, K, G, t, H] in the dtype of the values.
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
  # The gradient of softmax is ds_j = p_j (dp_j - delta) with delta = sum_j p_j dp_j.
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
  """Returns scores [B, K, G, t, s] float32 and mask [B, 1, 1, t, s] of a pair of blocks."""
  i, j = pair
  t, s = segments.shape[-1], key_segments.shape[-1]
  # Masks are the same for all layers. Without a dependency on the queries, JAX would compute the
  # masks of all pairs before a scan over layers.
  queries, segments, index = jax.lax.optimization_barrier(
    (queries[i], segments[i], index + i * t - j * s)
  )
  visible = layers.attention_mask(segments, key_segments[j], index=index, window=window)
  return layers.soft_cap(_matmul(queries, keys[j].swapaxes(-1, -2)), score_cap), visible


def _matmul(left, right):
  """Returns [B, K, G, t, x] @ [B, K, x, y] as [B, K, G, t, y] float32, one matmul per K."""
  flat = left.reshape(*left.shape[:2], -1, left.shape[-1])
  product = jnp.matmul(flat, right, preferred_element_type=jnp.float32)
  return product.reshape(*left.shape[:-1], right.shape[-1])


def _over_queries(left, right):
  """Sums products of [B, K, G, t, x] and [B, K, G, t, y] over G and t: [B, K, x, y] float32."""
  left, right = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (left, right))
  return jnp.matmul(left.swapaxes(-1, -2), right, preferred_element_type=jnp.float32)


def splash(queries, keys, values, segments, *, window, score_cap, interpret=False):
  """Computes attention with the Pallas kernel for TPUs, over full sequences (S = T).

  The kernel supports segments, a window, caps and grouped queries. It treats padding as one more
  segment, in which every token sees itself, so no softmax is empty.

  Args:
    queries, keys, values, segments, window, score_cap: See `blocks`.
    interpret: Whether to run the kernel in Pallas' interpreter, on any device.

  Returns:
    [B, t, N * H] in the dtype of the values.
  """
  length, query_length = segments.shape[1], queries.shape[1]
  size = -(-length // TPU_LANES) * TPU_LANES
  padding = ((0, 0), (0, 0), (0, size - length), (0, 0))
  queries = jnp.pad(
    queries.swapaxes(1, 2), ((0, 0), (0, 0), (length - query_length, size - length), (0, 0))
  )
  keys, values = jnp.pad(keys, padding), jnp.pad(values, padding)
  segments = jnp.pad(segments, ((0, 0), (0, size - length)))
  mask = splash_attention.LocalMask((size, size), (window - 1 if window else None, 0), 0)
  block_size = math.gcd(size, SPLASH_BLOCK_SIZE)
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * queries.shape[1]),
    block_sizes=splash_attention.BlockSizes(*[block_size] * 8),
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
  """Computes attention with cuDNN, over full sequences (S = T) that have one segment each.

  cuDNN would take a mask as a bias of shape [T, T]. Instead, the real tokens are moved to the
  front, in order: a causal mask then hides all padding from them, and cuDNN needs only their
  number.

  Args:
    queries, keys, values, segments: See `blocks`.
    window: Ignored; `attention_impl` chooses cuDNN only for layers without windows.

  Returns:
    [B, t, N * H] in the dtype of the values.
  """
  del window
  length, query_length = segments.shape[1], queries.shape[1]
  odd = length % 2  # The backward pass of cuDNN needs an even length.
  queries = jnp.pad(queries, ((0, 0), (length - query_length, odd), (0, 0), (0, 0)))
  keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, odd), (0, 0))) for x in (keys, values))
  segments = jnp.pad(segments, ((0, 0), (0, odd)))
  order = jnp.argsort(segments == 0, axis=1, stable=True)
  back = jnp.argsort(order, axis=1)
  count = jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
  real = (jnp.arange(length + odd)[None] < count[:, None])[:, :, None, None]
  # What cuDNN writes after the real tokens, in outputs or gradients, is undefined.
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
  """Reorders x [B, T, N, H] along T by `order` [B, T], whose inverse is `back`.

  The inverse makes the gradient a gather instead of a scatter.
  """
  return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


_permute.defvjp(
  lambda x, order, back: (_permute(x, order, back), (order, back)),
  lambda residuals, gradient: (_permute(gradient, *residuals[::-1]), None, None),
)

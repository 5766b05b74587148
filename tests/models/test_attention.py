"""All implementations of attention against `layers.attend` and a loop; memory; and the choice."""

import dataclasses
import functools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.models import attention
from rlhf_jax.models import layers

HEADS, KV_HEADS, WIDTH = 4, 2, 8
GEMMA2 = {
  'family': 'gemma2',
  'vocab_size': 29,
  'hidden_size': 12,
  'intermediate_size': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'max_position_embeddings': 32768,
  'sliding_window': 40,
  'query_pre_attn_scalar': 6,
  'initializer_range': 0.3,
}


@pytest.fixture
def small_blocks(monkeypatch):
  """Sets blocks of 16 tokens, so that a few dozen tokens fill several blocks."""
  monkeypatch.setitem(attention.BLOCK_SIZE, sharding.platform(), 16)


def ragged(length):
  """Returns rows with padding on both sides, three texts, holes, no padding, and no tokens."""
  segments = np.zeros((5, length), np.int32)
  segments[0, length // 3 : -5] = 1
  segments[1] = 1 + (np.arange(length) >= length // 2) + (np.arange(length) >= length - 7)
  segments[2, ::2] = 1
  segments[3] = 1
  return jnp.asarray(segments)


def draw(rows, length, dtype=jnp.float32, heads=HEADS, width=WIDTH):
  """Returns queries, keys, values, and weights for a sum over the result."""
  random = np.random.default_rng(0)
  shapes = (
    (rows, length, heads, width),
    *[(rows, KV_HEADS, length, width)] * 2,
    (rows, length, heads * width),
  )
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def plain(queries, keys, values, segments, *, window=0, score_cap=0.0):
  return layers.attend(
    queries,
    keys,
    values,
    layers.attention_mask(segments, segments, index=0, window=window),
    score_cap=score_cap,
  )


def in_blocks(queries, keys, values, segments, *, window=0, score_cap=0.0, index=0):
  return attention.blocks(
    queries, keys, values, segments, segments, index=index, window=window, score_cap=score_cap
  )


def results(function, queries, keys, values, weights, segments):
  """Returns outputs of real tokens and gradients of their sum; no NaN may occur anywhere."""
  real = (segments != 0)[:, :, None]

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def run(queries, keys, values, weights):
    mixed = function(queries, keys, values, segments)
    return jnp.sum(mixed.astype(jnp.float32) * weights), mixed

  (_, mixed), gradients = run(queries, keys, values, weights)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (mixed, *gradients))
  _, gradients = run(queries, keys, values, jnp.where(real, weights, 0))
  return [jnp.where(real, mixed, 0), *gradients]


def agree(found, expected, atol):
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(
      np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=0, atol=atol
    )


@pytest.mark.parametrize('window,score_cap', [(0, 0.0), (5, 0.0), (0, 1.5), (20, 1.5)])
def test_blocks_against_a_loop(small_blocks, window, score_cap):
  segments = np.asarray(ragged(40))
  queries, keys, values, _ = map(np.asarray, draw(5, 40))
  found = in_blocks(
    *map(jnp.asarray, (queries, keys, values, segments)), window=window, score_cap=score_cap
  )
  expected = np.zeros(found.shape)
  for row, t in zip(*np.nonzero(segments)):
    seen = [
      s
      for s in range(t + 1)
      if segments[row, s] == segments[row, t] and (not window or t - s < window)
    ]
    for head in range(HEADS):
      k = head // (HEADS // KV_HEADS)
      scores = np.array([queries[row, t, head] @ keys[row, k, s] for s in seen])
      weights = np.exp(score_cap * np.tanh(scores / score_cap) if score_cap else scores)
      mixed = sum(weight * values[row, k, s] for weight, s in zip(weights / weights.sum(), seen))
      expected[row, t, head * WIDTH : (head + 1) * WIDTH] = mixed
  np.testing.assert_allclose(np.where(segments[:, :, None], found, 0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('length', [16, 64, 75])
@pytest.mark.parametrize('window,score_cap', [(0, 0.0), (20, 1.5)])
@pytest.mark.parametrize('index', [0, jnp.int32(0)], ids=['index known', 'not known'])
def test_blocks_and_their_gradients(small_blocks, length, window, score_cap, index):
  segments, operands = ragged(length), draw(5, length)
  settings = dict(window=window, score_cap=score_cap)
  agree(
    results(functools.partial(in_blocks, index=index, **settings), *operands, segments),
    results(functools.partial(plain, **settings), *operands, segments),
    1e-5,
  )


def test_blocks_in_bfloat16(small_blocks):
  segments = ragged(64)
  exact = results(plain, *draw(5, 64), segments)
  bfloat16 = [
    results(function, *draw(5, 64, jnp.bfloat16), segments) for function in (in_blocks, plain)
  ]
  assert bfloat16[0][0].dtype == bfloat16[0][1].dtype == jnp.bfloat16
  errors = [[float(jnp.abs(x - y).max()) for x, y in zip(found, exact)] for found in bfloat16]
  for blocks, all_at_once in zip(*errors):
    assert blocks < 1.5 * all_at_once + 1e-3


def test_blocks_of_the_last_queries_and_of_a_part_of_the_cache(small_blocks):
  segments = ragged(50)
  queries, keys, values, _ = draw(5, 50)
  whole = in_blocks(queries, keys, values, segments)
  last = in_blocks(queries[:, -7:], keys, values, segments)
  np.testing.assert_allclose(last, whole[:, -7:], rtol=0, atol=1e-6)
  # Slots 20 to 49 in a separate call.
  for index in (20, jnp.int32(20)):
    part = attention.blocks(
      queries[:, 20:],
      keys,
      values,
      segments[:, 20:],
      segments,
      index=index,
      window=9,
      score_cap=0.0,
    )
    np.testing.assert_allclose(
      part, in_blocks(queries, keys, values, segments, window=9)[:, 20:], rtol=0, atol=1e-6
    )


def test_the_kernel_for_tpus():
  # A length and a width that are not multiples of a TPU's lanes.
  segments, operands = ragged(150), draw(5, 150)
  for settings in (dict(window=0, score_cap=0.0), dict(window=20, score_cap=1.5)):
    agree(
      results(functools.partial(attention.splash, interpret=True, **settings), *operands, segments),
      results(functools.partial(plain, **settings), *operands, segments),
      2e-5,
    )


def one_text(length):
  return (ragged(length) == 1).astype(jnp.int32)


def cudnn_on_a_cpu(monkeypatch):
  """Replaces cuDNN by XLA, with garbage where outputs and gradients of cuDNN are undefined."""
  real = jax.nn.dot_product_attention

  def garble(x, count):
    return jnp.where((jnp.arange(x.shape[1])[None] < count[:, None])[:, :, None, None], x, jnp.nan)

  @jax.custom_vjp
  def garble_gradient(x, count):
    return x

  garble_gradient.defvjp(lambda x, count: (x, count), lambda count, dx: (garble(dx, count), None))

  def stand_in(
    queries, keys, values, *, query_seq_lengths, key_value_seq_lengths, implementation, **settings
  ):
    assert implementation == 'cudnn' and set(settings) == {'scale', 'is_causal'}
    operands = [garble_gradient(x, key_value_seq_lengths) for x in (queries, keys, values)]
    mixed = real(
      *operands,
      **settings,
      query_seq_lengths=query_seq_lengths,
      key_value_seq_lengths=key_value_seq_lengths,
    )
    return garble(mixed, query_seq_lengths)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)


@pytest.mark.parametrize('length', [40, 41])
def test_rows_are_moved_for_cudnn_and_back(monkeypatch, length):
  cudnn_on_a_cpu(monkeypatch)
  segments, operands = one_text(length), draw(5, length)
  agree(
    results(functools.partial(attention.cudnn, window=0), *operands, segments),
    results(plain, *operands, segments),
    1e-5,
  )
  last = attention.cudnn(operands[0][:, -7:], *operands[1:3], segments, window=0)
  agree([last], [attention.cudnn(*operands[:3], segments, window=0)[:, -7:]], 1e-6)


@pytest.mark.parametrize('count, length', [(1, 64), (1, 63), (8, 64)])
def test_cudnn_is_called_without_a_mask(monkeypatch, count, length):
  fused = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91000)
  operands = draw(4, length, jnp.bfloat16)[:3]
  attend = functools.partial(attention.on_shards, functools.partial(attention.cudnn, window=0))
  loss = lambda *operands: jnp.sum(attend(*operands, one_text(length)[:4]).astype(jnp.float32))
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  mesh = sharding.make_mesh(
    dict.fromkeys(sharding.AXES, 2 if count == 8 else 1), devices=devices.first(count)
  )
  with jax.set_mesh(mesh):
    text = gradient.trace(*operands).lower(lowering_platforms=('cuda',)).as_text()
  for part in ('__cudnn$fmhaSoftmax(', '__cudnn$fmhaSoftmaxBackward(', 'PADDING_CAUSAL'):
    assert part in text
  assert 'ScaleBias' not in text and 'scatter' not in text


@pytest.mark.parametrize(
  'function',
  [in_blocks, functools.partial(attention.splash, window=0, score_cap=0.0, interpret=True)],
  ids=['blocks', 'splash'],
)
def test_eight_devices(small_blocks, function):
  """Sequences over 'data' and 'fsdp', heads over 'tensor'; no communication is needed."""
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}, devices=devices.first(8))
  segments = jnp.concatenate([ragged(40)[:3], jnp.ones((1, 40), jnp.int32)])
  operands = draw(4, 40)
  expected = results(function, *operands, segments)
  over_heads = jax.sharding.PartitionSpec(*sharding.BATCH, 'tensor')
  with jax.set_mesh(mesh):
    agree(
      results(functools.partial(attention.on_shards, function), *operands, segments), expected, 1e-5
    )
    places = [
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*sharding.BATCH, None, 'tensor')),
      *[jax.sharding.NamedSharding(mesh, over_heads)] * 2,
    ]
    call = jax.jit(
      jax.grad(lambda *x: jnp.sum(attention.on_shards(function, *x, segments)), argnums=(0, 1, 2))
    )
    text = (
      call.lower(
        *[
          jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
          for x, place in zip(operands, places)
        ]
      )
      .compile()
      .as_text()
    )
  assert not any(
    name in text for name in ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute')
  )


def choose(
  monkeypatch,
  platform,
  *,
  length=1024,
  dtype='bfloat16',
  key_length=0,
  index=0,
  single_segment=True,
  batch=4,
  **fields,
):
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  usual = GEMMA2 | {'head_dim': 64, 'sliding_window': 4096, 'attn_logit_softcapping': None}
  return attention.attention_impl(
    models.create(usual | fields).config,
    dtype,
    batch,
    length,
    key_length or length,
    index=index,
    single_segment=single_segment,
  )


def test_the_choice(monkeypatch):
  chosen = functools.partial(choose, monkeypatch)
  assert [chosen('cpu', length=length) for length in (1, 511, 512)] == ['plain', 'plain', 'blocks']
  assert [chosen('tpu', length=length) for length in (1, 127, 128)] == ['plain', 'plain', 'splash']
  assert (
    chosen('tpu', sliding_window=100, attn_logit_softcapping=50.0, single_segment=False) == 'splash'
  )
  assert chosen('tpu', head_dim=40) == 'blocks'
  # Queries into a cache that start at a traced slot.
  assert chosen('tpu', key_length=2048, index=jnp.int32(5)) == 'blocks'
  assert chosen('gpu', length=64) == 'cudnn' and chosen('gpu', dtype='float32') == 'blocks'
  for other in (
    dict(single_segment=False),
    dict(sliding_window=100),
    dict(attn_logit_softcapping=50.0),
    dict(head_dim=256),
  ):
    assert chosen('gpu', **other) == 'blocks' and chosen('gpu', length=512, **other) == 'plain'
  with jax.set_mesh(
    sharding.make_mesh({'fsdp': 2, 'tensor': 4}, devices=devices.first(8))
  ):  # for 2 key/value heads
    assert chosen('tpu') == 'blocks'
  with jax.set_mesh(sharding.make_mesh({'fsdp': 8}, devices=devices.first(8))):
    assert chosen('tpu') == 'blocks' and chosen('tpu', batch=8) == 'splash'


def test_the_platform_is_that_of_the_mesh():
  assert sharding.platform() == jax.default_backend()
  tpu = jax.sharding.AbstractMesh(
    (1, 1, 1), sharding.AXES, abstract_device=jax.sharding.AbstractDevice('', 1, 'tpu')
  )
  with jax.sharding.use_abstract_mesh(tpu):
    assert sharding.platform() == 'tpu'


@pytest.mark.parametrize('unroll', [1, 2])
def test_a_model_with_windows_in_every_other_layer(monkeypatch, unroll):
  """Training, and a prompt read into a cache, with blocks and with plain attention."""
  model = dataclasses.replace(
    models.create(GEMMA2), unroll=unroll, remat='block' if unroll == 1 else 'none'
  )
  params = model.init(jax.random.key(0))
  mask = (ragged(96) == 1)[jnp.array([0, 1, 3, 4])]
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 29, mask.shape), jnp.int32)

  def run(params):
    states = model.response_states(params, tokens, mask, 50)
    state, _ = model.prefill(params, tokens, mask, 3)
    return jnp.sum(states * mask[:, -50:, None]) + jnp.sum(state * mask[:, -1:]), states * mask[
      :, -50:, None
    ]

  found = []
  for block in (1024, 16):
    monkeypatch.setitem(attention.BLOCK_SIZE, sharding.platform(), block)
    (_, states), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    found.append([states, *jax.tree.leaves(gradients)])
  for x, y in zip(*found, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('window', [1000, 32768])
def test_memory_grows_with_the_length_and_not_with_its_square(window):
  """Forward and backward with remat at 2 k to 32 k tokens; all scores of 32 k would be 16 GiB."""
  model = models.create(GEMMA2 | {'sliding_window': window}, remat='block')
  params = jax.eval_shape(model.init, jax.random.key(0))

  def loss(params, tokens, mask):
    hidden, _ = model.forward(params, tokens, types.positions_from_mask(mask), mask)
    return jnp.sum(jnp.square(hidden))

  used = []
  for length in (2048, 8192, 32768):
    shape = functools.partial(jax.ShapeDtypeStruct, (1, length))
    compiled = jax.jit(jax.grad(loss)).lower(params, shape(jnp.int32), shape(bool)).compile()
    used.append(compiled.memory_analysis().temp_size_in_bytes)
  assert all(long < 4.2 * short for short, long in zip(used, used[1:])), used
  assert used[-1] < 200 * 2**20, used

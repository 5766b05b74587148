"""Properties of the backbone: caches, packing, padding, scans; real models if present."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.types import positions_from_mask

GPT2 = {
  'family': 'gpt2',
  'vocab_size': 31,
  'n_positions': 32,
  'n_embd': 12,
  'n_layer': 2,
  'n_head': 3,
  'scale_attn_by_inverse_layer_idx': True,
  'initializer_range': 0.3,
}
LLAMA = {
  'family': 'llama',
  'vocab_size': 31,
  'hidden_size': 12,
  'intermediate_size': 20,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
  'max_position_embeddings': 32,
  'initializer_range': 0.3,
}
PROMPT, RESPONSE = 7, 5


@pytest.fixture(scope='module', params=[GPT2, LLAMA], ids=['gpt2', 'llama'])
def built(request):
  model = models.create(request.param)
  forward = jax.jit(model.forward)
  return model, model.init(jax.random.key(0)), forward


def draw_tokens(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 31, shape).astype(np.int32)


def ragged_mask():
  """Returns the mask of left-padded prompts of 7, 4 and 1 tokens, and responses of 5."""
  mask = np.ones((3, PROMPT + RESPONSE), bool)
  mask[1, :3] = False
  mask[2, :6] = False
  return mask


@pytest.mark.parametrize('spare', [0, 6])
def test_cached_decode_equals_full_forward(built, spare):
  """A ragged prefill, then single tokens, with a cache of the exact or a larger length."""
  model, params, forward = built
  tokens, mask = draw_tokens((3, PROMPT + RESPONSE)), ragged_mask()
  positions = np.asarray(positions_from_mask(jnp.asarray(mask)))
  full, none = forward(params, tokens, positions, mask)
  assert none is None
  cache = model.init_cache(3, PROMPT + RESPONSE + spare)
  hidden, cache = forward(
    params, tokens[:, :PROMPT], positions[:, :PROMPT], mask[:, :PROMPT], cache
  )
  pieces = [hidden]
  for t in range(PROMPT, PROMPT + RESPONSE):
    hidden, cache = forward(
      params, tokens[:, t : t + 1], positions[:, t : t + 1], mask[:, t : t + 1], cache
    )
    pieces.append(hidden)
  assert int(cache['index']) == PROMPT + RESPONSE
  decoded = np.concatenate(pieces, axis=1)
  np.testing.assert_allclose(decoded[mask], np.asarray(full)[mask], rtol=0, atol=1e-5)


def test_cache_has_the_promised_shape(built):
  model, _, _ = built
  cache = model.init_cache(3, 9)
  config = model.config
  assert (
    cache['k'].shape == cache['v'].shape == (config.depth, 3, config.kv_heads, 9, config.head_width)
  )
  assert cache['segments'].shape == (3, 9) and cache['index'].shape == ()


def test_packed_segments_equal_separate_rows(built):
  """Two texts and padding in one row, against each text alone."""
  model, params, forward = built
  tokens = draw_tokens((1, 12), seed=1)
  segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
  positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], np.int32)
  packed = np.asarray(forward(params, tokens, positions, segments)[0])
  for start, stop in ((0, 5), (5, 9)):
    alone = np.zeros((1, 12), np.int32)
    alone[0, : stop - start] = tokens[0, start:stop]
    mask = np.arange(12)[None] < stop - start
    separate = np.asarray(
      forward(params, alone, np.arange(12)[None].astype(np.int32), mask.astype(np.int32))[0]
    )
    np.testing.assert_allclose(
      packed[0, start:stop], separate[0, : stop - start], rtol=0, atol=1e-5
    )


def test_garbage_in_padded_slots_changes_nothing(built):
  """Any ids and positions in padding change no bit and give no NaN."""
  model, params, forward = built
  tokens, mask = draw_tokens((3, PROMPT + RESPONSE), seed=2), ragged_mask()
  mask[0, 9:] = False
  positions = np.asarray(positions_from_mask(jnp.asarray(mask)))
  clean = np.asarray(forward(params, tokens, positions, mask)[0])
  for garbage in (0, 30, -100, 10**6):
    dirty = np.asarray(
      forward(params, np.where(mask, tokens, garbage), np.where(mask, positions, garbage), mask)[0]
    )
    np.testing.assert_array_equal(dirty[mask], clean[mask])
    assert np.isfinite(dirty).all()


def test_left_padded_right_padded_and_unpadded_agree(built):
  model, params, forward = built
  tokens = draw_tokens((1, 6), seed=3)
  rows = np.zeros((2, 12), np.int32)
  mask = np.zeros((2, 12), bool)
  rows[0, 6:], mask[0, 6:] = tokens[0], True
  rows[1, :6], mask[1, :6] = tokens[0], True
  hidden = np.asarray(forward(params, rows, positions_from_mask(jnp.asarray(mask)), mask)[0])
  alone = np.asarray(
    model.forward(params, tokens, jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))[0]
  )
  np.testing.assert_allclose(hidden[0, 6:], alone[0], rtol=0, atol=1e-5)
  np.testing.assert_allclose(hidden[1, :6], alone[0], rtol=0, atol=1e-5)


def test_gradient_is_finite_with_rows_of_padding_only(built):
  model, params, _ = built
  tokens, mask = draw_tokens((2, 6)), np.array([[True] * 6, [False] * 6])

  @jax.jit
  @jax.grad
  def gradient(params):
    hidden, _ = model.forward(params, tokens, positions_from_mask(jnp.asarray(mask)), mask)
    return jnp.sum(jnp.square(model.unembed(params, hidden)) * mask[:, :, None])

  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


@functools.cache
def loss_and_gradient(**settings):
  tokens, segments = draw_tokens((2, 6)), np.ones((2, 6), np.int32)
  positions = np.broadcast_to(np.arange(6), (2, 6))
  model = models.create(LLAMA, **settings)

  def loss(params):
    return jnp.mean(jnp.square(model.forward(params, tokens, positions, segments)[0][:, :, 0]))

  return jax.jit(jax.value_and_grad(loss))(model.init(jax.random.key(1)))


@pytest.mark.parametrize(
  'settings', [{'remat': 'block'}, {'remat': 'dots'}, {'unroll': 2}, {'unroll': 8}]
)
def test_remat_and_unroll_change_no_value(settings):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    loss_and_gradient(**settings),
    loss_and_gradient(),
  )


@pytest.mark.parametrize('unroll', [1, 3])
def test_remat_saves_memory_however_unrolled(unroll):
  tokens = jnp.zeros((8, 32), jnp.int32)

  def temporary_bytes(remat):
    model = models.create(LLAMA, remat=remat, unroll=unroll)

    def loss(params):
      return jnp.mean(jnp.square(model.forward(params, tokens, tokens, tokens + 1)[0]))

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes('block') < 0.7 * temporary_bytes('none')


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
  wide, narrow = models.create(LLAMA), models.create(LLAMA, dtype='bfloat16')
  params = wide.init(jax.random.key(0))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.init(jax.random.key(0))))
  tokens, segments = draw_tokens((2, 6)), np.ones((2, 6), np.int32)
  positions = np.broadcast_to(np.arange(6), (2, 6))
  hidden, _ = jax.jit(narrow.forward)(params, tokens, positions, segments)
  assert hidden.dtype == jnp.bfloat16
  assert narrow.init_cache(1, 4)['k'].dtype == jnp.bfloat16
  logits = narrow.unembed(params, hidden)
  assert logits.dtype == jnp.float32
  expected = wide.unembed(params, jax.jit(wide.forward)(params, tokens, positions, segments)[0])
  assert np.abs(logits - expected).mean() < 0.05 * np.abs(expected).mean()


def test_initialization_has_the_configured_scale():
  """GPT-2 divides the initial scale of residual outputs by sqrt(2 L)."""
  model = models.create(GPT2 | {'n_embd': 96, 'n_layer': 8, 'initializer_range': 0.02})
  params = model.init(jax.random.key(0))
  mlp = params['blocks']['mlp']
  assert mlp['up']['kernel'].shape == (8, 96, 384)
  np.testing.assert_allclose(mlp['up']['kernel'].std(), 0.02, rtol=0.02)
  np.testing.assert_allclose(mlp['down']['kernel'].std(), 0.02 / 4, rtol=0.02)  # sqrt(2 * 8) = 4
  assert not np.array_equal(mlp['up']['kernel'][0], mlp['up']['kernel'][1])
  assert not np.any(mlp['up']['bias'])


def test_model_is_hashable_and_has_its_sizes():
  model = models.create(LLAMA)
  assert hash(model) == hash(models.create(dict(LLAMA))) and model == models.create(dict(LLAMA))
  assert (model.width, model.vocab_size, model.max_length) == (12, 31, 32)


@pytest.mark.parametrize(
  'fields,settings,words',
  [
    ({'family': 'mamba'}, {}, "family='mamba'"),
    ({}, {'dtype': 'float16'}, "dtype='float16'"),
    ({}, {'remat': 'everything'}, "remat='everything'"),
    ({}, {'unroll': 0}, 'unroll=0'),
  ],
)
def test_unknown_settings_are_refused(fields, settings, words):
  with pytest.raises(UserError, match=words):
    models.create(LLAMA | fields, **settings)


def test_stories260k_mean_loss_of_a_story(shared):
  """1.316 nats per token on the first story, 373 tokens after BOS (from the folder's README)."""
  tokenizers = pytest.importorskip('tokenizers')
  model, params = hf.load(shared / 'models' / 'stories260K')
  tokenizer = tokenizers.Tokenizer.from_file(
    str(shared / 'models' / 'stories260K' / 'tokenizer.json')
  )
  text = (shared / 'data' / 'text' / 'tinystories_sample.txt').read_text()
  story = text.split('<|endoftext|>')[0].strip()
  ids = tokenizer.encode(story, add_special_tokens=False).ids
  tokens = jnp.asarray([[1] + ids])
  positions = jnp.arange(tokens.shape[1])[None]
  hidden, _ = jax.jit(model.forward)(params, tokens, positions, jnp.ones_like(tokens))
  logprobs = jax.nn.log_softmax(model.unembed(params, hidden)[:, :-1])
  chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)
  assert abs(-float(chosen.mean()) - 1.316) < 0.01, (float(chosen.mean()), tokens.shape)


def test_stories260k_greedy_text(shared):
  """256 tokens after BOS, past the EOS, equal to those of transformers."""
  tokenizers = pytest.importorskip('tokenizers')
  folder = shared / 'models' / 'stories260K'
  model, params = hf.load(folder)

  @jax.jit
  def decode(params):
    def step(carry, position):
      token, cache = carry
      hidden, cache = model.forward(
        params, token[None, None], position[None, None], jnp.ones((1, 1), jnp.int32), cache
      )
      token = jnp.argmax(model.unembed(params, hidden)[0, 0]).astype(jnp.int32)
      return (token, cache), token

    return jax.lax.scan(step, (jnp.int32(1), model.init_cache(1, 256)), jnp.arange(256))[1]

  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  found = tokenizer.decode(np.asarray(decode(params)).tolist(), skip_special_tokens=True)
  assert found.strip() == (folder / 'greedy_256.txt').read_text().strip()


def test_randomwalks_mean_loss_of_the_walks(shared):
  """0.707 nats per token on the 1,000 walks (from the folder's README)."""
  model, params = hf.load(shared / 'models' / 'randomwalks')
  walks = json.loads((shared / 'data' / 'randomwalks.json').read_text())['walks']
  eos, longest = 21, max(map(len, walks)) + 1
  rows = [[ord(letter) - ord('a') for letter in walk] + [eos] for walk in walks]
  tokens = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
  mask = np.arange(longest)[None] < np.array([len(row) for row in rows])[:, None]
  hidden, _ = jax.jit(model.forward)(params, tokens, positions_from_mask(jnp.asarray(mask)), mask)
  logprobs = jax.nn.log_softmax(model.unembed(params, hidden)[:, :-1])
  chosen = np.asarray(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))[:, :, 0]
  assert abs(-chosen[mask[:, 1:]].mean() - 0.707) < 0.002

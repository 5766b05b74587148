"""Rotary positions: frequencies by hand and against transformers, tables, rotation, fields."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf_config
from rlhf_jax.models import rope

PLAIN = [1, 0.1, 0.01, 0.001]  # for 8 coordinates and base 10000


def test_types_without_bands_by_hand():
  shared = dict(head_width=8, max_positions=16)
  np.testing.assert_allclose(rope.Rope(**shared).frequencies(99), PLAIN)
  np.testing.assert_allclose(rope.Linear(factor=4.0, **shared).frequencies(99), np.divide(PLAIN, 4))
  half = rope.Proportional(factor=2.0, rotary_fraction=0.5, **shared)
  np.testing.assert_allclose(half.frequencies(99), [0.5, 0.05, 0, 0])
  # 32 slots of 16: the base grows by (3 * 2 - 2)^(8 / 6).
  dynamic = rope.Dynamic(factor=3.0, **shared)
  np.testing.assert_allclose(dynamic.frequencies(16), PLAIN)
  np.testing.assert_allclose(
    dynamic.frequencies(32), [(10000 * 4 ** (4 / 3)) ** (-i / 4) for i in range(4)]
  )


def test_llama3_by_hand():
  """More than 4 turns over the old context: kept; fewer than 1: divided by 8; between: blended."""
  llama3 = rope.Llama3(
    head_width=8,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
  )
  # turns = 128 f / 2 pi = 20.4, 2.037, 0.204, 0.020; blend of the second (2.037 - 1) / 3 = 0.3457
  blend = (128 * 0.1 / (2 * np.pi) - 1) / 3
  expected = [1, 0.1 * (blend + (1 - blend) / 8), 0.01 / 8, 0.001 / 8]
  np.testing.assert_allclose(llama3.frequencies(99), expected)


def test_yarn_by_hand():
  """128 positions: 2 turns at pair 4 ln(128 / 4 pi) / ln 10000 = 1.008, half a turn at 1.61."""
  yarn = rope.Yarn(
    head_width=8, factor=4.0, original_max_position_embeddings=128, beta_fast=2.0, beta_slow=0.5
  )
  # Rounded outwards: from 1 to 2.
  np.testing.assert_allclose(yarn.frequencies(99), [1, 0.1, 0.01 / 4, 0.001 / 4])
  assert yarn.scale == pytest.approx(0.1 * math.log(4) + 1)
  exact = rope.Yarn(
    head_width=8,
    factor=4.0,
    original_max_position_embeddings=128,
    beta_fast=20.0,
    beta_slow=0.5,
    truncate=False,
    mscale=0.5,
    mscale_all_dim=2.0,
  )
  low, high = [4 * math.log(128 / (2 * math.pi * turns)) / math.log(10000) for turns in (20, 0.5)]
  divided = (1 - low) / (high - low)
  np.testing.assert_allclose(
    exact.frequencies(99), [1, 0.1 * (1 - divided + divided / 4), 0.01 / 4, 0.001 / 4]
  )
  assert exact.scale == pytest.approx((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1))


def test_longrope_by_hand():
  """The divisors depend on S, and the default scale on max_positions / original length = 4."""
  long = rope.LongRope(
    head_width=8,
    max_positions=64,
    original_max_position_embeddings=16,
    short_factor=(1.0, 1.0, 1.0, 2.0),
    long_factor=(1.0, 2.0, 4.0, 8.0),
  )
  np.testing.assert_allclose(long.frequencies(16), [1, 0.1, 0.01, 0.0005])
  np.testing.assert_allclose(long.frequencies(17), [1, 0.05, 0.0025, 0.000125])
  assert long.scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
  cos, sin = long.table(jnp.array([[0, 3]]), 17)
  assert cos.shape == sin.shape == (1, 2, 1, 4)
  np.testing.assert_allclose(cos[0, 1, 0], long.scale * np.cos(3 * long.frequencies(17)), rtol=1e-5)


def random_parameters(draw, kind, turning):
  """Returns a dict of a config.json with realistic sizes."""
  original = {'original_max_position_embeddings': int(draw.choice([2048, 8192, 32768]))}
  scaled = {'factor': float(draw.choice([1.0, 4.0, 32.0])), **original}
  scale = [{}, {'attention_factor': 1.3}][draw.integers(2)]
  own = {
    'linear': {'factor': 8.0},
    'dynamic': {'factor': 2.0},
    'llama3': {
      **scaled,
      'low_freq_factor': 1.0,
      'high_freq_factor': float(draw.choice([2.0, 4.0])),
    },
    'yarn': {
      **scaled,
      **scale,
      'truncate': bool(draw.integers(2)),
      **[{}, {'beta_fast': 16.0, 'beta_slow': 2.0}, {'mscale': 0.7, 'mscale_all_dim': 1.0}][
        draw.integers(3)
      ],
    },
    'longrope': {
      **(scaled if draw.integers(2) else original),
      **scale,
      'short_factor': draw.uniform(1, 2, turning // 2).tolist(),
      'long_factor': draw.uniform(1, 60, turning // 2).tolist(),
    },
    'proportional': [{}, {'factor': 4.0}][draw.integers(2)],
  }
  return {'rope_type': kind, 'rope_theta': float(draw.choice([1e4, 5e5, 1e6])), **own[kind]}


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize(
  'kind', ['linear', 'dynamic', 'llama3', 'yarn', 'longrope', 'proportional']
)
def test_types_against_transformers(kind, seed):
  transformers = pytest.importorskip('transformers')
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  draw = np.random.default_rng(seed)
  head_width, part = [(64, 1.0), (128, 0.75), (96, 0.25)][draw.integers(3)]
  parameters = random_parameters(draw, kind, int(head_width * part)) | {
    'partial_rotary_factor': part
  }
  limit = int(draw.choice([4096, 131072]))
  config = transformers.LlamaConfig(
    hidden_size=head_width,
    num_attention_heads=1,
    head_dim=head_width,
    max_position_embeddings=limit,
    rope_parameters=dict(parameters),
  )
  fields = hf_config.Fields({'rope_parameters': parameters})
  ours = rope.from_hf(fields, head_width=head_width, max_positions=limit, partial=True)
  for length in (1024, 32768, 200000):
    theirs, scale = ROPE_INIT_FUNCTIONS[kind](config, 'cpu', seq_len=length)
    np.testing.assert_allclose(ours.frequencies(length), theirs.numpy(), rtol=2e-5)
    assert ours.scale == pytest.approx(scale)


def test_rotation_depends_on_distances_only():
  table = rope.Rope(head_width=6).table(jnp.array([[3, 7], [13, 17]]), 18)
  x = jax.random.normal(jax.random.key(0), (1, 2, 1, 6)).repeat(2, axis=0)
  turned = rope.rotate(x, table)
  products = jnp.sum(turned[:, 0, 0] * turned[:, 1, 0], axis=-1)
  np.testing.assert_allclose(products[0], products[1], rtol=1e-4)


@pytest.mark.parametrize('head_width,part,turned', [(8, 0.5, 4), (7, 0.8, 6), (6, 1.0, 6)])
def test_a_part_of_a_head_turns(head_width, part, turned):
  """Rotates the first coordinates in pairs (i, i + R / 2), one more if their number is odd."""
  partial = rope.Rope(head_width=head_width, rotary_fraction=part)
  x = np.random.default_rng(0).normal(size=(1, 1, 2, head_width)).astype(np.float32)
  found = rope.rotate(jnp.asarray(x), partial.table(jnp.array([[5]]), 6))
  np.testing.assert_array_equal(found[..., turned:], x[..., turned:])
  for i, frequency in enumerate(partial.frequencies(6)):
    pair = x[..., i] + 1j * x[..., i + turned // 2]
    expected = pair * np.exp(5j * frequency)
    np.testing.assert_allclose(found[..., i], expected.real, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[..., i + turned // 2], expected.imag, rtol=1e-4, atol=1e-6)


LLAMA = {
  'family': 'llama',
  'vocab_size': 31,
  'hidden_size': 12,
  'intermediate_size': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'head_dim': 6,
  'max_position_embeddings': 8,
  'initializer_range': 0.3,
}
SCALINGS = [
  {'rope_type': 'linear', 'factor': 2.0},
  {'rope_type': 'dynamic', 'factor': 2.0},
  {'rope_type': 'proportional', 'partial_rotary_factor': 0.4},
  {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0},
  {
    'rope_type': 'yarn',
    'factor': 4.0,
    'original_max_position_embeddings': 6,
    'attention_factor': 1.5,
    'truncate': False,
  },
  {'rope_type': 'longrope', 'short_factor': [1, 2, 3.0], 'long_factor': [2, 3, 4.5], 'factor': 3.0},
]


@pytest.mark.parametrize('scaling', SCALINGS, ids=lambda scaling: scaling['rope_type'])
def test_both_spellings_and_the_output(scaling):
  new = models.create(LLAMA | {'rope_parameters': {'rope_theta': 300.0, **scaling}})
  old = models.create(LLAMA | {'rope_theta': 300, 'rope_scaling': scaling})
  oldest = scaling | {'type': scaling['rope_type']}
  del oldest['rope_type']
  assert (
    new
    == old
    == models.create(LLAMA | {'rope_theta': 300.0, 'rope_scaling': oldest})
    != models.create(LLAMA)
  )
  assert models.create(json.loads(json.dumps(new.config.to_hf()))) == new


def test_original_length():
  """The length in the outer dict, else the one inside, else the model's maximum."""

  def length(fields, scaling):
    model = models.create(LLAMA | fields | {'rope_scaling': SCALINGS[5] | scaling})
    return model.config.rope.original_max_position_embeddings

  assert length({}, {}) == 8
  assert length({}, {'original_max_position_embeddings': 5}) == 5
  assert (
    length({'original_max_position_embeddings': 4}, {'original_max_position_embeddings': 5}) == 4
  )


@pytest.mark.parametrize(
  'change,words',
  [
    ({'rope_scaling': {'rope_type': 'su'}}, 'rope_scaling.rope_type="su": must be one of'),
    ({'rope_scaling': {'rope_type': ['yarn']}}, 'rope_scaling.rope_type=["yarn"]'),
    (
      {'rope_scaling': {'rope_type': 'yarn'}},
      "'factor' is missing; add it (inside rope_scaling of type 'yarn')",
    ),
    ({'rope_scaling': SCALINGS[1] | {'beta_fast': 3}}, 'beta_fast=3'),
    ({'rope_scaling': SCALINGS[4] | {'truncate': 1}}, 'truncate=1'),
    (
      {'rope_scaling': SCALINGS[5] | {'long_factor': [1, 2]}},
      'long_factor=[1.0, 2.0]: must have 3 numbers',
    ),
    ({'rope_scaling': SCALINGS[5] | {'short_factor': [1, 2, 'x']}}, 'short_factor=[1, 2, "x"]'),
    (
      {'rope_scaling': SCALINGS[0] | {'partial_rotary_factor': 0.5}},
      'partial_rotary_factor=0.5: only 1 is supported',
    ),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'rope_scaling': SCALINGS[1], 'head_dim': 2}, 'head_dim=2'),
    ({'head_dim': 5}, 'head_dim=5: must be even'),
  ],
)
def test_refused(change, words):
  with pytest.raises(UserError) as error:
    models.create(LLAMA | change)
  assert words in str(error.value)


@pytest.mark.parametrize(
  'scaling',
  [SCALINGS[1], SCALINGS[5] | {'original_max_position_embeddings': 8}],
  ids=['dynamic', 'longrope'],
)
def test_long_texts_change_nothing_beside_them(scaling):
  """A text that fills the slots does not change a short text's states; more slots do."""
  model = models.create(LLAMA | {'rope_scaling': scaling})
  params = model.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)
  mask = np.arange(12)[None] < np.array([[5], [12]])
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
  both, _ = model.forward(params, tokens, positions, mask)
  alone, _ = model.forward(params, tokens[:1], positions[:1], mask[:1])
  np.testing.assert_allclose(alone[0, :5], both[0, :5], rtol=0, atol=1e-5)
  shorter, _ = model.forward(params, tokens[:1, :8], positions[:1, :8], mask[:1, :8])
  assert np.abs(shorter[0, :5] - both[0, :5]).max() > 1e-2

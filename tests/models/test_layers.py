"""Attention against a loop over heads and positions; activations against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import layers


def looped_attention(queries, keys, values, allowed):
  """Computes attention in a loop: [B, T, N, H], twice [B, K, S, H], [B, T, S] -> [B, T, N * H]."""
  batch, time, heads, width = queries.shape
  mixed = np.zeros((batch, time, heads, width))
  for b in range(batch):
    for t in range(time):
      for n in range(heads):
        k = n // (heads // keys.shape[1])
        seen = [s for s in range(keys.shape[2]) if allowed[b, t, s]]
        scores = np.array([queries[b, t, n] @ keys[b, k, s] for s in seen])
        weights = np.exp(scores - scores.max())
        mixed[b, t, n] = sum(
          weight * values[b, k, s] for weight, s in zip(weights / weights.sum(), seen)
        )
  return mixed.reshape(batch, time, heads * width)


@pytest.mark.parametrize('heads,kv_heads', [(4, 4), (6, 2), (3, 1)])
def test_attend_against_a_loop(heads, kv_heads):
  draw = np.random.default_rng(0)
  queries = draw.normal(size=(2, 3, heads, 5)).astype(np.float32)
  keys, values = draw.normal(size=(2, 2, kv_heads, 7, 5)).astype(np.float32)
  allowed = draw.random((2, 3, 7)) < 0.5
  allowed[:, :, 0] = True
  found = layers.attend(queries, keys, values, allowed[:, None, None])
  np.testing.assert_allclose(
    found, looped_attention(queries, keys, values, allowed), rtol=0, atol=1e-5
  )


def test_large_scores_and_fully_masked_rows_give_no_nan():
  queries = jnp.full((1, 2, 1, 2), 1e4)
  keys = values = jnp.array([[[[1e4, 0.0], [0.0, 1.0], [-1e4, 5.0]]]])
  mask = jnp.array([[[True, True, False], [False, False, False]]])[:, None, None]
  mixed = layers.attend(queries, keys, values, mask)
  np.testing.assert_array_equal(mixed[0, 0], [1e4, 0.0])
  assert np.isfinite(mixed).all()
  gradient = jax.grad(lambda q: layers.attend(q, keys, values, mask).sum())(queries)
  assert np.isfinite(gradient).all()


def test_mask_by_hand():
  """Two packed texts and padding; then one token after two others in a cache."""
  segments = jnp.array([[1, 1, 2, 0]])
  mask = layers.attention_mask(segments, segments, index=0)
  assert mask.shape == (1, 1, 1, 4, 4)
  np.testing.assert_array_equal(
    mask[0, 0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  )
  decode = layers.attention_mask(jnp.array([[1]]), jnp.array([[0, 1, 1, 1]]), index=jnp.int32(2))
  np.testing.assert_array_equal(decode[0, 0, 0], [[0, 1, 1, 0]])


def test_gelu_derivatives_are_those_of_the_formula():
  x = jnp.linspace(-6, 6, 101)

  def plain(x):
    return jax.nn.gelu(x, approximate=True)

  np.testing.assert_allclose(layers.gelu_tanh(x), plain(x), rtol=0, atol=1e-6)
  for derivative in (
    lambda f: jax.grad(lambda x: f(x).sum())(x),
    lambda f: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
  ):
    np.testing.assert_allclose(derivative(layers.gelu_tanh), derivative(plain), rtol=0, atol=1e-5)

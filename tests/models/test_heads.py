"""Scalar heads by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import heads


def test_apply_scalar_by_hand():
  head = {'kernel': jnp.array([1.0, -2.0]), 'bias': jnp.array(0.5)}
  hidden = jnp.array([[[3.0, 1.0], [0.0, 2.0]]], jnp.bfloat16)
  values = heads.apply_scalar(head, hidden)
  # 3 - 2 + 0.5 = 1.5; 0 - 4 + 0.5 = -3.5
  np.testing.assert_array_equal(values, [[1.5, -3.5]])
  assert values.dtype == jnp.float32


def test_scales():
  zero = heads.init_scalar(None, 8, scale='zero')
  assert zero['kernel'].shape == (8,) and not np.any(zero['kernel']) and zero['bias'] == 0
  normal = heads.init_scalar(jax.random.key(0), 4095, scale='normal')
  np.testing.assert_allclose(normal['kernel'].std(), 1 / 64, rtol=0.05)  # 1 / sqrt(4096)
  assert normal['bias'] == 0
  with pytest.raises(ValueError, match='scale'):
    heads.init_scalar(None, 8, scale='xavier')


def test_several_heads_by_hand():
  head = {'kernel': jnp.array([[1.0, 0.0], [-2.0, 3.0]]), 'bias': jnp.array([0.5, -1.0])}
  hidden = jnp.array([[3.0, 1.0], [0.0, 2.0]])
  # 3 - 2 + 0.5 and 3 - 1; 0 - 4 + 0.5 and 6 - 1.
  np.testing.assert_array_equal(heads.apply_scalar(head, hidden), [[1.5, 2.0], [-3.5, 5.0]])
  assert heads.count(head) == 2
  mean = heads.mean(head)
  assert heads.count(mean) == 1 and heads.mean(mean) is mean
  np.testing.assert_array_equal(heads.apply_scalar(mean, hidden), [1.75, 0.75])
  new = heads.init_scalar(jax.random.key(0), 2047, scale='normal', count=3)
  assert new['kernel'].shape == (2047, 3) and new['bias'].tolist() == [0, 0, 0]
  np.testing.assert_allclose(new['kernel'].std(axis=0), [2048**-0.5] * 3, rtol=0.1)
  assert abs(np.corrcoef(new['kernel'].T)[0, 1]) < 0.1


def test_last_token_wherever_the_padding_is():
  values = jnp.arange(12.0).reshape(3, 4)
  mask = jnp.array(
    [[True, True, False, False], [False, False, True, True], [True, False, True, False]]
  )
  np.testing.assert_array_equal(heads.last_token(values, mask), [1.0, 7.0, 10.0])


def test_mlp_by_hand():
  head = {
    'up': {'kernel': jnp.array([[1.0, -1.0], [2.0, 0.5]]), 'bias': jnp.array([0.5, 0.0])},
    'down': {'kernel': jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 'bias': jnp.arange(3.0)},
  }
  # (1, 1) up: (1 + 2 + 0.5, -1 + 0.5), after the ReLU (3.5, 0); down: 3.5 (1, 2, 3) + (0, 1, 2).
  features = heads.mlp_features(head, jnp.ones((1, 2)))
  np.testing.assert_array_equal(features, [[3.5, 0.0]])
  np.testing.assert_array_equal(heads.mlp_outputs(head, features), [[3.5, 8.0, 12.5]])
  np.testing.assert_array_equal(heads.mlp_output_at(head, features, jnp.array([2])), [12.5])
  new = heads.init_mlp(jax.random.key(0), 400, 3)
  assert new['up']['kernel'].shape == (400, 800) and new['down']['kernel'].shape == (800, 3)
  # Uniform in +-1 / sqrt(inputs): the standard deviation is 1 / sqrt(3 * inputs).
  for layer, inputs in (('up', 400), ('down', 800)):
    for name in ('kernel', 'bias'):
      assert np.abs(new[layer][name]).max() <= inputs**-0.5
    np.testing.assert_allclose(new[layer]['kernel'].std(), (3 * inputs) ** -0.5, rtol=0.05)

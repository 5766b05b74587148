"""trust_region.py: solvers against NumPy, Fisher products against an explicit Fisher matrix."""

import functools

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import forward as forward_lib
from rlhf_jax import models
from rlhf_jax import trust_region
from rlhf_jax import types
from rlhf_jax.models import trainable

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
N, T, VOCAB = 12, 0.7, 11
LLAMA = {
  'family': 'llama',
  'vocab_size': VOCAB,
  'hidden_size': 4,
  'intermediate_size': 6,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'max_position_embeddings': 32,
  'tie_word_embeddings': True,
  'initializer_range': 0.4,
}


def system(seed):
  """A positive definite matrix, a vector, and the vector as a tree with the product of trees."""
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(N, N))
  matrix, b = root @ root.T / N + 0.1 * np.eye(N), rng.normal(size=N)
  tree = {'a': jnp.float32(b[:8]).reshape(2, 4), 'b': {'c': jnp.float32(b[8:])}}
  _, back = ravel_pytree(tree)
  product = lambda tree: back(jnp.float32(matrix) @ ravel_pytree(tree)[0])
  return matrix, b, tree, product


@pytest.mark.parametrize('seed', range(5))
def test_conjugate_gradients_solve_the_system(seed):
  matrix, b, tree, product = system(seed)
  x, residual = trust_region.conjugate_gradient(product, tree, steps=100, tolerance=1e-6)
  np.testing.assert_allclose(ravel_pytree(x)[0], np.linalg.solve(matrix, b), rtol=2e-5, atol=2e-5)
  assert residual <= 1e-6
  none = jax.tree.map(jnp.zeros_like, tree)
  x, residual = trust_region.conjugate_gradient(product, none, steps=100)
  assert residual == 0 and not ravel_pytree(x)[0].any()


@pytest.mark.parametrize('steps', [1, 3, 5])
def test_few_steps_are_best_in_the_space_of_their_products(steps):
  """After k steps x minimizes x^T A x / 2 - b^T x over b, A b, ..., A^(k-1) b."""
  matrix, b, tree, product = system(7)
  basis, _ = np.linalg.qr(
    np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(steps)], axis=1)
  )
  best = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
  x, residual = trust_region.conjugate_gradient(product, tree, steps=steps)
  close(ravel_pytree(x)[0], best)
  close(residual, np.linalg.norm(b - matrix @ best) / np.linalg.norm(b))
  # The quadratic model of the KL is at its bound after a step of this size.
  size = trust_region.step_size(x, tree, max_kl=0.03)
  close(size**2 * best @ matrix @ best / 2, 0.03)


def test_a_gradient_of_zero_takes_no_step():
  zero = {'a': jnp.zeros(3)}
  assert trust_region.step_size(zero, zero, max_kl=0.1) == 0


def search(evaluate, size, **region):
  start = {'x': jnp.float32(0.1), 'n': jnp.int32(5)}
  attempt = lambda size: {'x': start['x'] + size, 'n': start['n'] + 1}
  run = jax.jit(
    lambda size: trust_region.line_search(
      attempt, evaluate, start, size, jnp.float32(0.0), region=trust_region.Region(**region)
    )
  )
  result, metrics = run(jnp.float32(size))
  return result, {name.removeprefix('trust_region/'): float(v) for name, v in metrics.items()}


def test_line_search_by_hand():
  # The surrogate 1 - x^2 beats 0 below 1, the KL x^2 is below 0.2 for x < 0.447. The attempts are
  # at 0.1 + 2 and 0.1 + 1, too far for both, at 0.1 + 0.5, where only the KL is too large (0.36),
  # and at 0.1 + 0.25.
  evaluate = lambda result: (1 - result['x'] ** 2, result['x'] ** 2)
  result, metrics = search(evaluate, 2.0, max_kl=0.2, shrink=0.5)
  close([result['x'], result['n']], [0.35, 6])
  expected = {
    'accepted': 1,
    'attempts': 4,
    'step_size': 0.25,
    'kl': 0.1225,
    'improvement': 0.8775,
  }
  assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  'surrogate, kl, attempts',
  [(-1.0, 0.0, 10), (0.0, 0.0, 10), (1.0, 0.01, 10), (np.nan, 0.0, 10), (1.0, np.nan, 2)],
)
def test_a_failed_search_changes_nothing(surrogate, kl, attempts):
  evaluate = lambda result: (jnp.float32(surrogate), jnp.float32(kl))
  result, metrics = search(evaluate, 2.0, max_kl=0.01, attempts=attempts)
  assert result['x'] == np.float32(0.1) and result['n'] == 5
  expected = {'accepted': 0, 'attempts': attempts, 'step_size': 0, 'kl': 0, 'improvement': 0}
  assert metrics == expected


def test_a_step_of_zero_is_not_tried():
  _, metrics = search(lambda result: (jnp.float32(1.0), jnp.float32(0.0)), 0.0)
  assert metrics['attempts'] == 0 and metrics['accepted'] == 0


P, R, B = 3, 5, 3


def responses():
  """Ragged responses, some with holes, as a Rollout."""
  rng = np.random.default_rng(0)
  mask = np.arange(P + R) < np.array([[P + 5], [P + 2], [P + 4]])
  mask[1, 0] = False  # padding of the prompt
  response_mask = mask[:, P:].copy()
  response_mask[0, 2] = False
  return types.Rollout(
    tokens=jnp.asarray(rng.integers(0, VOCAB, (B, P + R)), jnp.int32),
    mask=jnp.asarray(mask),
    response_mask=jnp.asarray(response_mask),
    logprobs=jnp.zeros((B, R)),
  )


def split(model, **settings):
  """Model, trained and frozen parameters; those of adapters are not zero."""
  settings = {'unfrozen_layers': None, 'targets': (), 'rslora': False, 'path': None} | settings
  params = model.init(jax.random.key(0))
  model, trained, frozen = trainable.set_up(model, params, seed=0, **settings)
  move = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape)
  return model, jax.tree.map(move, trained), frozen


def explicit_fisher(model, trained, frozen, rollout):
  """The sum over response tokens of J^T (diag(p) - p p^T) J, in float64, from full Jacobians."""
  vector, back = ravel_pytree(trained)

  def logits(vector):
    params = trainable.merge(frozen, back(vector))
    positions = types.positions_from_mask(rollout.mask)
    hidden, _ = model.forward(params, rollout.tokens, positions, rollout.mask)
    return model.unembed(params, hidden)[:, P - 1 : -1] / T

  jacobian = np.asarray(jax.jit(jax.jacrev(logits))(vector), np.float64)
  fisher = np.zeros((len(vector), len(vector)))
  for j, z, real in zip(
    jacobian.reshape(B * R, VOCAB, -1),
    np.asarray(logits(vector), np.float64).reshape(B * R, VOCAB),
    np.ravel(rollout.response_mask),
  ):
    if real:
      p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
      fisher += j.T @ (np.diag(p) - np.outer(p, p)) @ j
  return fisher


@pytest.mark.parametrize(
  'settings',
  [{}, {'unfrozen_layers': 1, 'targets': (('blocks/.*', 2, 4.0),)}],
  ids=['all', 'adapters of the top layer'],
)
def test_products_are_those_of_the_explicit_fisher_matrix(settings):
  model, trained, frozen = split(models.create(LLAMA), **settings)
  rollout = responses()
  forward = forward_lib.Forward(forward_lib.Models(model), {'policy': frozen}, T)
  frozen_states = forward.fixed({'policy': trained}, rollout).frozen_states
  assert (frozen_states is not None) == ('unfrozen_layers' in settings)
  fisher = explicit_fisher(model, trained, frozen, rollout)
  vector, back = ravel_pytree(trained)
  weights = rollout.response_mask.astype(jnp.float32)

  @jax.jit
  def product(vector):
    vector = {'policy': back(vector)}
    image = forward.fisher_product({'policy': trained}, vector, rollout, weights, frozen_states)
    return ravel_pytree(image)[0]

  for seed in range(3):
    vector = np.random.default_rng(seed).normal(size=len(vector)).astype(np.float32)
    expected, found = fisher @ vector, product(vector)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_the_kl_is_from_the_old_policy_and_zero_to_itself():
  model, trained, frozen = split(models.create(LLAMA))
  rollout = responses()
  forward = forward_lib.Forward(forward_lib.Models(model), {'policy': frozen}, T)
  other = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), trained)
  logprobs = [
    np.asarray(
      jax.nn.log_softmax(
        model.unembed(
          params,
          model.response_states(params, rollout.tokens, rollout.mask, R),
        )
        / T
      )
    )
    for params in (trained, other)
  ]
  old, new = ({'policy': params} for params in (trained, other))
  expected = np.sum(np.exp(logprobs[0]) * (logprobs[0] - logprobs[1]), axis=-1)
  close(forward.policy_kl(old, new, rollout), expected)
  assert np.abs(forward.policy_kl(old, old, rollout)).max() < 1e-6


def test_long_sequences_have_products_too():
  """Attention in blocks has no forward-mode derivative; 600 tokens would get it."""
  model = models.create(LLAMA | {'max_position_embeddings': 600})
  params = {'policy': model.init(jax.random.key(0))}
  forward = forward_lib.Forward(forward_lib.Models(model), {'policy': {}}, T)
  shape = lambda dtype, length: jax.ShapeDtypeStruct((2, length), dtype)
  rollout = types.Rollout(
    shape(jnp.int32, 600), shape(bool, 600), shape(bool, 500), shape(jnp.float32, 500)
  )
  product = lambda params, rollout: forward.fisher_product(
    params, params, rollout, rollout.logprobs
  )
  assert jax.tree.structure(jax.eval_shape(product, params, rollout)) == jax.tree.structure(params)

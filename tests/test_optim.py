"""optim.py: optimizers against loops, schedules and clipping by hand, microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references
from rlhf_jax import errors
from rlhf_jax import optim
from rlhf_jax import sharding

close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
PLAIN = dict(
  name='adam',
  learning_rate=0.1,
  schedule_kind='constant',
  warmup_steps=0,
  steps=10,
  b1=0.9,
  b2=0.999,
  eps=1e-5,
  weight_decay=0.0,
  clip_norm=0.0,
)


def run(optimizer, params, gradients):
  """Returns the parameters after each gradient."""

  @jax.jit
  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for grads in gradients:
    params, state = step(params, state, grads)
    yield params


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_optimizers_agree_with_loops(name):
  rng = np.random.default_rng(0)
  gradients = [
    {'w': (10.0 ** rng.uniform(-6, 0, 8) * rng.choice([-1, 1], 8)).astype(np.float32)}
    for _ in range(50)
  ]
  tensorflow = name.startswith('tf_')
  reference = (
    references.Adam(b1=0.9, b2=0.999, eps=1e-5, tensorflow=tensorflow)
    if name.endswith('adam')
    else references.RMSProp(decay=0.999, eps=1e-5, tensorflow=tensorflow)
  )
  params = expected = {'w': np.linspace(-1, 1, 8).astype(np.float32)}
  for grads, updated in zip(
    gradients, run(optim.make(**PLAIN | {'name': name}), params, gradients)
  ):
    expected = reference.step(expected, grads, 0.1)
    close(updated['w'], expected['w'], rtol=5e-6, atol=5e-6)  # 50 roundings of a number near 1


def test_the_two_forms_differ_at_first():
  # g = 1e-5, t = 1: m^ = v^ root = 1e-5, so torch's step is lr * 1e-5 / (1e-5 + 1e-5) = lr / 2.
  # TF: sqrt(0.001) / 0.1 * 1e-6 / (sqrt(0.001) * 1e-5 + 1e-5) = 0.0306534.
  def step(name):
    optimizer = optim.make(**PLAIN | {'name': name})
    return 1 - float(next(run(optimizer, {'w': jnp.ones(1)}, [{'w': jnp.full(1, 1e-5)}]))['w'][0])

  assert step('adam') == pytest.approx(0.1 * 0.5, rel=1e-4)
  assert step('tf_adam') == pytest.approx(0.1 * 0.0306534, rel=1e-4)


def test_schedules_by_hand():
  rate = functools.partial(optim.schedule, 2.0, steps=10)
  close([rate(kind='constant', warmup_steps=0)(t) for t in (0, 5, 10)], [2, 2, 2])
  close([rate(kind='linear', warmup_steps=0)(t) for t in (0, 5, 10)], [2, 1, 0])
  close([rate(kind='cosine', warmup_steps=0)(t) for t in (0, 5, 10)], [2, 1, 0])
  close([rate(kind='linear', warmup_steps=2)(t) for t in (0, 1, 2, 6, 10)], [0, 1, 2, 1, 0])
  # From a quarter of the peak: 0.5, halfway between that and 2, 2.
  close(
    [rate(kind='linear', warmup_steps=2, warmup_from=0.25)(t) for t in (0, 1, 2, 6)],
    [0.5, 1.25, 2, 1],
  )


def test_a_schedule_counts_train_steps():
  # 10 train steps of 3 optimizer steps each: the rate changes at every third, and the last one is a
  # tenth.
  rate = optim.schedule(2.0, kind='linear', warmup_steps=0, steps=10, updates=3)
  close([rate(t) for t in (0, 1, 2, 3, 5, 6, 27, 29)], [2, 2, 2, 1.8, 1.8, 1.6, 0.2, 0.2])
  rate = optim.schedule(2.0, kind='constant', warmup_steps=4, warmup_from=0.5, steps=10, updates=2)
  close([rate(t) for t in (0, 1, 2, 3, 7, 8, 19)], [1, 1, 1.25, 1.25, 1.75, 2, 2])


def test_gradients_are_clipped_by_their_global_norm():
  # Norm of (3, 4) is 5; clipped to 1 it is (0.6, 0.8). Seen through Adam's first moment.
  optimizer = optim.make(**PLAIN | {'clip_norm': 1.0})
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  _, state = optimizer.update(
    {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}, optimizer.init(params), params
  )
  mu = optax.tree_utils.tree_get(state, 'mu')
  close([mu['a'][0], mu['b'][0]], [0.06, 0.08])


def test_only_matrices_decay():
  optimizer = optim.make(**PLAIN | {'weight_decay': 0.5})
  params = {'kernel': jnp.ones((2, 2)), 'scale': jnp.ones(2)}
  after = next(run(optimizer, params, [jax.tree.map(jnp.zeros_like, params)]))
  close(after['kernel'], np.full((2, 2), 1 - 0.1 * 0.5))
  close(after['scale'], np.ones(2))


@pytest.mark.parametrize('size', [0, 1, 2, 6])
def test_microbatches_add_up(size):
  rows = jnp.arange(6.0)[:, None]
  share = jax.grad(
    lambda w, x: (jnp.sum(jnp.square(x[:, 0] * w)) / 6, {'n': len(x) / 6.0}), has_aux=True
  )
  gradient, metrics = optim.accumulate(share, jnp.float32(2.0), rows, size)
  close(gradient, 2 * 2.0 * (1 + 4 + 9 + 16 + 25) / 6)
  close(metrics['n'], 1.0)


def test_unknown_names_are_user_errors():
  with pytest.raises(errors.UserError, match="optim.name='sgd'"):
    optim.make(**PLAIN | {'name': 'sgd'})
  with pytest.raises(errors.UserError, match="optim.schedule='step'"):
    optim.make(**PLAIN | {'schedule_kind': 'step'})


def test_master_weights_keep_updates_that_bfloat16_loses():
  # Between 1 and 2 bfloat16 has steps of 2^-7; a hundred updates of 1e-3 are 0.1, each alone is
  # none.
  params = {'w': jnp.full(3, 1.5, jnp.bfloat16)}
  settings = PLAIN | {'learning_rate': 1e-3}
  grads = [{'w': jnp.ones(3, jnp.bfloat16)}] * 100
  *_, with_master = run(optim.make(**settings), params, grads)
  *_, without = run(optim.make(**settings | {'master_dtype': 'bfloat16'}), params, grads)
  assert with_master['w'].dtype == jnp.bfloat16
  close(with_master['w'].astype(jnp.float32), 1.4, atol=2**-8)
  close(without['w'].astype(jnp.float32), 1.5)


def test_master_weights_are_those_of_a_float32_run_rounded():
  rng = np.random.default_rng(1)
  low = {
    'w': jnp.asarray(rng.normal(size=(40, 3)), jnp.bfloat16),
    'scale': jnp.ones(3, jnp.float32),
  }
  gradients = [
    jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), low) for _ in range(20)
  ]
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), low)
  optimizer = optim.make(**PLAIN | {'weight_decay': 0.1, 'clip_norm': 1.0})
  exact = run(
    optimizer, wide, [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in gradients]
  )
  for found, expected in zip(run(optimizer, low, gradients), exact):
    np.testing.assert_array_equal(found['w'], expected['w'].astype(jnp.bfloat16))
    close(found['scale'], expected['scale'])


def test_moments_of_another_dtype_and_their_place():
  params = {'w': jnp.ones(4, jnp.bfloat16)}
  for name in optim.OPTIMIZERS:
    state = optim.make(**PLAIN | {'name': name, 'moment_dtype': 'bfloat16'}).init(params)
    mu = [leaf.dtype for path, leaf in sharding.paths(state).items() if 'mu' in path]
    nu = [leaf.dtype for path, leaf in sharding.paths(state).items() if 'nu' in path]
    assert mu == ([jnp.bfloat16] if name.endswith('adam') else []) and nu == [jnp.float32]


@pytest.mark.parametrize('decay', [0.9, 0.999])
def test_the_moving_average_by_loop(decay):
  """A weighted mean of the parameters after each update; those before the first are no part."""
  rng = np.random.default_rng(2)
  params = {'w': jnp.asarray(rng.normal(size=5), jnp.float32)}
  optimizer = optim.make(**PLAIN | {'ema': decay})
  state, seen = optimizer.init(params), []
  np.testing.assert_array_equal(optim.moving_average(state)['w'], params['w'])
  for t in range(1, 41):
    updates, state = optimizer.update(
      {'w': jnp.asarray(rng.normal(size=5), jnp.float32)}, state, params
    )
    params = optax.apply_updates(params, updates)
    seen.append(np.asarray(params['w'], np.float64))
    weights = decay ** np.arange(t - 1, -1, -1.0)
    expected = weights @ np.stack(seen) / weights.sum()
    close(optim.moving_average(state)['w'], expected, rtol=2e-5, atol=2e-6)
  np.testing.assert_array_equal(state.count, 40)
  assert optim.moving_average(optim.make(**PLAIN).init(params)) is None


def test_a_cosine_after_a_warmup_ends_with_the_run():
  # 2 of 10 steps up to 2; then (1 + cos(pi n / 8)) of the 8 that are left, at n = 0, 2, 4, 8.
  rate = optim.schedule(2.0, kind='cosine', warmup_steps=2, steps=10)
  close([rate(t) for t in (1, 2, 4, 6, 10)], [1, 2, 1 + np.sqrt(0.5), 1, 0])


def test_gradients_of_bfloat16_add_up_in_float32():
  # Beyond 256 bfloat16 has steps of 2: 300 ones one after the other stop there.
  rows = jnp.ones((300, 1), jnp.bfloat16)
  grad_fn = lambda params, rows: (params * jnp.sum(rows), {'n': jnp.sum(rows)})
  gradient, metrics = optim.accumulate(grad_fn, jnp.ones((), jnp.bfloat16), rows, 1)
  assert (float(gradient), float(metrics['n'])) == (300, 300)

"""PPO updates on several devices equal those on one, for any size of the minibatches."""

import functools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import heads
import tiny

P, R = 4, 6
GPT2 = {
  'family': 'gpt2',
  'vocab_size': tiny.VOCAB,
  'n_embd': 16,
  'n_layer': 2,
  'n_head': 4,
  'n_positions': 32,
  'initializer_range': 0.1,
}
FAMILIES = {'gpt2': GPT2, 'llama': tiny.LLAMA}


def update(model, settings, batch, mesh):
  """Returns parameters before and after an update with SGD on a mesh, and its metrics."""
  policy = model.init(jax.random.key(1))
  head = heads.init_scalar(jax.random.key(2), model.width, scale='normal')
  params = {'policy': policy, 'critic': {'head': head}}
  reference = jax.tree.map(lambda x: 1.1 * x, policy)
  rng = np.random.default_rng(0)
  mask = np.arange(P + R)[None] < P + rng.integers(1, R + 1, batch)[:, None]
  rollout = types.Rollout(
    tokens=rng.integers(4, tiny.VOCAB, mask.shape, dtype=np.int32),
    mask=mask,
    response_mask=mask[:, P:],
    logprobs=np.where(mask[:, P:], -4.0, 0.0).astype(np.float32),
  )
  scores = rng.normal(size=batch).astype(np.float32)
  place = lambda tree: jax.device_put(tree, sharding.shardings(tree, model.rules, mesh))
  optimizers = {name: optax.sgd(0.3) for name in params}
  step = functools.partial(
    ppo.train_step, models=forward.Models(model), optimizers=optimizers, settings=settings
  )
  with jax.set_mesh(mesh):
    params = place(params)
    state = types.TrainState(
      step=jnp.int32(0),
      key=jax.random.key(0),
      params=params,
      opt_state={name: optimizers[name].init(params[name]) for name in params},
      extra={'kl_coef': jnp.float32(0.2), 'reward_moments': jnp.zeros(3)},
    )
    batch = sharding.put_rows((rollout, scores), mesh)
    after, metrics = jax.jit(step)(
      state, {'policy': {}, 'reference': place(reference)}, *batch, None
    )
    return jax.device_get((params, after.params, metrics))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
  'shape, batch, minibatches',
  [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 12, 4),
    ({'data': 4, 'tensor': 2}, 12, 4),
    ({'data': 2, 'tensor': 4}, 6, 2),
  ],
  ids=str,
)
def test_minibatches_that_do_not_divide_over_the_devices(shape, batch, minibatches, family, world):
  """3 sequences per minibatch on 2 or 4 data shards."""
  config = tiny.ppo(world)
  config.rl.update({'epochs': 2, 'minibatches': minibatches})
  settings, model = ppo.Settings.of(config, (tiny.EOS,)), models.create(FAMILIES[family])
  before, expected, metrics = update(
    model, settings, batch, sharding.make_mesh({}, devices=jax.devices()[:1])
  )
  _, found, found_metrics = update(
    model, settings, batch, sharding.make_mesh(shape, devices=devices.first(8))
  )
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, expected)
  assert max(jax.tree.leaves(moved)) > 0.02
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-6), found, expected)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), found_metrics, metrics
  )

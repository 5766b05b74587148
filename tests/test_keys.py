"""Every random draw of a run has its own key."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlhf_jax import keys
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import wiring
from rlhf_jax.models import trainable
import tiny

SEED, STEPS, WIDTH = 3, 64, 16


def keys_of_steps():
  """Returns the key of each of the first steps, and those of its rollout and its update."""
  found = []
  for step in range(STEPS):
    state = types.TrainState(step, jax.random.key(SEED), {}, {})
    found += [jax.random.fold_in(state.key, step), *types.step_keys(state)]
  return found


def adapters_of(critic):
  """Returns A [2, 16, 4] of new adapters on the only adapted map, the policy's or a critic's."""
  model = models.create(tiny.LLAMA)
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  params = model.init(jax.random.key(0))
  model, trained, frozen = trainable.set_up(
    model,
    params,
    unfrozen_layers=None,
    targets=(('mlp/up', 4, 8.0),),
    rslora=False,
    path='',
    seed=SEED,
  )
  if critic:
    config = ml_collections.ConfigDict(
      {'seed': SEED, 'critic': {'kind': 'adapters'}, 'model': {'lora': {'path': ''}}}
    )
    trained = wiring.make_critic(config, mesh, model, trained, frozen, None)[1]['backbone']
  return np.asarray(trained['blocks']['mlp']['up']['lora']['a'])


def test_heads_and_adapters_are_drawn_from_no_key_of_a_step():
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  head = np.asarray(setup.new_head(models.create(tiny.LLAMA), mesh, SEED, 'normal')['kernel'])
  policy, critic = adapters_of(critic=False), adapters_of(critic=True)
  assert not np.array_equal(policy, critic)
  found = keys_of_steps()
  assert len({jax.random.key_data(key).tobytes() for key in found}) == len(found)
  stack = jnp.stack(found)
  normals = jax.vmap(lambda key: jax.random.normal(key, head.shape))(stack) * (WIDTH + 1) ** -0.5
  bound = WIDTH**-0.5
  uniforms = jax.vmap(
    lambda key: jax.random.uniform(key, policy.shape, minval=-bound, maxval=bound)
  )(stack)
  assert np.abs(np.asarray(normals) - head).max(1).min() > 0.1
  for adapters in (policy, critic):
    assert np.abs(np.asarray(uniforms) - adapters).max((1, 2, 3)).min() > 0.1


def test_purposes_have_keys_of_their_own_beyond_those_of_steps():
  purposes = [keys.HEAD, keys.ADAPTERS, keys.CRITIC_ADAPTERS, keys.EVALUATION]
  assert len(set(purposes)) == 4 and min(purposes) > 10**9
  assert max(purposes) < 2**31  # fits into an int32, like step numbers

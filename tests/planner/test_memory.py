"""Bytes on each chip against the arrays of a real run."""

import jax
import pytest

from planner import memory
from planner import programs
from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.algorithms import ppo
import tiny

MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}
LORA = (('attention/(query|value)$', 4, 8.0),)
WAYS = {
  'all': {},
  'bfloat16': {'model.param_dtype': 'bfloat16', 'model.dtype': 'bfloat16', 'optim.ema': 0.9},
  'adapters': {'model.lora.targets': LORA, 'critic.kind': 'adapters'},
  'top layer, critic on the trunk': {'model.unfrozen_layers': 1, 'critic.kind': 'trunk'},
}


def run_config(world, way):
  config = tiny.ppo(world)
  config.reward.update({'function': '', 'model': f'{world}/reward'})
  config.model.init = tiny.LLAMA
  config.update_from_flattened_dict(WAYS[way])
  return config


def held(tree):
  """Returns the bytes on the first device; a buffer in several trees counts once."""
  first = jax.devices()[0]
  shards = {
    shard.data.unsafe_buffer_pointer(): shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == first and shard.data.size
  }
  return sum(shards.values())


@pytest.mark.parametrize('way', WAYS)
def test_every_kind_needs_the_memory_of_a_run(way, world):
  config = run_config(world, way)
  mesh = sharding.make_mesh(MESH)
  with jax.set_mesh(mesh):
    learner, state = ppo.create(config, mesh)
    (frozen, *_), _ = learner.next_batch(state, timed=False)
  made = programs.make(config, mesh)
  structure = lambda tree: jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding.shard_shape(x.shape)), tree
  )
  assert structure(made.arrays['state'].params) == structure(state.params)
  assert structure(made.arrays['state'].opt_state) == structure(state.opt_state)
  assert structure(made.arrays['frozen']) == structure(frozen)
  kinds = memory.by_kind(made.arrays)
  assert kinds['policy'] == held((state.params['policy'], frozen['policy']))
  assert kinds['critic'] == held(state.params['critic'])
  assert kinds.get('reference', 0) == held(frozen['reference'])
  optimizer = state.opt_state
  scalars = sum(leaf.nbytes for leaf in jax.tree.leaves(optimizer) if not leaf.ndim)
  sizes = [kinds.get(kind, 0) for kind in ('moments', 'master weights', 'moving average')]
  assert abs(sum(sizes) - held(optimizer)) <= scalars
  assert (kinds.get('master weights', 0) > 0) == (way == 'bfloat16')


def test_cache_and_gradients(world):
  config = run_config(world, 'all')
  mesh = sharding.make_mesh(MESH)
  made = programs.make(config, mesh)
  # Keys and values of 2 layers, 16 rows over 4 shards, 2 heads over 2, 12 tokens, width 4, float32.
  assert (
    memory.cache(config, models.create(tiny.LLAMA), mesh) == 2 * 2 * (16 / 4) * (2 / 2) * 12 * 4 * 4
  )
  kinds = memory.by_kind(made.arrays)
  assert memory.gradients(config, made.arrays) == kinds['policy'] + kinds['critic']
  config.microbatch_size = 4  # with float32 sums of gradients
  assert memory.gradients(config, made.arrays) == 2 * (kinds['policy'] + kinds['critic'])


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('algorithm', 'sft', 'plans single runs of PPO'),
    ('model.init', {}, 'config.model.init is empty'),
    ('critic.path', 'folder', 'reads no folder'),
  ],
)
def test_configs_that_cannot_be_planned(key, value, message, world):
  config = run_config(world, 'all')
  with config.ignore_type():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError, match=message):
    programs.make(config, sharding.make_mesh(MESH))

"""PPO on eight fake devices equals PPO on one: results, placement of arrays, compilations."""

import collections
import re

import jax
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import ppo
import tiny

STEPS, COMPARED = 20, 3
MESHES = {
  'data 2, fsdp 2, tensor 2': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'fsdp 8': {'data': 1, 'fsdp': 8, 'tensor': 1},
  'data 8': {'data': 8, 'fsdp': 1, 'tensor': 1},
}
# The shard of each parameter on one device, by hand for tiny.LLAMA.
PARTS = {
  'data 2, fsdp 2, tensor 2': {
    'embed/embedding': (32, 8),
    'query/kernel': (2, 8, 8),
    'key/kernel': (2, 8, 4),
    'value/kernel': (2, 8, 4),
    'out/kernel': (2, 8, 8),
    'gate/kernel': (2, 8, 16),
    'up/kernel': (2, 8, 16),
    'down/kernel': (2, 16, 8),
    'attention_norm/scale': (2, 16),
    'mlp_norm/scale': (2, 16),
    'norm/scale': (16,),
    'head/kernel': (16,),
    'head/bias': (),
  },
  'fsdp 8': {
    'embed/embedding': (64, 2),
    'query/kernel': (2, 2, 16),
    'key/kernel': (2, 2, 8),
    'value/kernel': (2, 2, 8),
    'out/kernel': (2, 16, 2),
    'gate/kernel': (2, 2, 32),
    'up/kernel': (2, 2, 32),
    'down/kernel': (2, 32, 2),
    'attention_norm/scale': (2, 16),
    'mlp_norm/scale': (2, 16),
    'norm/scale': (16,),
    'head/kernel': (16,),
    'head/bias': (),
  },
  'data 8': {
    'embed/embedding': (64, 16),
    'query/kernel': (2, 16, 16),
    'key/kernel': (2, 16, 8),
    'value/kernel': (2, 16, 8),
    'out/kernel': (2, 16, 16),
    'gate/kernel': (2, 16, 32),
    'up/kernel': (2, 16, 32),
    'down/kernel': (2, 32, 16),
    'attention_norm/scale': (2, 16),
    'mlp_norm/scale': (2, 16),
    'norm/scale': (16,),
    'head/kernel': (16,),
    'head/bias': (),
  },
}
Run = collections.namedtuple('Run', 'state metrics params batch compiled lengths')


def run(world, shape, compiled, devices=None, steps=STEPS):
  """Runs PPO-ptx with a reward model, a critic, microbatches and an adaptive KL controller."""
  config = tiny.ppo(world)
  tiny.mix_in_pretraining(config, world)
  config.reward.update({'function': '', 'model': f'{world}/reward'})
  config.rl.kl_controller = 'adaptive'
  config.rl.whiten_advantages = 'minibatch'
  config.optim.eps = 1e-5  # with 1e-8 Adam amplifies the rounding of small gradients
  config.steps = steps
  mesh = sharding.make_mesh(shape, devices=devices)
  before, history, params, lengths = len(compiled), [], None, []
  with jax.set_mesh(mesh):
    learner, state = ppo.create(config, mesh)
    for step in range(steps):
      batch, _ = learner.next_batch(state, timed=False)
      state, metrics = learner.train_step(state, *batch)
      history.append(jax.device_get(metrics))
      lengths.append(np.asarray(batch[1].mask).sum(1) - np.asarray(batch[1].response_mask).sum(1))
      if step + 1 == COMPARED:
        params = jax.device_get(state.params)
  return Run(state, history, params, batch, compiled[before:], lengths)


@pytest.fixture(scope='module')
def one_device(world, compiled):
  return run(world, {}, compiled, devices=jax.devices()[:1], steps=COMPARED)


@pytest.fixture(scope='module', params=MESHES)
def many(request, world, compiled):
  return request.param, run(world, MESHES[request.param], compiled)


def test_three_steps_agree_with_one_device(one_device, many):
  _, found = many
  moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), one_device.params, found.params)
  assert max(jax.tree.leaves(moved)) < 1e-5
  for a, b in zip(one_device.metrics, found.metrics[:COMPARED], strict=True):
    assert a.keys() == b.keys()
    for name in a:
      gap, size = np.abs(a[name] - b[name]), np.abs(a[name])
      assert np.max(gap) < 1e-5 * max(1.0, np.max(size)), name


def test_parameters_and_moments_are_sharded_by_the_table(many):
  name, found = many
  checked = collections.Counter()
  for path, leaf in sharding.paths((found.state.params, found.state.opt_state)).items():
    part = next((p for key, p in PARTS[name].items() if re.search(f'(^|/){key}$', path)), None)
    assert (part is None) == path.endswith('count'), path
    shards = leaf.addressable_shards
    assert len(shards) == 8
    assert {shard.data.shape for shard in shards} == {part or ()}, path
    checked[path.split('/')[-2]] += 1
  assert checked['query'] == 6  # policy and critic, each with two moments
  assert {s.data.shape[0] for s in found.batch[1].tokens.addressable_shards} == {
    16 // (MESHES[name]['data'] * MESHES[name]['fsdp'])
  }


def test_one_compilation_each_whatever_the_prompts_lengths(many):
  _, found = many
  counts = collections.Counter(found.compiled)
  # None if another test has cached the program on disk.
  assert max(counts[f'jit({name})'] for name in ('train_step', 'generate', 'score')) == 1, counts
  assert len({tuple(row) for row in found.lengths}) > STEPS / 2  # lengths varied

"""The reference of runs that start from trained adapters is the initial policy, with adapters."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import forward
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import wiring
from rlhf_jax.models import hf
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import peft
from rlhf_jax.models import trainable
import tiny

LORA = lora_lib.Lora((('attention/(query|value)$', 2, 4.0), ('mlp/', 3, 3.0)))
R = 4


@pytest.fixture(scope='module')
def adapted(world, tmp_path_factory):
  """Returns folders of an adapter that training has changed, its base model, and both merged."""
  folder = tmp_path_factory.mktemp('adapted')
  base, params = hf.load(world / 'model')
  model = dataclasses.replace(base, lora=LORA)
  adapters, _ = trainable.split_trainable(model, params)
  leaves, structure = jax.tree.flatten(adapters)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  adapters = structure.unflatten(
    [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
  )
  peft.save(folder / 'adapter', model, adapters)
  hf.save(folder / 'merged', base, trainable.merge_lora(model, adapters, params))
  return folder


def config_of(algorithm, world, folder):
  config = tiny.ppo(world) if algorithm is ppo else tiny.grpo(world)
  config.model.lora.path = str(folder / 'adapter')
  if algorithm is ppo:
    config.critic.kind = 'adapters'
  return config


def rollout():
  rng = np.random.default_rng(0)
  response = np.arange(R)[None] < np.array([4, 2, 3])[:, None]
  mask = np.concatenate([np.ones((3, 3), bool), response], axis=1)
  tokens = rng.integers(4, tiny.VOCAB, mask.shape).astype(np.int32)
  return types.Rollout(*map(jnp.asarray, (tokens, mask, response)), None)


@pytest.mark.parametrize('algorithm', [ppo, grpo], ids=['ppo', 'grpo'])
def test_the_reference_is_the_initial_policy(algorithm, world, adapted):
  """Without the adapters the KL was 1.10 nats; the merged weights give the expected numbers."""
  config, mesh = (
    config_of(algorithm, world, adapted),
    sharding.make_mesh({}, devices=jax.devices()[:1]),
  )
  merged = hf.load(adapted / 'merged')[1]
  with jax.set_mesh(mesh):
    found = {}
    for name, reference in (('merged', merged), ('start', True)):
      wired = wiring.wire(config, mesh, hf.load(world / 'model'), reference=reference, steps=1)
      passes = forward.Forward(wired.models, wired.frozen, 0.7)
      found[name] = passes.fixed(wired.params, rollout()).ref_logprobs
    policy = passes.outputs(wired.params, rollout())
  mask = rollout().response_mask
  np.testing.assert_allclose(found['start'][mask], found['merged'][mask], rtol=0, atol=1e-5)
  np.testing.assert_allclose(found['start'][mask], policy.logprobs[mask], rtol=0, atol=1e-6)
  # Evaluators compare with the same arrays, and a critic of adapters starts from equal ones.
  start = wired.frozen['reference']
  model, frozen = wired.models.policy, wired.frozen['policy']
  context = setup.policy_context(
    config, model, None, mesh, frozen, wired.params['policy'], start=start
  )
  merged = trainable.merge(frozen, start)
  assert all(map(operator.is_, jax.tree.leaves(context.start()), jax.tree.leaves(merged)))
  jax.tree.map(np.testing.assert_array_equal, start, wired.params['policy'])
  if algorithm is ppo:
    jax.tree.map(np.testing.assert_array_equal, wired.params['critic']['backbone'], start)


def test_a_run_from_adapters(world, adapted, tmp_path):
  """The KL is initially 0; merged and unmerged exports contain both trainings."""
  config = config_of(ppo, world, adapted)
  config.optim.learning_rate = 0.02
  config.rl.update({'epochs': 1, 'minibatches': 1})
  learner, state, history, _ = tiny.train(ppo, config, 2)
  assert history[0]['objective/kl'] == pytest.approx(0.0, abs=1e-5)
  assert abs(history[1]['objective/kl']) > 1e-3
  learner.export(state, tmp_path / 'model')
  base, params = hf.load(world / 'model')
  lora, adapters = peft.load(tmp_path / 'adapter', base)
  unmerged = trainable.merge_lora(dataclasses.replace(base, lora=lora), adapters, params)
  first = hf.load(adapted / 'merged')[1]
  for path, merged in sharding.paths(hf.load(tmp_path / 'model')[1]).items():
    np.testing.assert_allclose(
      merged, sharding.paths(unmerged)[path], rtol=0, atol=1e-5, err_msg=path
    )
    if path.endswith('mlp/up/kernel'):
      before, plain = sharding.paths(first)[path], sharding.paths(params)[path]
      moved, given = np.abs(merged - before).max(), np.abs(before - plain).max()
      assert 1e-4 < moved < given, 'a small step from where the first training ended'

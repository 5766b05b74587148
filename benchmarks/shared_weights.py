"""What a PPO update holds and costs: everything trained, top layers, or adapters.

python -m benchmarks.shared_weights

Arrays are counted once however many trees they are in, so a second copy of the weights would show.
Temporaries are the compiler's: the most that one train step needs beyond its arguments and results.
Seconds are the median of a few updates (everything after rollout and scoring) after the first.
"""

import functools
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import config as config_lib
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup
from rlhf_jax.evaluation import tables

FLAGS = flags.FLAGS
flags.DEFINE_integer('layers', 6, 'Layers.')
flags.DEFINE_integer('width', 768, 'Width; the feed-forward layers have four times as much.')
flags.DEFINE_integer('vocab', 50257, 'Vocabulary.')
flags.DEFINE_integer('batch', 8, 'Rows of a batch.')
flags.DEFINE_integer('prompt', 32, 'Prompt tokens.')
flags.DEFINE_integer('response', 32, 'Response tokens.')
flags.DEFINE_integer('updates', 3, 'Updates to take the time of.')

LORA = (('attention/(query|value)$', 16, 32.0),)
# Config keys that differ from training everything, critic included.
WAYS = {
    'all, separate critic': {},
    'all, critic on the trunk': {'critic.kind': 'trunk'},
    'top half, critic on the trunk': {'critic.kind': 'trunk', 'model.unfrozen_layers': -2},
    'adapters, critic on the trunk': {'critic.kind': 'trunk', 'model.lora.targets': LORA},
    'adapters, the critic too': {'critic.kind': 'adapters', 'model.lora.targets': LORA},
}


def make_config(way):
  """The config of one row of the table."""
  config = config_lib.ppo()
  config.model.init = {
      'family': 'gpt2', 'vocab_size': FLAGS.vocab, 'n_embd': FLAGS.width, 'n_layer': FLAGS.layers,
      'n_head': max(FLAGS.width // 64, 1), 'n_positions': FLAGS.prompt + FLAGS.response}
  config.model.unroll = FLAGS.layers
  config.update_from_flattened_dict(WAYS[way])
  if config.model.unfrozen_layers == -2:
    config.model.unfrozen_layers = FLAGS.layers // 2
  return config


def measure(config, mesh):
  """Bytes by kind, as a row of the table."""
  model = models.create(config.model.init.to_dict(), **setup.model_settings(config.model))
  place = sharding.shardings(model.shapes(), model.rules, mesh)
  policy = jax.jit(model.init, out_shardings=place)(jax.random.key(0))
  model, trained, shared = setup.divide(config, model, policy, mesh)
  reference = on_policy.load_reference(config, mesh, model, trained)
  critic_model, critic = on_policy.make_critic(config, None, mesh, model, trained, shared, None)
  handles = ppo.Models(model, critic_model, critic_shared=config.critic.kind == 'adapters')
  optimizers = {'policy': setup.make_optimizer(config.optim, 100),
                'critic': setup.make_optimizer(config.optim, 100, exported=False)}
  state = setup.new_state(config, {'policy': trained, 'critic': critic}, optimizers, mesh, model.rules)
  sizes = {'policy': (trained, shared), 'critic': critic, 'reference': reference, 'moments': state.opt_state}
  seen = set()
  sizes = {name: _count(tree, seen) for name, tree in sizes.items()}
  step = setup.jit_step(functools.partial(
      ppo.train_step, models=handles, optimizers=optimizers, settings=ppo.make_settings(config, None)), state)
  arguments = {'shared': shared, 'reference': reference}, *_episode(), None
  step = step.lower(state, *arguments).compile()
  sizes['temporaries'] = step.memory_analysis().temp_size_in_bytes
  sizes['total'] = sum(sizes.values())
  return {name: round(size / 2**20) for name, size in sizes.items()} | {'seconds': _seconds(step, state, arguments)}


def _episode():
  """A rollout of random tokens, none of them padding, and scores."""
  rng = np.random.default_rng(0)
  shape = FLAGS.batch, FLAGS.prompt + FLAGS.response
  real = np.ones(shape, bool)
  rollout = types.Rollout(rng.integers(0, FLAGS.vocab, shape, dtype=np.int32), real, real[:, FLAGS.prompt:],
                          np.zeros((FLAGS.batch, FLAGS.response), np.float32))
  return jax.tree.map(jnp.asarray, (rollout, rng.normal(size=FLAGS.batch).astype(np.float32)))


def _seconds(step, state, arguments):
  """Median of the updates after the first, which warms up."""
  times = []
  for _ in range(FLAGS.updates + 1):
    started = time.perf_counter()
    state, metrics = step(state, *arguments)
    jax.block_until_ready((state, metrics))
    times.append(time.perf_counter() - started)
  return round(statistics.median(times[1:]), 2)


def _count(tree, seen):
  """Bytes of the arrays of a tree whose buffers are not among `seen`, to which they are added."""
  total = 0
  for array in jax.tree.leaves(tree):
    for shard in array.addressable_shards:
      pointer = shard.data.unsafe_buffer_pointer()
      if shard.data.size and pointer not in seen:
        seen.add(pointer)
        total += np.prod(shard.data.shape, dtype=int) * shard.data.dtype.itemsize
  return total


def main(_):
  mesh = sharding.make_mesh({'data': -1})
  with jax.set_mesh(mesh):
    rows = [{'stage': way, **measure(make_config(way), mesh)} for way in WAYS]
  what = (f'GPT-2, {FLAGS.layers} layers of width {FLAGS.width}, vocabulary {FLAGS.vocab}, '
          f'batch {FLAGS.batch} x ({FLAGS.prompt} + {FLAGS.response}), float32, Adam, 4 epochs')
  print(tables.stages_table(rows, title=f'MiB and seconds: {what}', width=130))


if __name__ == '__main__':
  app.run(main)

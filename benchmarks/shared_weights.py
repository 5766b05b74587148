"""Measures memory and time of a PPO update of all parameters, the top layers, or adapters.

python -m benchmarks.shared_weights --workload s

An array that is in several trees is counted once, so a second copy of the weights would show.
Temporaries are the compiler's figure: the peak memory of a train step beyond its arguments and
results. Seconds are the median of a few updates (without rollout and scoring) after the first.
"""

from absl import app
import jax
import numpy as np

from benchmarks import options
from benchmarks import updates
from benchmarks import workloads
from rlhf_jax import sharding
from rlhf_jax.evaluation import tables

FLAGS = options.FLAGS

# {name: changes from the config that trains all parameters and a separate critic}.
VARIANTS = {
  'all, separate critic': workloads.VARIANTS['separate'].config,
  'all, critic on the trunk': workloads.VARIANTS['trunk'].config,
  'top half, critic on the trunk': workloads.VARIANTS['hydra'].config,
  'adapters, critic on the trunk': workloads.VARIANTS['lora'].config,
  'adapters, the critic too': workloads.VARIANTS['lora'].config | {'critic.kind': 'adapters'},
}


def measure(update):
  """Measures MiB by kind and seconds of an updates.Update, and returns them as a table row."""
  frozen = update.arguments[0]
  params = update.state.params
  seen = set()
  sizes = {
    name: count(tree, seen)
    for name, tree in (
      ('policy', (params['policy'], frozen['policy'])),
      ('critic', params['critic']),
      ('reference', frozen['reference']),
      ('moments', update.state.opt_state),
    )
  }
  sizes['temporaries'] = update.step.memory_analysis().temp_size_in_bytes
  sizes['total'] = sum(sizes.values())
  return {name: round(size / 2**20) for name, size in sizes.items()} | {
    'seconds': updates.seconds(update, FLAGS.timed)[1]
  }


def count(tree, seen):
  """Returns the bytes of a tree's arrays whose buffers are not in `seen`, and adds these to it."""
  total = 0
  for array in jax.tree.leaves(tree):
    for shard in array.addressable_shards:
      pointer = shard.data.unsafe_buffer_pointer()
      if shard.data.size and pointer not in seen:
        seen.add(pointer)
        total += np.prod(shard.data.shape, dtype=int) * shard.data.dtype.itemsize
  return total


def main(_):
  w = workloads.WORKLOADS[FLAGS.workload]
  mesh = sharding.make_mesh({'data': -1})
  with jax.set_mesh(mesh):
    rows = [
      {'stage': variant, **measure(updates.prepare(updates.make_config(w, changes), mesh))}
      for variant, changes in VARIANTS.items()
    ]
  description = (
    f'GPT-2, {w.layers} layers of width {w.width}, vocabulary {w.vocab}, '
    f'batch {w.batch} x ({w.prompt} + {w.response}), float32, Adam, 4 epochs'
  )
  print(tables.stages_table(rows, title=f'MiB and seconds: {description}', width=130))


if __name__ == '__main__':
  app.run(main)

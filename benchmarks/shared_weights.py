"""What a PPO update holds and costs: everything trained, top layers, or adapters.

python -m benchmarks.shared_weights --workload s

Arrays are counted once however many trees they are in, so a second copy of the weights would show.
Temporaries are the compiler's: the most that one train step needs beyond its arguments and results.
Seconds are the median of a few updates (everything after rollout and scoring) after the first.
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

# Config keys that differ from training everything, critic included.
WAYS = {
  'all, separate critic': workloads.WAYS['separate'].config,
  'all, critic on the trunk': workloads.WAYS['trunk'].config,
  'top half, critic on the trunk': workloads.WAYS['hydra'].config,
  'adapters, critic on the trunk': workloads.WAYS['lora'].config,
  'adapters, the critic too': workloads.WAYS['lora'].config | {'critic.kind': 'adapters'},
}


def measure(update):
  """Bytes by kind in MiB and seconds of an updates.Update, as a row of the table."""
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
  w = workloads.WORKLOADS[FLAGS.workload]
  mesh = sharding.make_mesh({'data': -1})
  with jax.set_mesh(mesh):
    rows = [
      {'stage': way, **measure(updates.prepare(updates.make_config(w, changes), mesh))}
      for way, changes in WAYS.items()
    ]
  what = (
    f'GPT-2, {w.layers} layers of width {w.width}, vocabulary {w.vocab}, '
    f'batch {w.batch} x ({w.prompt} + {w.response}), float32, Adam, 4 epochs'
  )
  print(tables.stages_table(rows, title=f'MiB and seconds: {what}', width=130))


if __name__ == '__main__':
  app.run(main)

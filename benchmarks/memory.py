"""How much memory a PPO update takes with a large vocabulary.

python -m benchmarks.memory

The compiler's account of the temporaries of one update, the most it needs at a time beyond its
arguments and results, for growing numbers of response tokens. Beside it what the logits of all
response tokens would take once. Then by how many arrays of [B, T, D] it grows with the batch, for
this vocabulary and for a small one: were there an array of [B, R, V], the two would differ. Nothing
is run; peak memory of whole processes is a column of benchmarks.run.

Letters: B batch, R response length, T with the prompt, D width, V vocabulary.
"""

import dataclasses

from absl import app
import jax
import numpy as np

from benchmarks import options
from benchmarks import updates
from benchmarks import workloads
from rlhf_jax import sharding
from rlhf_jax.evaluation import tables

FLAGS = options.FLAGS

BASE = workloads.Workload('memory', 2, 128, 2, 512, 50257, 32, 64, 64)
SMALL_VOCABULARY = 8192
BATCHES = (64, 128, 256)


def sizes(vocab):
  """Workloads of growing batches, and the last of them with twice the width."""
  batches = [dataclasses.replace(BASE, vocab=vocab, batch=batch) for batch in BATCHES]
  wide = dataclasses.replace(
    batches[-1], width=2 * BASE.width, heads=2 * BASE.heads, mlp=2 * BASE.mlp
  )
  return [*batches, wide]


def temporaries(w, way, mesh):
  """Bytes the update of a workload needs at a time beyond its arguments and results."""
  update = updates.prepare(updates.make_config(w, workloads.WAYS[way].config), mesh)
  return update.step.memory_analysis().temp_size_in_bytes


def row(w, used):
  """A row of the table, in MiB."""
  mib = lambda values: round(values * 4 / 2**20, 1)
  return {
    'stage': f'{w.batch} x {w.response} x {w.width}',
    'temporaries': round(used / 2**20),
    'one array of states': mib(w.batch * w.length * w.width),
    'logits of the responses': mib(w.batch * w.response * w.vocab),
  }


def growth(batches, used):
  """By how many float32 arrays of [B, T, D] the temporaries grow with the batch.

  Args:
    batches: Workloads that differ in the batch only.
    used: bytes of temporaries of each.
  """
  return np.polyfit([4 * w.batch * w.length * w.width for w in batches], used, 1)[0]


def main(_):
  mesh = sharding.make_mesh({'data': -1})
  found = {}
  with jax.set_mesh(mesh):
    for vocab in (BASE.vocab, SMALL_VOCABULARY):
      found[vocab] = [(w, temporaries(w, FLAGS.way, mesh)) for w in sizes(vocab)]
  for vocab, pairs in found.items():
    title = f'MiB of an update, batch x response x width; vocabulary {vocab}, {BASE.layers} layers'
    print(tables.stages_table([row(w, used) for w, used in pairs], title=title, width=110))
    batches = len(BATCHES)
    grows = growth([w for w, _ in pairs[:batches]], [used for _, used in pairs[:batches]])
    print(f'It grows by {grows:.1f} arrays of [B, T, D] with the batch.\n')


if __name__ == '__main__':
  app.run(main)

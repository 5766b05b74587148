"""Measures the memory of a PPO update with a large vocabulary.

python -m benchmarks.memory

Prints the compiler's figure for the temporaries of one update (peak memory beyond its arguments and
results) for increasing numbers of response tokens, beside the size of the logits of all response
tokens. Then it prints by how many arrays [B, T, D] the temporaries grow with the batch, for a large
and a small vocabulary. If the update had an array [B, R, V], the two would differ. It does not run
the update; benchmarks.run measures the peak memory of processes.

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
  """Returns workloads with increasing batch sizes, and the last of them with twice the width."""
  batches = [dataclasses.replace(BASE, vocab=vocab, batch=batch) for batch in BATCHES]
  wide = dataclasses.replace(
    batches[-1], width=2 * BASE.width, heads=2 * BASE.heads, mlp=2 * BASE.mlp
  )
  return [*batches, wide]


def temporaries(w, variant, mesh):
  """Returns the peak bytes of a workload's update beyond its arguments and results."""
  update = updates.prepare(updates.make_config(w, workloads.VARIANTS[variant].config), mesh)
  return update.step.memory_analysis().temp_size_in_bytes


def row(w, used):
  """Returns a row of the table, in MiB."""
  mib = lambda values: round(values * 4 / 2**20, 1)
  return {
    'stage': f'{w.batch} x {w.response} x {w.width}',
    'temporaries': round(used / 2**20),
    'one array of states': mib(w.batch * w.length * w.width),
    'logits of the responses': mib(w.batch * w.response * w.vocab),
  }


def growth(batches, used):
  """Computes by how many float32 arrays [B, T, D] the temporaries grow with the batch.

  Args:
    batches: Workloads that differ only in the batch size.
    used: Bytes of temporaries of each workload.
  """
  return np.polyfit([4 * w.batch * w.length * w.width for w in batches], used, 1)[0]


def main(_):
  mesh = sharding.make_mesh({'data': -1})
  found = {}
  with jax.set_mesh(mesh):
    for vocab in (BASE.vocab, SMALL_VOCABULARY):
      found[vocab] = [(w, temporaries(w, FLAGS.variant, mesh)) for w in sizes(vocab)]
  for vocab, pairs in found.items():
    title = f'MiB of an update, batch x response x width; vocabulary {vocab}, {BASE.layers} layers'
    print(tables.stages_table([row(w, used) for w, used in pairs], title=title, width=110))
    batches = len(BATCHES)
    grows = growth([w for w, _ in pairs[:batches]], [used for _, used in pairs[:batches]])
    print(f'Temporaries grow by {grows:.1f} arrays [B, T, D] with the batch.\n')


if __name__ == '__main__':
  app.run(main)

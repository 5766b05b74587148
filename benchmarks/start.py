"""Measures the compilation time of the first and the second start of a run.

python -m benchmarks.start --workload s

Starts rlhf_jax three times: without a compilation cache, with an empty cache, and with the cache
that the previous start filled, as in a user's second start. Compilation is that of the rollout, the
reward model and the train step, as JAX measures it: tracing, lowering, and compiling or reading the
cache. The first iteration also allocates memory that later ones reuse, so it takes longer than the
next by more than the compilation.
"""

import os
import sys
import tempfile

from absl import app

from benchmarks import options
from benchmarks import processes
from benchmarks import workloads
from rlhf_jax.evaluation import tables

FLAGS = options.FLAGS


def start(w, folder, *words):
  """Starts rlhf_jax and returns seconds of set-up, compilation, and the first two iterations."""
  process = processes.Process(
    sys.executable,
    'ours',
    w,
    device=FLAGS.device,
    threads=FLAGS.threads,
    log=os.path.join(folder, 'log'),
    options=['--variant', FLAGS.variant, *words],
  )
  try:
    first, second = process.turn(), process.turn()
  finally:
    process.end()
  iterations = [sum(turn['parts'].values()) for turn in (first, second)]
  return {
    'set-up': process.about['setup'],
    'compilation': first['compilation'],
    'first iteration': iterations[0],
    'second': iterations[1],
  }


def main(_):
  options.hold_to_cores()
  w = workloads.WORKLOADS[FLAGS.workload]
  with tempfile.TemporaryDirectory() as folder:
    cache = ['--cache', os.path.join(folder, 'cache')]
    rows = [
      {'stage': name, **start(w, folder, *words)}
      for name, words in (('no cache', []), ('empty cache', cache), ('next start', cache))
    ]
  print(tables.stages_table(rows, title=f'Seconds: {w.name}, {FLAGS.variant}, on {FLAGS.device}'))


if __name__ == '__main__':
  app.run(main)

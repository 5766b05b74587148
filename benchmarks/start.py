"""Seconds of compilation at the first start of a run, and at the next one.

python -m benchmarks.start --workload s

Our own peer three times: without a cache of compiled programs, with one that is empty, and with the
one that the start before filled, which is what a user's second start finds. Compilation is that of
the rollout, the reward model and the train step, by JAX's clock: tracing, lowering, and compiling
or reading the cache. The first iteration takes longer than the next one by more than that, as it
also gets the memory that the others use again.
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
  """Starts the peer: seconds of its set-up, of compilation, and of its first two iterations."""
  process = processes.Process(
    sys.executable,
    'ours',
    w,
    device=FLAGS.device,
    threads=FLAGS.threads,
    log=os.path.join(folder, 'log'),
    options=['--way', FLAGS.way, *words],
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
  print(tables.stages_table(rows, title=f'Seconds: {w.name}, {FLAGS.way}, on {FLAGS.device}'))


if __name__ == '__main__':
  app.run(main)

"""Compares the seconds of an iteration of PPO or ILQL on random walks with trlX's, in turns.

python -m benchmarks.random_walks --model FOLDER
python -m benchmarks.random_walks --model FOLDER --algorithm ilql

PPO: both start from the model in FOLDER, such as that of the stage `pretrain` of
configs/random_walks.py, and do the work of trlX's example: 140 responses of 9 tokens, and 4 epochs
over them, ours in 8 minibatches of 70, trlX's in 8 of 100 and 40. `benchmarks/install.sh trlx`
installs trlX. The first iteration, which includes compilation, is not counted.

ILQL: an iteration is 10 steps of about 100 walks, an epoch of the example's 1,000 walks, with a new
model and without evaluations; ours is the stage `ilql` of configs/random_walks_offline.py. trlX
takes the tokenizer of FOLDER.

Prints medians by part, and the ratio of each pair of neighbouring iterations; writes
OUT/random_walks.json.
"""

import json
import os
import pathlib

from absl import app
from absl import flags
import numpy as np

from benchmarks import options
from benchmarks import processes
from benchmarks import workloads

FLAGS = options.FLAGS
# trlX's model; benchmarks/workloads.py has no FLOPs of this task, only its shapes.
WORKLOAD = workloads.Workload('walks', 6, 144, 12, 576, 23, 1, 9, 140)
PEERS = {'rlhf_jax': ('walks', ''), 'trlx': ('trlx', 'trlx')}  # {name: (module, environment)}


def start(name, out):
  """Starts the process of a peer."""
  module, venv = PEERS[name]
  return processes.Process(
    processes.python(venv, FLAGS.venvs),
    module,
    WORKLOAD,
    device='cpu',
    threads=FLAGS.threads,
    log=out / f'walks-{name}.log',
    options=['--model', os.path.abspath(FLAGS.model), '--algorithm', FLAGS.algorithm],
  )


def measure(out):
  """Runs both peers in turn; returns {name: list of reports}, without the first iteration."""
  running = {}
  try:
    for name in PEERS:
      running[name] = start(name, out)
    for peer in running.values():
      peer.turn()
    reports = {name: [] for name in PEERS}
    for _ in range(FLAGS.iterations):
      for name, peer in running.items():
        reports[name].append(peer.turn())
  finally:
    for peer in running.values():
      peer.end()
  return reports


def summarize(reports):
  """Returns medians of the seconds by part, and the ratios of neighbouring iterations.

  Args:
    reports: {name: list of reports of the same length}; see peers/protocol.py.

  Returns:
    {name: {part or 'total': median seconds}}, and quartiles of the ratio of our seconds to trlX's.
  """
  totals = {name: [sum(r['parts'].values()) for r in rows] for name, rows in reports.items()}
  medians = {}
  for name, rows in reports.items():
    parts = {part: [r['parts'].get(part, 0.0) for r in rows] for part in workloads.PARTS}
    values = parts | {'total': totals[name]}
    medians[name] = {part: float(np.median(seconds)) for part, seconds in values.items()}
  ratios = np.divide(totals['rlhf_jax'], totals['trlx'])
  return medians, np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()


def main(_):
  options.hold_to_cores()
  out = pathlib.Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  try:
    reports = measure(out)
  except processes.PeerError as error:
    raise SystemExit(f'error: {error}') from None
  medians, ratios = summarize(reports)
  for name, parts in medians.items():
    print(f'{name:10}', '  '.join(f'{part} {seconds:.3f} s' for part, seconds in parts.items()))
  print('ratio of seconds per iteration: {1:.2f} ({0:.2f} to {2:.2f})'.format(*ratios))
  result = {'medians': medians, 'ratio': ratios, 'reports': reports, 'threads': FLAGS.threads}
  path = out / f'random_walks{"_ilql" if FLAGS.algorithm == "ilql" else ""}.json'
  path.write_text(json.dumps(result, indent=1), encoding='utf-8')


if __name__ == '__main__':
  flags.DEFINE_string('model', None, 'Folder of the pretrained model.', required=True)
  flags.DEFINE_enum('algorithm', 'ppo', ('ppo', 'ilql'), 'Algorithm of both.')
  flags.DEFINE_integer('iterations', 15, 'Iterations of each after the first.')
  flags.DEFINE_string(
    'venvs', os.environ.get('VENVS', '.venv-peers'), 'Folder of the virtual environments.'
  )
  app.run(main)

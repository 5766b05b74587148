"""Times a PPO iteration as batch, response length, depth or vocabulary grows 16-fold.

python -m benchmarks.scaling

Runs rlhf_jax as benchmarks/run.py does, on workloads that differ in one number. Each point is the
median of a few iterations after the first. The table shows the slope in a log-log plot over all
points and over the last doubling: 1 if the time is linear, less if a part of it is constant, and 2
if it is quadratic. Writes OUT/scaling.json and .png.
"""

import dataclasses
import json
import pathlib
import statistics
import sys

from absl import app
from absl import flags
import matplotlib.figure
import numpy as np

from benchmarks import options
from benchmarks import processes
from benchmarks import results
from benchmarks import workloads
from rlhf_jax.evaluation import tables

FLAGS = options.FLAGS
flags.DEFINE_integer('iterations', 3, 'Iterations of each point after the first.')
flags.DEFINE_list('along', ['batch', 'response', 'layers', 'vocab'], 'Workload fields to vary.')

BASE = workloads.Workload('scaling', 2, 256, 4, 1024, 4096, 32, 32, 16)
FACTORS = (1, 2, 4, 8, 16)
# Smallest value of each field; the other fields are those of BASE.
SMALLEST = {'batch': 4, 'response': 16, 'layers': 1, 'vocab': 2048}


def points(field):
  """Returns the workloads that vary in a field."""
  return [dataclasses.replace(BASE, **{field: SMALLEST[field] * factor}) for factor in FACTORS]


def measure(w, log):
  """Measures the median seconds of each part of an iteration, {'rollout', 'scoring', 'update'}."""
  process = processes.Process(
    sys.executable,
    'ours',
    w,
    device=FLAGS.device,
    threads=FLAGS.threads,
    log=log,
    options=['--variant', FLAGS.variant],
  )
  try:
    process.turn()
    iterations = [process.turn() for _ in range(FLAGS.iterations)]
    splits = [process.turn('split') for _ in range(2)][1:]
  finally:
    process.end()
  rows = results.seconds({'iterations': iterations, 'splits': splits})
  return {part: statistics.median(row[part] for row in rows) for part in workloads.PARTS}


def slopes(x, seconds):
  """Returns slopes of log seconds over log x: of a fit to all points, and of the last two."""
  x, seconds = np.log(x), np.log(seconds)
  return float(np.polyfit(x, seconds, 1)[0]), float((seconds[-1] - seconds[-2]) / (x[-1] - x[-2]))


def plot(path, found):
  """Draws a log-log plot for each field.

  Args:
    path: PNG file.
    found: {field: [(value, {part: seconds}), ...]}.
  """
  figure = matplotlib.figure.Figure(figsize=(3.2 * len(found), 3.4), layout='constrained')
  for axes, (field, pairs) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items()):
    x = [value for value, _ in pairs]
    whole = [sum(parts.values()) for _, parts in pairs]
    axes.loglog(
      x, whole, 'o-', color='black', label=f'all, slope {slopes(x, whole)[0]:.2f}', base=2
    )
    for part in workloads.PARTS:
      axes.loglog(x, [parts[part] for _, parts in pairs], '.-', label=part, base=2)
    axes.loglog(
      x, [whole[-1] * value / x[-1] for value in x], ':', color='grey', label='slope 1', base=2
    )
    axes.set_xlabel(
      {'response': 'response length', 'layers': 'depth', 'vocab': 'vocabulary'}.get(field, field)
    )
    axes.legend(fontsize=7)
  figure.get_axes()[0].set_ylabel('seconds per iteration')
  figure.savefig(path, dpi=120)


def table(found):
  """Returns the table as plain text.

  Args:
    found: {field: [(value, {part: seconds}), ...]}.
  """
  rows = []
  for field, pairs in found.items():
    x = [value for value, _ in pairs]
    whole = [sum(parts.values()) for _, parts in pairs]
    every, last = slopes(x, whole)
    rows.append(
      {
        'stage': field,
        'from': x[0],
        'to': x[-1],
        **{f'seconds x{value // x[0]}': total for value, total in zip(x, whole)},
        'slope': every,
        'last slope': last,
      }
    )
  return tables.stages_table(rows, title='Seconds of an iteration', width=130)


def main(_):
  options.hold_to_cores()
  out = pathlib.Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  found = {}
  for field in FLAGS.along:
    found[field] = []
    for w in points(field):
      found[field].append((getattr(w, field), measure(w, out / 'scaling.log')))
      print('.', end='', flush=True)
  print(f'\n{table(found)}')
  (out / 'scaling.json').write_text(
    json.dumps({'base': json.loads(BASE.to_json()), 'found': found}, indent=1)
  )
  plot(out / 'scaling.png', found)


if __name__ == '__main__':
  app.run(main)

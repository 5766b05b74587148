"""Summarizes timed iterations: medians, ratios, the table and the chart.

The runs of a peer are a list of {'first': report, 'iterations': [report, ...], 'splits': [report,
...]}. A report of benchmarks/peers/protocol.py is {'parts': {part: seconds}, 'peak': bytes,
'device_peak': bytes or None}.
"""

import io
import statistics

import rich.box
import rich.console
import rich.table

from benchmarks import workloads
from rlhf_jax.evaluation import tables

MIB = 2**20


def seconds(run):
  """Returns the seconds of each part in each iteration of a run.

  Moves the seconds of scoring inside the update, which `splits` measure, from update to scoring.

  Args:
    run: Run as described at the top of the file.

  Returns:
    List of {part: seconds}.
  """
  inside = (
    statistics.median(split['parts']['scoring'] for split in run['splits'])
    if run.get('splits')
    else 0.0
  )
  parts = [dict(report['parts']) for report in run['iterations']]
  if inside:
    for row in parts:
      row['update'] -= inside
      row['scoring'] = row.get('scoring', 0.0) + inside
  return parts


def summarize(runs, about, w, limits, *, variant, device):
  """Computes one row of the table.

  Args:
    runs: Runs as described at the top of the file.
    about: Message that the peer sent when it was ready.
    w: Workload.
    limits: {'matmul': FLOP/s, 'copy': bytes/s} of the machine.
    variant: See workloads.VARIANTS.
    device: 'cpu', 'gpu' or 'tpu'.

  Returns:
    Dict, with None for what the peer does not do. Seconds are medians over the iterations after the
    first of all runs. 'compile' is the additional time of the first iteration. Memory is the peak
    over all runs.
  """
  rows = [row for run in runs for row in seconds(run)]
  medians = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
  complete = all(part in medians for part in workloads.PARTS)
  total = statistics.median(sum(row.values()) for row in rows) if complete else None
  work = workloads.flops(w, variant, about['epochs'])
  item = 4 if device == 'cpu' else 2
  bound = sum(
    workloads.bound(w, **limits, variant=variant, epochs=about['epochs'], item_size=item).values()
  )
  utilization = lambda work, part, limit: (
    work / medians[part] / limits[limit] if part in medians else None
  )
  peaks = [
    report[key]
    for run in runs
    for report in (run['first'], *run['iterations'])
    for key in ['peak' if device == 'cpu' else 'device_peak']
  ]
  return {
    'total': total,
    **{part: medians.get(part) for part in workloads.PARTS},
    'others': {part: value for part, value in medians.items() if part not in workloads.PARTS},
    'tokens': w.batch * w.response / medians['rollout'] if 'rollout' in medians else None,
    'peak': max((x for x in peaks if x is not None), default=None),
    'compile': statistics.median(sum(run['first']['parts'].values()) for run in runs)
    - statistics.median(sum(row.values()) for row in rows),
    'bound': bound,
    'times_bound': total / bound if complete else None,
    'limit': sum(work.values()) / total / limits['matmul'] if complete else None,
    'update_limit': utilization(work['update'], 'update', 'matmul'),
    'decode_limit': utilization(sum(workloads.decode_bytes(w, item).values()), 'rollout', 'copy'),
  }


def ratios(rows, base):
  """Returns the speed of `base` relative to each peer, {name: {'total', 'rollout'}}.

  A ratio is None if one of the two was not measured.
  """

  def times(row, part):
    return row[part] / rows[base][part] if row[part] and rows[base][part] else None

  return {
    name: {part: times(row, part) for part in ('total', 'rollout')} for name, row in rows.items()
  }


def table(rows, base, *, title, notes=(), width=150):
  """Returns the table as plain text.

  Args:
    rows: {peer: summary}.
    base: Name of the peer that the others are compared with.
    title: Title above the table.
    notes: Lines below the table.
    width: Maximum width in characters.
  """
  out = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify='left')
  out.add_column('')
  for name in (
    'seconds per\niteration',
    'rollout',
    'scoring',
    'update',
    'generated\ntokens/s',
    'peak\nMiB',
    'compile\nseconds',
    'times the\nlower bound',
    'FLOP/s of\nmatmul',
    'update\nof matmul',
    'decode\nof copy',
    f'{base} is\ntimes as fast',
    'in the\nrollout',
  ):
    out.add_column(name, justify='right')
  compared = ratios(rows, base)
  for name, row in rows.items():
    cells = [
      row['total'],
      *(row[part] for part in workloads.PARTS),
      row['tokens'],
      row['peak'] and row['peak'] / MIB,
      row['compile'],
      row['times_bound'],
      row['limit'],
      row['update_limit'],
      row['decode_limit'],
      compared[name]['total'],
      compared[name]['rollout'],
    ]
    integers = (4, 5)
    out.add_row(
      name,
      *(
        tables.number(round(cell) if i in integers and cell else cell)
        for i, cell in enumerate(cells)
      ),
    )
  text = io.StringIO()
  console = rich.console.Console(file=text, width=width, color_system=None, highlight=False)
  console.print(out)
  for note in notes:
    console.print(note, markup=False)
  return '\n'.join(line.rstrip() for line in text.getvalue().splitlines()).strip('\n')


def chart(path, rows, bound, title):
  """Draws a bar with the seconds of each part for each peer and for the lower bound.

  Args:
    path: PNG file.
    rows: {peer: summary}. Peers that do not run a full iteration are omitted.
    bound: {part: seconds}, the lower bound.
    title: Title of the chart.
  """
  import matplotlib.figure

  bars = {name: row for name, row in rows.items() if row['total']} | {'lower bound': bound}
  figure = matplotlib.figure.Figure(figsize=(8, 1 + 0.5 * len(bars)), layout='constrained')
  axes = figure.subplots()
  left = [0.0] * len(bars)
  for part in workloads.PARTS:
    widths = [row[part] for row in bars.values()]
    axes.barh(list(bars), widths, left=left, label=part)
    left = [a + b for a, b in zip(left, widths)]
  for y, end in enumerate(left):
    axes.text(end, y, f' {end:.2f}', va='center')
  axes.invert_yaxis()
  axes.margins(x=0.1)
  axes.set_xlabel('seconds per PPO iteration')
  axes.set_title(title, fontsize=10)
  axes.legend()
  figure.savefig(path, dpi=120)

"""From the iterations that were timed to medians, ratios, the table and the chart.

A peer's runs are a list of {'first': report, 'iterations': [report, ...], 'splits': [report, ...]},
reports as benchmarks/peers/protocol.py makes them: {'parts': {part: seconds}, 'peak': bytes,
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
  """Seconds of each part in each iteration of a run, scoring within the update counted as scoring.

  Args:
    run: see the module.

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


def summarize(runs, about, w, limits, *, way, device):
  """One row of the table.

  Args:
    runs: see the module.
    about: what the peer said when it was ready.
    w: Workload.
    limits: {'matmul': FLOP/s, 'copy': bytes/s} of the machine.
    way: see workloads.WAYS.
    device: 'cpu', 'gpu' or 'tpu'.

  Returns:
    Dict; None where the peer does no such thing. Seconds are medians over all iterations after the
    first of all runs; 'compile' is by how much the first one took longer; memory is the most of any
    run.
  """
  rows = [row for run in runs for row in seconds(run)]
  middle = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
  whole = all(part in middle for part in workloads.PARTS)
  total = statistics.median(sum(row.values()) for row in rows) if whole else None
  work = workloads.flops(w, way, about['epochs'])
  item = 4 if device == 'cpu' else 2
  bound = sum(
    workloads.bound(w, **limits, way=way, epochs=about['epochs'], item_size=item).values()
  )
  share = lambda rate, part, limit: rate / middle[part] / limits[limit] if part in middle else None
  peaks = [
    report[key]
    for run in runs
    for report in (run['first'], *run['iterations'])
    for key in ['peak' if device == 'cpu' else 'device_peak']
  ]
  return {
    'total': total,
    **{part: middle.get(part) for part in workloads.PARTS},
    'others': {part: value for part, value in middle.items() if part not in workloads.PARTS},
    'tokens': w.batch * w.response / middle['rollout'] if 'rollout' in middle else None,
    'peak': max((x for x in peaks if x is not None), default=None),
    'compile': statistics.median(sum(run['first']['parts'].values()) for run in runs)
    - statistics.median(sum(row.values()) for row in rows),
    'bound': bound,
    'times_bound': total / bound if whole else None,
    'limit': sum(work.values()) / total / limits['matmul'] if whole else None,
    'update_limit': share(work['update'], 'update', 'matmul'),
    'decode_limit': share(sum(workloads.decode_bytes(w, item).values()), 'rollout', 'copy'),
  }


def ratios(rows, base):
  """Speed of `base` relative to each peer, {name: {'total', 'rollout'}}; None if not measured."""

  def times(row, part):
    return row[part] / rows[base][part] if row[part] and rows[base][part] else None

  return {
    name: {part: times(row, part) for part in ('total', 'rollout')} for name, row in rows.items()
  }


def table(rows, base, *, title, notes=(), width=150):
  """The table as plain text.

  Args:
    rows: {peer: summary}.
    base: the peer that others are compared with.
    title: above it.
    notes: lines below it.
    width: in characters.
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
    whole = (4, 5)
    out.add_row(
      name,
      *(
        tables.number(round(cell) if i in whole and cell else cell) for i, cell in enumerate(cells)
      ),
    )
  text = io.StringIO()
  console = rich.console.Console(file=text, width=width, color_system=None, highlight=False)
  console.print(out)
  for note in notes:
    console.print(note, markup=False)
  return '\n'.join(line.rstrip() for line in text.getvalue().splitlines()).strip('\n')


def chart(path, rows, bound, title):
  """Draws a bar for each peer, in seconds by part, and one for the lower bound of their work.

  Args:
    path: the PNG file.
    rows: {peer: summary}; those without a whole iteration are left out.
    bound: {part: seconds}.
    title: above it.
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

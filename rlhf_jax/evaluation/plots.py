"""Figures for notebooks: metrics of a run, live or afterwards, and comparisons of policies."""

import contextlib
import importlib
import io
import sys
import time

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf_jax import metrics as metrics_lib

UPDATE_SECONDS = 2.0  # interval between two updates of the live figure
MAX_PANELS = 6  # panels of a figure if no metrics are chosen


class Plot(Figure):
  """A Figure that notebooks show without pyplot."""

  def _repr_png_(self):
    buffer = io.BytesIO()
    FigureCanvasAgg(self).print_png(buffer)
    return buffer.getvalue()


def figure(records, names=None):
  """Draws metrics over steps, one panel each.

  Args:
    records: List of dicts with a `step`, as metrics.read returns them.
    names: Names of metrics; None for those that the progress bar shows.

  Returns:
    Plot.
  """
  if names is None:
    names = [
      name for name in metrics_lib.PROGRESS_METRICS if any(name in record for record in records)
    ]
    names = names[:MAX_PANELS]
  columns = min(3, max(1, len(names)))
  rows = max(1, -(-len(names) // columns))
  plot = Plot(figsize=(3.4 * columns, 2.3 * rows), layout='constrained')
  for axes, name in zip(plot.subplots(rows, columns, squeeze=False).flat, names):
    points = [(record['step'], record[name]) for record in records if name in record]
    axes.plot(*zip(*points) if points else ([], []), marker='.', markersize=3, linewidth=1)
    axes.set_title(name, fontsize=9)
    axes.set_xlabel('step', fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
  for axes in plot.axes[len(names) :]:
    axes.remove()
  return plot


def ratings(rows, baseline):
  """Draws win rates over the baseline and Elo ratings, with their 95 % intervals.

  Args:
    rows: Rows that comparison.compare returns.
    baseline: Name of the baseline.

  Returns:
    Plot.
  """
  plot = Plot(figsize=(7.0, 1.2 + 0.35 * len(rows)), layout='constrained')
  panels = (('win', 'win_rate', f'win rate over {baseline}'), ('elo', 'elo', 'Elo rating'))
  left, right = plot.subplots(1, 2, sharey=True)
  for axes, (prefix, key, label) in zip((left, right), panels):
    for y, row in enumerate(rows[::-1]):
      axes.plot([row[f'{prefix}_low'], row[f'{prefix}_high']], [y, y], color='C0', alpha=0.4, lw=5)
      axes.plot(row[key], y, color='C0', marker='o')
    axes.set_xlabel(label)
    axes.grid(alpha=0.2)
  left.set_yticks(range(len(rows)), [row['stage'] for row in rows[::-1]])
  left.axvline(0.5, color='gray', linestyle='--', linewidth=0.8)
  return plot


@contextlib.contextmanager
def live():
  """Shows a figure of the metrics below a notebook's cell, and updates it while the body runs.

  Yields:
    Function (step, metrics) -> None for loop.run(on_metrics=...); None outside of a notebook.
  """
  shell = sys.modules.get('IPython') and sys.modules['IPython'].get_ipython()
  if shell is None or not hasattr(shell, 'kernel'):
    yield None
    return
  display = importlib.import_module('IPython.display')  # not a dependency, but notebooks have it

  records, handle, drawn = [], None, 0.0

  def draw(step, metrics):
    nonlocal handle, drawn
    records.append({'step': step} | metrics)
    if time.monotonic() - drawn < UPDATE_SECONDS:
      return
    drawn = time.monotonic()
    if handle is None:
      handle = display.display(figure(records), display_id=True)
    else:
      handle.update(figure(records))

  try:
    yield draw
  finally:
    if handle is not None:
      handle.update(figure(records))

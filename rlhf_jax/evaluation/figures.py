"""Figures of the report, as SVG text for an HTML page; see svg.py."""

import math

import numpy as np

from rlhf_jax.svg import BLUE
from rlhf_jax.svg import GREEN
from rlhf_jax.svg import INK as _INK
from rlhf_jax.svg import inline as _svg
from rlhf_jax.svg import ORANGE
from rlhf_jax.svg import PALETTE as _PALETTE
from rlhf_jax.svg import short as _short

_MAX_POINTS = 300


def curve(title, lines):
  """Draws one metric over steps. The page shows the metric's name above the figure.

  Args:
    title: Name of the metric, for screen readers.
    lines: {label: list of (step, value)}. None, NaN and infinite values leave a gap. Labels are
      shown if there are several lines.

  Returns:
    SVG text.
  """

  def draw(figure):
    axes = figure.subplots()
    for (label, points), colour in zip(lines.items(), (BLUE, ORANGE, GREEN) * 9, strict=False):
      steps = np.array([step for step, _ in points], float)
      values = np.array([_finite(value) for _, value in points], float)
      shown = np.unique(np.linspace(0, len(points) - 1, _MAX_POINTS).astype(int))
      smooth = _running_mean(values, len(values) // 25)
      if len(values) < 50:
        axes.plot(steps, values, color=colour, label=_short(label), marker='.', markersize=4)
      else:
        axes.plot(steps[shown], values[shown], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps[shown], smooth[shown], color=colour, label=_short(label))
    axes.set_xlabel('step')
    axes.locator_params(nbins=5)
    if len(lines) > 1:
      axes.legend(fontsize=8)

  return _svg(draw, (3.6, 2.1), title)


def frontier(points, best_of=()):
  """Draws gold and proxy scores over KL, for the policy in training and for best-of-n.

  Args:
    points: List of {"step", "kl" in nats, "gold", "gold_se", "proxy"}; the last three may be
      missing. A line joins the points in the order of steps.
    best_of: Points of best_of_n.curve, list of {"n", "kl", "gold", "gold_se", "proxy"}. At least
      one of the two lists must not be empty.

  Returns:
    SVG text.
  """
  points = sorted(points, key=lambda point: point.get('step', 0))
  both = [*points, *best_of]

  def draw(figure):
    named = (('gold', 'gold score', GREEN), ('proxy', 'proxy score', ORANGE))
    panels = [panel for panel in named if any(panel[0] in point for point in both)]
    rows = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, name, colour) in zip(rows, panels, strict=False):
      _frontier_line(axes, points, key, 'step', colour, 'policy in training')
      _frontier_line(axes, best_of, key, 'n', BLUE, 'best of n, upper bound of KL', style='--')
      axes.set_ylabel(name)
      axes.margins(y=0.2)
    rows[-1].set_xlabel('KL from the reference policy (nats per sequence)')
    if points and best_of:
      rows[0].legend(fontsize=8)

  return _svg(draw, (5.2, 4.4), 'Scores over KL')


def _frontier_line(axes, points, key, counter, colour, label, style='-'):
  """Draws one line of `frontier`, with labels at its first and last point."""
  points = [point for point in points if key in point]
  kl = [_finite(point.get('kl')) for point in points]
  values = [_finite(point[key]) for point in points]
  if not points:
    return
  errors = [_finite(point.get(f'{key}_se'), 0.0) for point in points]
  axes.errorbar(
    kl,
    values,
    errors,
    color=colour,
    label=label,
    linestyle=style,
    marker='o',
    markersize=3,
    elinewidth=0.8,
  )
  for end, offset, side in ((0, (6, -9), 'left'), (-1, (-4, 6), 'right'))[: len(points)]:
    if math.isfinite(kl[end]) and math.isfinite(values[end]):
      axes.annotate(
        f'{counter} {points[end].get(counter, "")}',
        (kl[end], values[end]),
        offset,
        textcoords='offset points',
        horizontalalignment=side,
        fontsize=7,
      )


def points_and_curves(series, *, x, y, title, log_x=False, integer_x=False):
  """Draws points with a line or a fitted curve for each series.

  Args:
    series: List of {"label", "points": list of (x, y)} and possibly "colour": number of its colour,
      by default that of the series; "dashed"; "curve": list of (x, y), drawn instead of a line
      through the points. Series with the same label share an entry of the legend.
    x: Label of the x axis.
    y: Label of the y axis.
    title: Text for screen readers.
    log_x: Whether the x axis is logarithmic.
    integer_x: Whether the ticks of the x axis are whole numbers, as for counts.

  Returns:
    SVG text.
  """

  def draw(figure):
    axes = figure.subplots()
    for number, one in enumerate(series):
      colour = _PALETTE[one.get('colour', number)]
      style = '--' if one.get('dashed') else '-'
      known = [row for row in one['points'] if all(math.isfinite(value) for value in row)]
      columns = lambda rows: tuple(zip(*rows)) or ((), ())
      axes.plot(*columns(known), '.', color=colour, alpha=0.35, markersize=4)
      axes.plot(*columns(one.get('curve', known)), style, color=colour, label=_short(one['label']))
    if log_x:
      axes.set_xscale('log')
    if integer_x:
      # By default, matplotlib takes fractions if there are fewer than two whole numbers.
      axes.locator_params('x', integer=True, min_n_ticks=1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    axes.legend(handles.values(), handles, fontsize=8)

  return _svg(draw, (5.2, 3.6), title)


def reliability(bins):
  """Draws accuracy over confidence. The area of a point is proportional to its number of pairs.

  Args:
    bins: List of {"low", "high", "count", "confidence", "accuracy"}.

  Returns:
    SVG text.
  """
  bins = [row for row in bins if row['count']]
  total = sum(row['count'] for row in bins)

  def draw(figure):
    axes = figure.subplots()
    x, y = [row['confidence'] for row in bins], [row['accuracy'] for row in bins]
    axes.plot([0.5, 1], [0.5, 1], color=_INK, alpha=0.5, linestyle='--', linewidth=1)
    axes.plot(x, y, color=BLUE)
    axes.scatter(x, y, [10 + 300 * row['count'] / total for row in bins], color=BLUE, alpha=0.6)
    axes.set_xlabel('confidence of the reward model')
    axes.set_ylabel('accuracy')
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min([0.45, *y]) - 0.03, 1.03)

  return _svg(draw, (4.2, 3.2), 'Reliability diagram')


def ratings(elo):
  """Draws Elo ratings with their intervals.

  Args:
    elo: {policy: {"elo", "low", "high"}}.

  Returns:
    SVG text.
  """
  values = {name: (rating['elo'], rating['low'], rating['high']) for name, rating in elo.items()}
  return intervals(values, 'Elo rating, with its 95 % interval', 'Elo ratings')


def intervals(values, axis, title=''):
  """Draws one value with its interval per line.

  Args:
    values: {label: (value, low, high)}.
    axis: Label of the axis.
    title: Title for screen readers; by default the label of the axis.

  Returns:
    SVG text.
  """
  names = list(values)[::-1]

  def draw(figure):
    axes = figure.subplots()
    for row, name in enumerate(names):
      value, low, high = values[name]
      axes.plot([low, high], [row, row], color=BLUE, alpha=0.4, linewidth=5)
      axes.plot(value, row, color=BLUE, marker='o', markersize=5)
    axes.set_yticks(range(len(names)), map(_short, names))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(axis)

  return _svg(draw, (4.2, 1.0 + 0.35 * len(names)), title or axis)


def reliabilities(values):
  """Draws the learned reliability of each annotator, and where one chooses at random.

  Args:
    values: {annotator: inverse temperature}, from top to bottom.

  Returns:
    SVG text.
  """
  names = list(values)[::-1]

  def draw(figure):
    axes = figure.subplots()
    axes.axvline(0, color=_INK, alpha=0.5, linestyle='--', linewidth=1)
    axes.barh(range(len(names)), [values[name] for name in names], height=0.5, color=BLUE)
    axes.set_yticks(range(len(names)), map(_short, names))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel('reliability; 0 is random, the mean is 1')

  return _svg(draw, (4.2, 1.0 + 0.3 * len(names)), 'Reliability of the annotators')


def bands(lines, x_axis, y_axis):
  """Draws one line with a band for each group of runs.

  Args:
    lines: {label: {"x", "mean", "low", "high"}}, lists of equal length.
    x_axis: Label of the horizontal axis.
    y_axis: Label of the vertical axis.

  Returns:
    SVG text.
  """

  def draw(figure):
    axes = figure.subplots()
    for (label, line), colour in zip(lines.items(), _PALETTE, strict=False):
      axes.fill_between(line['x'], line['low'], line['high'], color=colour, alpha=0.2, linewidth=0)
      axes.plot(line['x'], line['mean'], color=colour, label=_short(label))
    axes.set_xlabel(x_axis)
    axes.set_ylabel(y_axis)
    axes.legend(fontsize=7)

  return _svg(draw, (5.2, 3.6), f'{y_axis} over {x_axis}')


def frontiers(lines, y_axis):
  """Draws the score over the KL, one line for each group of runs.

  Args:
    lines: {label: list of (kl, score)}, in the order of training.
    y_axis: Label of the vertical axis.

  Returns:
    SVG text.
  """

  def draw(figure):
    axes = figure.subplots()
    for (label, points), colour in zip(lines.items(), _PALETTE, strict=False):
      axes.plot(*zip(*points, strict=True), color=colour, label=_short(label))
      axes.plot(*points[-1], color=colour, marker='o', markersize=4)
    axes.set_xlabel('KL from the reference policy (nats per sequence)')
    axes.set_ylabel(y_axis)
    axes.legend(fontsize=7)

  return _svg(draw, (5.2, 3.6), f'{y_axis} over KL')


def _finite(value, default=math.nan):
  return float(value) if value is not None and math.isfinite(value) else default


def _running_mean(values, half):
  """Computes the mean over the window of `half` values on either side, ignoring NaNs."""
  known = np.isfinite(values)
  totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
  counts = np.concatenate([[0], np.cumsum(known)])
  index = np.arange(len(values))
  left, right = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
  with np.errstate(invalid='ignore'):
    return (totals[right] - totals[left]) / (counts[right] - counts[left])

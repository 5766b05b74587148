"""Selects what the report shows of a run's metrics: panels, final values, and times.

A record is a line of metrics.jsonl, a dict with a `step`. A series is a list of (step, value).
"""

import math
import statistics

from rlhf_jax.evaluation import glossary

MAX_PANELS = 12
# Glossary entries that are shown first.
KEY_METRICS = (
  'objective/scores',
  'EVAL/score',
  'EVAL/rate',
  'objective/kl',
  'distillation/loss',
  'distillation/reverse_kl',
  'distillation/forward_kl',
  'response/length',
  'response/eos_rate',
  'value/explained_variance',
  'policy/clipfrac',
  'policy/approxkl',
  'policy/entropy_per_token',
  'reward/PART',
  'groups/equal',
  'ptx/loss',
  'loss',
  'EVAL/loss',
  'accuracy',
  'EVAL/accuracy',
  'margin',
  'perplexity',
  'EVAL/perplexity',
)
# Glossary entries with a best value, and whether it is the highest or the lowest.
BEST = dict.fromkeys(
  (
    'objective/scores',
    'objective/rlhf_reward',
    'EVAL/score',
    'EVAL/rate',
    'accuracy',
    'EVAL/accuracy',
    'value/explained_variance',
  ),
  max,
) | dict.fromkeys(('loss', 'EVAL/loss', 'perplexity', 'EVAL/perplexity', 'distillation/loss'), min)
NO_PANEL = {metric.name for metric in glossary.TIMES} | {'tokens', 'fill'}
PARTS = ('rollout', 'scoring', 'update')  # timed parts of a step
_LAST = (*glossary.OPTIMIZER, *glossary.TIMES)
_ORDER = {metric.name: place for place, metric in enumerate(glossary.METRICS)}


def series(records):
  """Returns {name: series} of the metrics with a finite value, sorted by `_rank`."""
  names = dict.fromkeys(name for record in records for name in record if name != 'step')
  metrics = {
    name: [(record['step'], record[name]) for record in records if name in record] for name in names
  }
  metrics = {name: points for name, points in metrics.items() if finite(points)}
  return {name: metrics[name] for name in sorted(metrics, key=_rank)}


def _rank(name):
  """Returns a sort key: first KEY_METRICS, then the user's metrics, then the glossary's order."""
  entry = _entry(name)
  if entry in KEY_METRICS:
    return 0, KEY_METRICS.index(entry), name
  return (2, _ORDER[entry], name) if entry else (1, 0, name)


def _entry(name):
  """Returns the name of a metric's glossary entry; '' if it has none."""
  metric = glossary.find(name)
  return metric.name if metric else ''


def finite(points):
  """Returns the points of a series whose value is a finite number, as (step, float)."""
  return [
    (step, float(value))
    for step, value in points
    if isinstance(value, (int, float)) and math.isfinite(value)
  ]


def panels(metrics):
  """Returns the first figures of a run, {title: {name: series}}.

  There is no figure for times and sizes, for a metric that does not change, or for a metric with
  the same values as an earlier one, such as scores without postprocessing. A held-out metric shares
  the figure of the same training metric.

  Args:
    metrics: {name: series}; see `series`.
  """
  figures, seen = {}, []
  for name, points in metrics.items():
    values = finite(points)
    varies = len({value for _, value in values}) > 1
    if varies and values not in seen and _entry(name) not in NO_PANEL:
      _, _, training_name = name.partition('/')
      is_held_out = _entry(name).startswith('EVAL/') and training_name in metrics
      figures.setdefault(training_name if is_held_out else name, {})[name] = points
      seen.append(values)
  return dict(list(figures.items())[:MAX_PANELS])


def final(metrics):
  """Returns rows (name, first, last, best, step of the best) of the key metrics.

  Best and its step are None if neither high nor low values are better. A run without key metrics
  gets the rows of all other metrics except norms and times.

  Args:
    metrics: {name: series}; see `series`.
  """
  last = {metric.name for metric in _LAST}
  names = [name for name in metrics if _entry(name) in KEY_METRICS]
  names = names or [name for name in metrics if _entry(name) not in last]
  rows = []
  for name in names:
    points, better = finite(metrics[name]), BEST.get(_entry(name))
    step, best = better(points, key=lambda point: point[1]) if better else (None, None)
    rows.append((name, points[0][1], points[-1][1], best, step))
  return rows


def ranges(metrics):
  """Returns rows (name, first, last, minimum, maximum) of all metrics.

  Args:
    metrics: {name: series}; see `series`.
  """
  rows = []
  for name, points in metrics.items():
    values = [value for _, value in finite(points)]
    rows.append((name, values[0], values[-1], min(values), max(values)))
  return rows


def times(records):
  """Computes how long the parts of a step take.

  Args:
    records: Records of the run.

  Returns:
    Rows (part, seconds per step, fraction of the step, seconds in the first logged step). Seconds
    are medians over the logged steps, without the first if there are others, because it includes
    compilation. The part 'other' is the remaining time of the step. [] if no times are logged.
  """
  timed = [record for record in records if 'seconds/step' in record]
  seconds = {}
  for part in (*PARTS, 'step'):
    values = finite([(0, record.get(f'seconds/{part}')) for record in timed])
    if values:
      later = [value for _, value in values[1:] or values]
      seconds[part] = statistics.median(later), values[0][1]
  if not seconds.keys() & set(PARTS):
    return []
  parts = [(part, *seconds[part]) for part in PARTS if part in seconds]
  other = [max(0.0, seconds['step'][i] - sum(row[i + 1] for row in parts)) for i in (0, 1)]
  parts.append(('other', *other))
  total = sum(row[1] for row in parts) or 1.0
  return [(part, median, median / total, first) for part, median, first in parts]

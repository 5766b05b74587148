"""What the report shows of a run's metrics: panels, final values, and the time of each part.

A record is a line of metrics.jsonl, a dict with a `step`; a series is a list of (step, value).
"""

import math
import statistics

from rlhf_jax.evaluation import glossary

MOST_PANELS = 12
# Entries of the glossary that a reader looks for first.
FIRST = (
  'objective/scores',
  'EVAL/score',
  'EVAL/rate',
  'objective/kl',
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
# Entries whose best value is the highest or the lowest; the others have no best value.
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
) | dict.fromkeys(('loss', 'EVAL/loss', 'perplexity', 'EVAL/perplexity'), min)
NO_PANEL = {metric.name for metric in glossary.TIMES} | {'tokens', 'fill'}
PARTS = ('rollout', 'scoring', 'update')
_LAST = (*glossary.OPTIMIZER, *glossary.TIMES)
_ORDER = {metric.name: place for place, metric in enumerate(glossary.METRICS)}


def series(records):
  """{name: series} of the metrics that have a finite value, those looked for first in front."""
  names = dict.fromkeys(name for record in records for name in record if name != 'step')
  found = {
    name: [(record['step'], record[name]) for record in records if name in record] for name in names
  }
  found = {name: points for name, points in found.items() if finite(points)}
  return {name: found[name] for name in sorted(found, key=_rank)}


def _rank(name):
  """Sorts names: FIRST, a user's own metrics, then the order of the glossary: times are last."""
  entry = _entry(name)
  if entry in FIRST:
    return 0, FIRST.index(entry), name
  return (2, _ORDER[entry], name) if entry else (1, 0, name)


def _entry(name):
  """The name of a metric's entry in the glossary; '' if it has none."""
  metric = glossary.find(name)
  return metric.name if metric else ''


def finite(points):
  """The finite numbers of a series, as (step, float)."""
  return [
    (step, float(value))
    for step, value in points
    if isinstance(value, (int, float)) and math.isfinite(value)
  ]


def panels(found):
  """The first figures of a run: {title: {name: series}}.

  Times and sizes have no figure, and neither has a metric that does not change, or one whose values
  are those of a metric before it, such as scores without postprocessing. A held-out metric is in
  the figure of the same metric in training.

  Args:
    found: of `series`.
  """
  made, before = {}, []
  for name, points in found.items():
    values = finite(points)
    varies = len({value for _, value in values}) > 1
    if varies and values not in before and _entry(name) not in NO_PANEL:
      _, _, rest = name.partition('/')
      shared = _entry(name).startswith('EVAL/') and rest in found
      made.setdefault(rest if shared else name, {})[name] = points
      before.append(values)
  return dict(list(made.items())[:MOST_PANELS])


def final(found):
  """Rows (name, first, last, best, step of the best) of the metrics that a reader looks for first.

  Best and its step are None if neither high nor low values are good. A run that has none of these
  metrics gets the rows of all others, except norms and times.

  Args:
    found: of `series`.
  """
  last = {metric.name for metric in _LAST}
  names = [name for name in found if _entry(name) in FIRST]
  names = names or [name for name in found if _entry(name) not in last]
  rows = []
  for name in names:
    points, better = finite(found[name]), BEST.get(_entry(name))
    step, best = better(points, key=lambda point: point[1]) if better else (None, None)
    rows.append((name, points[0][1], points[-1][1], best, step))
  return rows


def ranges(found):
  """Rows (name, first, last, least, most) of all metrics."""
  rows = []
  for name, points in found.items():
    values = [value for _, value in finite(points)]
    rows.append((name, values[0], values[-1], min(values), max(values)))
  return rows


def times(records):
  """How long the parts of a step take.

  Args:
    records: of the run.

  Returns:
    Rows (part, seconds of a step, fraction of it, seconds in the first logged step). Seconds are
    medians over the logged steps, without the first if there are others: it includes compilation.
    `other` is what the parts leave of the step. [] if no times are logged.
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
  whole = sum(row[1] for row in parts) or 1.0
  return [(part, typical, typical / whole, first) for part, typical, first in parts]

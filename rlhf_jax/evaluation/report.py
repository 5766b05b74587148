"""The report of a run: one HTML file with tables, figures and samples, and nothing outside it.

Every part may be missing: a run of a single stage has only learning curves and a configuration.
"""

import math
import os
import pathlib

import jinja2
import markupsafe

from rlhf_jax import metrics as metrics_lib
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import page
from rlhf_jax.evaluation import tables

_MOST_PANELS = 9
# What people look for first, as parts of metric names, of which the first that there is counts; the
# rest follows in alphabetical order.
_FIRST = (
  ('gold',),
  ('objective/scores', 'score'),
  ('objective/postprocessed_scores',),
  ('reward',),
  ('loss',),
  ('accuracy',),
  ('objective/kl', 'kl'),
  ('objective/kl_coef',),
  ('objective/entropy_per_response', 'entropy'),
  ('length',),
  ('clip',),
)


def write(
  path,
  *,
  title,
  summary='',
  stages=(),
  metrics=None,
  frontier=(),
  calibration=None,
  elo=None,
  samples=(),
  config_text='',
):
  """Writes the report.

  Args:
    path: the HTML file; written aside and then renamed, so it is never half there.
    title: of the page.
    summary: a plain sentence or two under the title.
    stages: list of rows of the stage table; see `tables`.
    metrics: {stage: list of dicts of its metrics.jsonl}.
    frontier: list of {"step", "kl", "gold", "gold_se", "proxy"} of one policy as it was trained.
    calibration: a Calibration as a dict (dataclasses.asdict), None for none.
    elo: {policy: a Rating as a dict}, None for none.
    samples: list of {"prompt", "before", "after"} and, if known, "scores": {"before": {name:
      number}, "after": {name: number}}.
    config_text: the configuration, to be read by people.

  Returns:
    The path, a pathlib.Path.
  """
  titles, rows = tables.stages(stages)
  curves = [_curves(stage, records) for stage, records in (metrics or {}).items() if records]
  parts = {
    'stages': rows,
    'frontier': _safe(figures.frontier(frontier)) if frontier else '',
    'ratings': _safe(figures.ratings(elo)) if elo else '',
    'calibration': _calibration_rows(calibration) if calibration else [],
    'samples': [_sample(sample) for sample in samples],
    'curves': curves,
    'config_text': config_text,
  }
  bins = calibration['bins'] if calibration else ()
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
  )
  html = environment.from_string(page.TEMPLATE).render(
    title=title,
    summary=summary,
    titles=titles,
    stages_note=_stages_note(stages),
    reliability=_safe(figures.reliability(bins)) if any(row['count'] for row in bins) else '',
    contents=_contents(parts),
    **parts,
  )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(html, encoding='utf-8')
  os.replace(temporary, path)
  return path


def _safe(svg):
  return markupsafe.Markup(svg)


def _contents(parts):
  """(name, anchor) of every section that there is."""
  sections = (
    ('Stages', 'stages', parts['stages']),
    ('Scores and ratings', 'frontier', parts['frontier'] or parts['ratings']),
    ('Reward model', 'calibration', parts['calibration']),
    ('Samples', 'samples', parts['samples']),
    ('Learning curves', 'curves', parts['curves']),
    ('Configuration', 'config', parts['config_text']),
  )
  return [(name, anchor) for name, anchor, there in sections if there]


def _stages_note(rows):
  """What the columns mean, for those columns that there are."""
  notes = {
    'gold': 'Gold score ± standard error: the hidden score that no training stage sees.',
    'proxy': 'Proxy score: what the learned reward model gives.',
    'kl': 'KL: nats per sequence from the reference policy.',
    'win_rate': 'Win rate: over the baseline on the same prompts, draws half, 95 % interval.',
    'elo': 'Elo: from matches between all stages, ± half the 95 % interval.',
  }
  return ' '.join(note for key, note in notes.items() if any(key in row for row in rows))


def _curves(stage, records):
  """The panels of a stage's first metrics, and first, last, least and most of all of them."""
  names = list(dict.fromkeys(name for record in records for name in record if name != 'step'))
  series = {}
  for name in names:
    points = [(record['step'], record[name]) for record in records if name in record]
    if any(_is_number(value) for _, value in points):
      series[name] = points
  panels = {}
  # False sorts first: training before evaluation.
  for name in sorted(series, key=lambda name: (name.startswith(('eval', 'held_out')), name)):
    panels.setdefault(_plain(name), {})[name] = series[name]
  shown = []
  for title in _ordered(panels)[:_MOST_PANELS]:
    lines = panels[title]
    labelled = lines if len(lines) > 1 else {'': next(iter(lines.values()))}
    shown.append(_safe(figures.curve(title, labelled)))
  rows = []
  for name, points in sorted(series.items()):
    values = [float(value) for _, value in points if _is_number(value)]
    summary = (values[0], values[-1], min(values), max(values))
    rows.append([name, *map(tables.number, summary)])
  return {'stage': stage, 'panels': shown, 'rows': rows}


def _plain(name):
  """The name without its split, so that training and evaluation share a panel."""
  for prefix in ('train/', 'held_out/', 'eval/', 'train_', 'eval_'):
    name = name.removeprefix(prefix)
  return name


def _ordered(names):
  """The names, those that people look for first: of each sort the shortest, then all others."""
  left = sorted(names)
  first = []
  for parts in _FIRST:
    part = next((part for part in parts if any(part in name for name in left)), None)
    match = min((name for name in left if part and part in name), key=len, default=None)
    if match is not None:
      first.append(match)
      left.remove(match)
  return first + left


def _is_number(value):
  return isinstance(value, (int, float)) and math.isfinite(value)


def _calibration_rows(calibration):
  return [
    ('Pairs', str(calibration['count'])),
    ('Accuracy (ties are wrong)', f'{calibration["accuracy"]:.3f}'),
    (
      '95 % interval',
      f'{calibration["accuracy_low"]:.3f} to {calibration["accuracy_high"]:.3f}',
    ),
    ('Ties', f'{calibration["ties"]:.3f}'),
    ('Mean margin', f'{calibration["margin"]:.2f}'),
    ('Expected calibration error', f'{calibration["ece"]:.3f}'),
  ]


def _sample(sample):
  scores = sample.get('scores') or {}

  def text(side):
    named = (scores.get(side) or {}).items()
    return ''.join(f' · {name} {value:.2f}' for name, value in named if _is_number(value))

  return {
    'prompt': sample['prompt'],
    'before': sample['before'].strip(),
    'after': sample['after'].strip(),
    'before_scores': text('before'),
    'after_scores': text('after'),
  }


def of_stages(folder, *, workdir, title, summary, curves):
  """A stage of a pipeline: the report of stages that nothing else evaluates, workdir/report.html.

  Args:
    folder: of this stage; nothing is written there.
    workdir: the pipeline's folder.
    title: of the page.
    summary: a plain sentence or two under the title.
    curves: names of the stages whose learning curves the report shows.
  """
  del folder
  workdir = pathlib.Path(workdir)
  write(
    workdir / 'report.html',
    title=title,
    summary=summary,
    metrics={name: metrics_lib.read(workdir / name) for name in curves},
    config_text=(workdir / 'config.json').read_text(),
  )


def of_run(workdir, *, title):
  """The report of a single run: its learning curves and its config.json.

  Args:
    workdir: of the run; the report goes to report.html there.
    title: of the page.

  Returns:
    The path, a pathlib.Path.
  """
  workdir = pathlib.Path(workdir)
  return write(
    workdir / 'report.html',
    title=title,
    metrics={title: metrics_lib.read(workdir)},
    config_text=(workdir / 'config.json').read_text(),
  )

"""Writes the report of a run: one self-contained HTML file with tables, figures and samples.

Every part is optional. For example, the report of a single run has no table of stages.
"""

import json
import pathlib
import re

import markupsafe

from rlhf_jax import identity
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.evaluation import annotators as annotators_lib
from rlhf_jax.evaluation import curves
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import formulas
from rlhf_jax.evaluation import glossary
from rlhf_jax.evaluation import page
from rlhf_jax.evaluation import reliability
from rlhf_jax.evaluation import samples as samples_lib
from rlhf_jax.evaluation import tables

# Placeholders in the names of metrics in the glossary.
_PLACEHOLDERS = {
  'EVAL': 'EVAL stands for the name of an evaluator in config.evals.',
  'PART': 'PART stands for a part of the reward.',
  'MODEL': 'MODEL stands for policy, critic, reward or annotators.',
}


def write(
  path,
  *,
  title,
  summary='',
  stages=(),
  gold='',
  metrics=None,
  frontier=(),
  best_of=(),
  calibration=None,
  annotators=None,
  elo=None,
  samples=(),
  logged=(),
  config_text='',
  differences=None,
):
  """Writes the report.

  Args:
    path: HTML file. It is replaced atomically, so it is never incomplete.
    title: Title of the page.
    summary: One or two sentences below the title, plain text.
    stages: Rows of the table of stages; see `tables`.
    gold: Description of the gold score in this run.
    metrics: {stage: list of records of its metrics.jsonl}.
    frontier: List of {"step", "kl", "gold", "gold_se", "proxy"} of one policy during training.
    best_of: Points of best-of-n for the figure of the frontier; see best_of_n.curve.
    calibration: Calibration as a dict (dataclasses.asdict), or None.
    annotators: {stage: rows of its annotators.json}, or None.
    elo: {policy: Rating as a dict}, or None.
    samples: List of {"prompt", "before", "after"} and, if known, "scores": {"before": {name:
      number}, "after": {name: number}}.
    logged: Records of samples.jsonl, shown if there are no `samples`.
    config_text: Config as text.
    differences: {stage: list of identity.Change from the base config}.

  Returns:
    The path, a pathlib.Path.
  """
  titles, rows = tables.stages(stages)
  records = {stage: lines for stage, lines in (metrics or {}).items() if lines}
  series = {stage: curves.series(lines) for stage, lines in records.items()}
  entries, anchors = _glossary(name for stage_series in series.values() for name in stage_series)
  cards = samples_lib.pairs(samples) or samples_lib.logged(logged)
  unique = lambda key: list(dict.fromkeys(name for card in cards for name in card[key]))
  bins = calibration['bins'] if calibration else ()
  parts = {
    'stages': rows,
    'frontier': _safe(figures.frontier(frontier, best_of)) if frontier or best_of else '',
    'ratings': _safe(figures.ratings(elo)) if elo else '',
    'final': _final(series),
    'calibration': _calibration_rows(calibration) if calibration else [],
    'annotators': _annotators(annotators or {}),
    'samples': cards,
    'curves': [_curves(stage, stage_series) for stage, stage_series in series.items()],
    'times': _times(records),
    'differences': [(stage, _changes(changes)) for stage, changes in (differences or {}).items()],
    'config_text': config_text,
    'metrics': entries,
  }
  html = page.render(
    parts
    | {
      'title': title,
      'summary': summary,
      'titles': titles,
      'best': tables.best(stages),
      'stages_note': _stages_note(stages, gold),
      'best_of': bool(best_of),
      'reliability': _safe(figures.reliability(bins)) if any(row['count'] for row in bins) else '',
      'groups': unique('groups'),
      'score_names': unique('scores'),
      'annotator_titles': reliability.TITLES,
      'anchors': anchors,
      'metrics_note': _metrics_note(entries),
      'contents': _contents(parts),
    }
  )
  path = pathlib.Path(path)
  page.replace(path, html)
  return path


def _safe(svg):
  return markupsafe.Markup(svg)


def _contents(parts):
  """Returns (name, anchor) of every section that is not empty."""
  sections = (
    ('Stages', 'stages', parts['stages']),
    ('Scores and ratings', 'frontier', parts['frontier'] or parts['ratings']),
    ('Final figures', 'final', parts['final']),
    ('Reward model', 'calibration', parts['calibration']),
    ('Annotators', 'annotators', parts['annotators']),
    ('Samples', 'samples', parts['samples']),
    ('Learning curves', 'curves', parts['curves']),
    ('Time', 'time', parts['times']),
    ('Configuration', 'config', parts['config_text'] or parts['differences']),
    ('Metrics', 'metrics', parts['metrics']),
  )
  return [(name, anchor) for name, anchor, content in sections if content]


def _stages_note(rows, gold):
  """Returns an explanation of the columns that are not empty."""
  notes = {
    'gold': f'Gold score ± standard error. {f"Gold is {gold}" if gold else ""}'.rstrip(' .') + '.',
    'proxy': 'Proxy score: the score of the reward model.',
    'kl': 'KL: nats per response, from the baseline.',
    'win_rate': 'Win rate: over the baseline on the same prompts, with its 95 % interval; a draw '
    'is half a win.',
    'elo': 'Elo: from matches between all stages, ± half the width of the 95 % interval.',
  }
  present = [note for key, note in notes.items() if any(row.get(key) is not None for row in rows)]
  return ' '.join([*present, 'The best row is highlighted.'])


def _final(series):
  """Returns (stage, rows of strings) for the table of final figures."""
  stages = ((stage, curves.final(metrics)) for stage, metrics in series.items())
  texts = lambda row: [row[0], *map(tables.number, row[1:])]
  return [(stage, [texts(row) for row in rows]) for stage, rows in stages if rows]


def _curves(stage, series):
  """Returns plots of a stage's main metrics, and the table of all of its metrics."""
  panels = [
    (name, _safe(figures.curve(name, lines))) for name, lines in curves.panels(series).items()
  ]
  rows = [[name, *map(tables.number, values)] for name, *values in curves.ranges(series)]
  return {'stage': stage, 'panels': panels, 'rows': rows}


def _times(records):
  """Returns (stage, rows of strings) for the table of times."""
  stages = ((stage, curves.times(lines)) for stage, lines in records.items())
  texts = lambda row: (row[0], f'{row[1]:.3g}', row[2], f'{row[3]:.3g}')
  return [(stage, [texts(row) for row in rows]) for stage, rows in stages if rows]


def _changes(changes):
  """Returns rows (key, base value, value) of a config's differences."""
  text = lambda value: value if value == identity.ABSENT else repr(value)
  return [(change.key, text(change.before), text(change.after)) for change in changes]


def _glossary(names):
  """Returns the glossary entries of metrics, with Markdown rendered as HTML, and {name: anchor}."""
  metrics = {name: glossary.find(name) for name in names}
  metrics = {name: metric for name, metric in metrics.items() if metric}
  unique = set(metrics.values())
  entries = [metric for metric in glossary.METRICS if metric in unique]
  links = {metric.name: f'metric-{metric.anchor}' for metric in entries}

  def html(text):
    parts = re.split('`([^`]+)`', text)
    for i in range(1, len(parts), 2):
      link = links.get(parts[i])
      code = markupsafe.Markup('<code>{}</code>').format(parts[i])
      parts[i] = markupsafe.Markup('<a href="#{}">{}</a>').format(link, code) if link else code
    return markupsafe.Markup('').join(parts)

  rendered = [
    {
      'name': metric.name,
      'anchor': metric.anchor,
      'meaning': html(metric.meaning),
      'formula': formulas.mathml(metric.formula, block=True) if metric.formula else '',
      'unit': html(metric.unit),
      'worry': html(metric.worry),
    }
    for metric in entries
  ]
  return rendered, {name: links[metric.name] for name, metric in metrics.items()}


def _metrics_note(entries):
  """Returns an explanation of the placeholders in the names of the entries."""
  words = {word for metric in entries for word in metric['name'].split('/')}
  return ' '.join(note for word, note in _PLACEHOLDERS.items() if word in words)


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


def _annotators(stages):
  """Returns (stage, figure, rows of strings) for the tables of annotators."""
  tables_of = {stage: reliability.table(rows) for stage, rows in stages.items()}
  return [
    (stage, _safe(reliability.figure(stages[stage])), rows)
    for stage, rows in tables_of.items()
    if rows
  ]


def read(workdir, stages):
  """Reads the files of a run for the report.

  Args:
    workdir: Folder with config.json. A comparison of policies has none.
    stages: {name: folder of a run}, in order.

  Returns:
    {'metrics', 'annotators', 'config_text', 'differences'}: arguments of `write`.
  """
  path = pathlib.Path(workdir) / identity.CONFIG
  config = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
  differences = {
    name: identity.from_base(config.get(name, {}) if 'stages' in config else config, folder)
    for name, folder in stages.items()
  }
  return {
    'metrics': {name: metrics_lib.read(folder) for name, folder in stages.items()},
    'annotators': {name: annotators_lib.read(folder) for name, folder in stages.items()},
    'config_text': json.dumps(config, indent=2, ensure_ascii=False) if config else '',
    'differences': {name: changes for name, changes in differences.items() if changes is not None},
  }


def of_stages(folder, *, workdir, title, summary, curves):
  """Writes the report of a pipeline without an evaluation of policies, as a stage of it.

  Args:
    folder: Folder of this stage, which is not used.
    workdir: Folder of the pipeline, for report.html.
    title: Title of the page.
    summary: One or two sentences below the title, plain text.
    curves: Names of the stages whose learning curves the report shows.
  """
  del folder
  workdir = pathlib.Path(workdir)
  files = read(workdir, {name: workdir / name for name in curves})
  logged = [sample for name in curves for sample in metrics_lib.read_samples(workdir / name)]
  write(workdir / 'report.html', title=title, summary=summary, logged=logged, **files)


def of_run(workdir, *, title):
  """Writes the report of a single run.

  Args:
    workdir: Folder of the run, for report.html.
    title: Title of the page.

  Returns:
    The path, a pathlib.Path.
  """
  workdir = pathlib.Path(workdir)
  files = read(workdir, {title: workdir})
  logged = metrics_lib.read_samples(workdir)
  return write(workdir / 'report.html', title=title, logged=logged, **files)

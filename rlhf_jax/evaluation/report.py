"""The report of a run: one HTML file with tables, figures and samples, and nothing outside it.

Every part may be missing: the report of a single run has no table of stages, for example.
"""

import json
import os
import pathlib
import re

import markupsafe

from rlhf_jax import identity
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.evaluation import curves
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import formulas
from rlhf_jax.evaluation import glossary
from rlhf_jax.evaluation import page
from rlhf_jax.evaluation import samples as samples_lib
from rlhf_jax.evaluation import tables

# Words in capitals in the names of the glossary.
_PLACES = {
  'EVAL': 'EVAL stands for the name of an evaluator in config.evals.',
  'PART': 'PART stands for a part of the reward.',
  'MODEL': 'MODEL stands for policy, critic or reward.',
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
  elo=None,
  samples=(),
  logged=(),
  config_text='',
  differences=None,
):
  """Writes the report.

  Args:
    path: the HTML file; it is replaced as a whole, so it is never incomplete.
    title: of the page.
    summary: a plain sentence or two under the title.
    stages: list of rows of the stage table; see `tables`.
    gold: what the gold score is in this run.
    metrics: {stage: list of dicts of its metrics.jsonl}.
    frontier: list of {"step", "kl", "gold", "gold_se", "proxy"} of one policy as it was trained.
    best_of: best-of-n beside the frontier; see best_of_n.curve.
    calibration: a Calibration as a dict (dataclasses.asdict), None for none.
    elo: {policy: a Rating as a dict}, None for none.
    samples: list of {"prompt", "before", "after"} and, if known, "scores": {"before": {name:
      number}, "after": {name: number}}.
    logged: records of samples.jsonl, shown if there are no `samples`.
    config_text: the configuration, to be read by people.
    differences: {stage: list of identity.Change from the base config}.

  Returns:
    The path, a pathlib.Path.
  """
  titles, rows = tables.stages(stages)
  records = {stage: lines for stage, lines in (metrics or {}).items() if lines}
  series = {stage: curves.series(lines) for stage, lines in records.items()}
  entries, anchors = _glossary(name for found in series.values() for name in found)
  cards = samples_lib.pairs(samples) or samples_lib.logged(logged)
  unique = lambda key: list(dict.fromkeys(name for card in cards for name in card[key]))
  bins = calibration['bins'] if calibration else ()
  parts = {
    'stages': rows,
    'frontier': _safe(figures.frontier(frontier, best_of)) if frontier or best_of else '',
    'ratings': _safe(figures.ratings(elo)) if elo else '',
    'final': _final(series),
    'calibration': _calibration_rows(calibration) if calibration else [],
    'samples': cards,
    'curves': [_curves(stage, found) for stage, found in series.items()],
    'times': _times(records),
    'differences': [(stage, _changes(found)) for stage, found in (differences or {}).items()],
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
      'anchors': anchors,
      'metrics_note': _metrics_note(entries),
      'contents': _contents(parts),
    }
  )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(html, encoding='utf-8', errors='replace')
  os.replace(temporary, path)
  return path


def _safe(svg):
  return markupsafe.Markup(svg)


def _contents(parts):
  """(name, anchor) of every section that there is."""
  sections = (
    ('Stages', 'stages', parts['stages']),
    ('Scores and ratings', 'frontier', parts['frontier'] or parts['ratings']),
    ('Final figures', 'final', parts['final']),
    ('Reward model', 'calibration', parts['calibration']),
    ('Samples', 'samples', parts['samples']),
    ('Learning curves', 'curves', parts['curves']),
    ('Time', 'time', parts['times']),
    ('Configuration', 'config', parts['config_text'] or parts['differences']),
    ('Metrics', 'metrics', parts['metrics']),
  )
  return [(name, anchor) for name, anchor, there in sections if there]


def _stages_note(rows, gold):
  """What the columns mean, for those columns that there are."""
  notes = {
    'gold': f'Gold score ± standard error. {f"Gold is {gold}" if gold else ""}'.rstrip(' .') + '.',
    'proxy': 'Proxy score: the score of the reward model.',
    'kl': 'KL: nats per response, from the baseline.',
    'win_rate': 'Win rate: over the baseline on the same prompts, a draw is half a win, with its '
    '95 % interval.',
    'elo': 'Elo: from matches between all stages, ± half the 95 % interval.',
  }
  found = [note for key, note in notes.items() if any(row.get(key) is not None for row in rows)]
  return ' '.join([*found, 'The best row is highlighted.'])


def _final(series):
  """(stage, rows of text) of the table of final figures."""
  found = ((stage, curves.final(metrics)) for stage, metrics in series.items())
  texts = lambda row: [row[0], *map(tables.number, row[1:])]
  return [(stage, [texts(row) for row in rows]) for stage, rows in found if rows]


def _curves(stage, series):
  """The panels of a stage's first metrics, and first, last, least and most of all of them."""
  panels = [
    (name, _safe(figures.curve(name, lines))) for name, lines in curves.panels(series).items()
  ]
  rows = [[name, *map(tables.number, values)] for name, *values in curves.ranges(series)]
  return {'stage': stage, 'panels': panels, 'rows': rows}


def _times(records):
  """(stage, rows of text) of the table of times."""
  found = ((stage, curves.times(lines)) for stage, lines in records.items())
  texts = lambda row: (row[0], f'{row[1]:.3g}', row[2], f'{row[3]:.3g}')
  return [(stage, [texts(row) for row in rows]) for stage, rows in found if rows]


def _changes(changes):
  """Rows (key, base value, value) of a config's differences."""
  text = lambda value: value if value == identity.ABSENT else repr(value)
  return [(change.key, text(change.before), text(change.after)) for change in changes]


def _glossary(names):
  """The glossary's entries of metrics, with HTML in place of Markdown, and {name: anchor}."""
  found = {name: glossary.find(name) for name in names}
  found = {name: metric for name, metric in found.items() if metric}
  there = set(found.values())
  entries = [metric for metric in glossary.METRICS if metric in there]
  links = {metric.name: f'metric-{metric.anchor}' for metric in entries}

  def html(text):
    parts = re.split('`([^`]+)`', text)
    for i in range(1, len(parts), 2):
      link = links.get(parts[i])
      code = markupsafe.Markup('<code>{}</code>').format(parts[i])
      parts[i] = markupsafe.Markup('<a href="#{}">{}</a>').format(link, code) if link else code
    return markupsafe.Markup('').join(parts)

  shown = [
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
  return shown, {name: links[metric.name] for name, metric in found.items()}


def _metrics_note(entries):
  """What the words in capitals in the names of the entries mean."""
  words = {word for metric in entries for word in metric['name'].split('/')}
  return ' '.join(note for word, note in _PLACES.items() if word in words)


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


def read(workdir, stages):
  """What the report shows of the files of a run.

  Args:
    workdir: folder with config.json, or without one for a comparison of policies.
    stages: {name: folder of a run}, in order.

  Returns:
    {'metrics', 'config_text', 'differences'}, arguments of `write`.
  """
  path = pathlib.Path(workdir) / identity.CONFIG
  config = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
  differences = {
    name: identity.from_base(config.get(name, {}) if 'stages' in config else config, folder)
    for name, folder in stages.items()
  }
  return {
    'metrics': {name: metrics_lib.read(folder) for name, folder in stages.items()},
    'config_text': json.dumps(config, indent=2, ensure_ascii=False) if config else '',
    'differences': {name: found for name, found in differences.items() if found is not None},
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
  files = read(workdir, {name: workdir / name for name in curves})
  logged = [sample for name in curves for sample in metrics_lib.read_samples(workdir / name)]
  write(workdir / 'report.html', title=title, summary=summary, logged=logged, **files)


def of_run(workdir, *, title):
  """The report of a single run: final figures, samples, learning curves, times and configuration.

  Args:
    workdir: of the run; the report goes to report.html there.
    title: of the page.

  Returns:
    The path, a pathlib.Path.
  """
  workdir = pathlib.Path(workdir)
  files = read(workdir, {title: workdir})
  logged = metrics_lib.read_samples(workdir)
  return write(workdir / 'report.html', title=title, logged=logged, **files)

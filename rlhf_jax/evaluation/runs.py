"""Compares training runs at equal budgets: learning curves, final scores, the reward-KL frontier.

Runs that differ only in the seed form a group. All runs are read up to the largest budget that all
of them reach, counted in responses (in examples for algorithms that do not sample). Final scores
are means over the last tenth of that budget. The interquartile mean and the probability of
improvement are those of Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264). Intervals are 95 %
percentile bootstraps over the runs of each group. The package rliable has the same estimators, but
its bootstrap needs a version of arch that pandas 3 breaks.

Letters: N runs of a group, G points of the grid of budgets.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import json
import pathlib

from jaxtyping import Float
import numpy as np
from scipy import stats

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.evaluation import curves
from rlhf_jax.evaluation import glossary

POINTS = 50  # G
FINAL = 0.1  # fraction of the budget that final scores average over
DRAWS = 2_000  # of each bootstrap
SCORE, KL = 'objective/scores', 'objective/kl'
# Columns of the table: metrics of the training run, and of the pipeline's last evaluation.
FIGURES = {KL: 'kl', 'response/length': 'length', 'response/eos_rate': 'eos_rate'}
EVALUATED = ('gold', 'win_rate')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    group: Name that runs with different seeds share.
    folder: Folder of the run, or of the stage of a pipeline.
    config: Config of the run, a dict.
    records: Records of metrics.jsonl.
    evaluated: Row of this policy in the pipeline's table of stages; {} if there is none.
  """

  group: str
  folder: pathlib.Path
  config: dict
  records: list[dict]
  evaluated: dict

  @property
  def unit(self) -> str:
    """Unit of the budget: 'responses' or 'examples'."""
    return 'responses' if 'sampling' in self.config else 'examples'

  @property
  def budget(self) -> float:
    """Responses or examples of all logged steps."""
    return self.seen(max(record['step'] for record in self.records))

  def seen(self, step: int) -> float:
    """Returns the responses or examples up to a step, counted from 0."""
    return (step + 1.0) * self.config['batch_size']

  def series(self, metric: str) -> list[tuple[int, float]]:
    """Returns the finite values of a metric as (step, value)."""
    return curves.finite(curves.series(self.records).get(metric, []))

  def at(self, metric: str, grid: Float[np.ndarray, ' G']) -> Float[np.ndarray, ' G'] | None:
    """Returns a metric, interpolated at budgets; None if it is not logged."""
    points = self.series(metric)
    if not points:
      return None
    return np.interp(grid, [self.seen(step) for step, _ in points], [value for _, value in points])


def read(group: str, folder: str | pathlib.Path, stage: str = '') -> Run:
  """Reads a run.

  Args:
    group: Name of its group.
    folder: Folder of a run or a pipeline.
    stage: Stage of a pipeline; '' for the last one that trains.

  Raises:
    UserError: The folder holds no run, or one without metrics.
  """
  folder, config, evaluated = _find(folder, stage)
  errors.need('algorithm' in config, f'{folder} is not the folder of a run')
  records = metrics_lib.read(folder)
  errors.need(records, f'{folder} has no metrics yet: start the run first')
  return Run(group, folder, config, records, evaluated)


def has_metrics(folder: str | pathlib.Path, stage: str = '') -> bool:
  """Returns whether `read` can read a folder: false if the run failed before its first step."""
  folder, config, _ = _find(folder, stage)
  return 'algorithm' in config and bool(metrics_lib.read(folder))


def _find(folder, stage):
  """Returns the folder of a run, its config, and its row in the table of stages; see `read`."""
  folder = pathlib.Path(folder)
  config, evaluated = identity.read(folder) or {}, {}
  if 'stages' in config:
    trained = [name for name in config['stages'] if 'algorithm' in config.get(name, {})]
    name = stage or (trained[-1] if trained else '')
    errors.need(
      name in trained, f'{folder}: no stage {name!r} trains; the stages are {", ".join(trained)}'
    )
    evaluated = _evaluated(folder, name)
    seed = config.get('seed')
    folder, config = folder / name, config[name]
    config['seed'] = seed if config['seed'] is None else config['seed']
  return folder, config, evaluated


def _evaluated(folder, name):
  """Returns the row of a stage in report.json of a pipeline; {} if there is none."""
  path = folder / 'report.json'
  rows = json.loads(path.read_text(encoding='utf-8'))['stages'] if path.exists() else []
  return next((row for row in rows if row['stage'] == name), {})


def compare(runs: Sequence[Run], metric: str = '') -> dict:
  """Compares groups of runs.

  Args:
    runs: Runs, of which those of a group differ in the seed.
    metric: Name of the metric; '' for the scores, or else the first of the report's key metrics
      that all runs log.

  Returns:
    Dict of JSON values: 'metric', 'unit', 'budget', 'higher_is_better', 'groups' {name: table row},
    'curves' {name: {'x', 'mean', 'low', 'high'}}, 'frontier' {name: [[kl, score]]},
    'improvement' {'A > B': {'value', 'low', 'high'}}, and 'notes', a list of warnings.

  Raises:
    UserError: There is no such metric, or the runs count different things.
  """
  metric = metric or _common_metric(runs)
  without = [str(run.folder) for run in runs if not run.series(metric)]
  errors.need(not without, f'metric {metric!r} is not logged by {", ".join(without[:3])}')
  errors.need(
    len({run.unit for run in runs}) == 1,
    'runs that sample responses cannot be compared with runs that do not: they count budgets in '
    'responses and in examples',
  )
  groups = {}
  for run in runs:
    groups.setdefault(run.group, []).append(run)
  budget = min(run.budget for run in runs)
  first = max(run.seen(run.series(metric)[0][0]) for run in runs)
  grid = np.linspace(min(first, budget), budget, POINTS)
  scores = {
    name: np.stack([run.at(metric, grid) for run in members]) for name, members in groups.items()
  }
  finals = {name: final(values, grid) for name, values in scores.items()}
  entry = glossary.find(metric)
  higher = curves.BEST.get(entry.name if entry else metric, max) is max
  return {
    'metric': metric,
    'unit': runs[0].unit,
    'budget': budget,
    'higher_is_better': higher,
    'groups': {
      name: _row(members, scores[name], finals[name], grid, higher)
      for name, members in groups.items()
    },
    'curves': {name: {'x': grid.tolist()} | band(values) for name, values in scores.items()},
    'frontier': _frontier(groups, scores, grid),
    'improvement': improvement(finals, higher),
    'notes': _notes(runs, budget),
  }


def _common_metric(runs):
  """Returns the score if all runs log it, or else the first such metric of `curves.BEST`."""
  logged = [set(curves.series(run.records)) for run in runs]
  for entry in (SCORE, *curves.BEST):
    for name in sorted(set.intersection(*logged)):
      found = glossary.find(name)
      if found and found.name == entry:
        return name
  raise errors.UserError('the runs log no score or loss in common: name one with --metric')


def final(scores: Float[np.ndarray, 'N G'], grid: Float[np.ndarray, ' G']) -> np.ndarray:
  """Returns the mean [N] of each run over the last tenth of the budget."""
  return scores[:, grid >= (1 - FINAL) * grid[-1]].mean(axis=1)


def band(scores: Float[np.ndarray, 'N G']) -> dict[str, list[float]]:
  """Returns the mean over runs and its 95 % bootstrap interval at every point of the grid."""
  low, high = _interval(scores[_resampled(len(scores))].mean(axis=1))
  return {'mean': scores.mean(axis=0).tolist(), 'low': low.tolist(), 'high': high.tolist()}


def interquartile_mean(finals: Float[np.ndarray, ' N']) -> tuple[float, float, float]:
  """Returns the mean of the middle half of the final scores and its 95 % bootstrap interval.

  A quarter of the runs, rounded down, is left out at either end: none of three runs, one of four.
  """
  low, high = _interval(stats.trim_mean(finals[_resampled(len(finals))], 0.25, axis=1))
  return float(stats.trim_mean(finals, 0.25)), float(low), float(high)


def improvement(
  finals: Mapping[str, Float[np.ndarray, ' N']], higher_is_better: bool = True
) -> dict[str, dict[str, float]]:
  """Computes the probability that a run of one group beats a run of another.

  P(A > B) = mean over pairs of runs of 1[a > b] + 1/2 1[a = b], with its 95 % bootstrap interval.

  Args:
    finals: {group: final scores [N]}.
    higher_is_better: False if lower scores are better.

  Returns:
    {'A > B': {'value', 'low', 'high'}} for every pair of groups, the one with the better mean
    first.
  """
  sign = 1.0 if higher_is_better else -1.0
  result = {}
  for pair in itertools.combinations(finals, 2):
    first, second = sorted(pair, key=lambda name: -sign * finals[name].mean())
    a, b = sign * finals[first], sign * finals[second]
    draws = a[_resampled(len(a))][:, :, None], b[_resampled(len(b), seed=1)][:, None, :]
    low, high = _interval(_wins(*draws))
    value = _wins(a[None, :, None], b[None, None, :])[0]
    result[f'{first} > {second}'] = {'value': float(value), 'low': float(low), 'high': float(high)}
  return result


def _wins(a, b):
  """Returns the fraction of pairs in which a is larger; a draw is half a win."""
  return ((a > b) + 0.5 * (a == b)).mean(axis=(1, 2))


def _resampled(count, seed=0):
  """Returns the indices [DRAWS, count] of bootstrap samples of `count` runs."""
  return np.random.default_rng(seed).integers(count, size=(DRAWS, count))


def _interval(values):
  return np.percentile(values, [2.5, 97.5], axis=0)


def _row(members, scores, finals, grid, higher):
  """Returns the row of a group in the table."""
  value, low, high = interquartile_mean(finals)
  sign = 1.0 if higher else -1.0
  collapsed = [
    str(run.config.get('seed'))
    for run, curve, last in zip(members, scores, finals, strict=True)
    if sign * last < sign * curve[0]
  ]
  row = {'runs': len(members), 'iqm': value, 'iqm_low': low, 'iqm_high': high}
  row |= {'mean': float(finals.mean()), 'worst': float(sign * (sign * finals).min())}
  for metric, column in FIGURES.items():
    values = [run.at(metric, grid) for run in members]
    if all(value is not None for value in values):
      row[column] = float(final(np.stack(values), grid).mean())
  for column in EVALUATED:
    values = [run.evaluated[column] for run in members if run.evaluated.get(column) is not None]
    if len(values) == len(members):
      row[column] = float(np.mean(values))
  return row | {
    'seconds': float(np.mean([_seconds(run) for run in members])),
    'peak_gib': _peak(members),
    'collapsed': collapsed,
    'unfinished': [
      str(run.config.get('seed')) for run in members if not (run.folder / 'model').exists()
    ],
  }


def _seconds(run):
  """Returns the time of all steps, without evaluations; NaN if no times are logged."""
  steps = dict(curves.finite((r['step'], r.get('seconds/step')) for r in run.records))
  if not steps:
    return float('nan')
  before = dict(zip(steps, [-1, *steps], strict=False))  # a value is a mean since the last one
  return sum(value * (step - before[step]) for step, value in steps.items())


def _peak(members):
  values = [value for run in members for _, value in run.series('memory/peak_gib')]
  return max(values) if values else None


def _frontier(groups, scores, grid):
  """Returns {group: [[kl, score]]} along training, means over its runs; {} without a KL."""
  frontier = {}
  for name, members in groups.items():
    kl = [run.at(KL, grid) for run in members]
    if all(values is not None for values in kl):
      points = zip(np.mean(kl, axis=0), scores[name].mean(axis=0), strict=True)
      frontier[name] = [[float(x), float(y)] for x, y in points]
  return frontier


def _notes(runs, budget):
  """Returns warnings about unequal budgets and about groups of one run."""
  longer = sorted({run.group for run in runs if run.budget > 1.01 * budget})
  notes = []
  if longer:
    notes.append(
      f'Budgets differ: {", ".join(longer)} ran longer and is compared at the budget that all runs '
      'reach.'
    )
  single = sorted({run.group for run in runs if [r.group for r in runs].count(run.group) == 1})
  if single:
    notes.append(f'One run only, so no interval means anything: {", ".join(single)}.')
  return notes

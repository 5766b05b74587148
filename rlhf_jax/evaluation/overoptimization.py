"""Stages that measure how far a policy can be optimized against a reward model before gold falls.

The setting of Gao et al. 2022 (https://arxiv.org/abs/2210.10760): a large reward model, the gold
model, labels the comparisons that the proxy reward models learn from. `label` does so, `best_of_n`
selects the best samples by each proxy, and `run` reads the PPO runs against them, fits the paper's
curves and writes the page.

Gold and proxy scores are relative to those of the initial policy. All models should be normalized
on samples of that policy (`preference.normalize='gain_bias'`), so that scores of all of them are in
units of its standard deviation.
"""

import collections
import dataclasses
import json
import math
import pathlib

import jax
import ml_collections
import numpy as np

from rlhf_jax import identity
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import best_of_n as best_of_n_lib
from rlhf_jax.evaluation import best_of_n_stage
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import fits
from rlhf_jax.evaluation import judges
from rlhf_jax.evaluation import reward_models
from rlhf_jax.evaluation import sections
from rlhf_jax.evaluation import tables
from rlhf_jax.feedback import annotators
from rlhf_jax.feedback import collect
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import learned

PAGE = 'overoptimization.html'
TITLES = (
  'Optimizer and proxy',
  'α gold',
  'β gold',
  'R² gold',
  'α proxy',
  'β proxy',
  'R² proxy',
  'peak d',
  'peak KL',
  'gold at peak',
  'highest gold',
  'its KL',
  'last gold',
  'last proxy',
  'last KL',
)


def label(
  folder,
  *,
  policy,
  prompts,
  pairs,
  subsets,
  held_out,
  max_new_tokens,
  temperature,
  gold,
  annotator_temperature,
  label_noise,
  seed,
):
  """Samples pairs of responses and labels them by a reward model.

  Writes the files of feedback.collect.run except agreement.json, and first_COUNT.jsonl.

  Args:
    folder: pathlib.Path of the output folder.
    policy: Folder of the language model.
    prompts: Data set of prompts.
    pairs: Number of training comparisons.
    subsets: Sizes of the parts of the training comparisons that are also written.
    held_out: Number of held-out comparisons.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    gold: Folder of the gold reward model.
    annotator_temperature: Temperature of the Bradley-Terry choice by gold scores.
    label_noise: Probability that a label is flipped.
    seed: Random seed.
  """
  text_policy = policy_lib.TextPolicy.load(policy)
  samples = collect.sample_pairs(
    text_policy,
    prompts,
    (pairs, held_out),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    seed=seed,
  )
  scores = reward_models.RewardModel.load(gold).score_samples(samples, text_policy.tokenizer)
  gold_scores = dict(zip(zip(samples.prompts, samples.responses), scores.tolist()))
  panel = annotators.SimulatedAnnotators(
    lambda prompt, response: gold_scores[prompt, response],
    count=1,
    seed=seed,
    temperature=annotator_temperature,
    label_noise=label_noise,
    disagreement=0.0,
  )
  collect.write(folder, panel, samples, pairs)
  collect.subsets(folder, path=folder / 'comparisons.jsonl', counts=subsets)


def best_of_n(
  folder,
  *,
  policy,
  prompts,
  count,
  samples,
  max_new_tokens,
  temperature,
  rewards,
  gold,
  hidden,
  seed,
):
  """Measures the scores of best-of-n sampling by each proxy.

  Writes best_of_n.json, {name: list of {"n", "kl", "proxy", "gold", "gold_se", "hidden"}}; see
  best_of_n.curve.

  Args:
    folder: pathlib.Path of the output folder.
    policy: Folder of the language model.
    prompts: Data set of prompts.
    count: Number of prompts, the first ones.
    samples: N, the number of responses per prompt and the largest n.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    rewards: {name: keys of config.reward}.
    gold: Folder of the gold reward model.
    hidden: 'package.module:function' of the hidden score that the gold model learned from.
    seed: Random seed.
  """
  text_policy = policy_lib.TextPolicy.load(policy)
  examples = text_policy.read_examples(prompts)[:count]
  answers = text_policy.sample(
    [example.prompt for example in examples],
    jax.random.key(seed),
    samples=samples,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
  )
  grid = lambda scores: np.asarray(scores).reshape(-1, samples)
  repeated = [example for example in examples for _ in range(samples)]
  tokenizer, questions = text_policy.tokenizer, answers.prompts[::samples]
  gold_scores = grid(reward_models.RewardModel.load(gold).score_samples(answers, tokenizer))
  hidden_scores = grid(list(map(functions.load_gold(hidden), answers.prompts, answers.responses)))
  curves = {}
  for name, reward in rewards.items():
    block = ml_collections.ConfigDict(reward)
    proxy = grid(best_of_n_stage.score(text_policy, answers.rollout, repeated, block)[0])
    curves[name] = best_of_n_lib.curve(proxy, gold_scores, questions)
    for point, other in zip(curves[name], best_of_n_lib.curve(proxy, hidden_scores, questions)):
      point['hidden'] = other['gold']
  identity.write_json(folder / 'best_of_n.json', curves)


@dataclasses.dataclass(frozen=True)
class Line:
  """Scores over the distance from the initial policy, of one optimizer against one proxy.

  Attributes:
    form: one of fits.FORMS.
    points: list of {"kl", "gold", "proxy", "hidden"}; scores are relative to those of the initial
      policy.
    gold: Fit of the gold score.
    proxy: Fit of the proxy score.
    hidden: Fit of the hidden score.
  """

  form: str
  points: list[dict[str, float]]
  gold: fits.Fit
  proxy: fits.Fit
  hidden: fits.Fit


def make_line(form, points, start):
  """Returns the Line of points with absolute scores.

  Args:
    form: One of fits.FORMS.
    points: List of {"kl", "gold", "proxy", "hidden"}.
    start: The scores of the initial policy, a dict with the same keys.
  """
  scores = 'gold', 'proxy', 'hidden'
  relative = [
    {'kl': max(point['kl'], 0.0)} | {key: point[key] - start[key] for key in scores}
    for point in points
  ]
  distances = [math.sqrt(point['kl']) for point in relative]
  curve = lambda key: fits.fit(form, distances, [point[key] for point in relative])
  return Line(form, relative, *map(curve, scores))


def read_run(run_folder, gold, hidden):
  """Computes the scores at the steps of a run at which all of its responses were logged.

  A response of fewer than the run's `sampling.max_new_tokens` tokens has ended, so it gets an EOS
  before the gold model reads it.

  Args:
    run_folder: Folder of a PPO run.
    gold: reward_models.RewardModel.
    hidden: Function (prompt, response) -> float.

  Returns:
    List of {"step", "kl", "gold", "proxy", "hidden"}.
  """
  records = {
    record['step']: record for record in metrics_lib.read(run_folder) if 'objective/kl' in record
  }
  limit = identity.read(run_folder)['sampling']['max_new_tokens']
  by_step = collections.defaultdict(list)
  for sample in metrics_lib.read_samples(run_folder):
    if sample['step'] in records and sample['score'] is not None and sample['response'].strip():
      by_step[sample['step']].append(sample)
  samples = [sample for step in by_step for sample in by_step[step]]
  pairs = [(sample['prompt'], sample['response']) for sample in samples]
  tokenizer, model = gold.policy.tokenizer, gold.policy.model
  lengths = [len(row) for row in tokenizers.encode_continuation(tokenizer, [r for _, r in pairs])]
  scores = gold.score_tokens(
    *learned.padded_texts(
      model,
      tokenizer,
      *map(list, zip(*pairs)),
      [length < limit for length in lengths],
      max_length=model.max_length,
    )
  )
  points, first = [], 0
  for step, members in by_step.items():
    last = first + len(members)
    points.append(
      {
        'step': step,
        'kl': records[step]['objective/kl'],
        'gold': float(np.mean(scores[first:last])),
        'proxy': float(np.mean([sample['score'] for sample in members])),
        'hidden': float(np.mean([hidden(*pair) for pair in pairs[first:last]])),
      }
    )
    first = last
  return points


def run(folder, *, workdir, best_of_n, runs, penalties, plots, gold, hidden):
  """Fits the curves of all runs, prints the table, and writes results.json and the page.

  Args:
    folder: pathlib.Path for results.json.
    workdir: Folder of the pipeline, for the page.
    best_of_n: Name of the stage `best_of_n`.
    runs: {name: stage} of the PPO runs. Names in best_of_n.json are the same proxies.
    penalties: {name of a run with a KL penalty: name of the same proxy without}.
    plots: Pairs (title, names of the runs in the figure).
    gold: Folder of the gold reward model.
    hidden: 'package.module:function' of the hidden score that the gold model learned from.
  """
  workdir = pathlib.Path(workdir)
  curves = json.loads((workdir / best_of_n / 'best_of_n.json').read_text())
  model, hidden_fn = reward_models.RewardModel.load(gold), functions.load_gold(hidden)
  lines = {
    f'best of n, {name}': make_line('best_of_n', points[1:], points[0])
    for name, points in curves.items()
  }
  for name, stage in runs.items():
    start = curves[penalties.get(name, name)][0]
    lines[f'PPO, {name}'] = make_line('rl', read_run(workdir / stage, model, hidden_fn), start)
  shifts = {
    name: shift(lines[f'PPO, {name}'], lines[f'PPO, {other}']) for name, other in penalties.items()
  }
  rows = [table_row(name, line) for name, line in lines.items()]
  print(tables.text(TITLES, rows, title='Over-optimization', width=160))
  identity.write_json(
    folder / 'results.json',
    {
      name: {
        'points': line.points,
        'gold': dataclasses.asdict(line.gold) | {'peak': line.gold.peak},
        'proxy': dataclasses.asdict(line.proxy),
        'hidden': dataclasses.asdict(line.hidden) | {'peak': line.hidden.peak},
      }
      for name, line in lines.items()
    }
    | {'shifts': shifts},
  )
  write_page(
    workdir / PAGE, lines, plots, rows=rows, shifts=shifts, hidden=judges.load(hidden).description
  )
  print(f'page: {workdir / PAGE}')


def shift(line, other):
  """Returns how far a Line's gold scores are above another's fitted curve at the same distances.

  The paper finds that a KL penalty does not move the gold score at a given KL; then this is near 0.

  Returns:
    The mean difference and its standard error, of the points within the other's distances.
  """
  end = max(point['kl'] for point in other.points)
  points = [point for point in line.points if 0 < point['kl'] <= end]
  curve = other.gold([math.sqrt(point['kl']) for point in points])
  gaps = np.array([point['gold'] for point in points]) - curve
  return float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))


def table_row(name, line):
  """Returns a row of the table of fits; see TITLES."""
  gold = [point['gold'] for point in line.points]
  highest = max(line.points, key=lambda point: point['gold'])
  values = [
    *(line.gold.alpha, line.gold.beta, line.gold.r2),
    *(line.proxy.alpha, line.proxy.beta, line.proxy.r2),
    *(line.gold.peak, line.gold.peak**2, line.gold.highest),
    *(highest['gold'], highest['kl']),
    *(gold[-1], line.points[-1]['proxy'], line.points[-1]['kl']),
  ]
  return [name, *map(number, values)]


def number(value):
  """Formats a number of the tables; a peak that lies far beyond any run is 'none'."""
  return f'{value:.2f}' if abs(value) < 1e4 else 'none'


def write_page(path, lines, plots, *, rows, shifts, hidden):
  """Writes the page of all figures.

  Args:
    path: HTML file.
    lines: {'best of n, NAME' or 'PPO, NAME': Line}.
    plots: See `run`.
    rows: Rows of the table of fits.
    shifts: {name of a run with a KL penalty: result of `shift`}.
    hidden: Description of the hidden score.
  """
  parts = []
  for title, names in plots:
    panels = []
    for optimizer in ('best of n', 'PPO'):
      chosen = {name: lines.get(f'{optimizer}, {name}') for name in names}
      chosen = {name: line for name, line in chosen.items() if line}
      if chosen:
        panels.append((scores_figure(chosen, f'{title}: {optimizer}'), f'{optimizer}. {CAPTION}'))
    text = ' '.join(
      f'At the same distance the gold score of {name} is on average {mean:+.2f} ± {error:.2f} '
      'from the fitted curve without a penalty.'
      for name, (mean, error) in shifts.items()
      if name in names
    )
    parts.append(sections.Section(title, text, panels))
  of_hidden = lambda fit: (fit.alpha, fit.beta, fit.r2, fit.peak, fit.peak**2, fit.highest)
  parts.append(
    sections.Section(
      'The hidden score',
      f'The gold model learned from comparisons by {hidden} It is only a model of that score, so '
      'it can be wrong about responses unlike those that it learned from.',
      [(hidden_figure(lines), 'Hidden score of all runs and of best of n, dashed.')],
      ('Optimizer and proxy', 'α', 'β', 'R²', 'peak d', 'peak KL', 'hidden at peak'),
      [[name, *map(number, of_hidden(line.hidden))] for name, line in lines.items()],
    )
  )
  parts.append(sections.Section('Fits', FITS, titles=TITLES, rows=rows))
  sections.write(path, title='Over-optimization of reward models', summary=SUMMARY, sections=parts)


SUMMARY = (
  'Scores over the distance from the initial policy, the square root of the KL in nats per '
  'response, as in Gao et al. 2022. All scores are relative to the initial policy, in standard '
  'deviations of its samples.'
)
CAPTION = (
  'Solid: gold. Dashed: proxy. Points are measured; curves are d(α − β d) for best of n and '
  'd(α − β log d) for PPO.'
)
FITS = (
  'Peak is the distance at which the fitted gold score is highest; beyond it gold falls. Highest '
  'and last scores are measured. A peak far beyond the last KL is an extrapolation.'
)
DISTANCE = 'square root of the KL from the initial policy'


def scores_figure(lines, title):
  """Draws gold and proxy scores of some Lines with their fits; returns SVG text."""
  series = []
  for number, (name, line) in enumerate(lines.items()):
    points = [(math.sqrt(point['kl']), point) for point in line.points]
    grid = np.linspace(0.0, max(distance for distance, _ in points), 100)
    for key, curve in (('gold', line.gold), ('proxy', line.proxy)):
      series.append(
        {
          'label': name,
          'points': [(distance, point[key]) for distance, point in points],
          'curve': list(zip(grid.tolist(), curve(grid).tolist())),
          'colour': number,
          'dashed': key == 'proxy',
        }
      )
  return figures.points_and_curves(series, x=DISTANCE, y='score', title=title)


def hidden_figure(lines):
  """Draws the hidden scores of some Lines; returns SVG text."""
  series = [
    {
      'label': name,
      'points': [(math.sqrt(point['kl']), point['hidden']) for point in line.points],
      'dashed': line.form == 'best_of_n',
    }
    for name, line in lines.items()
  ]
  return figures.points_and_curves(series, x=DISTANCE, y='hidden score', title='Hidden scores')

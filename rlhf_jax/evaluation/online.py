"""Stages that report the rounds of iterated online RLHF: one report each, and a page of them all.

See configs/online.py for the rounds, and Bai et al. 2022, §4.5 (https://arxiv.org/abs/2204.05862).
`report` measures the policy of one round, `run` ranks the policies of all rounds. Both write the
page online.html in the workdir, which shows the rounds that are finished.
"""

import dataclasses
import json
import pathlib

from rlhf_jax import identity
from rlhf_jax.data import sources
from rlhf_jax.evaluation import comparison
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import judges
from rlhf_jax.evaluation import policies as policies_lib
from rlhf_jax.evaluation import report as report_lib
from rlhf_jax.evaluation import reward_models as reward_models_lib
from rlhf_jax.evaluation import sections
from rlhf_jax.evaluation import tables
from rlhf_jax.feedback import leaderboard
from rlhf_jax.feedback import store as store_lib

PAGE = 'online.html'
RESULTS = 'results.json'


def report(
  folder,
  *,
  workdir,
  policies,
  reward_model,
  before,
  data,
  curves,
  prompts,
  samples,
  max_new_tokens,
  temperature,
  gold,
  reports,
  seed,
):
  """Measures the policy of a round, and writes its report, results.json and the page.

  Args:
    folder: pathlib.Path of the round, for report.html.
    workdir: Folder of the pipeline, for the page.
    policies: Pairs (name, folder of a policy): the initial policy first, that of this round last.
    reward_model: Folder of this round's reward model, for the proxy score.
    before: Folder of the reward model of the round before, or ''. Its accuracy on the comparisons
      of this round, which it has not seen, shows whether it still knows what the policy writes.
    data: Data sets of comparisons that the reward model learned from, those of this round last.
    curves: Names of the stages whose learning curves the report shows.
    prompts: Data set of prompts.
    samples: Number of responses of each policy.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    gold: Judge that gives the gold score, see judges.py; '' if there is none.
    reports: Names of the stages of this kind, in the order of the page.
    seed: Random seed of the samples.
  """
  loaded = policies_lib.load_policies(dict(policies), {})
  scorer = reward_models_lib.RewardModel.load(reward_model)
  judge = judges.load(gold or scorer, key='gold')
  settings = comparison.Settings(
    samples=samples, seed=seed, max_new_tokens=max_new_tokens, temperature=temperature
  )
  name = policies[-1][0]
  compared = comparison.compare_policies(
    loaded, loaded[name].read_examples(prompts), judge, settings, reward_model=scorer
  )
  rows = [row if gold else _without_gold(row) for row in compared.rows]
  results = {
    'policy': name,
    'judgements': sum(len(sources.read(path)) for path in data),
    'stages': rows,
    'before': reward_models_lib.calibrate(reward_models_lib.RewardModel.load(before), data[-1])
    if before
    else None,
  }
  print(tables.stages_table(rows, title=f'{folder.name}, {samples} samples of each'))
  identity.write_json(folder / RESULTS, results)
  stages = {stage: pathlib.Path(workdir) / stage for stage in curves}
  report_lib.write(
    folder / 'report.html',
    title=f'Online RLHF: {name}',
    summary=f'The reward model learned from {results["judgements"]} judgements.',
    stages=rows,
    gold=judge.description if gold else '',
    calibration=results['before'],
    samples=comparison.side_by_side(
      *(compared.scored[policies[i][0]] for i in (0, -1)), policies_lib.SAMPLES
    ),
    **report_lib.read(workdir, stages),
  )
  write_page(workdir, reports)


def check(*, gold, **_):
  """Checks argument `gold` of `report` before the first stage runs; see pipeline.check."""
  if gold:
    judges.check(gold, key='gold')


report.check = check


def _without_gold(row):
  """Returns a row of a policy without what a judge decides."""
  judged = 'gold', 'win_', 'elo'
  return {key: value for key, value in row.items() if not key.startswith(judged)}


def run(folder, *, workdir, store, project, rounds, reward_models, one_shot, reports):
  """Ranks all policies by the answers in the store; writes results.json and the page.

  Args:
    folder: pathlib.Path for results.json.
    workdir: Folder of the pipeline, for the page.
    store: URL or path of the store.
    project: Name of the project of `rounds.evaluate`.
    rounds: Number of rounds.
    reward_models: Folders of the reward models of the rounds, in order.
    one_shot: Folder of the reward model of one-shot RLHF, or ''.
    reports: See `report`.
  """
  found = read(workdir, reports)
  with store_lib.Store.open(store) as opened:
    battles = opened.battles(opened.project(project), round=rounds + 1)
  initial = found[0]['stages'][0]['stage']
  board = leaderboard.rate(battles, anchor=initial)
  models = dict(enumerate(reward_models, 1)) | ({'one_shot': one_shot} if one_shot else {})
  results = {
    'elo': {row.policy: dataclasses.asdict(row) for row in board.standings},
    'rankings': len({battle.task_id for battle in battles}),
    'accuracy': accuracies(f'feedback:{store}#{project}', models, rounds),
  }
  identity.write_json(folder / RESULTS, results)
  write_page(workdir, reports, results)
  rows = table_rows(found, results)
  print(tables.text(TITLES, rows, title='Online RLHF', width=120))
  print(f'page: {pathlib.Path(workdir) / PAGE}')


def accuracies(data, models, rounds):
  """Measures reward models on held-out comparisons of the policies that each round starts from.

  Args:
    data: Data set of the project of `rounds.evaluate`, without a round.
    models: {number of a round or 'one_shot': folder of a reward model}.
    rounds: Number of rounds.

  Returns:
    {round: {'before', 'after', 'one_shot': calibration}} of the reward models of the round before
    and of the round, and of one-shot RLHF. Each is missing if there is no such model.
  """
  loaded = {key: reward_models_lib.RewardModel.load(path) for key, path in models.items()}
  of_round = lambda number: {'before': number - 1, 'after': number, 'one_shot': 'one_shot'}
  return {
    str(number): {
      name: reward_models_lib.calibrate(loaded[key], f'{data}?round={number}&form=rankings')
      for name, key in of_round(number).items()
      if key in loaded
    }
    for number in range(1, rounds + 1)
  }


def read(workdir, reports):
  """Returns the results of the reports that are finished, a list of dicts in order."""
  paths = (pathlib.Path(workdir) / name / RESULTS for name in reports)
  return [json.loads(path.read_text(encoding='utf-8')) for path in paths if path.exists()]


TITLES = 'Policy', 'Judgements', 'Gold', 'Elo', 'KL', 'Proxy', 'Accuracy before', 'Accuracy after'


def table_rows(found, results):
  """Returns the rows of the table of policies, lists of strings.

  Args:
    found: Result of `read`.
    results: results.json of `run`, or {} if it has not run.
  """
  measured = [(0, found[0]['stages'][0])] + [(r['judgements'], r['stages'][-1]) for r in found]
  ratings, rows = results.get('elo', {}), []
  for count, row in measured:
    name = row['stage']
    rating, number = ratings.get(name), name.removeprefix('round_')
    accuracy = results.get('accuracy', {}).get(number, {})
    rows.append(
      [
        name,
        str(count),
        f'{row["gold"]:.2f} ± {row["gold_se"]:.2f}' if 'gold' in row else '–',
        '{elo:.0f} [{low:.0f}, {high:.0f}]'.format(**rating) if rating else '–',
        tables.number(row['kl']),
        tables.number(row['proxy']),
        *(_accuracy(accuracy.get(key)) for key in ('before', 'after')),
      ]
    )
  return rows


def _accuracy(calibration):
  if not calibration:
    return '–'
  return '{accuracy:.2f} [{accuracy_low:.2f}, {accuracy_high:.2f}]'.format(**calibration)


SUMMARY = (
  'Each round collects judgements of what the policies write now, retrains the reward model on '
  'those of all rounds, and trains the next policy. One-shot RLHF learns from as many judgements, '
  'all of the initial policy.'
)
POLICIES = (
  'Judgements: those that the reward model learned from. Gold ± standard error: the hidden score '
  'that simulated annotators follow. Elo: from rankings of the responses of all policies to the '
  'same prompts, with a 95 % interval by bootstrap. KL: nats per response, from the initial '
  'policy. Proxy: the score of the reward model of that round. Accuracy: on held-out comparisons '
  'of the policy that the round starts from, of the reward model of the round before and of the '
  'retrained one, with 95 % intervals.'
)
ACCURACY = (
  'Accuracy: held-out comparisons of responses of the policy that a round starts from, by the same '
  'annotators. Before: the reward model of the round before, which that policy was trained '
  'against. After: the retrained one.'
)


def write_page(workdir, reports, results=None):
  """Writes the page of all rounds that are finished.

  Args:
    workdir: Folder of the pipeline.
    reports: See `report`.
    results: results.json of `run`; None before it has run.
  """
  found, results = read(workdir, reports), results or {}
  parts = [
    sections.Section(
      'Policies',
      figures=_policy_figures(found),
      titles=TITLES,
      rows=table_rows(found, results),
      note=POLICIES,
    )
  ]
  if results:
    parts.append(_rankings_section(results))
  sections.write(pathlib.Path(workdir) / PAGE, title='Online RLHF', summary=SUMMARY, sections=parts)


def _policy_figures(found):
  """Returns (SVG, caption) of the gold score and of the KL over the judgements.

  Args:
    found: Result of `read`.
  """
  start = found[0]['stages'][0]
  lines = {
    'online': [item for item in found if item['policy'] != 'one_shot'],
    'one-shot': [item for item in found if item['policy'] == 'one_shot'],
  }
  panels = []
  for key, name, caption in (
    ('gold', 'gold score', 'Gold score of the policies.'),
    ('kl', 'KL (nats)', 'KL from the initial policy, per response.'),
  ):
    if start.get(key) is None:
      continue
    series = [
      {
        'label': label,
        'points': [(0, start[key])]
        + [(item['judgements'], item['stages'][-1][key]) for item in items],
        'dashed': label == 'one-shot',
      }
      for label, items in lines.items()
      if items
    ]
    svg = figures.points_and_curves(series, x='judgements', y=name, title=caption, integer_x=True)
    panels.append((svg, caption))
  return panels


def _rankings_section(results):
  """Returns the section of Elo and of the reward models' accuracy.

  Args:
    results: results.json of `run`.
  """
  accuracy, keys = results['accuracy'], ('before', 'after', 'one_shot')
  series = [
    {
      'label': key.replace('_', '-'),
      'points': [
        (int(number), values[key]['accuracy'])
        for number, values in accuracy.items()
        if key in values
      ],
    }
    for key in keys
  ]
  svg = figures.points_and_curves(
    [line for line in series if line['points']],
    x='round',
    y='accuracy',
    title='Accuracy',
    integer_x=True,
  )
  rows = [
    [number, *(_accuracy(values.get(key)) for key in keys)] for number, values in accuracy.items()
  ]
  return sections.Section(
    'Elo and accuracy',
    ACCURACY,
    [
      (figures.ratings(results['elo']), f'Elo. From {results["rankings"]} rankings.'),
      (svg, 'Accuracy of reward models on the policy that each round starts from.'),
    ],
    ('Round', 'Before', 'After', 'One-shot'),
    rows,
  )

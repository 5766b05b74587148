"""The last stage of a pipeline: compares policies on the same prompts and writes the report.

Training does not use the gold score. Here the reward model gives the proxy score and the judge the
gold score, which determines win rates over the baseline and Elo ratings.
"""

import itertools
import json
import pathlib

import numpy as np

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import intervals
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import sources
from rlhf_jax.evaluation import comparison
from rlhf_jax.evaluation import judges
from rlhf_jax.evaluation import report
from rlhf_jax.evaluation import reward_models
from rlhf_jax.evaluation import tables

REPORT = 'report.json'  # data of report.html, except metrics and config
SAMPLES = 24  # samples in the report


def run(
  folder,
  *,
  title,
  summary,
  workdir,
  policies,
  baseline,
  trained,
  best_of,
  reward_model,
  comparisons,
  prompts,
  samples,
  max_new_tokens,
  temperature,
  gold,
  gold_path,
  curves,
  seed,
  truncate_at=None,
  truncate_after=0,
  betas=(),
):
  """Evaluates policies, prints the table, and writes results.json and the report.

  Args:
    folder: Folder for results.json.
    title: Title of the report.
    summary: Sentence below the title.
    workdir: Folder of the pipeline, for the report.
    policies: Pairs (name, folder of a language model or of the run that trained it), in the
      order of the table.
    baseline: Name of the policy that win rates and KLs are relative to.
    trained: Name of the policy that RL trained. The report shows its responses beside the
      baseline's.
    best_of: n of best-of-n sampling from the baseline with the reward model; 0 for none.
    reward_model: Folder of a reward model, or ''.
    comparisons: Held-out comparisons for the reward model's calibration, or ''.
    prompts: Data set of prompts, repeated if there are fewer than `samples`. The chat template of
      `trained` renders messages, for all policies.
    samples: Number of responses per policy.
    max_new_tokens: Maximum number of tokens of a response.
    temperature: Sampling temperature.
    gold: Judge, such as 'package.module:function'; see evaluation/judges.py.
    gold_path: Path that the function `gold` is called with to create the judge, or ''.
    curves: Names of the stages whose learning curves the report shows.
    seed: Random seed of the samples.
    truncate_at: See policy.TextPolicy.sample. If set, comparisons are scored without an EOS.
    truncate_after: See policy.TextPolicy.sample.
    betas: Pairs (name, beta) of policies that Q functions guide; see policy.TextPolicy.sample.
  """
  policies, betas = dict(policies), dict(betas)
  judge = judges.load(gold, key='gold', path=gold_path)
  loaded = load_policies(policies, betas)
  scorer = reward_models.RewardModel.load(reward_model) if reward_model else None
  compared = comparison.compare_policies(
    loaded,
    loaded[trained].read_examples(prompts),
    judge,
    comparison.Settings(
      baseline=baseline,
      samples=samples,
      best_of=best_of,
      seed=seed,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      truncate_at=truncate_at,
      truncate_after=truncate_after,
    ),
    reward_model=scorer,
  )
  print(tables.stages_table(compared.rows, title=f'{title}, {samples} samples of each', width=120))
  quality = None
  if comparisons:
    quality = reward_models.calibrate(scorer, comparisons, append_eos=truncate_at is None)
  results = compared.results() | {'reward_model': quality}
  identity.write_json(folder / 'results.json', results)
  parts = {
    'title': title,
    'summary': summary,
    'stages': compared.rows,
    'frontier': frontier(policies[trained], judge),
    'best_of': compared.best_of_curve(),
    'gold': judge.description,
    'calibration': quality,
    'elo': results['elo'],
    'samples': comparison.side_by_side(
      compared.scored[baseline], compared.scored[trained], SAMPLES
    ),
    'curves': curves,
  }
  identity.write_json(pathlib.Path(workdir) / REPORT, parts)
  print(f'report: {write_report(workdir)}')


def write_report(workdir):
  """Writes report.html from report.json, config.json and the stages' metrics in a folder.

  Args:
    workdir: Folder of a pipeline, or of a comparison of policies, which has no config.json.

  Returns:
    The path of the report.
  """
  workdir = pathlib.Path(workdir)
  parts = json.loads((workdir / REPORT).read_text(encoding='utf-8'))
  stages = {name: workdir / name for name in parts.pop('curves')}
  return report.write(workdir / 'report.html', **report.read(workdir, stages), **parts)


def load_policies(policies, betas):
  """Returns {name: TextPolicy}; see `run` and `compare_folders`.

  Raises:
    UserError: If a folder cannot be used, or a beta has no policy.
  """
  for name in betas:
    comparison.check_name(name, policies, 'betas')
  return {
    name: policy_lib.TextPolicy.load(path, beta=betas.get(name, 0.0))
    for name, path in policies.items()
  }


def compare_folders(workdir, policies, *, prompts, judge, reward_model, settings, betas=None):
  """Compares policies without a pipeline, and prints the table and some samples.

  Writes results.json, samples.jsonl (all responses with their scores) and report.html.

  Args:
    workdir: Folder for these files, a pathlib.Path.
    policies: {name: folder of a language model or of the run that trained it}.
    prompts: Data set of prompts. The chat template of the first policy that has one renders
      messages, for all policies.
    judge: Text that names the judge; see evaluation/judges.py.
    reward_model: Folder of a reward model for the proxy score, or ''.
    settings: comparison.Settings.
    betas: {name: beta} of policies that Q functions guide; see policy.TextPolicy.sample.

  Raises:
    UserError: If a name, the judge, a folder or the prompts cannot be used.
  """
  if settings.baseline:
    comparison.check_name(settings.baseline, policies, 'baseline')
  errors.need(
    reward_model or not settings.best_of,
    f'best_of={settings.best_of} needs a reward model: set reward_model',
  )
  loaded_judge = judges.load(judge)
  scorer = reward_models.RewardModel.load(reward_model) if reward_model else None
  loaded = load_policies(policies, betas or {})
  templated = [policy for policy in loaded.values() if policy.tokenizer.chat_template]
  examples = (templated or list(loaded.values()))[0].read_examples(prompts)
  compared = comparison.compare_policies(
    loaded, examples, loaded_judge, settings, reward_model=scorer
  )
  count = len(compared.scored[compared.baseline].samples.prompts)
  title = f'{" vs. ".join(policies)}: {count} responses each, judged by {judge}'
  print(tables.stages_table(compared.rows, title=title, width=120))
  print(compared.text(3))
  workdir.mkdir(parents=True, exist_ok=True)
  sources.write(workdir / 'samples.jsonl', compared.samples())
  identity.write_json(workdir / 'results.json', compared.results() | {'judge': judge})
  others = [name for name in policies if name != compared.baseline] or [compared.baseline]
  parts = {
    'title': title,
    'summary': f'Prompts {prompts}, judge {judge}, baseline {compared.baseline}.',
    'stages': compared.rows,
    'gold': loaded_judge.description,
    'elo': compared.results()['elo'],
    'samples': comparison.side_by_side(
      compared.scored[compared.baseline], compared.scored[others[-1]], SAMPLES
    ),
    'curves': (),
  }
  identity.write_json(workdir / REPORT, parts)
  print(f'report: {write_report(workdir)}')


def check(
  *,
  policies,
  baseline,
  trained,
  best_of,
  reward_model,
  comparisons,
  gold,
  gold_path,
  betas=(),
  **_,
):
  """Checks the arguments of `run` before the first stage runs; see pipeline.check.

  Raises:
    UserError: If an argument is wrong; names it.
  """
  names = [pair[0] for pair in policies]
  comparison.check_name(baseline, names, 'baseline')
  comparison.check_name(trained, names, 'trained')
  for name, _ in betas:
    comparison.check_name(name, names, 'betas')
  judges.check(gold, key='gold', path=gold_path)
  for key, value in (('best_of', best_of), ('comparisons', comparisons)):
    errors.need(
      reward_model or not value, f'{key}={value!r} needs a reward model: set reward_model'
    )


run.check = check


def frontier(run_folder, judge):
  """Computes gold score, proxy score and KL at the logged steps of an on-policy run.

  Args:
    run_folder: Folder of the run.
    judge: judges.Judge.

  Returns:
    List of points for report.write; [] if the judge cannot score one text at a time, because only
    texts are logged.
  """
  if judge.score_text is None:
    return []
  kl = {
    record['step']: record['objective/kl']
    for record in metrics_lib.read(run_folder)
    if 'objective/kl' in record
  }
  points = []
  by_step = itertools.groupby(metrics_lib.read_samples(run_folder), lambda s: s['step'])
  for step, samples in by_step:
    samples = [sample for sample in samples if sample['score'] is not None]
    gold = [judge.score_text(s['prompt'], s['response']) for s in samples]
    if step in kl and samples:
      points.append(
        {
          'step': step,
          'kl': kl[step],
          'gold': float(np.mean(gold)),
          'gold_se': intervals.standard_error(gold, [s['prompt'] for s in samples]),
          'proxy': float(np.mean([s['score'] for s in samples])),
        }
      )
  return points

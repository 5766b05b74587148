"""The last stage of a pipeline: policies side by side on the same prompts, and the report.

Only here does the gold score meet the policies: the reward model gives the proxy score, the judge
the gold score, and comparisons by gold score the win rate over the baseline and the Elo ratings.
"""

import itertools
import json
import pathlib

import numpy as np

from rlhf_jax import errors
from rlhf_jax import intervals
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import policy as policy_lib
from rlhf_jax.evaluation import comparison
from rlhf_jax.evaluation import judges
from rlhf_jax.evaluation import report
from rlhf_jax.evaluation import reward_models
from rlhf_jax.evaluation import tables


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
):
  """Evaluates policies, prints the table and writes results.json and workdir/report.html.

  Args:
    folder: where results.json goes.
    title: of the report.
    summary: a sentence under the title.
    workdir: the pipeline's folder; the report goes there.
    policies: pairs (name, folder of a language model or of the run that trained it), in the
      order of the table.
    baseline: the name whose samples win rates and KLs are against.
    trained: the name of the policy that RL trained; the report shows its texts beside the
      baseline's.
    best_of: n of best-of-n of the baseline by the reward model; 0 for none.
    reward_model: folder of a reward model, or ''.
    comparisons: held-out comparisons for the reward model's calibration, or ''.
    prompts: data set of prompts, repeated if there are fewer than `samples`; messages become
      texts by the chat template of `trained`, the same for all policies.
    samples: n, responses of each policy.
    max_new_tokens: of a response.
    temperature: of sampling.
    gold: the judge, such as 'package.module:function'; see evaluation/judges.py.
    gold_path: data that `gold` makes the judge from, or ''.
    curves: names of the stages whose learning curves the report shows.
    seed: of the samples.
    truncate_at: see policy.TextPolicy.sample; comparisons are then scored without an EOS.
    truncate_after: likewise.
  """
  policies = dict(policies)
  judge = judges.load(gold, key='gold', path=gold_path)
  loaded = {name: policy_lib.TextPolicy.load(path) for name, path in policies.items()}
  scorer = reward_models.Scorer.load(reward_model) if reward_model else None
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
  (folder / 'results.json').write_text(json.dumps(results, indent=2))
  workdir = pathlib.Path(workdir)
  report.write(
    workdir / 'report.html',
    title=title,
    summary=summary,
    stages=compared.rows,
    metrics={name: metrics_lib.read(workdir / name) for name in curves},
    frontier=frontier(policies[trained], judge),
    calibration=quality,
    elo=results['elo'],
    samples=comparison.side_by_side(compared.answers[baseline], compared.answers[trained], 24),
    config_text=(workdir / 'config.json').read_text(),
  )
  print(f'report: {workdir / "report.html"}')


def check(*, policies, baseline, trained, best_of, reward_model, comparisons, gold, gold_path, **_):
  """Checks the arguments of `run` before the first stage runs; see pipeline.check.

  Raises:
    UserError: names the argument.
  """
  names = [pair[0] for pair in policies]
  comparison.check_name(baseline, names, 'baseline')
  comparison.check_name(trained, names, 'trained')
  judges.check(gold, key='gold', path=gold_path)
  for key, value in (('best_of', best_of), ('comparisons', comparisons)):
    errors.need(
      reward_model or not value, f'{key}={value!r} needs a reward model: set reward_model'
    )


run.check = check


def frontier(run_folder, judge):
  """Gold and proxy score against KL over an on-policy run, from its logged samples.

  Args:
    run_folder: of the run.
    judge: judges.Judge.

  Returns:
    List of points for report.write; [] if the judge needs more than the texts that are logged.
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

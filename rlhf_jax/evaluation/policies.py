"""The last stage: policies side by side on the same prompts, and the report.

Only here does the gold score meet the policies. Every policy answers the same prompts; the
reward model gives the proxy score, the gold function the gold score, matches by gold score the
win rate over the baseline and the Elo ratings of all.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import jax
import numpy as np

from rlhf_jax import intervals
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import report
from rlhf_jax.evaluation import tables
from rlhf_jax.evaluation import text
from rlhf_jax.evaluation import winrate
from rlhf_jax.feedback import elo
from rlhf_jax.models import hf
from rlhf_jax.rewards import calibration as calibration_lib
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import scoring
from rlhf_jax.rollout import actor


@dataclasses.dataclass
class Answers:
  """What one policy said: samples, proxy and gold scores [n], KL to the baseline in nats."""

  samples: policy_lib.Samples
  proxy: np.ndarray
  gold: np.ndarray
  kl: float


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
    prompts: data set of prompts, repeated where there are fewer than `samples`; messages become
      texts by the chat template of `trained`, the same for all policies.
    samples: n, answers of each policy.
    max_new_tokens: of an answer.
    temperature: of sampling.
    gold: 'package.module:function': (prompt, response) -> float, or with `gold_path` a function
      of that path which returns one.
    gold_path: data that the gold function is made from, or ''.
    curves: names of the stages whose learning curves the report shows.
    seed: of the samples.
    truncate_at: see policy.TextPolicy.sample; comparisons are then scored without an EOS.
    truncate_after: likewise.
  """
  policies = dict(policies)
  judge = functions.load_gold(gold, gold_path)
  loaded = {name: policy_lib.TextPolicy.load(path) for name, path in policies.items()}
  scorer = Scorer.load(reward_model) if reward_model else None
  asked = loaded[trained].read_prompts(prompts)
  questions = [asked[i % len(asked)] for i in range(samples)]
  answers = ask(
    loaded,
    questions,
    scorer,
    judge,
    jax.random.key(seed),
    baseline=baseline,
    best_of=best_of,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    truncate_at=truncate_at,
    truncate_after=truncate_after,
  )

  rows, ratings = compare(answers, baseline)
  print(tables.stages_table(rows, title=f'{title}, {samples} samples of each', width=120))
  quality = calibrate(scorer, comparisons, append_eos=truncate_at is None) if comparisons else None
  results = {
    'stages': rows,
    'reward_model': quality,
    'elo': {name: dataclasses.asdict(rating) for name, rating in ratings.items()},
    'texts': {name: text.statistics(a.samples.responses) for name, a in answers.items()},
  }
  (folder / 'results.json').write_text(json.dumps(results, indent=2))
  workdir = pathlib.Path(workdir)
  report.write(
    workdir / 'report.html',
    title=title,
    summary=summary,
    stages=rows,
    metrics={name: metrics_lib.read(workdir / name) for name in curves},
    frontier=frontier(policies[trained], judge),
    calibration=quality,
    elo=results['elo'],
    samples=side_by_side(answers[baseline], answers[trained], 24),
    config_text=(workdir / 'config.json').read_text(),
  )
  print(f'report: {workdir / "report.html"}')


def ask(
  policies,
  questions,
  scorer,
  judge,
  key,
  *,
  baseline,
  best_of,
  max_new_tokens,
  temperature,
  truncate_at=None,
  truncate_after=0,
):
  """Every policy's scored answers, and right behind the baseline its best of n.

  Args:
    policies: {name: TextPolicy}.
    questions: n prompts.
    scorer: Scorer, or None.
    judge: (prompt, response) -> gold score.
    key: random key.
    baseline: name.
    best_of: 0 for none.
    max_new_tokens: of an answer.
    temperature: of sampling.
    truncate_at: see policy.TextPolicy.sample.
    truncate_after: likewise.

  Returns:
    {name: Answers}.
  """
  sample = lambda name, key, samples=1: policies[name].sample(
    questions,
    key,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    samples=samples,
    truncate_at=truncate_at,
    truncate_after=truncate_after,
  )

  proxy = lambda said: scorer(said, policies[name].tokenizer)

  def scored(said, kl):
    return Answers(
      said,
      proxy(said) if scorer else None,
      np.array([judge(p, r) for p, r in zip(said.prompts, said.responses)]),
      kl,
    )

  keys = jax.random.split(key, len(policies) + 1)
  answers = {}
  for key, name in zip(keys, policies):
    said = sample(name, key)
    answers[name] = scored(
      said, mean_kl(policies[name], policies[baseline], said.rollout, temperature)
    )
    if name == baseline and best_of:
      many = sample(name, keys[-1], best_of)
      best = proxy(many).reshape(-1, best_of).argmax(axis=1)
      chosen = many.take(np.arange(len(questions)) * best_of + best)
      answers[f'best of {best_of}'] = scored(chosen, math.log(best_of) - (best_of - 1) / best_of)
  return answers


@dataclasses.dataclass
class Scorer:
  """A reward model with its tokenizer; called with n Samples it gives scores [n]."""

  policy: policy_lib.TextPolicy

  @classmethod
  def load(cls, path):
    """From a Hugging Face folder of a sequence classifier with one label."""
    model, params = hf.load_reward(path, unroll=None)
    return cls(policy_lib.TextPolicy(model, params, tokenizers.load(path)))

  def __call__(self, samples, tokenizer):
    """Scores [n] of a policy's Samples: of tokens if its tokenizer is the same, else of texts."""
    rollout, own = samples.rollout, self.policy
    if learned.same_tokenizer(own.tokenizer, tokenizer):
      return self.rows(rollout.tokens, rollout.mask)
    ended = learned.with_eos(actor.texts_of(rollout, tokenizer)[1], tokenizer)
    return self.rows(
      *learned.padded_texts(
        own.model,
        own.tokenizer,
        samples.prompts,
        samples.responses,
        ended,
        max_length=own.model.max_length,
      )
    )

  def rows(self, tokens, mask):
    """Scores [n] of tokens [n, T] and their mask."""
    return policy_lib.in_batches(
      lambda rows, start: _score(self.policy.params, *rows, model=self.policy.model), (tokens, mask)
    )


@functools.partial(jax.jit, static_argnames=('model',))
def _score(params, tokens, mask, *, model):
  return scoring.score(params, tokens, mask, model=model)


def mean_kl(policy, reference, rollout, temperature):
  """Mean over samples of log pi(y|x) - log pi_ref(y|x), nats per sequence (k1).

  Both at the sampling temperature; at 1 where that is 0, as evaluators.prompts has it.
  """
  if policy is reference:
    return 0.0
  temperature = temperature or 1.0
  return float(
    np.mean(
      policy.logprobs(rollout, temperature=temperature)
      - reference.logprobs(rollout, temperature=temperature)
    )
  )


def compare(answers, baseline):
  """Table rows and Elo ratings from gold scores on the same prompts.

  Standard errors and intervals are over prompts where several samples share one; see intervals.py.
  Ratings compare answers with the same other answers, so their intervals always are.

  Args:
    answers: {name: Answers}.
    baseline: name.

  Returns:
    Rows for tables.stages_table, and {name: Rating} with the baseline at 1000.
  """
  prompts = answers[baseline].samples.prompts
  ratings = elo.ratings_of_outcomes(
    {
      (first, second): winrate.outcomes(answers[first].gold, answers[second].gold)
      for first, second in itertools.combinations(answers, 2)
    },
    prompts,
    anchor=baseline,
  )
  rows = []
  for name, answer in answers.items():
    win = winrate.win_rate(answer.gold, answers[baseline].gold, prompts=prompts)
    rows.append(
      {
        'stage': name,
        'gold': float(answer.gold.mean()),
        'gold_se': intervals.standard_error(answer.gold, prompts),
        'proxy': None if answer.proxy is None else float(answer.proxy.mean()),
        'kl': answer.kl,
        'kl_per_token': answer.kl / float(answer.samples.rollout.response_mask.sum(1).mean()),
        'win_rate': win.rate,
        'win_low': win.low,
        'win_high': win.high,
        'elo': ratings[name].elo,
        'elo_low': ratings[name].low,
        'elo_high': ratings[name].high,
        'distinct_2': text.distinct(answer.samples.responses, 2),
      }
    )
  return rows, ratings


def pair_gaps(scorer, path, *, max_length=0, append_eos=True):
  """Gaps r_better - r_worse [n] of a data set of comparisons, and their n prompts.

  Args:
    scorer: Scorer.
    path: data set.
    max_length: tokens of a row; 0 for the model's context.
    append_eos: see pipelines.comparison_batches.
  """
  tokenizer = scorer.policy.tokenizer
  examples, _ = formats.comparisons(sources.read(path), tokenizer=tokenizer)
  batches = pipelines.comparison_batches(
    examples,
    tokenizer,
    batch_size=min(policy_lib.BATCH, len(examples)),
    max_length=max_length or scorer.policy.model.max_length,
    append_eos=append_eos,
  )
  gaps, prompts, first = [], [], 0
  for batch, _ in batches:
    tokens, mask = (x.reshape((-1,) + x.shape[2:]) for x in (batch.tokens, batch.mask))
    scores = scorer.rows(tokens, mask).reshape(batch.ranks.shape)
    found, rows = scoring.pair_gaps(scores, batch)
    gaps.append(found)
    prompts += [examples[first + row].prompt for row in rows]
    first += len(scores)
  return np.concatenate(gaps), prompts


def calibrate(scorer, path, *, append_eos=True):
  """Calibration of a reward model on held-out pairs, as a dict; see `pair_gaps`."""
  gaps, prompts = pair_gaps(scorer, path, append_eos=append_eos)
  return dataclasses.asdict(calibration_lib.pairwise(gaps, np.zeros_like(gaps), prompts=prompts))


def frontier(run_folder, judge):
  """Gold and proxy score against KL over a PPO run, from its logged samples."""
  kl = {
    record['step']: record['objective/kl']
    for record in metrics_lib.read(run_folder)
    if 'objective/kl' in record
  }
  points = []
  by_step = itertools.groupby(metrics_lib.read_samples(run_folder), lambda s: s['step'])
  for step, samples in by_step:
    samples = [sample for sample in samples if sample['score'] is not None]
    gold = [judge(s['prompt'], s['response']) for s in samples]
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


def side_by_side(before, after, count):
  """The first `count` answers of two policies to the same prompts, for the report."""
  pick = lambda answers, i: {
    name: float(values[i])
    for name, values in (('proxy', answers.proxy), ('gold', answers.gold))
    if values is not None
  }
  return [
    {
      'prompt': before.samples.prompts[i],
      'before': before.samples.responses[i],
      'after': after.samples.responses[i],
      'scores': {'before': pick(before, i), 'after': pick(after, i)},
    }
    for i in range(min(count, len(before.gold)))
  ]

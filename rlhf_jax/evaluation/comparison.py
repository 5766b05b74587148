"""Compares policies on the same prompts by scores, win rates and Elo ratings.

`rlhf evaluate`, `rlhf_jax.compare` and the last stage of a pipeline (policies.py) call
`compare_policies`. Every policy responds to the same prompts. A judge scores the responses (the
gold score) or compares pairs of them. A reward model, if given, adds the proxy score.

Letters: n samples, P prompts, N samples of each prompt for best-of-n.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools

import jax
import numpy as np

from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import intervals
from rlhf_jax import policy as policy_lib
from rlhf_jax.evaluation import best_of_n
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation import tables
from rlhf_jax.evaluation import winrate
from rlhf_jax.feedback import elo
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import text_statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings of a comparison.

  Attributes:
    baseline: Name of the policy that win rates and KLs are relative to; '' for the first.
    samples: Number n of responses per policy; prompts repeat if there are fewer. 0 for one response
      to each prompt.
    best_of: N of best-of-N sampling from the baseline with the reward model; 0 for none.
    seed: Random seed of the samples.
    max_new_tokens: See policy.TextPolicy.sample.
    temperature: See policy.TextPolicy.sample.
    truncate_at: See policy.TextPolicy.sample.
    truncate_after: See policy.TextPolicy.sample.
  """

  baseline: str = ''
  samples: int = 0
  best_of: int = 0
  seed: int = 0
  max_new_tokens: int | None = None
  temperature: float = 1.0
  truncate_at: str | None = None
  truncate_after: int = 0

  @property
  def sampling(self):
    """The settings that are keyword arguments of policy.TextPolicy.sample, a dict."""
    names = 'max_new_tokens', 'temperature', 'truncate_at', 'truncate_after'
    return {name: getattr(self, name) for name in names}


@dataclasses.dataclass
class ScoredSamples:
  """Responses of one policy, with their scores.

  Attributes:
    samples: Samples.
    proxy: [n] scores by the reward model; None without a reward model.
    gold: [n] scores by the judge; None if the judge compares pairs.
    kl: KL from the baseline, nats per sequence; None if the two have different tokenizers, or if Q
      functions guide the sampler.
    curve: Points of best_of_n.curve for best-of-n; else ().
  """

  samples: policy_lib.Samples
  proxy: np.ndarray | None
  gold: np.ndarray | None
  kl: float | None
  curve: Sequence[Mapping] = ()


@dataclasses.dataclass
class Comparison:
  """The result of comparing policies.

  Attributes:
    baseline: Name of the policy that win rates and KLs are relative to.
    scored: {name: ScoredSamples}.
    rows: Rows of the table, one per policy; see tables.stages_table.
    ratings: {name: elo.Rating}; the baseline's rating is 1000.
  """

  baseline: str
  scored: Mapping[str, ScoredSamples]
  rows: Sequence[Mapping]
  ratings: Mapping[str, elo.Rating]

  def samples(self):
    """Returns one dict per prompt with the prompt and every policy's response and scores."""
    scores = lambda result, i: {
      key: float(values[i])
      for key, values in (('gold', result.gold), ('proxy', result.proxy))
      if values is not None
    }
    prompts = self.scored[self.baseline].samples.prompts
    return [
      {
        'prompt': prompt,
        'responses': {
          name: {'response': result.samples.responses[i]} | scores(result, i)
          for name, result in self.scored.items()
        },
      }
      for i, prompt in enumerate(prompts)
    ]

  def best_of_curve(self):
    """Returns the points of best-of-n for the report; () if there was no best-of-n."""
    return next((result.curve for result in self.scored.values() if result.curve), ())

  def text(self, count):
    """Returns the responses of all policies to the first `count` prompts as text."""
    lines = []
    for sample in self.samples()[:count]:
      lines.append(f'prompt: {sample["prompt"]}')
      for name, entry in sample['responses'].items():
        scores = ', '.join(f'{key} {entry[key]:.2f}' for key in ('gold', 'proxy') if key in entry)
        lines.append(f'  {name}{f" ({scores})" if scores else ""}: {entry["response"].strip()}')
    return errors.printable('\n'.join(lines))

  @property
  def table(self):
    """The rows as a pandas DataFrame, without empty columns."""
    import pandas

    return pandas.DataFrame(list(self.rows)).set_index('stage').dropna(axis=1, how='all')

  @property
  def responses(self):
    """The prompts and every policy's responses and gold scores, a pandas DataFrame."""
    import pandas

    columns = {'prompt': self.scored[self.baseline].samples.prompts}
    for name, result in self.scored.items():
      columns[name] = result.samples.responses
      if result.gold is not None:
        columns[f'{name} score'] = result.gold
    return pandas.DataFrame(columns)

  def plot(self):
    """Draws win rates over the baseline and Elo ratings; returns a matplotlib Figure."""
    return plots.ratings(self.rows, self.baseline)

  def __repr__(self):
    return tables.stages_table(self.rows)

  def _repr_html_(self):
    titles, cells = tables.stages(self.rows)
    import pandas

    return pandas.DataFrame(cells, columns=titles).to_html(index=False)

  def results(self):
    """Returns the results as a dict for JSON, without the samples."""
    return {
      'stages': self.rows,
      'elo': {name: dataclasses.asdict(rating) for name, rating in self.ratings.items()},
      'texts': {
        name: text_statistics.statistics(r.samples.responses) for name, r in self.scored.items()
      },
    }


def compare_policies(policies, examples, judge, settings=Settings(), *, reward_model=None):
  """Samples responses of all policies to the same prompts and compares them with a judge.

  Args:
    policies: {name: policy.TextPolicy}.
    examples: List of formats.Prompt: prompts with the metadata that the judge reads.
    judge: judges.Judge.
    settings: Settings.
    reward_model: reward_models.RewardModel for the proxy score, or None.

  Returns:
    Comparison.

  Raises:
    UserError: If the baseline is not one of the policies, the judge fails, or a prompt is too long.
  """
  settings = dataclasses.replace(settings, baseline=settings.baseline or next(iter(policies)))
  check_name(settings.baseline, policies, 'baseline')
  errors.need(
    not settings.best_of or reward_model is not None,
    f'best_of={settings.best_of} needs a reward model to select the best samples',
  )
  errors.need(examples, 'there are no prompts to compare the policies on')
  judge.check_examples(examples)
  count = settings.samples or len(examples)
  examples = [examples[i % len(examples)] for i in range(count)]
  scored = ask(policies, examples, judge, settings, reward_model=reward_model)
  metadata = [example.metadata for example in examples]
  rows, ratings = compare(
    scored, settings.baseline, outcomes=outcomes_of_pairs(scored, judge, metadata)
  )
  return Comparison(settings.baseline, scored, rows, ratings)


def check_name(name, names, key):
  """Raises UserError if `name` is not one of the policies' names."""
  if name not in names:
    hint = config_keys.did_you_mean(name, list(names)).replace('The keys are', 'They are')
    raise errors.UserError(f'{key}={name!r} is not the name of a policy. {hint}')


def ask(policies, examples, judge, settings, *, reward_model=None):
  """Samples and scores responses of every policy, and of best-of-n.

  Args:
    policies: See `compare_policies`.
    examples: List of n formats.Prompt.
    judge: judges.Judge.
    settings: Settings with a baseline.
    reward_model: reward_models.RewardModel, or None.

  Returns:
    {name: ScoredSamples}. 'best of N' follows the baseline.
  """
  baseline, best_of = settings.baseline, settings.best_of
  prompts = [example.prompt for example in examples]
  metadata = [example.metadata for example in examples]

  def score(name, samples, kl):
    tokenizer = policies[name].tokenizer
    return ScoredSamples(
      samples,
      None if reward_model is None else reward_model.score_samples(samples, tokenizer),
      None if judge.score is None else judge.score(samples, metadata, tokenizer),
      kl,
    )

  keys = jax.random.split(jax.random.key(settings.seed), len(policies) + 1)
  scored = {}
  for key, name in zip(keys, policies):
    samples = policies[name].sample(prompts, key, **settings.sampling)
    kl = mean_kl(policies[name], policies[baseline], samples.rollout, settings.temperature)
    scored[name] = score(name, samples, kl)
    if name == baseline and best_of:
      many = policies[name].sample(prompts, keys[-1], samples=best_of, **settings.sampling)
      scores = reward_model.score_samples(many, policies[name].tokenizer).reshape(-1, best_of)
      best = many.take(np.arange(len(prompts)) * best_of + scores.argmax(axis=1))
      result = score(name, best, best_of_n.kl(best_of))
      result.curve = best_of_n.curve(scores, gold_of_each(many, judge, best_of), prompts)
      scored[f'best of {best_of}'] = result
  return scored


def gold_of_each(samples, judge, count):
  """Computes gold scores [P, N] of all samples of best-of-n.

  Args:
    samples: Samples, N of each prompt.
    judge: judges.Judge.
    count: N.

  Returns:
    NumPy array, or None if the judge cannot score one text at a time.
  """
  if judge.score_text is None:
    return None
  pairs = zip(samples.prompts, samples.responses)
  return np.reshape([judge.score_text(*pair) for pair in pairs], (-1, count))


def mean_kl(policy, reference, rollout, temperature):
  """Computes the mean over samples of log pi(y|x) - log pi_ref(y|x), nats per sequence.

  This is the k1 estimator of the KL. Both log-probabilities are at the sampling temperature, or at
  1 if that is 0, as in evaluators.prompts.

  Returns:
    A float; None if the two policies have different tokenizers, or if Q functions guide the sampler
    of one: the responses are then not those of the policy.
  """
  if policy.beta or reference.beta:
    return None
  if policy is reference:
    return 0.0
  if not learned.same_tokenizer(policy.tokenizer, reference.tokenizer):
    return None
  temperature = temperature or 1.0
  return float(
    np.mean(
      policy.rollout_logprobs(rollout, temperature=temperature)
      - reference.rollout_logprobs(rollout, temperature=temperature)
    )
  )


def outcomes_of_pairs(scored, judge, metadata):
  """Computes who wins between each pair of policies.

  Args:
    scored: {name: ScoredSamples}.
    judge: judges.Judge.
    metadata: List of the n prompts' metadata, dicts.

  Returns:
    {(first, second): [n] float in [0, 1]}: 1 if the first wins, 0.5 for a draw, 0 if the second
    wins.
  """
  if judge.outcomes is not None:
    return judge.outcomes({name: result.samples for name, result in scored.items()})
  if judge.prefer is None:
    return outcomes_of_scores(scored)
  return {
    (first, second): 0.5
    + 0.5 * judge.prefer(scored[first].samples, scored[second].samples, metadata)
    for first, second in itertools.combinations(scored, 2)
  }


def outcomes_of_scores(scored):
  """Computes who has the higher gold score in each pair of policies; see `outcomes_of_pairs`."""
  return {
    (first, second): winrate.outcomes(scored[first].gold, scored[second].gold)
    for first, second in itertools.combinations(scored, 2)
  }


def compare(scored, baseline, *, outcomes=None):
  """Computes the table's rows and the Elo ratings.

  Standard errors and intervals are clustered by prompt if samples share prompts; see intervals.py.
  Intervals of Elo ratings are always clustered by prompt, because each match is between responses
  to the same prompt.

  Args:
    scored: {name: ScoredSamples}.
    baseline: Name of the baseline.
    outcomes: See `outcomes_of_pairs`; None to compare gold scores.

  Returns:
    Rows for tables.stages_table, and {name: Rating} with the baseline at 1000.
  """
  outcomes = outcomes_of_scores(scored) if outcomes is None else outcomes
  prompts = scored[baseline].samples.prompts
  ratings = {baseline: elo.Rating(1000.0, 1000.0, 1000.0, 0.0)}
  if outcomes:
    ratings = elo.ratings_of_outcomes(outcomes, prompts, anchor=baseline)
  rows = []
  for name, result in scored.items():
    win = winrate.of_outcomes(against(outcomes, name, baseline, len(prompts)), prompts)
    length = float(result.samples.rollout.response_mask.sum(1).mean())
    rows.append(
      {
        'stage': name,
        'gold': None if result.gold is None else float(result.gold.mean()),
        'gold_se': None if result.gold is None else intervals.standard_error(result.gold, prompts),
        'proxy': None if result.proxy is None else float(result.proxy.mean()),
        'kl': result.kl,
        'kl_per_token': None if result.kl is None else result.kl / length,
        'win_rate': win.rate,
        'win_low': win.low,
        'win_high': win.high,
        'elo': ratings[name].elo,
        'elo_low': ratings[name].low,
        'elo_high': ratings[name].high,
        'distinct_2': text_statistics.distinct(result.samples.responses, 2),
      }
    )
  return rows, ratings


def against(outcomes, name, baseline, count):
  """Returns the outcomes [count] of a policy's matches against the baseline.

  The baseline draws all matches against itself.
  """
  if name == baseline:
    return np.full(count, 0.5)
  if (name, baseline) in outcomes:
    return outcomes[name, baseline]
  return 1 - outcomes[baseline, name]


def side_by_side(before, after, count):
  """Returns the first `count` responses of two policies to the same prompts, for the report."""
  pick = lambda result, i: {
    name: float(values[i])
    for name, values in (('proxy', result.proxy), ('gold', result.gold))
    if values is not None
  }
  return [
    {
      'prompt': before.samples.prompts[i],
      'before': before.samples.responses[i],
      'after': after.samples.responses[i],
      'scores': {'before': pick(before, i), 'after': pick(after, i)},
    }
    for i in range(min(count, len(before.samples.prompts)))
  ]

"""Labels of a policy's responses by simulated annotators, in place of human feedback.

`run` labels which of two responses to a prompt is better, `best_of` which of several is the best.
Each comparison is labelled by one annotator. `sample` only samples responses.
"""

import math

import jax

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import sources
from rlhf_jax.feedback import agreement as agreement_lib
from rlhf_jax.feedback import annotators
from rlhf_jax.rewards import functions


def run(
  folder,
  *,
  policy,
  prompts,
  pairs,
  held_out,
  max_new_tokens,
  temperature,
  gold,
  annotator_count,
  annotator_temperature,
  label_noise,
  disagreement,
  seed,
):
  """Samples pairs of responses, labels them, and writes training and held-out comparisons.

  Writes comparisons.jsonl and held_out.jsonl ({"prompt", "chosen", "rejected", "annotator",
  "simulated"}), samples.jsonl ({"prompt", "completion"}: all responses, on which a reward model can
  be normalized) and agreement.json.

  Args:
    folder: pathlib.Path of the output folder.
    policy: Folder of the language model.
    prompts: Data set of prompts; they are repeated if there are too few.
    pairs: Number of comparisons for training.
    held_out: Number of held-out comparisons, whose prompts are the last ones; see `split_prompts`.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    gold: 'package.module:function' of (prompt, response) -> float, which the annotators follow.
    annotator_count: Number of annotators; see annotators.SimulatedAnnotators.
    annotator_temperature: Temperature of the annotators' choices.
    label_noise: Probability that a label is flipped, or one for each annotator.
    disagreement: Standard deviation of the annotators' individual preferences.
    seed: Random seed of samples and annotators.
  """
  samples = sample_pairs(
    policy_lib.TextPolicy.load(policy),
    prompts,
    (pairs, held_out),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    seed=seed,
  )
  panel = annotators.SimulatedAnnotators(
    functions.load_gold(gold),
    count=annotator_count,
    seed=seed,
    temperature=annotator_temperature,
    label_noise=label_noise,
    disagreement=disagreement,
  )
  triples = write(folder, panel, samples, pairs)
  sources.write(folder / 'agreement.json', [agreement(panel, triples[:200])])


def sample_pairs(policy, prompts, counts, *, max_new_tokens, temperature, seed):
  """Samples two responses to each prompt of training and held-out comparisons.

  Args:
    policy: policy.TextPolicy.
    prompts: Data set of prompts.
    counts: Numbers of training and of held-out comparisons; see `split_prompts`.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    seed: Random seed.

  Returns:
    policy.Samples, those of training first.
  """
  return policy.sample(
    sum(split_prompts(policy.read_prompts(prompts), *counts), []),
    jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    samples=2,
  )


def write(folder, panel, samples, pairs):
  """Labels pairs of responses, and writes comparisons.jsonl, held_out.jsonl and samples.jsonl.

  Args:
    folder: pathlib.Path of the output folder.
    panel: annotators.SimulatedAnnotators.
    samples: Result of `sample_pairs`.
    pairs: Number of training comparisons; the others are held out.

  Returns:
    List of (prompt, a, b) without those with an empty response, which a reward model cannot read.
  """
  triples = list(zip(samples.prompts[::2], samples.responses[::2], samples.responses[1::2]))
  readable = lambda part: [(q, a, b) for q, a, b in part if a.strip() and b.strip()]
  train, test = readable(triples[:pairs]), readable(triples[pairs:])
  sources.write(folder / 'comparisons.jsonl', panel.label(train))
  sources.write(folder / 'held_out.jsonl', panel.label(test))
  write_samples(folder, [(q, text) for q, a, b in train + test for text in (a, b)])
  return train + test


def write_samples(folder, pairs):
  """Writes samples.jsonl: pairs of a prompt and a response, without empty responses."""
  sources.write(
    folder / 'samples.jsonl',
    [{'prompt': prompt, 'completion': text} for prompt, text in pairs if text.strip()],
  )


def subsets(folder, *, path, counts):
  """Writes the first records of a data set, for each of some counts, to first_COUNT.jsonl.

  Args:
    folder: pathlib.Path of the output folder.
    path: Data set.
    counts: Numbers of records; a larger number than there are writes all.
  """
  records = [record.fields for record in sources.read(path)]
  for count in counts:
    sources.write(folder / f'first_{count}.jsonl', records[:count])


def check(*, gold, gold_path='', **_):
  """Checks argument `gold` of `run` and `best_of` before any stage runs; see pipeline.check."""
  functions.check_gold(gold, gold_path)


run.check = check


def agreement(panel, triples):
  """Measures the agreement of annotators on comparisons that all of them label.

  Args:
    panel: annotators.SimulatedAnnotators.
    triples: List of (prompt, a, b).

  Returns:
    {'fraction', 'kappa', 'simulated': True}; see agreement.Agreement. With a single annotator both
    numbers are None.
  """
  if panel.count < 2:
    return {'fraction': None, 'kappa': None, 'simulated': True}
  result = agreement_lib.agreement(panel.votes(triples))
  kappa = None if math.isnan(result.kappa) else result.kappa
  return {'fraction': result.fraction, 'kappa': kappa, 'simulated': True}


def split_prompts(prompts, pairs, held_out):
  """Splits prompts into those of training and of held-out comparisons, with none in common.

  The last distinct prompts are held out, in proportion to `held_out`. Prompts of either part are
  repeated if there are too few.

  Args:
    prompts: List of texts.
    pairs: Number of training comparisons.
    held_out: Number of held-out comparisons.

  Returns:
    List of `pairs` prompts and list of `held_out` prompts.

  Raises:
    UserError: There is only one prompt for both parts.
  """
  distinct = list(dict.fromkeys(prompts))
  count = 0
  if held_out:
    if len(distinct) < 2 and pairs:
      raise errors.UserError(
        f'pairs={pairs} and held_out={held_out} need different prompts, but there is only one: '
        'give two different prompts, or held_out=0'
      )
    count = round(len(distinct) * held_out / (pairs + held_out))
    count = min(max(count, 1), len(distinct) - bool(pairs))
  last = set(distinct[len(distinct) - count :])
  parts = [p for p in prompts if p not in last], [p for p in prompts if p in last]
  return [
    [part[i % len(part)] for i in range(wanted)] for part, wanted in zip(parts, (pairs, held_out))
  ]


def best_of(
  folder,
  *,
  policy,
  prompts,
  count,
  held_out,
  completions,
  samples,
  max_new_tokens,
  temperature,
  truncate_at,
  truncate_after,
  gold,
  gold_path,
  annotator_count,
  annotator_temperature,
  label_noise,
  disagreement,
  seed,
):
  """Samples several responses to each prompt and labels the best, as lm-human-preferences does.

  As in Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), annotators see only responses that
  end with `truncate_at`: the first `completions` such responses of the `samples` to a prompt. A
  prompt with fewer of them is left out.

  Writes labels.jsonl and held_out.jsonl ({"prompt", "completions", "best", "annotator",
  "simulated"}), and samples.jsonl ({"prompt", "completion"}: the first response to each prompt,
  whether it ended or not, on which a reward model can be normalized).

  Args:
    folder: pathlib.Path of the output folder.
    policy: Folder of the language model.
    prompts: Data set of prompts.
    count: Maximum number of prompts; the first ones are used.
    held_out: Number of labels to hold out, from the start. Other labels of the same prompts are
      held out too.
    completions: Number of responses that an annotator compares.
    samples: Number of responses sampled per prompt.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    truncate_at: Token that ends a response; see policy.TextPolicy.sample.
    truncate_after: First position at which it ends one; see policy.TextPolicy.sample.
    gold: Gold score that the annotators follow; see functions.load_gold.
    gold_path: Data set of the gold score; see functions.load_gold.
    annotator_count: Number of annotators; see annotators.SimulatedAnnotators.
    annotator_temperature: Temperature of the annotators' choices.
    label_noise: Probability that a label is flipped, or one for each annotator.
    disagreement: Standard deviation of the annotators' individual preferences.
    seed: Random seed of samples and annotators.

  Raises:
    UserError: Too few prompts have enough responses that end.
  """
  text_policy = policy_lib.TextPolicy.load(policy)
  questions = text_policy.read_prompts(prompts)[:count]
  sampled = text_policy.sample(
    questions,
    jax.random.key(seed),
    samples=samples,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    truncate_at=truncate_at,
    truncate_after=truncate_after,
  )
  groups = []
  for number, prompt in enumerate(questions):
    own = range(number * samples, (number + 1) * samples)
    ended = [sampled.responses[i] for i in own if sampled.rollout.ended[i]]
    if len(ended) >= completions:
      groups.append((prompt, tuple(ended[:completions])))
  test_prompts = {prompt for prompt, _ in groups[:held_out]}
  test = [group for group in groups if group[0] in test_prompts]
  train = [group for group in groups if group[0] not in test_prompts]
  if not train:
    raise errors.UserError(
      f'of {len(questions)} prompts only {len(groups)} have {completions} responses of {samples} '
      f'that end with {truncate_at!r}, and {held_out} of these are held out: give more prompts '
      'or samples, or lower truncate_after'
    )
  panel = annotators.SimulatedAnnotators(
    functions.load_gold(gold, gold_path),
    count=annotator_count,
    seed=seed,
    temperature=annotator_temperature,
    label_noise=label_noise,
    disagreement=disagreement,
  )
  sources.write(folder / 'held_out.jsonl', panel.label_best(test))
  sources.write(folder / 'labels.jsonl', panel.label_best(train))
  write_samples(folder, zip(questions, sampled.responses[::samples]))


best_of.check = check


def sample(
  folder,
  *,
  policy,
  prompts,
  count,
  max_new_tokens,
  temperature,
  seed,
  truncate_at=None,
  truncate_after=0,
):
  """Writes samples.jsonl ({"prompt", "completion"}): responses on which scores are normalized.

  Args:
    folder: pathlib.Path of the output folder.
    policy: Folder of the language model.
    prompts: Data set of prompts; they are repeated if there are too few.
    count: Number of responses.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    seed: Random seed.
    truncate_at: Token that ends a response; see policy.TextPolicy.sample.
    truncate_after: First position at which it ends one; see policy.TextPolicy.sample.
  """
  text_policy = policy_lib.TextPolicy.load(policy)
  questions = text_policy.read_prompts(prompts)
  samples = text_policy.sample(
    [questions[i % len(questions)] for i in range(count)],
    jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    truncate_at=truncate_at,
    truncate_after=truncate_after,
  )
  write_samples(folder, zip(samples.prompts, samples.responses))

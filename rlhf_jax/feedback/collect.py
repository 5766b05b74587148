"""Comparisons of a policy's own answers by simulated annotators.

The human step of RLHF where no human is at hand: samples of each prompt, one label each. `run`
compares two, `best_of` has the best of several picked.
"""

import math

import jax

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import sources
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
  """Samples pairs of answers, has them labelled, and writes both splits of the comparisons.

  Writes comparisons.jsonl and held_out.jsonl ({"prompt", "chosen", "rejected", "annotator",
  "simulated"}), samples.jsonl ({"prompt", "completion"}: every answer, on which a reward model
  is normalized) and agreement.json.

  Args:
    folder: where they go.
    policy: folder of the language model that answers.
    prompts: data set of prompts; taken again from the start where there are too few.
    pairs: comparisons to train on.
    held_out: further comparisons, of other prompts: the last ones, as large a share of them.
    max_new_tokens: of an answer.
    temperature: of sampling.
    gold: 'package.module:function' (prompt, response) -> float: what the annotators go by.
    annotator_count: see annotators.SimulatedAnnotators.
    annotator_temperature: likewise.
    label_noise: likewise.
    disagreement: likewise.
    seed: of samples and annotators.
  """
  asked = policy_lib.TextPolicy.load(policy)
  questions = sum(split_prompts(asked.read_prompts(prompts), pairs, held_out), [])
  samples = asked.sample(
    questions,
    jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    samples=2,
  )
  triples = list(zip(questions, samples.responses[::2], samples.responses[1::2]))
  # An answer of nothing at all is no text that a reward model could read.
  shown = lambda part: [(q, a, b) for q, a, b in part if a.strip() and b.strip()]
  train, test = shown(triples[:pairs]), shown(triples[pairs:])
  triples = train + test
  panel = annotators.SimulatedAnnotators(
    functions.load_gold(gold),
    count=annotator_count,
    seed=seed,
    temperature=annotator_temperature,
    label_noise=label_noise,
    disagreement=disagreement,
  )
  sources.write(folder / 'comparisons.jsonl', panel.label(train))
  sources.write(folder / 'held_out.jsonl', panel.label(test))
  sources.write(
    folder / 'samples.jsonl',
    [{'prompt': q, 'completion': text} for q, a, b in triples for text in (a, b)],
  )
  sources.write(folder / 'agreement.json', [agreement(panel, triples[:200])])


def check(*, gold, gold_path='', **_):
  """Checks `gold` of `run` and `best_of` before the first stage runs; see pipeline.check."""
  functions.check_gold(gold, gold_path)


run.check = check


def agreement(panel, triples):
  """The record of how far a panel agrees on (prompt, a, b); None where it cannot disagree.

  Args:
    panel: annotators.SimulatedAnnotators.
    triples: what all of them are asked.

  Returns:
    {'fraction', 'kappa', 'simulated': True}; see annotators.Agreement.
  """
  if panel.count < 2:
    return {'fraction': None, 'kappa': None, 'simulated': True}
  result = annotators.agreement(panel.votes(triples))
  kappa = None if math.isnan(result.kappa) else result.kappa
  return {'fraction': result.fraction, 'kappa': kappa, 'simulated': True}


def split_prompts(prompts, pairs, held_out):
  """Prompts to compare answers of, for training and held out; no prompt is among both.

  Args:
    prompts: texts, taken again from the start where there are too few.
    pairs: number of the first.
    held_out: number of the second.

  Returns:
    Two lists.

  Raises:
    UserError: both are wanted of a single prompt.
  """
  distinct = list(dict.fromkeys(prompts))
  count = 0
  if held_out:
    if len(distinct) < 2 and pairs:
      raise errors.UserError(
        f'pairs={pairs} and held_out={held_out} comparisons, and only one prompt: give two '
        'different ones, or held_out=0'
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
  """Has the best of several answers to each prompt picked, as lm-human-preferences does.

  Only answers that end with `truncate_at` are shown, as in Ziegler et al. 2019
  (https://arxiv.org/abs/1909.08593): of each prompt the first `completions` of `samples`. A prompt
  with fewer is left out.

  Writes labels.jsonl and held_out.jsonl ({"prompt", "completions", "best", "annotator",
  "simulated"}), and samples.jsonl ({"prompt", "completion"}: the first answer to each prompt,
  whether it ends or not, on which a reward model is normalized).

  Args:
    folder: where they go.
    policy: folder of the language model that answers.
    prompts: data set of prompts.
    count: prompts that are answered, the first ones, at most.
    held_out: labels that are held out, the first ones, and all others of their prompts.
    completions: answers that an annotator sees.
    samples: answers sampled of each prompt.
    max_new_tokens: of an answer.
    temperature: of sampling.
    truncate_at: see policy.TextPolicy.sample.
    truncate_after: likewise.
    gold: 'package.module:function' of what the annotators go by; see functions.load_gold.
    gold_path: likewise.
    annotator_count: see annotators.SimulatedAnnotators.
    annotator_temperature: likewise.
    label_noise: likewise.
    disagreement: likewise.
    seed: of samples and annotators.

  Raises:
    UserError: too few prompts have enough answers that end.
  """
  asked = policy_lib.TextPolicy.load(policy)
  questions = asked.read_prompts(prompts)[:count]
  answers = asked.sample(
    questions,
    jax.random.key(seed),
    samples=samples,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    truncate_at=truncate_at,
    truncate_after=truncate_after,
  )
  groups = []
  for first in range(0, len(answers.prompts), samples):
    ended = [
      answers.responses[i] for i in range(first, first + samples) if answers.rollout.ended[i]
    ]
    if len(ended) >= completions:
      groups.append((answers.prompts[first], tuple(ended[:completions])))
  known = {prompt for prompt, _ in groups[:held_out]}
  test = [group for group in groups if group[0] in known]
  train = [group for group in groups if group[0] not in known]
  if not train:
    raise errors.UserError(
      f'of {len(questions)} prompts only {len(groups)} have {completions} answers of {samples} '
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
  sources.write(
    folder / 'samples.jsonl',
    [
      {'prompt': prompt, 'completion': text}
      for prompt, text in zip(answers.prompts[::samples], answers.responses[::samples])
      if text.strip()
    ],
  )


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
  """Writes samples.jsonl: a policy's answers, {"prompt", "completion"}, to normalize scores on.

  Args:
    folder: pathlib.Path it goes to.
    policy: folder of the language model that answers.
    prompts: data set of prompts; taken again from the start where there are too few.
    count: answers.
    max_new_tokens: of an answer.
    temperature: of sampling.
    seed: of the samples.
    truncate_at: see policy.TextPolicy.sample.
    truncate_after: likewise.
  """
  asked = policy_lib.TextPolicy.load(policy)
  questions = asked.read_prompts(prompts)
  samples = asked.sample(
    [questions[i % len(questions)] for i in range(count)],
    jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    truncate_at=truncate_at,
    truncate_after=truncate_after,
  )
  sources.write(
    folder / 'samples.jsonl',
    [
      {'prompt': prompt, 'completion': response}
      for prompt, response in zip(samples.prompts, samples.responses)
      if response.strip()
    ],
  )

"""Comparisons of a policy's own answers by simulated annotators.

The human step of RLHF where no human is at hand: samples of each prompt, one label each. `run`
compares two, `best_of` has the best of several picked.
"""

import jax

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.feedback import annotators
from rlhf_jax.rewards import functions


def run(folder, *, policy, prompts, pairs, held_out, max_new_tokens, temperature, gold,
        annotator_count, annotator_temperature, label_noise, disagreement, seed):
  """Samples pairs of answers, has them labelled, and writes both splits of the comparisons.

  Writes comparisons.jsonl and held_out.jsonl ({"prompt", "chosen", "rejected", "annotator",
  "simulated"}), samples.jsonl ({"prompt", "completion"}: every answer, on which a reward model
  is normalized) and agreement.json.

  Args:
    folder: where they go.
    policy: folder of the language model that answers.
    prompts: data set of prompts; taken again from the start where there are too few.
    pairs: comparisons to train on.
    held_out: further comparisons, of prompts after those.
    max_new_tokens: of an answer.
    temperature: of sampling.
    gold: 'package.module:function' (prompt, response) -> float: what the annotators go by.
    annotator_count: see annotators.SimulatedAnnotators.
    annotator_temperature: likewise.
    label_noise: likewise.
    disagreement: likewise.
    seed: of samples and annotators.
  """
  records = sources.read(prompts)
  examples, _ = formats.prompts(records)
  total = pairs + held_out
  questions = [examples[i % len(examples)].prompt for i in range(total)]
  asked = policy_lib.TextPolicy.load(policy)
  samples = asked.sample(questions, jax.random.key(seed), max_new_tokens=max_new_tokens,
                         temperature=temperature, samples=2)
  first, second = samples.responses[::2], samples.responses[1::2]
  # An answer of nothing at all is no text that a reward model could read.
  triples = [(q, a, b) for q, a, b in zip(questions, first, second) if a.strip() and b.strip()]
  panel = annotators.SimulatedAnnotators(
      functions.load_gold(gold), count=annotator_count, seed=seed,
      temperature=annotator_temperature, label_noise=label_noise, disagreement=disagreement)
  split = round(len(triples) * pairs / total)
  sources.write(folder / 'comparisons.jsonl', panel.label(triples[:split]))
  sources.write(folder / 'held_out.jsonl', panel.label(triples[split:]))
  sources.write(folder / 'samples.jsonl', [
      {'prompt': q, 'completion': text} for q, a, b in triples for text in (a, b)])
  agreement = annotators.agreement(panel.votes(triples[:200]))
  sources.write(folder / 'agreement.json', [
      {'fraction': agreement.fraction, 'kappa': agreement.kappa, 'simulated': True}])


def best_of(folder, *, policy, prompts, count, held_out, completions, samples, max_new_tokens,
            temperature, truncate_at, truncate_after, gold, gold_path, annotator_count,
            annotator_temperature, label_noise, disagreement, seed):
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
    held_out: labels that are held out, the first ones.
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
  examples, _ = formats.prompts(sources.read(prompts))
  examples = examples[:count]
  asked = policy_lib.TextPolicy.load(policy)
  answers = asked.sample(
      [example.prompt for example in examples], jax.random.key(seed), samples=samples,
      max_new_tokens=max_new_tokens, temperature=temperature, truncate_at=truncate_at,
      truncate_after=truncate_after)
  groups = []
  for first in range(0, len(answers.prompts), samples):
    ended = [answers.responses[i] for i in range(first, first + samples)
             if answers.rollout.ended[i]]
    if len(ended) >= completions:
      groups.append((answers.prompts[first], tuple(ended[:completions])))
  if len(groups) <= held_out:
    raise errors.UserError(
        f'of {len(examples)} prompts only {len(groups)} have {completions} answers of {samples} '
        f'that end with {truncate_at!r}, and {held_out} of these are held out: give more prompts '
        'or samples, or lower truncate_after')
  panel = annotators.SimulatedAnnotators(
      functions.load_gold(gold, gold_path), count=annotator_count, seed=seed,
      temperature=annotator_temperature, label_noise=label_noise, disagreement=disagreement)
  sources.write(folder / 'held_out.jsonl', panel.label_best(groups[:held_out]))
  sources.write(folder / 'labels.jsonl', panel.label_best(groups[held_out:]))
  sources.write(folder / 'samples.jsonl', [
      {'prompt': prompt, 'completion': text} for prompt, text in
      zip(answers.prompts[::samples], answers.responses[::samples]) if text.strip()])


def sample(folder, *, policy, prompts, count, max_new_tokens, temperature, seed,
           truncate_at=None, truncate_after=0):
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
  examples, _ = formats.prompts(sources.read(prompts))
  asked = policy_lib.TextPolicy.load(policy)
  samples = asked.sample(
      [examples[i % len(examples)].prompt for i in range(count)], jax.random.key(seed),
      max_new_tokens=max_new_tokens, temperature=temperature, truncate_at=truncate_at,
      truncate_after=truncate_after)
  sources.write(folder / 'samples.jsonl', [
      {'prompt': prompt, 'completion': response}
      for prompt, response in zip(samples.prompts, samples.responses) if response.strip()])

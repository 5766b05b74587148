"""Labels of which responses follow a rule, by simulated annotators, for rule reward models.

Sparrow's rule model learns from such labels (Glaese et al. 2022, https://arxiv.org/abs/2209.14375).
"""

import random

import jax
import numpy as np

from rlhf_jax import policy as policy_lib
from rlhf_jax.data import sources
from rlhf_jax.feedback import collect
from rlhf_jax.rewards import functions


def run(
  folder,
  *,
  policy,
  prompts,
  count,
  held_out,
  rules,
  max_new_tokens,
  temperature,
  label_noise,
  seed,
):
  """Samples responses, labels whether they follow each rule, and writes the labels.

  Writes RULE.jsonl and RULE_held_out.jsonl, {"prompt", "completion", "rating", "simulated"}, for
  each rule; the rating is 1 if the response follows the rule, else 0.

  Args:
    folder: pathlib.Path of the output folder.
    policy: Folder of the language model.
    prompts: Data set of prompts; see collect.split_prompts.
    count: Number of responses for training.
    held_out: Number of held-out responses.
    rules: {name of a rule: 'package.module:function' of (prompts, responses) -> n values, 1 for a
      response that follows the rule, else 0}.
    max_new_tokens: Maximum length of a response.
    temperature: Sampling temperature.
    label_noise: Probability that a label is flipped.
    seed: Random seed of samples and labels.
  """
  text_policy = policy_lib.TextPolicy.load(policy)
  parts = collect.split_prompts(text_policy.read_prompts(prompts), count, held_out)
  samples = text_policy.sample(
    sum(parts, []), jax.random.key(seed), max_new_tokens=max_new_tokens, temperature=temperature
  )
  for name, rule in rules.items():
    followed = functions.load(rule, key=f'rules.{name}')(samples.prompts, samples.responses)
    rng = random.Random(f'{name} {seed}')
    flipped = [rng.random() < label_noise for _ in followed]
    records = [
      {'prompt': prompt, 'completion': response, 'rating': float(label), 'simulated': True}
      for prompt, response, label in zip(
        samples.prompts, samples.responses, np.asarray(followed, bool) ^ np.array(flipped)
      )
    ]
    readable = lambda part: [record for record in part if record['completion'].strip()]
    sources.write(folder / f'{name}.jsonl', readable(records[:count]))
    sources.write(folder / f'{name}_held_out.jsonl', readable(records[count:]))


def check(*, rules, **_):
  """Checks argument `rules` of `run` before any stage runs; see pipeline.check."""
  for name, rule in rules.items():
    function = functions.load(rule, key=f'rules.{name}')
    functions.check_signature(function, f'rules.{name}={rule!r}', 'f(prompts, responses)', 2)


run.check = check

"""A stage of a pipeline: samples responses, scores them, and writes the best as data for SFT.

This is best-of-n sampling (Nakano et al. 2021, WebGPT, https://arxiv.org/abs/2112.09332; Menick et
al. 2022, GopherCite, https://arxiv.org/abs/2203.11147), and one step of rejection-sampling
fine-tuning and of expert iteration; see configs/best_of_n.py and configs/expert_iteration.py.

Letters: P prompts, N samples of each.
"""

from collections.abc import Sequence

import jax
from jaxtyping import Float
import ml_collections
import numpy as np

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import sources
from rlhf_jax.evaluation import best_of_n
from rlhf_jax.evaluation import tables
from rlhf_jax.rewards import offline
from rlhf_jax.rewards import scorers
from rlhf_jax.rollout import actor


def run(
  folder,
  *,
  policy,
  prompts,
  reward,
  samples,
  keep,
  min_score,
  max_new_tokens,
  temperature,
  seed,
  top_k=0,
  top_p=1.0,
  stop=(),
):
  """Samples, scores and selects responses, and prints the scores of best-of-n.

  Writes to `folder`:

      best.jsonl       {"prompt", "completion", "score"}: the selected responses
      samples.jsonl    the same for all responses, with the "parts" of their scores if there are any
      results.json     numbers of prompts and responses, and "curve": the unbiased estimate of the
                       score of best-of-n for n = 1, 2, 4 and so on; see best_of_n.curve

  Args:
    folder: pathlib.Path of the output folder.
    policy: Folder of a language model, or of the run that trained it.
    prompts: Data set of prompts; its other columns are the metadata of reward functions.
    reward: Dict with the keys of scorers.config(), the block `config.reward`.
    samples: N.
    keep: Largest number of different responses to a prompt that are selected, the best ones.
    min_score: Lowest score of a selected response; None for any.
    max_new_tokens: See policy.TextPolicy.sample.
    temperature: See policy.TextPolicy.sample.
    seed: Random seed of the samples.
    top_k: See policy.TextPolicy.sample.
    top_p: See policy.TextPolicy.sample.
    stop: See policy.TextPolicy.sample.

  Raises:
    UserError: An argument is wrong, or no response is selected.
  """
  text_policy = policy_lib.TextPolicy.load(policy)
  examples = text_policy.read_examples(prompts)
  sampled = text_policy.sample(
    [example.prompt for example in examples],
    seed,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k or 0,
    top_p=top_p,
    stop=tuple(stop),
    samples=samples,
  )
  block = ml_collections.ConfigDict(reward)
  repeated = [example for example in examples for _ in range(samples)]
  scores, parts = score(text_policy, sampled.rollout, repeated, block)
  by_prompt = scores.reshape(-1, samples)
  texts = np.array(sampled.responses, object).reshape(by_prompt.shape)
  chosen = select(by_prompt, texts, keep=keep, min_score=min_score)
  errors.need(
    chosen,
    f'no response of {len(scores)} scores at least min_score={min_score} (the best scores '
    f'{np.nanmax(scores, initial=-np.inf):.4g}): lower it, or raise samples={samples}',
  )
  records = [
    {'prompt': prompt, 'completion': text, 'score': actor.float_or_none(value)}
    for prompt, text, value in zip(sampled.prompts, sampled.responses, scores)
  ]
  sources.write(folder / 'best.jsonl', [records[i] for i in chosen])
  named = [
    {name: actor.float_or_none(part[i]) for name, part in parts.items()}
    for i in range(len(records))
  ]
  sources.write(
    folder / 'samples.jsonl',
    [record | ({'parts': of} if of else {}) for record, of in zip(records, named)],
  )
  scored = ~np.isnan(by_prompt).any(axis=1)
  curve = best_of_n.curve(by_prompt[scored]) if scored.any() else []
  results = {'prompts': len(examples), 'responses': len(scores), 'selected': len(chosen)}
  identity.write_json(folder / 'results.json', results | {'curve': curve})
  rows = [{'stage': f'best of {p["n"]}', 'score': p['proxy'], 'kl at most': p['kl']} for p in curve]
  title = f'{len(chosen)} of {len(scores)} responses selected'
  print(tables.stages_table(rows, title=title))


def check(*, policy, prompts, reward, samples, keep, temperature, **_):
  """Checks the arguments of `run` before the first stage runs; see pipeline.check.

  Raises:
    UserError: An argument is wrong; names it.
  """
  errors.need(policy, 'policy is empty: set it to the folder of a language model')
  errors.need(prompts, 'prompts is empty: set it to a data set of prompts')
  scorers.validate(ml_collections.ConfigDict(reward), 'reward')
  errors.need(0 < keep <= samples, f'keep={keep} must be from 1 to samples={samples}')
  errors.need(
    temperature > 0, f'temperature={temperature} must be positive: all samples would be the same'
  )
  errors.need(
    jax.process_count() == 1,
    'best_of_n_stage:run samples and scores in one process, and there are '
    f'{jax.process_count()}: run this stage alone first, with --config.stages=NAME',
  )


run.check = check


def score(text_policy, rollout, examples, block):
  """Scores responses with the scorer of a reward block; see rewards.offline.

  Args:
    text_policy: TextPolicy that sampled them.
    rollout: Rollout of B responses, NumPy arrays.
    examples: formats.Prompt of each response.
    block: ConfigDict with the keys of scorers.config().

  Returns:
    Scores [B], and their parts {name: [B]}.
  """
  return offline.make(block, text_policy.tokenizer, batch_size=policy_lib.BATCH_SIZE)(
    rollout, examples
  )


def select(
  scores: Float[np.ndarray, 'P N'],
  texts: Sequence[Sequence[str]],
  *,
  keep: int,
  min_score: float | None = None,
) -> list[int]:
  """Selects the best responses to each prompt.

  Args:
    scores: [P, N]; NaN is never selected.
    texts: [P, N] responses; of equal ones the first counts, and an empty one is never selected.
    keep: Largest number of responses per prompt.
    min_score: Lowest score; None for any.

  Returns:
    Indices into the P N responses, by prompt, the best first.
  """
  chosen, count = [], scores.shape[1]
  for prompt, row in enumerate(scores):
    seen = {}
    for i in np.argsort(-row, kind='stable'):
      enough = not np.isnan(row[i]) and (min_score is None or row[i] >= min_score)
      if enough and texts[prompt][i].strip():
        seen.setdefault(texts[prompt][i], prompt * count + int(i))
    chosen += list(seen.values())[:keep]
  return chosen

"""The actor: draws prompts, samples responses from the current policy and scores them.

Letters: B batch, n responses of a prompt, R response length.
"""

from collections.abc import Callable
from collections.abc import Sequence
import time

import jax
from jaxtyping import Array, Float, Key, PyTree
import numpy as np
import transformers

from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import tokenizers
from rlhf_jax.rollout import sampling as sampling_lib
from rlhf_jax.rollout import stops


class Actor:
  """Makes a scored rollout of a batch of prompts each time it is called."""

  def __init__(
    self,
    examples,
    iterator,
    sample,
    score,
    mesh,
    *,
    samples=1,
    truncate=None,
    for_scoring=None,
    as_prompted=None,
  ):
    """Keeps what makes a rollout.

    Args:
      examples: list of formats.Prompt.
      iterator: yields (Prompts [B / n, P], indices into `examples` [B / n]).
      sample: (params, Prompts, key) -> Rollout of B responses, those of a prompt side by side.
      score: Scorer: (Rollout, examples of the B responses) -> [B] or [B, R] float32, or
        types.Scores of them.
      mesh: device mesh.
      samples: n.
      truncate: Rollout -> the Rollout that is scored and trained on; None to change nothing.
      for_scoring: Rollout -> the Rollout that the scorer reads; None to change nothing.
      as_prompted: examples of a batch -> the same with the prompts that the policy reads; None to
        change nothing.
    """
    self.examples, self.iterator = examples, iterator
    identity = lambda value: value
    self._sample, self._score = sample, score
    self._truncate = truncate or identity
    self._for_scoring = for_scoring or identity
    self._as_prompted = as_prompted or identity
    self._mesh, self._samples, self._last_batch = mesh, samples, None

  def __call__(
    self, params: PyTree, key: Key[Array, ''], *, timed: bool
  ) -> tuple[types.Rollout, types.ScoreArray, dict[str, float]]:
    """One batch of experience.

    Args:
      params: all parameters of the policy.
      key: random key of this rollout.
      timed: whether to wait for the device, before and between the two parts, so that the time of
        each holds nothing else.

    Returns:
      Rollout, scores ([B] or [B, R] float32) and host-side metrics: the times, and the mean of
      each part of the scores as reward/NAME.
    """
    prompts, index = next(self.iterator)
    examples = self._as_prompted([self.examples[i] for i in np.asarray(index)])
    examples = [example for example in examples for _ in range(self._samples)]
    if timed:
      jax.block_until_ready(params)  # else the rollout's time would hold the update before it
    started = time.perf_counter()
    rollout = self._truncate(self._sample(params, sharding.put_rows(prompts, self._mesh), key))
    if timed:
      jax.block_until_ready(rollout)
    sampled = time.perf_counter()
    scored_rollout = self._for_scoring(rollout)
    scores = types.Scores.of(self._score(scored_rollout, examples))
    self._last_batch = examples, scored_rollout, scores
    if not timed:
      return rollout, scores.total, {}
    jax.block_until_ready(scores)
    scored = time.perf_counter()
    tokens = int(np.sum(processes.to_host(rollout.response_mask)))
    parts = {
      f'reward/{name}': nan_mean(processes.to_host(part)) for name, part in scores.parts.items()
    }
    return (
      rollout,
      scores.total,
      parts
      | {
        'seconds/rollout': sampled - started,
        'seconds/scoring': scored - sampled,
        'tokens_per_second/rollout': tokens / (sampled - started),
      },
    )

  def samples(
    self, tokenizer: transformers.PreTrainedTokenizerFast, metrics: dict[str, Array]
  ) -> list[dict]:
    """The last batch as dicts: prompt, response, score, what a train step adds, and parts if there are.

    A score of NaN is None, and so is one of its parts.

    Args:
      tokenizer: the policy's.
      metrics: of the train step on that batch; those called samples/NAME, [B], become NAME.
    """
    examples, rollout, scores = self._last_batch
    added = {
      name.removeprefix('samples/'): processes.to_host(values)
      for name, values in metrics.items()
      if name.startswith('samples/')
    }
    responses, _ = texts_of(rollout, tokenizer)
    parts = {name: processes.to_host(part) for name, part in scores.parts.items()}
    samples = []
    for i, (example, total) in enumerate(zip(examples, processes.to_host(scores.total))):
      sample = {
        'prompt': example.prompt,
        'response': responses[i],
        'score': float_or_none(np.sum(total)),
      }
      if sample['score'] is not None:
        sample |= {name: float(values[i]) for name, values in added.items()}
      if parts:
        sample['parts'] = {name: float_or_none(part[i]) for name, part in parts.items()}
      samples.append(sample)
    return samples


def nan_mean(values: Float[np.ndarray, ' B']) -> float:
  """The mean of a part of the scores [B], without those that are NaN."""
  return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else float('nan')


def float_or_none(value: float | np.floating) -> float | None:
  """A score as JSON has it: None where it is NaN."""
  return None if np.isnan(value) else float(value)


def stop_at(
  strings: Sequence[str],
  tokenizer: transformers.PreTrainedTokenizerFast,
  sampling: sampling_lib.Sampling,
  mesh: jax.sharding.Mesh,
) -> Callable[[types.Rollout], types.Rollout] | None:
  """Ends responses at stop strings of their text, on the host.

  Args:
    strings: tuple of texts.
    tokenizer: the policy's.
    sampling: Sampling that the responses are drawn with.
    mesh: device mesh.

  Returns:
    Rollout -> Rollout; None where there are no strings.
  """
  if not strings:
    return None

  def truncate(rollout):
    ended = processes.to_host(sampling_lib.ended(rollout, sampling))
    rollout, found = stops.truncate_at_strings(
      jax.tree.map(processes.to_host, rollout), tokenizer, strings, after=sampling.min_new_tokens
    )
    return sharding.put_rows(rollout.replace(ended=ended | found), mesh)

  return truncate


def texts_of(
  rollout: types.Rollout, tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[list[str], list[list[int]]]:
  """The responses of a rollout.

  Args:
    rollout: Rollout.
    tokenizer: the policy's.

  Returns:
    List of texts without special tokens, and list of token id lists with them.
  """
  mask = processes.to_host(rollout.response_mask)
  tokens = processes.to_host(rollout.tokens)[:, -mask.shape[1] :]
  ids = [row[keep].tolist() for row, keep in zip(tokens, mask)]
  return tokenizers.decode_continuation(tokenizer, ids), ids

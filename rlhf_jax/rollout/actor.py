"""The actor: takes prompts, samples responses from the current policy and scores them.

Letters: B batch, n responses per prompt, P prompt length, R response length.
"""

import base64
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import copy
import io
import time

import jax
from jaxtyping import Array, Float, Key, PyTree
import numpy as np
import transformers

from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import tokenizers
from rlhf_jax.rollout import sampling as sampling_lib
from rlhf_jax.rollout import stops


class Actor:
  """Returns a scored rollout of the next batch of prompts on each call.

  Attributes:
    last_batch: (examples of the B responses, Rollout that was scored, types.Scores) of the last
      call, for `samples`; None before the first.
  """

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
    """Stores the arguments.

    Args:
      examples: List of formats.Prompt.
      iterator: Iterator over (Prompts [B / n, P], indices into `examples` [B / n]).
      sample: (params, Prompts, key) -> Rollout of B responses, those to a prompt adjacent.
      score: Scorer: (Rollout, examples of the B responses) -> [B] or [B, R] float32, or
        types.Scores.
      mesh: Device mesh.
      samples: n.
      truncate: Rollout -> Rollout to score and to train on; None changes nothing.
      for_scoring: Rollout -> Rollout for the scorer only; None changes nothing.
      as_prompted: Examples of a batch -> examples with the prompts that the policy reads; None
        changes nothing.
    """
    self.examples, self.iterator = examples, iterator
    identity = lambda value: value
    self._sample, self._score = sample, score
    self._truncate = truncate or identity
    self._for_scoring = for_scoring or identity
    self._as_prompted = as_prompted or identity
    self._mesh, self._samples, self.last_batch = mesh, samples, None
    self._ahead = None  # (Rollout, indices) of the next call, if it was sampled ahead

  def __call__(
    self,
    params: PyTree,
    key: Key[Array, ''],
    *,
    timed: bool,
    next_key: Key[Array, ''] | None = None,
  ) -> tuple[types.Rollout, types.ScoreArray, dict[str, float]]:
    """Samples and scores one batch.

    Args:
      params: All parameters of the policy.
      key: Random key of this rollout.
      timed: Whether to measure times. This waits for the device before and after sampling and after
        scoring.
      next_key: Random key of the next rollout, which the device then samples with `params` while
        the host scores this one; the next call scores it. None samples nothing ahead.

    Returns:
      (Rollout, scores [B] or [B, R] float32, host-side metrics). The metrics are {} unless `timed`,
      else the times and the mean of each part of the scores as reward/NAME.
    """
    if timed:
      jax.block_until_ready(params)  # Otherwise the time includes the previous update.
    started = time.perf_counter()
    rollout, index = self._ahead or self._start_sampling(params, key)
    examples = self._as_prompted([self.examples[i] for i in index])
    examples = [example for example in examples for _ in range(self._samples)]
    rollout = self._truncate(rollout)
    scored_rollout = self._for_scoring(rollout)
    if timed:
      jax.block_until_ready(rollout)
    # Last of what the device does before the scoring, which need not wait for it.
    self._ahead = None if next_key is None else self._start_sampling(params, next_key)
    sampled = time.perf_counter()
    scores = types.Scores.of(self._score(scored_rollout, examples))
    self.last_batch = examples, scored_rollout, scores
    if not timed:
      return rollout, scores.total, {}
    jax.block_until_ready(scores)
    scored = time.perf_counter()
    metrics = mean_parts(scores) | {
      'seconds/rollout': sampled - started,
      'seconds/scoring': scored - sampled,
    }
    if self._ahead is None:
      tokens = int(np.sum(processes.to_host(rollout.response_mask)))
      metrics['tokens_per_second/rollout'] = tokens / metrics['seconds/rollout']
    else:
      jax.block_until_ready(self._ahead[0])  # The part of the sampling that scoring did not hide.
      metrics['seconds/rollout'] += time.perf_counter() - scored
    return rollout, scores.total, metrics

  @contextlib.contextmanager
  def undone_on_error(self):
    """Undoes what the body read and sampled if it raises UserError, and raises BatchError."""
    position, ahead = copy.deepcopy(self.iterator.get_state()), self._ahead
    try:
      yield
    except errors.UserError as error:
      self.iterator.set_state(position)
      self._ahead = ahead
      raise errors.BatchError(str(error)) from error

  def _start_sampling(self, params, key):
    """Starts to sample the next batch; returns (Rollout, indices) without waiting."""
    prompts, index = next(self.iterator)
    prompts = sharding.put_rows(prompts, self._mesh)
    return self._sample(params, prompts, key), np.asarray(index)

  def get_state(self) -> dict | None:
    """Returns the batch that was sampled ahead, for JSON: a resumed run scores that very batch.

    Returns:
      {'index': indices of the prompts, 'rollout': arrays of the Rollout as text}, or None.
    """
    if self._ahead is None:
      return None
    rollout, index = self._ahead
    arrays = {name: x for name, x in vars(rollout).items() if x is not None}
    file = io.BytesIO()
    np.savez_compressed(file, **{name: processes.to_host(x) for name, x in arrays.items()})
    return {'index': index.tolist(), 'rollout': base64.b64encode(file.getvalue()).decode('ascii')}

  def set_state(self, state: dict | None) -> None:
    """Sets the batch that was sampled ahead; see `get_state`."""
    self._ahead = None
    if state is not None:
      with np.load(io.BytesIO(base64.b64decode(state['rollout']))) as file:
        rollout = types.Rollout(**sharding.put_rows(dict(file), self._mesh))
      self._ahead = rollout, np.asarray(state['index'])

  def samples(
    self, tokenizer: transformers.PreTrainedTokenizerFast, metrics: dict[str, Array]
  ) -> list[dict]:
    """Returns the last batch as dicts with the keys prompt, response and score.

    The metrics of the train step and the parts of the score, if there are any, are added. NaN
    scores and parts become None.

    Args:
      tokenizer: Tokenizer of the policy.
      metrics: Metrics of the train step on that batch; samples/NAME, [B], is added as NAME.
    """
    examples, rollout, scores = self.last_batch
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


def mean_parts(scores: types.Scores) -> dict[str, float]:
  """Returns the mean of each part of the scores, as metrics reward/NAME."""
  return {
    f'reward/{name}': nan_mean(processes.to_host(part)) for name, part in scores.parts.items()
  }


def nan_mean(values: Float[np.ndarray, ' B']) -> float:
  """Returns the mean of the values that are not NaN, or NaN if there are none."""
  return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else float('nan')


def float_or_none(value: float | np.floating) -> float | None:
  """Converts a score to a value for JSON: None if it is NaN."""
  return None if np.isnan(value) else float(value)


def stop_at(
  strings: Sequence[str],
  tokenizer: transformers.PreTrainedTokenizerFast,
  sampling: sampling_lib.Sampling,
  mesh: jax.sharding.Mesh,
) -> Callable[[types.Rollout], types.Rollout] | None:
  """Returns a function that truncates responses after stop strings, on the host.

  Args:
    strings: Stop strings.
    tokenizer: Tokenizer of the policy.
    sampling: Sampling of the responses.
    mesh: Device mesh.

  Returns:
    Rollout -> Rollout, or None if there are no strings.
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
  """Decodes the responses of a rollout.

  Args:
    rollout: Rollout.
    tokenizer: Tokenizer of the policy.

  Returns:
    (texts without special tokens, lists of token ids with special tokens).
  """
  mask = processes.to_host(rollout.response_mask)
  tokens = processes.to_host(rollout.tokens)[:, -mask.shape[1] :]
  ids = [row[keep].tolist() for row, keep in zip(tokens, mask)]
  return tokenizers.decode_continuation(tokenizer, ids), ids

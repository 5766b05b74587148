"""Scorers that run on the host: Python functions, in this process or in a pool, and servers.

Letters: B batch, R response length.
"""

from collections.abc import Callable
import functools

import jax
from jaxtyping import Float
import ml_collections
import numpy as np
import transformers

from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.config import need
from rlhf_jax.rewards import client
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import pool
from rlhf_jax.rollout import actor

# Computes rewards of examples: (prompts, responses, *, response_tokens, metadata, response_length)
# -> rewards [n] or [n, R], and with a pool also which of them, [n], could not be scored.
Call = Callable[..., np.ndarray | tuple[np.ndarray, np.ndarray]]


def validate(block, key):
  """Validates the keys of a block about functions and servers, and loads the function if it is one.

  Args:
    block: `config.reward`, or one of its parts.
    key: Its dotted name.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  for name in ('timeout', 'example_timeout', 'request_timeout', 'request_size'):
    value = block.get(name)
    need(value is None or value > 0, f'{key}.{name}={value} must be positive, or None')
  for name, lowest in (('workers', 0), ('attempts', 1)):
    value = block.get(name, lowest)
    need(value >= lowest, f'{key}.{name}={value} must be {lowest} or more')
  on_error, workers = block.get('on_error', 'stop'), block.get('workers', 0)
  need(
    on_error in pool.ON_ERROR,
    f'{key}.on_error={on_error!r} must be one of {", ".join(pool.ON_ERROR)}',
  )
  name = block.get('function')
  need(
    on_error == 'stop' or name and workers,
    f'{key}.on_error={on_error!r} needs a {key}.function and {key}.workers of 1 or more',
  )
  if block.get('url'):
    client.validate(block.url, f'{key}.url')
  if not name:
    return
  need(
    not (workers and name.startswith(functions.IN_MEMORY)),
    f'{key}.workers={workers} needs a function that worker processes can import, but '
    f'{name.removeprefix(functions.IN_MEMORY)} is in the main script or notebook. Move it to a '
    'module, or set workers to 0',
  )
  function = load_function(block, key)
  need(
    workers or not getattr(function, 'needs_workers', False),
    f'{key}.function={name!r} can hang in a way that only ends with its process: set {key}.workers '
    'to 1 or more',
  )
  need(
    not (workers and getattr(function, 'whole_batch', False)),
    f'{key}.function={name!r} needs the whole batch, but workers score one example at a time: set '
    f'{key}.workers to 0',
  )


def load_function(block, key):
  """Loads the reward function of a block, with its arguments set."""
  limit = functions.Limit(block.get('timeout', functions.TIMEOUT), f'{key}.timeout')
  return functions.load_reward(
    block.function, key=f'{key}.function', arguments=arguments(block), limit=limit
  )


def arguments(block):
  """Returns the keyword arguments of the reward function of a block, a plain dict."""
  return ml_collections.ConfigDict(block.get('arguments', {})).to_dict()


def make(block, tokenizer, mesh, *, key, allow_nan):
  """Creates the scorer of a block that has a function or the URL of a server.

  Args:
    block: Block with the keys of scorers.config.
    tokenizer: Tokenizer of the policy.
    mesh: Device mesh.
    key: Dotted name of the block.
    allow_nan: Whether a reward may be NaN.

  Returns:
    Scorer. If a pool may fail to score examples without stopping the run, its result has the part
    `failed`, 1 for these examples and 0 for others.
  """
  limit = functions.Limit(block.get('timeout', functions.TIMEOUT), f'{key}.timeout', allow_nan)
  if block.get('function') and block.get('workers'):
    on_error = pool.OnError(block.get('on_error', 'stop'), block.get('error_score', 0.0))
    workers = pool.Pool(
      block.function,
      block.workers,
      key=key,
      limit=limit,
      arguments=arguments(block),
      example_timeout=block.get('example_timeout', pool.TIMEOUT),
      on_error=on_error,
    )
    return pool_scorer(workers, tokenizer, mesh, on_error=on_error)
  if block.get('function'):
    function = load_function(block, key)
  else:
    function = client.reward(
      block.url,
      client.Settings(
        size=block.get('request_size'),
        timeout=block.get('request_timeout', client.TIMEOUT),
        attempts=block.get('attempts', client.ATTEMPTS),
      ),
      key=key,
    )
  return function_scorer(function, tokenizer, mesh, limit=limit)


def function_scorer(function, tokenizer, mesh, *, limit=functions.Limit()):
  """Creates the scorer of a Python function, which each process calls with its part of the batch.

  Args:
    function: Reward function; see functions.py.
    tokenizer: Tokenizer of the policy.
    mesh: Device mesh.
    limit: functions.Limit of a call.

  Returns:
    Scorer.
  """
  call = functools.partial(functions.call, function, limit=limit)
  return lambda rollout, examples: sharding.put_rows(
    on_texts(call, rollout, examples, tokenizer), mesh
  )


def pool_scorer(
  workers: pool.Pool,
  tokenizer: transformers.PreTrainedTokenizerFast,
  mesh: jax.sharding.Mesh,
  *,
  on_error: pool.OnError,
) -> Callable[..., types.Scores]:
  """Creates the scorer of a worker pool. Each process has its own pool, for its part of the batch.

  Whether rewards are numbers or per token is known from the examples that were scored, on any
  process and in any batch, because a batch or a process may have none.

  Args:
    workers: Pool.
    tokenizer: Tokenizer of the policy.
    mesh: Device mesh.
    on_error: OnError of the pool.

  Returns:
    Scorer. It raises UserError if on_error.how is 'score' and rewards are per token.
  """
  kinds = set()  # 'per token' once such rewards were seen

  def call(*args, response_length, **kwargs):
    scores, failed = workers.score(*args, response_length=response_length, **kwargs)
    per_token = scores.ndim == 2
    # One array of one width on all processes, because all processes gather it.
    table = np.zeros((len(scores), response_length + 2), np.float32)
    table[:, : response_length if per_token else 1] = scores.reshape(len(scores), -1)
    table[:, -2], table[:, -1] = per_token, failed
    return table

  def score(rollout, examples):
    table = on_texts(call, rollout, examples, tokenizer)
    scores, failed = table[:, :-2], table[:, -1]
    if table[:, -2].any():
      kinds.add('per token')
    if not kinds:
      scores = scores[:, 0]
    elif on_error.how == 'skip':
      scores = np.where(failed[:, None] > 0, np.float32(np.nan), scores)
    else:
      need(not failed.any(), pool.ONE_REWARD)
    parts = {'failed': failed} if on_error.how != 'stop' else {}
    return types.Scores(*sharding.put_rows((scores, parts), mesh))

  return score


def on_texts(
  call: Call,
  rollout: types.Rollout,
  examples,
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> Float[np.ndarray, 'B ...']:
  """Calls a function on the texts of a rollout, each process on its part of the batch.

  Args:
    call: Function with the arguments of functions.call except `function`.
    rollout: Rollout of B responses.
    examples: B formats.Prompt.
    tokenizer: Tokenizer of the policy.

  Returns:
    The results for all B responses, on every process.
  """
  responses, ids = actor.texts_of(rollout, tokenizer)
  return processes.map_over_processes(
    lambda rows: call(
      [examples[i].prompt for i in rows],
      [responses[i] for i in rows],
      response_tokens=[ids[i] for i in rows],
      metadata=[examples[i].metadata for i in rows],
      response_length=rollout.response_mask.shape[1],
    ),
    len(examples),
  )

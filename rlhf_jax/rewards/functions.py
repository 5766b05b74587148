"""Python reward functions: loaded by name, called with strings, their answers checked.

A reward function is called once a batch as

    function(prompts, responses, response_tokens=..., metadata=...)

with lists of equal length: texts, texts, lists of token ids, and dicts that hold the other
columns of each prompt's record. It returns one number a response, or for rewards per token one
list a response with a number for each of its tokens.
"""

import importlib
import math
import os
import sys

import numpy as np

from rlhf_jax import errors


def load(name, *, key='config.reward.function'):
  """The function called `package.module:function`; the working directory is searched too.

  Args:
    name: 'package.module:function'.
    key: dotted name of the config key that holds it, for error messages.

  Raises:
    UserError: there is no such module or function.
  """
  module, _, attribute = name.partition(':')
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise errors.UserError(
        f'{key}={name!r} cannot be loaded ({error}). Write '
        "'package.module:function', importable from the working directory.") from error


def load_gold(name, path=''):
  """A gold score: (prompt, response) -> float.

  Args:
    name: 'package.module:function' of it, or with `path` of a function that makes it of that.
    path: data that it is made from, or ''.
  """
  found = load(name)
  return found(path) if path else found


def call(function, prompts, responses, *, response_tokens, metadata, slots):
  """Calls a reward function and checks what it returns.

  Args:
    function: see the module's docstring.
    prompts: n texts.
    responses: n texts.
    response_tokens: n lists of token ids.
    metadata: n dicts.
    slots: R, width of the result for rewards per token.

  Returns:
    [n] float32, or [n, R] float32 for rewards per token, 0 after each response's end.

  Raises:
    UserError: the function raised, or returned the wrong number of rewards, NaN or infinity;
      names the example.
  """
  name = getattr(function, '__name__', repr(function))
  try:
    rewards = list(function(prompts, responses, response_tokens=response_tokens,
                            metadata=metadata))
  except Exception as error:
    raise errors.UserError(
        f'the reward function {name} raised {type(error).__name__}: {error}. It was called '
        f'with {len(prompts)} prompts, the first {prompts[0]!r} with the response '
        f'{responses[0]!r}. Training stops here; once it is fixed, the same command resumes '
        'from the last checkpoint.') from error
  if len(rewards) != len(responses):
    raise errors.UserError(
        f'the reward function {name} returned {len(rewards)} rewards for {len(responses)} '
        'responses: it must return one for each')
  first = rewards[0] if rewards else None
  per_token = isinstance(first, (list, tuple)) or getattr(first, 'ndim', 0) == 1
  scores = np.zeros((len(rewards), slots) if per_token else len(rewards), np.float32)
  for i, reward in enumerate(rewards):
    shape = (len(response_tokens[i]),) if per_token else ()
    try:
      value = np.asarray(reward, np.float32)
    except (TypeError, ValueError):
      value = None
    if value is None or value.shape != shape:
      raise errors.UserError(
          f'the reward function {name} returned {str(reward)[:80]} for example {i}, where an '
          f'array of shape {shape} was expected: one number, or one for each of its '
          f'{len(response_tokens[i])} tokens, alike for all examples')
    if not all(math.isfinite(v) for v in value.reshape(-1)):
      raise errors.UserError(
          f'the reward function {name} returned {reward} for example {i}, prompt '
          f'{prompts[i]!r}, response {responses[i]!r}: every reward must be finite')
    if per_token:
      scores[i, :len(value)] = value
    else:
      scores[i] = value
  return scores

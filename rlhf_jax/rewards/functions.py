"""Python reward functions: loads them by name, calls them on strings and checks their results.

A reward function is called once per batch as

    function(prompts, responses, response_tokens=..., metadata=...)

with lists of equal length: texts, texts, lists of token ids, and dicts that hold the other columns
of each prompt's record. It returns one number per response; for rewards per token, it returns one
list per response, with a number for each of its tokens. Its signature may omit `response_tokens`,
`metadata` or both. It may have other keyword arguments, whose values are `config.reward.arguments`.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import contextvars
import functools
import inspect
import math
import os
import sys
from typing import NamedTuple

from absl import logging
from jaxtyping import Float
import numpy as np

from rlhf_jax import errors
from rlhf_jax.config_keys import did_you_mean
from rlhf_jax.rewards import guard

DATA = 'response_tokens', 'metadata'  # keywords that a call may pass
TIMEOUT = 600.0  # default limit of a call in seconds
REMEDY = 'Once it is fixed, the same command resumes.'  # last sentence of messages
NOT_NUMBERS = (bool, np.bool_, str, bytes)
IN_MEMORY = 'in_memory:'  # prefix of the names of functions that are not in a module
# {name in the config: function} for functions of the calling process; see `in_memory`.
_IN_MEMORY = contextvars.ContextVar('in_memory', default={})  # noqa: B039  never changed


class Limit(NamedTuple):
  """Limits of a call to a reward function.

  Attributes:
    seconds: time limit; None for no limit.
    key: config key that sets the time limit.
    allow_nan: whether a reward may be NaN.
  """

  seconds: float | None = TIMEOUT
  key: str = 'config.reward.timeout'
  allow_nan: bool = False


@contextlib.contextmanager
def in_memory(functions):
  """Makes functions of this process available to `load` inside a `with` block.

  Args:
    functions: {name in the config: function}.
  """
  token = _IN_MEMORY.set(_IN_MEMORY.get() | functions)
  try:
    yield
  finally:
    _IN_MEMORY.reset(token)


def load(name, *, key='config.reward.function', limit=Limit(TIMEOUT, '')):
  """Loads a function by name.

  Args:
    name: 'package.module:function', where the working directory is searched too; or a name that
      `in_memory` made available.
    key: Config key that holds the name, for error messages.
    limit: Time limit of the import of the module.

  Returns:
    The function.

  Raises:
    UserError: There is no such module or function, or the module fails to import. The message has
      the file and line.
  """
  if name in _IN_MEMORY.get():
    return _IN_MEMORY.get()[name]
  if name.startswith(IN_MEMORY):
    raise errors.UserError(
      f'{key}={name!r} was a function of the Python process that started the run. Move it to a '
      f"module and set {key} to 'package.module:function'."
    )
  module, _, attribute = name.partition(':')
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    if not attribute or not all(module.split('.')):
      raise ImportError('not a module name with a function name')
    call = guard.Call(f'{key}={name!r}: importing {module}', timeout=limit.seconds, key=limit.key)
    return getattr(guard.import_module(module, call), attribute)
  except (ImportError, AttributeError) as error:
    raise errors.UserError(
      f'{key}={name!r} cannot be loaded ({error}). Write '
      "'package.module:function', importable from the working directory."
    ) from error


def load_reward(name, *, key='config.reward.function', arguments=None, limit=Limit()):
  """Loads a reward function.

  Args:
    name: See `load`.
    key: See `load`.
    arguments: {keyword: value} that every call passes, or None.
    limit: See `load`.

  Returns:
    Function (prompts, responses, *, response_tokens, metadata).

  Raises:
    UserError: The function cannot be loaded, does not take the arguments of a reward function, or
      does not take `arguments`. A reward of this package also checks their values.
  """
  function = load(name, key=key, limit=limit)
  if arguments:
    of_function = f'{key.removesuffix("function")}arguments'
    function = bind(function, arguments, f'{key}={name!r}', of_function)
  keywords = keywords_of(function)
  if keywords is None:
    check_signature(
      function,
      f'{key}={name!r}',
      'f(prompts, responses, response_tokens=..., metadata=...)',
      2,
      DATA,
      remedy='write def f(prompts, responses, *, response_tokens, metadata), or omit one or both '
      'of the last two; config.reward.arguments sets other keyword arguments',
    )
  function = with_keywords(function, keywords)
  if name.startswith('rlhf_jax.rewards.'):
    # Without examples, the rewards of this package check their arguments and optional packages.
    try:
      function([], [], response_tokens=[], metadata=[])
    except errors.UserError as error:
      raise errors.UserError(f'{key}={name!r}: {error}') from error
  return function


def bind(function, arguments, named, key):
  """Returns a reward function with the values of its own keyword arguments set.

  Args:
    function: The loaded object.
    arguments: {keyword: value}.
    named: Config key and value of the function, for messages.
    key: Config key of the arguments, for messages.

  Raises:
    UserError: The function does not take one of the arguments.
  """
  if not callable(function):
    return function  # an error of the caller's checks
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # written in C, with an unknown signature
    return functools.partial(function, **arguments)
  names = [name for name in list(signature.parameters)[2:] if name not in DATA]
  for argument in arguments:
    errors.need(argument not in DATA, f'{key} sets {argument!r}, which every call sets: remove it')
    try:
      signature.bind_partial(None, None, **{argument: None})
    except TypeError as error:
      raise errors.UserError(
        f'{named} does not take {key}.{argument} ({error}). '
        + (did_you_mean(argument, names) if names else 'It has no arguments to set.')
      ) from None
  bound = functools.partial(function, **arguments)
  attributes = getattr(function, '__dict__', {}).items()
  # inspect.signature would take the signature of __wrapped__, without the values that are set.
  vars(bound).update({name: value for name, value in attributes if name != '__wrapped__'})
  bound.__name__ = getattr(function, '__name__', repr(function))
  return bound


def keywords_of(function):
  """Returns which of `response_tokens` and `metadata` a reward function takes.

  Returns:
    Tuple of names; both names if the signature is unknown, as for functions written in C; None if
    the function cannot be called with any subset of them.
  """
  if not callable(function):
    return None
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return DATA
  for keywords in (DATA, DATA[1:], DATA[:1], ()):
    try:
      signature.bind(None, None, **dict.fromkeys(keywords))
      return keywords
    except TypeError:
      continue
  return None


def with_keywords(function, keywords):
  """Wraps a reward function that takes only some of the keywords; see `keywords_of`."""
  if keywords == DATA:
    return function

  @functools.wraps(function)
  def reward_fn(prompts, responses, *, response_tokens, metadata):
    data = {'response_tokens': response_tokens, 'metadata': metadata}
    return function(prompts, responses, **{name: data[name] for name in keywords})

  return reward_fn


def load_gold(name, path=''):
  """Loads a gold score.

  Args:
    name: 'package.module:function' of f(prompt, response) -> number; with `path`, of a function
      that returns such an f for the path.
    path: Data set that the gold score is built from, or ''.

  Returns:
    Function (prompt, response) -> float; see `guarded_gold`.

  Raises:
    UserError: There is no such function, or it does not take these arguments.
  """
  function = load_or_build(name, path)
  check_gold_signature(function, f'gold={name!r}')
  return guarded_gold(function, f'the gold score {name}')


def check_gold(name, path=''):
  """Raises those errors of `load_gold` that do not depend on the data at `path`."""
  function = load(name, key='gold')
  if path:
    check_builder_signature(function, f'gold={name!r} with a gold_path')
  else:
    check_gold_signature(function, f'gold={name!r}')


def check_gold_signature(function, named):
  """Raises UserError unless a function can be called as f(prompt, response)."""
  check_signature(function, named, 'f(prompt, response)', 2)


def check_builder_signature(function, named):
  """Raises UserError unless a function can be called with a path."""
  check_signature(function, named, 'f(gold_path)', 1)


def load_or_build(name, path='', *, key='gold'):
  """Loads a function by name, or builds it by calling a loaded function with a path.

  Args:
    name: 'package.module:function'.
    path: Argument of the named function, which then returns the function; '' to not call it.
    key: Config key that holds `name`, for error messages.

  Returns:
    The function.
  """
  function = load(name, key=key)
  if not path:
    return function
  check_builder_signature(function, f'{key}={name!r} with a gold_path')
  return guard.run(lambda: function(path), guard.Call(f'the gold score {name}'))


def guarded_gold(function, what):
  """Wraps a gold function so that its errors become UserErrors that name the example.

  Args:
    function: Function (prompt, response) -> number.
    what: Name of the function in messages.

  Returns:
    Function (prompt, response) -> float.
  """

  def gold_fn(prompt, response):
    call = guard.Call(what, (prompt,), (response,), TIMEOUT)
    score = guard.run(lambda: function(prompt, response), call)
    return float(check_reward(score, call, 0, ()))

  return gold_fn


def check_signature(
  function, named, usage, positional, keywords=(), *, remedy='change its arguments'
):
  """Raises UserError unless an object is a function that takes certain arguments.

  Args:
    function: The loaded object.
    named: Config key and value of it, for the message.
    usage: How it is called, for the message.
    positional: Number of positional arguments.
    keywords: Names of the keyword arguments.
    remedy: Last part of the message: what to do.
  """
  config_error = lambda text: errors.UserError(f'{named} {text}')
  if not callable(function):
    raise config_error(f'is of type {type(function).__name__}: it must be a function')
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return  # Functions written in C may have no signature.
  try:
    signature.bind(*[None] * positional, **dict.fromkeys(keywords))
  except TypeError as error:
    raise config_error(f'takes {signature}, but is called as {usage}: {error}; {remedy}') from None


def call(
  function: Callable,
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  response_tokens: Sequence[Sequence[int]],
  metadata: Sequence[Mapping],
  response_length: int,
  limit: Limit = Limit(),
) -> Float[np.ndarray, ' n'] | Float[np.ndarray, 'n {response_length}']:
  """Calls a reward function and checks what it returns.

  Args:
    function: Reward function; see the top of the file.
    prompts: n texts.
    responses: n texts.
    response_tokens: n lists of token ids.
    metadata: n dicts.
    response_length: R, width of the result for rewards per token.
    limit: Limit.

  Returns:
    [n] float32, or [n, R] float32 for rewards per token, 0 after the end of each response.

  Raises:
    UserError: The function raised, exited or took too long, or it returned the wrong number of
      rewards or a reward that is not a finite number. The message names the example.
  """
  guarded = guard.Call(
    describe(function), prompts, responses, limit.seconds, limit.key, remedy=REMEDY
  )
  scores = checked(
    function,
    guarded,
    response_tokens=response_tokens,
    metadata=metadata,
    response_length=response_length,
    allow_nan=limit.allow_nan,
  )
  warn_about_nan(scores, guarded)
  return scores


def describe(function):
  """Returns the name of a reward function for messages."""
  return f'the reward function {getattr(function, "__name__", repr(function))}'


def checked(
  function: Callable,
  call: guard.Call,
  *,
  response_tokens: Sequence[Sequence[int]],
  metadata: Sequence[Mapping],
  response_length: int,
  allow_nan: bool = False,
) -> Float[np.ndarray, ' n'] | Float[np.ndarray, 'n {response_length}']:
  """Calls a reward function on the examples of a guard.Call; see `call`, which also logs NaNs."""
  prompts, responses = call.prompts, call.responses

  def rewards_of():
    rewards = function(prompts, responses, response_tokens=response_tokens, metadata=metadata)
    # Consume a generator here, so that errors in its code are caught too.
    return (
      list(rewards) if np.iterable(rewards) and not isinstance(rewards, (str, dict)) else [rewards]
    )

  rewards = guard.run(rewards_of, call)
  if len(rewards) != len(responses):
    returned = f'{len(rewards)} rewards' if len(rewards) != 1 else guard.shortened(rewards[0])
    raise refused(
      f'{call.what} returned {returned} for {len(responses)} responses: it must return one '
      'for each',
      call,
    )
  first = rewards[0] if rewards else None
  per_token = isinstance(first, (list, tuple)) or getattr(first, 'ndim', 0) == 1
  scores = np.zeros((len(rewards), response_length) if per_token else len(rewards), np.float32)
  for i, reward in enumerate(rewards):
    if per_token:
      value = check_reward(reward, call, i, (len(response_tokens[i]),), allow_nan=allow_nan)
      scores[i, : len(value)] = value
    else:
      scores[i] = check_reward(
        reward, call, i, (), tokens=len(response_tokens[i]), allow_nan=allow_nan
      )
  return scores


def warn_about_nan(scores, call, indices=None):
  """Logs how many responses are skipped because their reward is NaN, if any are.

  Args:
    scores: [n] or [n, R].
    call: guard.Call of the batch.
    indices: Indices [n] of the scores in the batch; None if they are the whole batch.
  """
  nan = np.flatnonzero(np.isnan(scores).any(axis=tuple(range(1, scores.ndim))))
  if nan.size:
    logging.warning(
      '%s returned NaN for %d of %d responses, which are skipped; the first is %s',
      call.what,
      nan.size,
      len(scores),
      guard.describe_example(nan[0] if indices is None else indices[nan[0]], call),
    )


def check_reward(reward, call, index, shape, *, tokens=None, allow_nan=False):
  """Converts the reward of one example to a NumPy array.

  Args:
    reward: Value that the function returned for the example.
    call: guard.Call.
    index: Index of the example.
    shape: Expected shape: () for a number, (number of tokens,) for rewards per token.
    tokens: Number of tokens of the response if rewards per token are allowed too, for the message.
    allow_nan: Whether a reward may be NaN.

  Returns:
    Float32 array of the expected shape.

  Raises:
    UserError: The reward is not a number, has another shape, or is not finite.
  """
  example = guard.describe_example(index, call)
  returned = f'{call.what} returned {guard.shortened(reward)} for {example}'
  wrong, value = [], None
  try:
    wrong = [
      item for item in np.asarray(reward, object).reshape(-1) if isinstance(item, NOT_NUMBERS)
    ]
    value = np.asarray(reward, np.float32)
  except Exception:  # raised by NumPy or by another library's array
    pass
  if wrong:
    raise refused(
      f'{returned}: {guard.shortened(wrong[0])} is a {type(wrong[0]).__name__}, but every reward '
      'must be a number, such as float(...)',
      call,
    )
  if value is None or value.shape != shape:
    tokens = shape[0] if shape else tokens
    choice = (
      '' if tokens is None else f', or for all examples one number per token (here {tokens} tokens)'
    )
    raise refused(
      f'{returned}, but an array of shape {shape} was expected: one number{choice}', call
    )
  if not all(math.isfinite(v) or allow_nan and math.isnan(v) for v in value.reshape(-1)):
    text = f'{returned}: every reward must be finite'
    if call.key and not np.isinf(value).any():
      block = call.key.rpartition('.')[0].split('.parts.')[0]
      text += f"; {block}.on_nan='skip' leaves out responses whose reward is NaN"
    raise refused(text, call)
  return value


def refused(text, call):
  """Returns a UserError about an invalid result, with the remedy of its guard.Call."""
  return errors.UserError('. '.join(filter(None, (text, call.remedy))))

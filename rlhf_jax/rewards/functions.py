"""Python reward functions: loaded by name, called with strings, their answers checked.

A reward function is called once a batch as

    function(prompts, responses, response_tokens=..., metadata=...)

with lists of equal length: texts, texts, lists of token ids, and dicts that hold the other
columns of each prompt's record. It returns one number a response, or for rewards per token one
list a response with a number for each of its tokens. It may leave out `response_tokens` or
`metadata`.
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
from rlhf_jax.rewards import guard

TIMEOUT = 600.0  # seconds of a call, where the config says nothing else
NOT_NUMBERS = (bool, np.bool_, str, bytes)
IN_MEMORY = 'in_memory:'  # begins the names of functions that no module has
# Functions that Python code gave a run, by the name that the config has for them; see `given`.
_GIVEN = contextvars.ContextVar('given', default={})  # noqa: B039  never changed


class Limit(NamedTuple):
  """What a call may do.

  Attributes:
    seconds: that it may take; None for no limit.
    key: of the config, that says so.
    allow_nan: whether NaN is a reward, too.
  """

  seconds: float | None = TIMEOUT
  key: str = 'config.reward.timeout'
  allow_nan: bool = False


@contextlib.contextmanager
def given(functions):
  """Makes functions of this process available to `load` while the body runs.

  Args:
    functions: {name as in a config: function}.
  """
  token = _GIVEN.set(_GIVEN.get() | functions)
  try:
    yield
  finally:
    _GIVEN.reset(token)


def load(name, *, key='config.reward.function', limit=Limit(TIMEOUT, '')):
  """The function called `package.module:function`; the working directory is searched too.

  Args:
    name: 'package.module:function'.
    key: dotted name of the config key that holds it, for error messages.
    limit: Limit of the import of its module.

  Raises:
    UserError: there is no such module or function, or the module fails; names its file and line.
  """
  if name in _GIVEN.get():
    return _GIVEN.get()[name]
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
      raise ImportError('it names no module, or no function')
    found = guard.import_module(
      module,
      guard.Call(f'{key}={name!r}: importing {module}', timeout=limit.seconds, key=limit.key),
    )
    return getattr(found, attribute)
  except (ImportError, AttributeError) as error:
    raise errors.UserError(
      f'{key}={name!r} cannot be loaded ({error}). Write '
      "'package.module:function', importable from the working directory."
    ) from error


def load_reward(name, *, key='config.reward.function', limit=Limit()):
  """The reward function of this name; see `load`.

  Raises:
    UserError: there is none, or it does not take the arguments of a reward function.
  """
  function = load(name, key=key, limit=limit)
  keywords = keywords_of(function)
  if keywords is None:
    check_signature(
      function,
      f'{key}={name!r}',
      'f(prompts, responses, response_tokens=..., metadata=...)',
      2,
      ('response_tokens', 'metadata'),
      remedy='write def f(prompts, responses, *, response_tokens, metadata), without what it does '
      'not need of the last two',
    )
  return with_keywords(function, keywords)


def keywords_of(function):
  """Which of `response_tokens` and `metadata` a function of prompts and responses takes.

  Returns:
    Tuple of names; both if the signature is unknown, as of functions in C; None if the function
    cannot be called with any choice of them.
  """
  names = 'response_tokens', 'metadata'
  if not callable(function):
    return None
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return names
  for keywords in (names, names[1:], names[:1], ()):
    try:
      signature.bind(None, None, **dict.fromkeys(keywords))
      return keywords
    except TypeError:
      continue
  return None


def with_keywords(function, keywords):
  """A function of both keywords that passes on those that `function` takes; see `keywords_of`."""
  if keywords == ('response_tokens', 'metadata'):
    return function

  @functools.wraps(function)
  def reward_fn(prompts, responses, *, response_tokens, metadata):
    data = {'response_tokens': response_tokens, 'metadata': metadata}
    return function(prompts, responses, **{name: data[name] for name in keywords})

  return reward_fn


def load_gold(name, path=''):
  """A gold score: (prompt, response) -> float. See `guarded_gold` for its errors.

  Args:
    name: 'package.module:function' of it, or with `path` of a function that makes it from that.
    path: data that it is made from, or ''.

  Raises:
    UserError: there is no such function, or it does not take these arguments.
  """
  function = load_made(name, path)
  check_gold_signature(function, f'gold={name!r}')
  return guarded_gold(function, f'the gold score {name}')


def check_gold(name, path=''):
  """Raises the UserError that `load_gold` would, as far as it shows before the data exist."""
  function = load(name, key='gold')
  if path:
    check_maker(function, f'gold={name!r} with a gold_path')
  else:
    check_gold_signature(function, f'gold={name!r}')


def check_gold_signature(function, named):
  """Raises UserError unless a function can be called as f(prompt, response)."""
  check_signature(function, named, 'f(prompt, response)', 2)


def check_maker(function, named):
  """Raises UserError unless a function can be called with a path."""
  check_signature(function, named, 'f(gold_path)', 1)


def load_made(name, path='', *, key='gold'):
  """The function called `package.module:function`, or what that function makes from a path.

  Args:
    name: 'package.module:function'.
    path: data that the function is made from; '' if it is the function itself.
    key: dotted name of the config key that holds `name`, for error messages.
  """
  function = load(name, key=key)
  if not path:
    return function
  check_maker(function, f'{key}={name!r} with a gold_path')
  return guard.run(lambda: function(path), guard.Call(f'the gold score {name}'))


def guarded_gold(function, what):
  """(prompt, response) -> float of a gold function; a UserError names what failed, and its example.

  Args:
    function: (prompt, response) -> number.
    what: its name in messages.
  """

  def gold_fn(prompt, response):
    call = guard.Call(what, (prompt,), (response,), TIMEOUT)
    score = guard.run(lambda: function(prompt, response), call)
    return float(checked(score, call, 0, ()))

  return gold_fn


def check_signature(
  function, named, usage, positional, keywords=(), *, remedy='change its arguments'
):
  """Raises UserError unless a function takes certain arguments.

  Args:
    function: what was loaded.
    named: it, for the message.
    usage: how it is called, for the message.
    positional: the number of positional arguments.
    keywords: names of the others.
    remedy: what to do.
  """
  config_error = lambda text: errors.UserError(f'{named} {text}')
  if not callable(function):
    raise config_error(f'is of type {type(function).__name__}: it must be a function')
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return  # written in C: it does not tell
  try:
    signature.bind(*[None] * positional, **dict.fromkeys(keywords))
  except TypeError as error:
    raise config_error(f'takes {signature}, and is called as {usage}: {error}; {remedy}') from None


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
    function: see the module's docstring.
    prompts: n texts.
    responses: n texts.
    response_tokens: n lists of token ids.
    metadata: n dicts.
    response_length: R, width of the result for rewards per token.
    limit: Limit.

  Returns:
    [n] float32, or [n, R] float32 for rewards per token, 0 after each response's end.

  Raises:
    UserError: the function raised, exited or took too long, or returned the wrong number of rewards,
      NaN, infinity or what is no number; names the example.
  """
  guarded = guard.Call(
    f'the reward function {getattr(function, "__name__", repr(function))}',
    prompts,
    responses,
    limit.seconds,
    limit.key,
    remedy='Once it is fixed, the same command resumes.',
  )

  def rewards_of():
    rewards = function(prompts, responses, response_tokens=response_tokens, metadata=metadata)
    # A generator's code runs here, under guard.
    return (
      list(rewards) if np.iterable(rewards) and not isinstance(rewards, (str, dict)) else [rewards]
    )

  rewards = guard.run(rewards_of, guarded)
  if len(rewards) != len(responses):
    returned = f'{len(rewards)} rewards' if len(rewards) != 1 else guard.clipped(rewards[0])
    raise refused(
      f'{guarded.what} returned {returned} for {len(responses)} responses: it must return one '
      'for each',
      guarded,
    )
  first, allow_nan = rewards[0] if rewards else None, limit.allow_nan
  per_token = isinstance(first, (list, tuple)) or getattr(first, 'ndim', 0) == 1
  scores = np.zeros((len(rewards), response_length) if per_token else len(rewards), np.float32)
  for i, reward in enumerate(rewards):
    if per_token:
      value = checked(reward, guarded, i, (len(response_tokens[i]),), allow_nan=allow_nan)
      scores[i, : len(value)] = value
    else:
      scores[i] = checked(
        reward, guarded, i, (), tokens=len(response_tokens[i]), allow_nan=allow_nan
      )
  nan = np.flatnonzero(np.isnan(scores).reshape(len(rewards), -1).any(axis=1))
  if nan.size:
    logging.warning(
      '%s returned NaN for %d of %d responses, which are skipped; the first is %s',
      guarded.what,
      nan.size,
      len(rewards),
      guard.named(nan[0], guarded),
    )
  return scores


def checked(reward, call, index, shape, *, tokens=None, allow_nan=False):
  """A reward as a NumPy array.

  Args:
    reward: what the function returned for an example.
    call: guard.Call.
    index: of the example.
    shape: () for a number, (its tokens,) for rewards per token.
    tokens: of the response, where a reward for each would do too; for the message.
    allow_nan: whether it may be NaN.

  Raises:
    UserError: it is no number, or of another shape, or not finite.
  """
  returned = f'{call.what} returned {guard.clipped(reward)} for {guard.named(index, call)}'
  wrong, value = [], None
  try:
    wrong = [
      item for item in np.asarray(reward, object).reshape(-1) if isinstance(item, NOT_NUMBERS)
    ]
    value = np.asarray(reward, np.float32)
  except Exception:  # of NumPy, or of another library's array
    pass
  if wrong:
    raise refused(
      f'{returned}: {guard.clipped(wrong[0])} is a {type(wrong[0]).__name__}, and every reward must be '
      'a number, such as float(...) of it',
      call,
    )
  if value is None or value.shape != shape:
    tokens = shape[0] if shape else tokens
    choice = (
      '' if tokens is None else f', or one for each of its {tokens} tokens, alike for all examples'
    )
    raise refused(
      f'{returned}, where an array of shape {shape} was expected: one number{choice}', call
    )
  if not all(math.isfinite(v) or allow_nan and math.isnan(v) for v in value.reshape(-1)):
    text = f'{returned}: every reward must be finite'
    if call.key and not np.isinf(value).any():
      block = call.key.split('.parts.')[0].removesuffix('.timeout')
      text += f"; {block}.on_nan='skip' leaves out responses whose reward is NaN"
    raise refused(text, call)
  return value


def refused(text, call):
  """The UserError about what a guard.Call returned, which ends as those about what it raised."""
  return errors.UserError('. '.join(filter(None, (text, call.remedy))))

"""Checks the keys of a config and the types of their values against the defaults."""

import difflib
import math
import numbers

import ml_collections

from rlhf_jax.errors import need

# Keys that may be None although their default is not None.
OPTIONAL = (
  'config.checkpoint_minutes',
  'config.rl.value_clip',
  'config.warn.kl',
  'config.warn.sampler_gap',
)
# Blocks with arbitrary keys, which are checked by the code that reads them.
OPEN = (
  'model.init',
  'data.mixture',
  'ptx.mixture',
  'evals',
  'reward.parts',
  'reward.arguments',
)


def lock(config):
  """Locks a config except for the blocks in OPEN, so that an unknown key is an error.

  Args:
    config: ConfigDict of an algorithm.

  Returns:
    The same ConfigDict.
  """
  config.lock()
  for key in OPEN:
    *blocks, name = key.split('.')
    block = config
    for part in blocks:
      block = block.get(part, {})
    if name in block:
      block[name].unlock()
  return config


def did_you_mean(name, names):
  """Returns 'Did you mean ...?' if one of `names` is similar to `name`, else a list of `names`."""
  like = difflib.get_close_matches(str(name), [str(other) for other in names], 1, 0.7)
  return f'Did you mean {like[0]!r}?' if like else f'The keys are {", ".join(map(str, names))}.'


def check_keys(block, defaults, key='config', *, require_all=True):
  """Checks that a block has only known keys, each with a value of the right type.

  Args:
    block: ConfigDict to check.
    defaults: ConfigDict of all keys with their defaults. A key whose default is None may be None.
    key: Dotted key of the block.
    require_all: Whether the block must have all keys.

  Raises:
    UserError: A key or a value is wrong; the message names the key and what it must be.
  """
  unknown = [name for name in block if name not in defaults]
  need(not unknown, unknown and _no_such_key(unknown[0], defaults, key, block.get('algorithm')))
  for name, default in defaults.items():
    if name not in block:
      need(
        not require_all,
        f'{key} lacks the key {name!r}: take the config from the config() of its algorithm',
      )
    elif not isinstance(default, ml_collections.ConfigDict):
      optional = default is None or f'{key}.{name}' in OPTIONAL or name.endswith('timeout')
      check_value(block[name], defaults.get_type(name), f'{key}.{name}', optional=optional)
    else:
      inner = f'{key}.{name}'
      need(
        isinstance(block[name], ml_collections.ConfigDict),
        f'{inner}={block[name]!r} must be a dict',
      )
      if inner.endswith(('.parts', '.arguments', *OPEN)):
        check_finite(block[name].to_dict(), inner)
      else:
        check_keys(block[name], default, inner, require_all=require_all)


def _no_such_key(name, names, key, algorithm):
  """Returns the error message for an unknown key.

  Args:
    name: The unknown key.
    names: Keys that exist.
    key: Dotted key of the block.
    algorithm: Name of the algorithm whose config the block is, or None.
  """
  hint = did_you_mean(name, list(names))
  if not algorithm:
    return f'{key} has no key {name!r}. {hint}'
  if hint.startswith('The keys'):  # not a typing error but the config of another algorithm
    hint = 'Take the config from the config() of that algorithm, or from a file that does.'
  return f'algorithm {algorithm!r} has no key {key}.{name}. {hint}'


def check_value(value, kind, key, *, optional=False):
  """Raises UserError if a value has the wrong type or holds a number that is not finite.

  Args:
    value: Value to check.
    kind: One of int, float, bool, str and tuple; other types are not checked.
    key: Dotted key of the value.
    optional: Whether the value may be None.
  """
  if value is None and optional:
    return
  number = lambda of: isinstance(value, of) and not isinstance(value, bool)
  fits, what = {
    int: (number(numbers.Integral), 'a whole number'),
    float: (number(numbers.Real) and math.isfinite(value), 'a finite number'),
    bool: (isinstance(value, bool), 'True or False'),
    str: (isinstance(value, str), 'a string'),
    tuple: (isinstance(value, (tuple, list)), 'a tuple'),
  }.get(kind, (True, ''))
  need(fits, f'{key}={value!r} must be {what}{", or None" if optional else ""}')
  check_finite(value, key)


def check_finite(value, key):
  """Raises UserError if there is NaN or infinity in nested dicts, lists and numbers."""
  if isinstance(value, dict):
    for name, item in value.items():
      check_finite(item, f'{key}.{name}')
  elif isinstance(value, (tuple, list)):
    for item in value:
      check_finite(item, key)
  else:
    need(
      not isinstance(value, float) or math.isfinite(value),
      f'{key}={value!r} must be a finite number',
    )

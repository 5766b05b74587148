"""Which keys a config may have and of which type: locked blocks, and checks against the defaults."""

import difflib
import math
import numbers

import ml_collections

from rlhf_jax.errors import need

# Keys with a default that may be None all the same, for none.
OPTIONAL = (
  'config.checkpoint_minutes',
  'config.rl.value_clip',
  'config.warn.kl',
  'config.warn.sampler_gap',
)
# Blocks whose keys are not known here: what is in them is checked where it is read.
OPEN = ('model.init', 'evals', 'reward.parts')


def lock(config):
  """Locks a config, so that a key that does not exist is an error; the blocks in OPEN stay open.

  Args:
    config: of an algorithm.

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
  """'Did you mean ...?' where one of `names` is like `name`, else the names."""
  like = difflib.get_close_matches(str(name), [str(other) for other in names], 1, 0.7)
  return f'Did you mean {like[0]!r}?' if like else f'The keys are {", ".join(map(str, names))}.'


def check_keys(block, defaults, key='config', *, whole=True):
  """Checks that a block has its keys and no others, each with a value of its type.

  Args:
    block: ConfigDict.
    defaults: ConfigDict of all its keys with their defaults; a placeholder may stay None.
    key: dotted name of the block.
    whole: whether all keys must be there.

  Raises:
    UserError: names the key and what it must be.
  """
  unknown = [name for name in block if name not in defaults]
  need(not unknown, unknown and _no_such_key(unknown[0], defaults, key, block.get('algorithm')))
  for name, default in defaults.items():
    if name not in block:
      need(
        not whole,
        f'{key} lacks the key {name!r}: take the config from the config() of its algorithm',
      )
    elif not isinstance(default, ml_collections.ConfigDict):
      optional = default is None or f'{key}.{name}' in OPTIONAL or name == 'timeout'
      check_value(block[name], defaults.get_type(name), f'{key}.{name}', optional=optional)
    else:
      inner = f'{key}.{name}'
      need(
        isinstance(block[name], ml_collections.ConfigDict),
        f'{inner}={block[name]!r} must be a dict',
      )
      if inner.partition('.')[2] in OPEN:
        check_finite(block[name].to_dict(), inner)
      else:
        check_keys(block[name], default, inner, whole=whole)


def _no_such_key(name, names, key, algorithm):
  """What to say of a name in a block `key`, which is the config of an algorithm or has None."""
  hint = did_you_mean(name, list(names))
  if not algorithm:
    return f'{key} has no key {name!r}. {hint}'
  if hint.startswith('The keys'):  # no slip: the config was another algorithm's
    hint = 'Take the config from the config() of that algorithm, or from a file that does.'
  return f'algorithm {algorithm!r} has no key {key}.{name}. {hint}'


def check_value(value, kind, key, *, optional=False):
  """Raises UserError unless a value is of a type, and finite where it is a number.

  Args:
    value: of the key.
    kind: int, float, bool, str or tuple; another is not checked.
    key: dotted.
    optional: whether it may be None.
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
  """Raises UserError where there is NaN or infinity in a value of dicts, lists and numbers."""
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

"""Finds the module of an algorithm, and checks a config with it.

An algorithm is a module with `config(preset='') -> ConfigDict`, `validate(config, device_count)` and
`create(config, mesh) -> (learner.Learner, first TrainState)`. A preset changes values, not keys: a
config with other keys than `config()` has, or with values of another type, is an error.
"""

import importlib.util
import os
import sys

from absl import logging

from rlhf_jax import config as config_lib
from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import processes
from rlhf_jax.algorithms import effects
from rlhf_jax.evaluation import evaluators
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard


def load(name):
  """The module of an algorithm.

  Args:
    name: of a module here, or the dotted path of another; the working directory is searched too.

  Raises:
    UserError: there is no such module, it fails, or it is no algorithm.
  """
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    if not isinstance(name, str) or not all(name.split('.')):
      raise ImportError('it names no module')
    full = f'{__package__}.{name}'
    here = '.' not in name and importlib.util.find_spec(full) is not None
    module = guard.import_module(
      full if here else name,
      guard.Call(f'config.algorithm={name!r}: importing it', timeout=functions.TIMEOUT),
    )
  except ImportError as error:
    raise errors.UserError(
      f'config.algorithm={name!r} cannot be loaded ({error}): name a module in '
      'rlhf_jax/algorithms, or the dotted path of a module of yours'
    ) from error
  missing = [part for part in ('config', 'validate', 'create') if not hasattr(module, part)]
  if missing:
    raise errors.UserError(
      f'config.algorithm={name!r} is a module without {", ".join(missing)}: it must have '
      'config, validate and create'
    )
  return module


def defaults(name):
  """The config of an algorithm with its defaults, a dict as config.json has it."""
  return identity.to_plain_dict(load(name).config())


def validate(config, device_count):
  """Checks a run's config before anything is loaded or compiled; warns of keys without effect.

  Args:
    config: of a single run.
    device_count: devices of all processes.

  Raises:
    UserError: names the key, the value and the remedy.
  """
  module = load(config.algorithm)
  defaults = module.config()
  config_keys.check_keys(config, defaults)
  config_lib.validate(config, device_count)
  evaluators.validate(config.evals)
  module.validate(config, device_count)
  for line in effects.without(config, defaults) if processes.is_main_process() else ():
    logging.warning('%s', line)

"""Loads the module of an algorithm and validates a config with it.

An algorithm is a module with `config(preset='') -> ConfigDict`, `validate(config, device_count)`
and `create(config, mesh) -> (learner.Learner, first TrainState)`. A preset changes values, not
keys: a run's config must have the same keys as `config()`, with values of the same types.
"""

import importlib
import importlib.util
import os
import pkgutil
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

PARTS = ('config', 'validate', 'create')  # what the module of an algorithm defines


def load(name):
  """Imports the module of an algorithm.

  Args:
    name: A module of this package, or the dotted path of any other. The working directory is
      searched too.

  Raises:
    UserError: The module does not exist, fails to import, or is not an algorithm.
  """
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    if not isinstance(name, str) or not all(name.split('.')):
      raise ImportError('not a module name')
    full = f'{__package__}.{name}'
    here = '.' not in name and importlib.util.find_spec(full) is not None
    module = guard.import_module(
      full if here else name,
      guard.Call(f'config.algorithm={name!r}: importing it', timeout=functions.TIMEOUT),
    )
  except ImportError as error:
    raise errors.UserError(
      f'config.algorithm={name!r} cannot be loaded ({error}): name a module of '
      'rlhf_jax/algorithms, or give the dotted path of your own module'
    ) from error
  missing = [part for part in PARTS if not hasattr(module, part)]
  if missing:
    raise errors.UserError(
      f'config.algorithm={name!r} is a module without {", ".join(missing)}: it must define '
      'config, validate and create'
    )
  return module


def names():
  """Returns the sorted names of the algorithms of this package."""
  modules = (module.name for module in pkgutil.iter_modules([os.path.dirname(__file__)]))
  return sorted(
    name
    for name in modules
    if all(hasattr(importlib.import_module(f'{__package__}.{name}'), part) for part in PARTS)
  )


def defaults(name):
  """Returns the default config of an algorithm as a plain dict, as in config.json."""
  return identity.to_plain_dict(load(name).config())


def validate(config, device_count):
  """Validates a run's config before anything is loaded, and warns about keys without effect.

  Args:
    config: Config of a single run.
    device_count: Number of devices over all processes.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  module = load(config.algorithm)
  defaults = module.config()
  config_keys.check_keys(config, defaults)
  config_lib.validate(config, device_count)
  evaluators.validate(config.evals)
  module.validate(config, device_count)
  for line in effects.warnings(config, defaults) if processes.is_main_process() else ():
    logging.warning('%s', line)

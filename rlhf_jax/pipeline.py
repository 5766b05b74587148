"""Stages in order, each in its own folder: pretraining, SFT, reward model, PPO and so on.

`config.stages` names them. A stage is a sub-config that either has an `algorithm`, and is a run
of train.py, or a `function` 'package.module:name', called with its folder and its other keys. A
string '$workdir' in any value stands for the pipeline's folder, and a stage whose seed is None takes
the pipeline's.

A finished stage is not run again; delete its folder to repeat it. --config.stages=ppo,evaluate
runs these alone.
"""

import importlib
import inspect
import json
import os
import pathlib
import time

from absl import logging
import jax
import ml_collections

from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import train
from rlhf_jax.algorithms import build

DONE = 'done.json'


def run(config, workdir):
  """Runs every unfinished stage.

  Args:
    config: ConfigDict with `stages`, `seed`, and a sub-config for every stage.
    workdir: folder; stage X writes to workdir/X.

  Raises:
    UserError: a stage is unknown, or its input is bad.
  """
  workdir = pathlib.Path(workdir)
  stages = {name: resolve(config[name], workdir, config.seed) for name in chosen(config)}
  for name, stage in stages.items():  # a mistake in the last is found before the first runs
    check(name, stage)
  if processes.first():
    write_json(workdir / 'config.json', config.to_dict())
  for number, (name, stage) in enumerate(stages.items(), 1):
    folder = workdir / name
    if processes.agree((folder / DONE).exists()):
      logging.info('stage %s is finished: %s', name, folder)
      continue
    started = time.perf_counter()
    if processes.first():
      print(f'[{number}/{len(stages)}] {name}', flush=True)
    run_stage(stage, folder)
    if processes.first():
      write_json(folder / DONE, {'seconds': round(time.perf_counter() - started, 1)})
    processes.wait_for_file(folder / DONE)


def chosen(config):
  """The names in `config.stages`; on the command line commas part them.

  Raises:
    UserError: one is not a stage of the config.
  """
  known = [name for name, value in config.items() if isinstance(value, ml_collections.ConfigDict)
           and ('algorithm' in value or 'function' in value)]
  names = [name.strip() for entry in config.stages for name in entry.split(',')]
  unknown = [name for name in names if name not in known]
  if unknown or not names:
    raise errors.UserError(
        f'config.stages={",".join(names)!r} names {unknown or "no stage"}: the stages of this '
        f'config are {", ".join(known)}')
  return names


def check(name, stage):
  """Raises UserError where a stage cannot run, as far as its config tells."""
  try:
    if 'algorithm' in stage:
      build.validate(stage, jax.device_count())
      return
    function, arguments = called(stage)
  except errors.UserError as error:
    raise errors.UserError(f'stage {name}: {error}') from error
  except (ImportError, AttributeError, ValueError) as error:
    raise errors.UserError(
        f'stage {name}: config.{name}.function={stage.function!r} cannot be loaded ({error}): '
        "it has to be 'package.module:name' of a function") from error
  try:
    inspect.signature(function).bind(None, **arguments)
  except TypeError as error:
    raise errors.UserError(
        f'stage {name}: {stage.function} cannot be called with the keys of config.{name} '
        f'({error}): they have to be its arguments') from error


def called(stage):
  """The function of a stage, and its arguments but for the folder."""
  arguments = stage.to_dict()
  module, _, name = arguments.pop('function').partition(':')
  return getattr(importlib.import_module(module), name), arguments


def run_stage(stage, folder):
  """Runs one stage whose placeholders are resolved; one that does not train on the first process alone."""
  if 'algorithm' in stage:
    train.run(stage, folder)
  if 'algorithm' in stage or not processes.first():
    return
  folder.mkdir(parents=True, exist_ok=True)
  function, arguments = called(stage)
  function(folder, **arguments)


def resolve(stage, workdir, seed):
  """A copy of a stage's config with '$workdir' replaced and a seed of None set."""
  stage = stage.copy_and_resolve_references()
  with stage.ignore_type():
    stage.update(_replaced(stage.to_dict(), str(workdir)))
  if 'seed' in stage and stage.seed is None:
    with stage.ignore_type():
      stage.seed = seed
  return stage.lock()


def _replaced(value, workdir):
  if isinstance(value, str):
    return value.replace('$workdir', workdir)
  if isinstance(value, dict):
    return {key: _replaced(item, workdir) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(_replaced(item, workdir) for item in value)
  return value


def write_json(path, value):
  """Writes a JSON file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(value, indent=2))
  os.replace(temporary, path)

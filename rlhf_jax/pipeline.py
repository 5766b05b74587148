"""Stages in order, each in its own folder: pretrain, SFT, comparisons, reward model, PPO, evaluation.

`config.stages` names them. A stage is a sub-config that either has an `algorithm`, and is a run
of train.py, or a `function` 'package.module:name', called with its folder and its other keys. A
string '$workdir' in any value stands for the pipeline's folder, '$seed' is not needed: every
stage that has a seed and leaves it at -1 takes the pipeline's.

A finished stage is not run again; delete its folder, or name stages with --config.stages, to
repeat it.
"""

import importlib
import json
import os
import pathlib
import time

from absl import logging

from rlhf_jax import errors
from rlhf_jax import train

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
  workdir.mkdir(parents=True, exist_ok=True)
  unknown = [name for name in config.stages if name not in config]
  if unknown:
    raise errors.UserError(f'config.stages names {unknown}, which the config does not describe')
  write_json(workdir / 'config.json', config.to_dict())
  for number, name in enumerate(config.stages, 1):
    folder = workdir / name
    if (folder / DONE).exists():
      logging.info('stage %s is finished: %s', name, folder)
      continue
    print(f'[{number}/{len(config.stages)}] {name}', flush=True)
    started = time.perf_counter()
    run_stage(resolve(config[name], workdir, config.seed), folder)
    write_json(folder / DONE, {'seconds': round(time.perf_counter() - started, 1)})


def run_stage(stage, folder):
  """Runs one stage whose placeholders are resolved."""
  if 'algorithm' in stage:
    train.run(stage, folder)
    return
  folder.mkdir(parents=True, exist_ok=True)
  arguments = stage.to_dict()
  module, _, name = arguments.pop('function').partition(':')
  getattr(importlib.import_module(module), name)(folder, **arguments)


def resolve(stage, workdir, seed):
  """A copy of a stage's config with '$workdir' replaced and a seed of -1 set."""
  stage = stage.copy_and_resolve_references()
  with stage.ignore_type():
    stage.update(_replaced(stage.to_dict(), str(workdir)))
  if stage.get('seed') == -1:
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

"""python -m rlhf_jax.evaluate --workdir=RUN [--evals=NAMES or JSON]

Runs the evaluators of a run's config.json on its newest checkpoint and prints their metrics: after
the end of the run, the numbers of its last evaluation. --evals=held_out,prompts picks some of
them; --evals='{"text": {"path": "prompts.jsonl"}}' takes the place of `config.evals`.
"""

import argparse
import json
import pathlib

import jax
import ml_collections

from rlhf_jax import checkpoint
from rlhf_jax import command_line
from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import runtime
from rlhf_jax import sharding
from rlhf_jax import train
from rlhf_jax.algorithms import build
from rlhf_jax.evaluation import tables


def run(workdir, evals=''):
  """Evaluates the newest checkpoint of a run.

  Args:
    workdir: folder of the run.
    evals: names in its config's `evals` with commas between them, or a JSON object in place of
      these; '' for all of them.

  Returns:
    Finished steps of the checkpoint, and {'NAME/METRIC': number}.

  Raises:
    UserError: there is no such run or evaluator, or no checkpoint.
  """
  config = read_config(workdir)
  names = None
  if evals.lstrip().startswith('{'):
    try:
      config.evals = ml_collections.ConfigDict(json.loads(evals))
    except ValueError as error:
      raise errors.UserError(f'--evals={evals} is no JSON: {error}') from error
  elif evals:
    names = evals.split(',')
    config.evals = ml_collections.ConfigDict(
      {name: block for name, block in config.evals.items() if name in names}
    )
  build.validate(config, jax.device_count())
  mesh = sharding.make_mesh(dict(config.mesh))
  with jax.set_mesh(mesh):
    learner, state = build.load(config.algorithm).create(config, mesh)
    unknown = [name for name in names or () if name not in learner.evaluators]
    if unknown:
      raise errors.UserError(
        f'--evals={evals} names {", ".join(unknown)}: the run has no such '
        'evaluator, or no data for it'
      )
    checkpoints = checkpoint.Checkpoints(workdir)
    try:
      step, state = checkpoints.restore(state, learner.iterators)
    finally:
      checkpoints.close()
    if not step:
      raise errors.UserError(f'there is no checkpoint in {workdir}/checkpoints')
    return step, train.evaluate(learner, state, names or list(learner.evaluators))


def read_config(workdir):
  """The config of a run, a ConfigDict.

  Raises:
    UserError: there is no config.json of a single run.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    config, _ = config_files.of_run(path)
  except OSError as error:
    raise errors.UserError(
      f'{path} cannot be read ({error}): --workdir must be the folder of a run'
    ) from error
  if 'stages' in config:
    raise errors.UserError(
      f'{workdir} is a pipeline: name the folder of a stage, such as {workdir}/{config.stages[0]}'
    )
  return config


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(prog='python -m rlhf_jax.evaluate')
  parser.add_argument('--workdir', required=True, help='folder of the run')
  parser.add_argument(
    '--evals',
    default='',
    help='names in config.evals with commas between '
    'them, or a JSON object in its place; all of the run by default',
  )
  options = parser.parse_args()
  with command_line.one_line():
    runtime.configure()
    step, metrics = run(options.workdir, options.evals)
    if processes.is_main_process():
      print(tables.metrics_table(metrics, title=f'{options.workdir} after {step} steps'))


if __name__ == '__main__':
  main()

"""The loop: every algorithm runs through it.

Set up, restore, then: next batch, step, log, evaluate, checkpoint. Whatever an algorithm does
differently is in its own file, behind `learner.Learner`.
"""

import json
import os
import pathlib

from absl import logging
import jax
import tqdm

from rlhf_jax import checkpoint
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.algorithms import build


def run(config, workdir):
  """Trains to the end, resuming from the newest checkpoint in `workdir` if there is one.

  Args:
    config: a single-stage config; see config.py.
    workdir: folder of this run. Ends with `model/` (a Hugging Face folder), `metrics.jsonl`,
      `tensorboard/`, `checkpoints/` and `config.json`.

  Returns:
    The path of the exported model.

  Raises:
    UserError: bad input, with the remedy in its message.
  """
  workdir = pathlib.Path(workdir)
  model_path = workdir / 'model'
  if processes.agree(model_path.exists()):
    logging.info('%s exists: this run is finished', model_path)
    return model_path
  build.validate(config, jax.device_count())
  mesh = sharding.make_mesh(dict(config.mesh))
  with jax.set_mesh(mesh):
    learner, state = build.load(config.algorithm).create(config, mesh)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
    step, state = checkpoints.restore(state, learner.iterators)
    if processes.first():  # only now: the files of another config's run stay as they are
      workdir.mkdir(parents=True, exist_ok=True)
      learner.describe(workdir)
      write_config(config, workdir)
    processes.wait_for_file(workdir / 'config.json')
    writer = metrics_lib.Writer(workdir, resume_step=step, config=config.to_dict(),
                                wandb_project=config.wandb_project)
    try:
      state = loop(config, learner, state, step, checkpoints, writer)
      learner.export(state, model_path)
    finally:
      checkpoints.close()
      writer.close()
  return model_path


def loop(config, learner, state, first_step, checkpoints, writer):
  """Steps from `first_step` to `learner.steps`.

  Args:
    config: the run's config.
    learner: Learner.
    state: TrainState at `first_step`; donated.
    first_step: finished steps.
    checkpoints: Checkpoints.
    writer: metrics.Writer.

  Returns:
    The last TrainState.
  """
  steps = learner.steps
  due = lambda step, every: step == steps or (every and step % every == 0)
  bar = tqdm.tqdm(range(first_step, steps), initial=first_step, total=steps,
                  desc=pathlib.Path(writer.workdir).name, dynamic_ncols=True,
                  disable=not processes.first())
  log = metrics_lib.StepLog(writer, bar)
  for step in bar:
    done = step + 1
    logged = done == 1 or due(done, config.log_every)
    batch, host_metrics = learner.next_batch(state, timed=logged)
    state, metrics = learner.train_step(state, *batch)
    log.add(step, metrics, host_metrics, written=logged)

    evals = [name for name in learner.evaluators if due(done, config.evals[name].get('every'))]
    if evals:
      log.flush()
      log.write(step, evaluate(learner, state, evals))
    if due(done, config.samples_every):
      writer.samples(step, learner.samples())
    if due(done, config.checkpoint_every):
      log.flush()  # stops the run where the state is not finite: it is never saved
      checkpoints.save(done, state, learner.iterators)
  return state


def evaluate(learner, state, names):
  """Runs evaluators.

  Args:
    learner: Learner.
    state: TrainState.
    names: of `learner.evaluators`.

  Returns:
    {'NAME/METRIC': number}.
  """
  return {f'{name}/{metric}': value for name in names
          for metric, value in learner.evaluators[name](state).items()}


def write_config(config, workdir):
  """Writes config.json whole or not at all."""
  temporary = workdir / 'config.json.tmp'
  temporary.write_text(json.dumps(config.to_dict(), indent=2))
  os.replace(temporary, workdir / 'config.json')

"""The loop: every algorithm runs through it.

Set up, restore, then: next batch, step, log, evaluate, checkpoint. Whatever an algorithm does
differently is in its own file, behind `learner.Learner`.
"""

import json
import math
import os
import pathlib
import time

from absl import logging
import jax
import tqdm

from rlhf_jax import checkpoint
from rlhf_jax import errors
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.algorithms import build

# What the progress bar shows, where a run has it.
SHOWN = {'loss': 'loss', 'eval/loss': 'eval', 'accuracy': 'acc', 'eval/accuracy': 'eval acc',
         'objective/scores': 'score', 'objective/kl': 'kl', 'response/length': 'len'}


def run(config, workdir):
  """Trains to the end, going on from the newest checkpoint in `workdir` if there is one.

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
    logging.info('%s is there already: this run is finished', model_path)
    return model_path
  build.validate(config, jax.device_count())
  mesh = sharding.make_mesh(dict(config.mesh))
  with jax.set_mesh(mesh):
    learner = build.load(config.algorithm).create(config, mesh)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
    step, state = checkpoints.restore(learner.state, learner.iterators)
    learner.state = None  # the loop owns the only copy: train steps donate it
    if processes.first():
      describe_run(config, learner, workdir)  # of another config's run, nothing is touched
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
  """Steps from `first_step` to `learner.steps`. The host reads the metrics of the step before.

  Args:
    config: the run's config.
    learner: Learner.
    state: TrainState at `first_step`.
    first_step: finished steps.
    checkpoints: Checkpoints.
    writer: metrics.Writer.

  Returns:
    The last TrainState.
  """
  steps = learner.steps
  due = lambda step, every: step == steps or (every and step % every == 0)
  clock = time.perf_counter()
  pending = None
  bar = tqdm.tqdm(range(first_step, steps), initial=first_step, total=steps,
                  desc=pathlib.Path(writer.workdir).name, dynamic_ncols=True, disable=not processes.first())
  for step in bar:
    done = step + 1
    logged = done == 1 or due(done, config.log_every)
    batch, host_metrics = learner.next_batch(state, timed=logged)
    state, metrics = learner.train_step(state, *batch)
    if pending is not None:
      log(writer, bar, *pending)
    now = time.perf_counter()
    pending = step, logged, metrics, host_metrics | {'seconds/step': now - clock}
    clock = now
    if due(done, config.eval_every):
      pending = log(writer, bar, *pending)
      held_out = learner.evaluate(state)
      if held_out:
        writer.write(step, held_out)
        show(bar, held_out)
    if due(done, config.samples_every):
      writer.samples(step, learner.samples())
    if due(done, config.checkpoint_every):
      pending = pending and log(writer, bar, *pending)
      checkpoints.save(done, state, learner.iterators)
  return state


def log(writer, bar, step, logged, step_metrics, host_metrics):
  """Writes one step's metrics if they are `logged`; stops the run where one is not finite.

  Raises:
    UserError: a loss or a norm is NaN or infinite.
  """
  values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
  bad = sorted(name for name, value in values.items() if not math.isfinite(value))
  if bad:
    raise errors.UserError(
        f'{", ".join(bad[:4])} is not finite at step {step}. Lower config.optim.learning_rate, '
        'set config.optim.clip_norm, or look at the batch; the checkpoints before this step '
        f'are in {writer.workdir}/checkpoints, and the same command goes on from the last.')
  values |= host_metrics
  show(bar, values)
  if logged:
    writer.write(step, values)


def show(bar, values):
  """Puts the figures that matter beside the progress bar."""
  shown = {short: f'{values[name]:.3g}' for name, short in SHOWN.items() if name in values}
  if shown:
    bar.set_postfix(shown, refresh=False)


def describe_run(config, learner, workdir):
  """Writes config.json, model.json and the tokenizer, so that a checkpoint is readable."""
  workdir.mkdir(parents=True, exist_ok=True)
  for name, content in {'config.json': config.to_dict(), 'model.json': {
      'name': learner.model_name, **learner.model.config.to_hf()}}.items():
    temporary = workdir / f'{name}.tmp'
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, workdir / name)
  learner.tokenizer.save_pretrained(workdir / 'tokenizer')

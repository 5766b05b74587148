"""The training loop, shared by all algorithms.

Sets up, restores, then repeats: next batch, train step, log, evaluate, checkpoint. What differs
between algorithms is in their own files, behind `learner.Learner`.
"""

import contextlib
import pathlib
import time

import jax
import jax.numpy as jnp
import tqdm

from rlhf_jax import checkpoint
from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import interrupts
from rlhf_jax import learner as learner_lib
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import processes
from rlhf_jax import progress
from rlhf_jax import runtime
from rlhf_jax import sharding
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import build
from rlhf_jax.feedback import source as feedback_source


def run(config, workdir, *, fork_of=None, on_metrics=None):
  """Trains to the end, resuming from the newest checkpoint in `workdir` if there is one.

  Args:
    config: Single-stage config; see config.py.
    workdir: Folder of this run. At the end it holds `model/` (a Hugging Face folder),
      `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `config.json`, `base_config.json`,
      `runs.jsonl`, and `feedback.json` if the run reads a store of human feedback.
    fork_of: Workdir of another run, from whose newest checkpoint this run starts, or None.
    on_metrics: Function of (step, metrics), called on the main process when metrics are logged, or
      None.

  Returns:
    The path of the exported model.

  Raises:
    UserError: The input is bad, or the run in `workdir` has another config.
    Interrupted: SIGTERM or Ctrl-C stopped the run; the state is saved.
  """
  runtime.enable_compilation_cache()
  build.validate(config, jax.device_count())
  began, defaults = time.perf_counter(), build.defaults(config.algorithm)
  with contextlib.ExitStack() as stack:
    changed = processes.run_on_main_process(
      lambda: workdir_lib.claim(config, workdir, fork_of, stack, defaults)
    )
    workdir = pathlib.Path(workdir).absolute()
    model_path = workdir / 'model'
    if processes.broadcast_scalar(model_path.exists()):
      processes.print_on_main(workdir_lib.describe_finished(workdir))
      return model_path
    processes.print_on_main(f'{workdir}: loading data and models')
    source = workdir_lib.fork_source(workdir, fork_of)
    pins = feedback_source.pins(config, workdir, source)
    mesh = sharding.make_mesh(dict(config.mesh))
    stack.enter_context(jax.set_mesh(mesh))
    pinned = feedback_source.pinned(config, pins)
    learner, state = build.load(config.algorithm).create(pinned, mesh)
    learner.prepare(workdir)
    signals = stack.enter_context(interrupts.Signals())
    checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints))
    forked = bool(source) and not processes.broadcast_scalar(identity.has_checkpoint(workdir))
    if forked:
      step, state = fork(config, state, learner, source)
    else:
      step, state = checkpoints.restore(state, learner.iterators)
    identity.check_steps(config, learner.steps, step, workdir, forked=forked)
    if step:
      processes.print_on_main(
        f'{source if forked else workdir}: resuming after step {step} of {learner.steps}'
      )
    if processes.is_main_process():  # after all checks, so that an error leaves the files unchanged
      learner.describe(workdir)
      feedback_source.write(workdir, pins)
      identity.write_base(build.load(config.algorithm).config(), workdir)
      identity.record_start(
        config,
        workdir,
        step=step,
        changed=changed,
        forked_from={'workdir': source, 'step': step} if forked else None,
      )
    processes.wait_for_file(workdir / identity.CONFIG)
    if forked:  # the fork no longer needs the folder of the other run
      checkpoints.save(step, state, learner.iterators)
    writer = stack.enter_context(
      metrics_lib.Writer(
        workdir,
        resume_step=step,
        config=config.to_dict(),
        wandb_project=config.wandb_project,
        on_metrics=on_metrics,
      )
    )
    state = run_steps(config, learner, state, step, checkpoints, writer, signals)
    learner.export(state, model_path)
    checkpoints.close()
    signals.check(workdir, learner.steps)
  minutes = (time.perf_counter() - began) / 60
  processes.print_on_main(
    f'{model_path}: {learner.steps} steps, {minutes:.1f} min; {metrics_lib.summary(workdir)}'
  )
  return model_path


def fork(config, state, learner, source):
  """Restores the newest checkpoint of another run, except for state whose config keys changed.

  Args:
    config: Config of this run.
    state: Initial TrainState of this run; its buffers are freed.
    learner: Learner of this run.
    source: Folder of the other run.

  Returns:
    The number of finished steps and the TrainState.

  Raises:
    UserError: The state of the other run does not fit this one.
  """
  learner.check_fork(pathlib.Path(source))
  before = identity.completed(identity.read(source), build.defaults(config.algorithm))
  changed = {change.key for change in identity.changes(before, identity.to_plain_dict(config))}
  new_extra = {
    name: jnp.copy(state.extra[name])
    for name, keys in learner.set_by.items()
    if not changed.isdisjoint(keys)
  }
  new_key = jnp.copy(state.key) if 'seed' in changed else None
  new_optimizers = not changed.isdisjoint(identity.OPTIMIZERS)
  if new_optimizers:
    processes.print_on_main(
      f'{source}: the optimizer state and the learning-rate schedule start anew'
    )
  iterators = {
    name: iterator
    for name, iterator in learner.iterators.items()
    if name != learner_lib.SAMPLED_AHEAD
  }
  with checkpoint.Checkpoints(source) as checkpoints:
    step, state = checkpoints.restore(state, iterators, new_optimizers=new_optimizers)
  key = state.key if new_key is None else new_key
  return step, state.replace(extra=state.extra | new_extra, key=key)


def run_steps(config, learner, state, first_step, checkpoints, writer, signals):
  """Takes the train steps from `first_step` to `learner.steps`.

  Args:
    config: Config of the run.
    learner: Learner of the run.
    state: TrainState at `first_step`; donated.
    first_step: Number of finished steps.
    checkpoints: Checkpoints of the run.
    writer: metrics.Writer of the run.
    signals: interrupts.Signals, already entered.

  Returns:
    The last TrainState.

  Raises:
    Interrupted: A signal stopped the run; the state is saved.
  """
  steps = learner.steps
  is_due = lambda step, every: step == steps or (every and step % every == 0)
  clock = interrupts.Clock(config.checkpoint_minutes, first_step)
  signals.check(writer.workdir, first_step)
  bar = tqdm.tqdm(
    range(first_step, steps),
    initial=first_step,
    total=steps,
    desc=pathlib.Path(writer.workdir).name,
    postfix='compiling',
    **progress.display(),
  )
  log = metrics_lib.StepLog(writer, bar, learner.warnings)
  for step in bar:
    done = step + 1
    logged = done == 1 or is_due(done, config.log_every)
    try:
      batch, host_metrics = learner.next_batch(state, timed=logged)
    except errors.BatchError:
      # With several processes only one may have failed, and all must save together.
      if jax.process_count() == 1 and step > (checkpoints.latest_step() or 0):
        log.flush()
        checkpoints.save(step, state, learner.iterators)
      raise
    state, metrics, seconds = metrics_lib.take_step(learner.train_step, state, batch, timed=logged)
    log.add(step, metrics, host_metrics | seconds, written=logged)
    if step == first_step:  # its metrics replace 'compiling'
      bar.set_postfix_str('', refresh=False)
      log.flush()

    evals = [name for name in learner.evaluators if is_due(done, config.evals[name].get('every'))]
    if evals:
      log.flush()
      log.write(step, evaluate(learner, state, evals))
    if is_due(done, config.samples_every):
      writer.samples(step, learner.samples(metrics))
    checkpoints.check()
    stop = signals.should_stop()
    if is_due(done, config.checkpoint_every) or clock.due(done) or stop:
      log.flush()  # raises if a metric is not finite, so that a bad state is never saved
      checkpoints.save(done, state, learner.iterators)
      clock.restart(done)
    if stop:
      checkpoints.close()
      raise signals.interrupted(writer.workdir, done)
  return state


def evaluate(learner, state, names):
  """Runs some of the evaluators.

  Args:
    learner: Learner of the run.
    state: TrainState to evaluate.
    names: Keys of `learner.evaluators`.

  Returns:
    Dict from 'NAME/METRIC' to a number.
  """
  return {
    f'{name}/{metric}': value
    for name in names
    for metric, value in learner.evaluators[name](state).items()
  }

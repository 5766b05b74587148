"""Checkpoints of a run: state, data iterators, step. Orbax writes them whole or not at all."""

import copy
import pathlib
import threading

from absl import logging
import jax
from jax.sharding import SingleDeviceSharding
import orbax.checkpoint as ocp

from rlhf_jax import errors
from rlhf_jax import processes


CLOSE_SECONDS = 40  # that a run which fails waits for a checkpoint that is being written


class _Manager(ocp.CheckpointManager):
  """Orbax's, without its own question whether the job is preempted: the loop asks that."""

  def reached_preemption(self, step):
    return False


class Checkpoints:
  """The checkpoints of one working directory; as a context, closed where it ends."""

  def __init__(self, workdir, *, keep=None):
    """Opens `workdir`/checkpoints and keeps the newest `keep` of them; None only reads."""
    self.path = pathlib.Path(workdir).resolve() / 'checkpoints'
    self._read_only, self._closed = keep is None, False
    self._manager = _Manager(self.path, options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, read_only=self._read_only, create=not self._read_only))

  def latest_step(self):
    """The newest step there is a checkpoint of, or None."""
    return self._manager.latest_step()

  def save(self, step, state, iterators):
    """Starts writing; the files appear under their name when all are complete.

    Args:
      step: finished train steps.
      state: TrainState.
      iterators: {name: grain iterator}.
    """
    # On all processes the same, so that any number of them can go on from here.
    places = {name: copy.deepcopy(it.get_state()) for name, it in iterators.items()}
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), iterators=ocp.args.JsonSave(places)))

  def check(self):
    """Raises what went wrong in a write that has ended, if anything did."""
    self._manager.check_for_errors()

  def restore(self, state, iterators, *, new_optimizers=False):
    """The newest checkpoint that can be read.

    A damaged one is put aside under another name with a warning, and the one before is
    tried: a run never goes on from half a checkpoint and never loses a whole one.

    Args:
      state: TrainState whose shapes and shardings the result has. Its buffers are freed.
      iterators: {name: grain iterator}, set to where they were.
      new_optimizers: whether `state.opt_state` stays as it is.

    Returns:
      The step (0 and `state` itself where there is no checkpoint) and the TrainState.

    Raises:
      UserError: there are checkpoints and none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    if not steps:
      return 0, state
    wanted = state
    if new_optimizers:
      wanted = {'step': state.step, 'key': state.key, 'params': state.params, 'extra': state.extra}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
    first = {name: it.get_state() for name, it in iterators.items()}
    jax.tree.map(lambda x: x.delete(), wanted)
    for step in steps:
      restored = None
      try:
        restored = self._read(step, abstract)
        for name, it in iterators.items():
          it.set_state(restored.iterators[name])
      except Exception as error:  # orbax raises a dozen kinds, none of them documented
        restored = None
        then = 'trying the one before' if step != steps[-1] else 'there is none before'
        logging.warning('checkpoint %d in %s cannot be read (%s: %s); %s', step, self.path,
                        type(error).__name__, str(error).split('\n')[0][:200], then)
      if processes.all_of(restored is not None):
        if not self._read_only:
          self._put_aside([s for s in steps if s > step])
        return step, state.replace(**restored.state) if new_optimizers else restored.state
      for name, it in iterators.items():
        it.set_state(first[name])
    raise errors.UserError(
        f'none of the checkpoints {steps} in {self.path} can be read with this config: it must '
        'have the model and the optimizer they were saved with, or another --workdir; nothing '
        'was deleted.')

  def _read(self, step, abstract):
    """One checkpoint, without a wait for other processes: one that cannot read its part never comes to it."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()})
    wanted = ocp.args.StandardRestore(abstract)
    if isinstance(abstract, dict):  # a part of the state
      wanted = ocp.args.PyTreeRestore(
          abstract, ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True)
    with ocp.CheckpointManager(self.path, options=ocp.CheckpointManagerOptions(
        create=False, multiprocessing_options=alone)) as manager:
      return manager.restore(step, args=ocp.args.Composite(
          state=wanted, iterators=ocp.args.JsonRestore()))

  def _put_aside(self, steps):
    """Renames unreadable checkpoints, so that their steps can be written again."""
    if not steps:
      return
    if processes.first():
      for step in steps:
        name = f'unreadable-{step}'
        taken = len(list(self.path.glob(f'{name}*')))
        (self.path / str(step)).rename(self.path / (f'{name}-{taken}' if taken else name))
    processes.wait()
    self._manager.reload()

  def close(self):
    """Waits until everything is written. A second call does nothing."""
    if self._closed:
      return
    self._closed = True
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    """Closes; after an error neither waits for ever nor raises another."""
    if kind is None:
      self.close()
      return
    def close():
      try:
        self.close()
      except Exception as error:
        logging.warning('the last checkpoint in %s is not whole: %s', self.path, str(error).split('\n')[0])

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(CLOSE_SECONDS)


def load_params(path, name):
  """The parameters `name` of the newest checkpoint under `path`, without a config.

  Args:
    path: a run's working directory.
    name: key within TrainState.params, such as 'policy'.

  Returns:
    Pytree of arrays on the default device.

  Raises:
    UserError: there is no checkpoint.
  """
  manager = ocp.CheckpointManager(pathlib.Path(path).resolve() / 'checkpoints', item_handlers={
      'state': ocp.PyTreeCheckpointHandler(), 'iterators': ocp.JsonCheckpointHandler()})
  step = manager.latest_step()
  if step is None:
    raise errors.UserError(f'there is no checkpoint in {path}/checkpoints')
  # Where the arrays lay says nothing here: other devices, or other processes, may have held them.
  place = SingleDeviceSharding(jax.local_devices()[0])
  saved = manager.item_metadata(step)['state'].tree['params'][name]
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved)
  places = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=place, dtype=x.dtype), wanted)
  restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
      {'params': {name: wanted}}, restore_args={'params': {name: places}}, partial_restore=True)))
  return restored['state']['params'][name]

"""Checkpoints of a run: state, data iterators, step, and checksums of all of them.

Orbax writes a checkpoint atomically. The checksums detect later damage by a disk or a copy.
"""

import copy
import pathlib
import threading

from absl import logging
import jax
from jax.sharding import SingleDeviceSharding
import orbax.checkpoint as ocp

from rlhf_jax import checksums
from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding

CLOSE_SECONDS = 40  # longest time that a failed run waits for a checkpoint to be written
CHECKSUMS = 'checksums'  # item of a checkpoint; earlier versions wrote none
UNREADABLE = 'cannot be read'


class _Manager(ocp.CheckpointManager):
  """Orbax's manager without its check for preemption, because the loop checks for it."""

  def reached_preemption(self, step):
    return False


class Checkpoints:
  """The checkpoints of one workdir. Use it as a context manager to close it."""

  def __init__(self, workdir, *, keep=None):
    """Opens the folder of the checkpoints.

    Args:
      workdir: Folder of the run; its checkpoints are in `workdir`/checkpoints.
      keep: Number of newest checkpoints to keep, or None to open the folder read-only.
    """
    self.path = pathlib.Path(workdir).resolve() / 'checkpoints'
    self._read_only, self._closed = keep is None, False
    self._manager = _Manager(
      self.path,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, read_only=self._read_only, create=not self._read_only
      ),
    )

  def latest_step(self):
    """Returns the step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step, state, iterators):
    """Starts to write a checkpoint, which gets its name when it is complete.

    Args:
      step: Number of finished train steps.
      state: TrainState to save.
      iterators: Dict from a name to a Grain iterator.

    Raises:
      UserError: A parameter is not finite; nothing is saved.
    """
    sums, bad = _sums(sharding.paths(state))
    if bad:
      raise errors.UserError(
        f'{_shorten(bad)} not finite after step {step}, which is not saved. Lower '
        'config.optim.learning_rate, or set config.optim.clip_norm; earlier checkpoints are in '
        f'{self.path}'
      )
    # All processes have the same iterator states, so any number of processes can resume.
    positions = {name: copy.deepcopy(it.get_state()) for name, it in iterators.items()}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        iterators=ocp.args.JsonSave(positions),
        checksums=ocp.args.JsonSave({'arrays': sums, 'iterators': checksums.of_json(positions)}),
      ),
    )

  def check(self):
    """Raises the error of an earlier write, if it failed."""
    self._manager.check_for_errors()

  def restore(self, state, iterators, *, new_optimizers=False):
    """Restores the newest intact checkpoint.

    A checkpoint is damaged if it cannot be read, if a checksum differs, or if a parameter is not
    finite. A damaged checkpoint is logged and renamed, and the one before it is tried: a run never
    resumes from a damaged checkpoint, and no file is deleted.

    Args:
      state: TrainState with the shapes and shardings of the result. Its buffers are freed.
      iterators: Dict from a name to a Grain iterator; they are set to their saved positions.
      new_optimizers: Whether to keep `state.opt_state` instead of restoring it.

    Returns:
      The step and the TrainState; 0 and `state` itself if there is no checkpoint.

    Raises:
      UserError: There are checkpoints, but none is intact.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    if not steps:
      return 0, state
    target = state
    if new_optimizers:
      target = {'step': state.step, 'key': state.key, 'params': state.params, 'extra': state.extra}
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )
    first = {name: it.get_state() for name, it in iterators.items()}
    jax.tree.map(lambda x: x.delete(), target)
    faults = []
    for step in steps:
      restored, fault = self._restore_step(step, abstract, iterators)
      if not fault:
        if not self._read_only:
          self._rename_damaged([s for s in steps if s > step])
        return step, state.replace(**restored) if new_optimizers else restored
      faults.append(fault)
      next_action = 'trying the one before' if step != steps[-1] else 'there is none before'
      logging.warning('checkpoint %d in %s %s; %s', step, self.path, fault, next_action)
      for name, it in iterators.items():
        it.set_state(first[name])
    if all(fault.startswith(UNREADABLE) for fault in faults):
      raise errors.UserError(
        f'none of the checkpoints {steps} in {self.path} can be read with this config: use the '
        'model and the optimizer that they were saved with, or name another --workdir; nothing '
        'was deleted.'
      )
    raise errors.UserError(
      f'none of the checkpoints {steps} in {self.path} is intact: {steps[0]} {faults[0]}. Restore '
      'one from a copy, or name another --workdir; nothing was deleted.'
    )

  def _restore_step(self, step, abstract, iterators):
    """Restores one checkpoint, or finds out on all processes that it is damaged.

    Args:
      step: Step of the checkpoint.
      abstract: Pytree of ShapeDtypeStruct with the shapes and shardings of the state.
      iterators: Dict from a name to a Grain iterator; they are set to their saved positions.

    Returns:
      The state and '', or None and the end of a sentence about what is wrong with the checkpoint.
    """
    restored, fault = None, ''
    try:
      restored = self._read(step, abstract)
      sums = restored.get(CHECKSUMS)
      if sums is not None and checksums.of_json(restored.iterators) != sums['iterators']:
        raise ValueError('the checksum of the iterators differs')
      for name, it in iterators.items():
        it.set_state(restored.iterators[name])
    except errors.UserError:  # the config asks for other data, on all processes alike
      raise
    except Exception as error:  # Orbax raises a dozen types, none of them documented
      fault = f'{UNREADABLE} ({_brief(error)})'
    if processes.all_true(not fault):
      fault = _fault(sharding.paths(restored.state), sums, self.path / str(step))
      if processes.all_true(not fault):
        return restored.state, ''
    return None, fault or f'{UNREADABLE} by another process'

  def _read(self, step, abstract):
    """Reads one checkpoint without a barrier, which a process that fails would not reach."""
    this_process = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    target = ocp.args.StandardRestore(abstract)
    if isinstance(abstract, dict):  # the state without optimizer states
      target = ocp.args.PyTreeRestore(
        abstract, ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
      )
    items = {'state': target, 'iterators': ocp.args.JsonRestore()}
    if (self.path / str(step) / CHECKSUMS).exists():
      items[CHECKSUMS] = ocp.args.JsonRestore()
    with ocp.CheckpointManager(
      self.path,
      options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=this_process),
    ) as manager:
      return manager.restore(step, args=ocp.args.Composite(**items))

  def _rename_damaged(self, steps):
    """Renames damaged checkpoints, so that their steps can be written again."""
    if not steps:
      return
    if processes.is_main_process():
      for step in steps:
        name = f'unreadable-{step}'
        count = len(list(self.path.glob(f'{name}*')))
        (self.path / str(step)).rename(self.path / (f'{name}-{count}' if count else name))
    processes.barrier()
    self._manager.reload()

  def close(self):
    """Waits until everything is written, and closes. A second call does nothing."""
    if self._closed:
      return
    self._closed = True
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    """Closes. After an error it waits for a limited time and does not raise another error."""
    if kind is None:
      self.close()
      return

    def close():
      try:
        self.close()
      except Exception as error:
        logging.warning(
          'the last checkpoint in %s is incomplete: %s', self.path, str(error).split('\n')[0]
        )

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(CLOSE_SECONDS)


def _sums(arrays):
  """Returns {name: checksum} of arrays, and the names of parameters that are not finite."""
  results = {name: checksums.of(array) for name, array in arrays.items()}
  bad = [name for name, (_, finite) in results.items() if not finite and name.startswith('params/')]
  return {name: checksum for name, (checksum, _) in results.items()}, bad


def _fault(arrays, saved, path):
  """Returns the end of a sentence about what is wrong with a checkpoint, or ''.

  Args:
    arrays: Dict from a name to an array, for all of the state or a part of it.
    saved: Content of the checkpoint's item of checksums, or None if there is none.
    path: Path of the checkpoint.
  """
  sums, bad = _sums(arrays)
  if saved is None:
    logging.warning(
      '%s has no checksums: an earlier version wrote it, and damage may not be detected', path
    )
    saved = {'arrays': sums}
  listed = saved.get('arrays')
  listed = listed if isinstance(listed, dict) else {}  # the checksums may be damaged, too
  damaged = [name for name, checksum in sums.items() if listed.get(name) != checksum]
  if damaged:
    return f'is damaged: the checksum of {_shorten(damaged)} differs'
  return f'has values of {_shorten(bad)} that are NaN or infinite' if bad else ''


def _shorten(names):
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _brief(error):
  return f'{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}'


def load_newest(path, name):
  """Returns the step of the newest intact checkpoint and its parameters `name`, without a config.

  Args:
    path: Folder of a run.
    name: Key of TrainState.params, such as 'policy'.

  Returns:
    The step, and a pytree of arrays on the default device.

  Raises:
    UserError: There is no checkpoint, or none is intact.
  """
  path = pathlib.Path(path).resolve() / 'checkpoints'
  manager = ocp.CheckpointManager(
    path,
    item_handlers={
      'state': ocp.PyTreeCheckpointHandler(),
      'iterators': ocp.JsonCheckpointHandler(),
      CHECKSUMS: ocp.JsonCheckpointHandler(),
    },
  )
  steps = sorted(manager.all_steps(), reverse=True)
  if not steps:
    raise errors.UserError(f'there is no checkpoint in {path}')
  faults = []
  for step in steps:
    try:
      with_sums = (path / str(step) / CHECKSUMS).exists()
      params, saved = _params(manager, step, name, with_sums=with_sums)
      fault = _fault(sharding.paths({'params': {name: params}}), saved, path / str(step))
    except Exception as error:  # as in Checkpoints.restore
      fault = f'{UNREADABLE} ({_brief(error)})'
    if not fault:
      return step, params
    faults.append(fault)
    logging.warning(
      'checkpoint %d in %s %s%s',
      step,
      path,
      fault,
      '; trying the one before' if step != steps[-1] else '',
    )
  raise errors.UserError(
    f'none of the checkpoints {steps} in {path} is intact: {steps[0]} {faults[0]}. '
    'Restore one from a copy'
  )


def _params(manager, step, name, *, with_sums):
  """Returns the parameters `name` of a checkpoint, and its item of checksums or None."""
  # The saved shardings may be for other devices or other processes.
  on_device = SingleDeviceSharding(jax.local_devices()[0])
  saved = manager.item_metadata(step)['state'].tree['params'][name]
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), saved)
  restore_args = jax.tree.map(
    lambda x: ocp.ArrayRestoreArgs(sharding=on_device, dtype=x.dtype), target
  )
  items = {
    'state': ocp.args.PyTreeRestore(
      {'params': {name: target}},
      restore_args={'params': {name: restore_args}},
      partial_restore=True,
    )
  }
  if with_sums:
    items[CHECKSUMS] = ocp.args.JsonRestore()
  restored = manager.restore(step, args=ocp.args.Composite(**items))
  return restored['state']['params'][name], restored[CHECKSUMS] if with_sums else None

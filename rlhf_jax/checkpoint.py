"""Checkpoints of a run: state, data iterators, step, and checksums of them all.

Orbax writes them whole or not at all. What a disk or a copy has damaged since shows in the
checksums.
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

CLOSE_SECONDS = 40  # that a run which fails waits for a checkpoint that is being written
CHECKSUMS = 'checksums'  # their item in a checkpoint; versions before had none
UNREADABLE = 'cannot be read'


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
    self._manager = _Manager(
      self.path,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, read_only=self._read_only, create=not self._read_only
      ),
    )

  def latest_step(self):
    """The newest step there is a checkpoint of, or None."""
    return self._manager.latest_step()

  def save(self, step, state, iterators):
    """Starts writing; the files appear under their name when all are complete.

    Args:
      step: finished train steps.
      state: TrainState.
      iterators: {name: grain iterator}.

    Raises:
      UserError: a parameter is not finite; nothing is saved.
    """
    sums, bad = _sums(sharding.paths(state))
    if bad:
      raise errors.UserError(
        f'{_some(bad)} not finite after step {step}, which is not saved. Lower '
        'config.optim.learning_rate, or set config.optim.clip_norm; the checkpoints before this '
        f'step are in {self.path}'
      )
    # On all processes the same, so that any number of them can go on from here.
    places = {name: copy.deepcopy(it.get_state()) for name, it in iterators.items()}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        iterators=ocp.args.JsonSave(places),
        checksums=ocp.args.JsonSave({'arrays': sums, 'iterators': checksums.of_json(places)}),
      ),
    )

  def check(self):
    """Raises what went wrong in a write that has ended, if anything did."""
    self._manager.check_for_errors()

  def restore(self, state, iterators, *, new_optimizers=False):
    """The newest checkpoint that is sound.

    One that cannot be read, does not have its checksums, or has parameters that are not finite is
    put aside under another name with a warning, and the one before is tried: a run never resumes
    from a damaged checkpoint and never loses a sound one.

    Args:
      state: TrainState whose shapes and shardings the result has. Its buffers are freed.
      iterators: {name: grain iterator}, set to where they were.
      new_optimizers: whether `state.opt_state` stays as it is.

    Returns:
      The step (0 and `state` itself where there is no checkpoint) and the TrainState.

    Raises:
      UserError: there are checkpoints and none is sound.
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
      restored, fault = self._sound(step, abstract, iterators)
      if not fault:
        if not self._read_only:
          self._put_aside([s for s in steps if s > step])
        return step, state.replace(**restored) if new_optimizers else restored
      faults.append(fault)
      then = 'trying the one before' if step != steps[-1] else 'there is none before'
      logging.warning('checkpoint %d in %s %s; %s', step, self.path, fault, then)
      for name, it in iterators.items():
        it.set_state(first[name])
    if all(fault.startswith(UNREADABLE) for fault in faults):
      raise errors.UserError(
        f'none of the checkpoints {steps} in {self.path} can be read with this config: it must '
        'have the model and the optimizer they were saved with, or another --workdir; nothing '
        'was deleted.'
      )
    raise errors.UserError(
      f'none of the checkpoints {steps} in {self.path} is sound: {steps[0]} {faults[0]}. Put back '
      'a copy of one, or start in another --workdir; nothing was deleted.'
    )

  def _sound(self, step, abstract, iterators):
    """The state of a checkpoint and '', or None and what is wrong with it; agreed by all processes."""
    restored, fault = None, ''
    try:
      restored = self._read(step, abstract)
      sums = restored.get(CHECKSUMS)
      if sums is not None and checksums.of_json(restored.iterators) != sums['iterators']:
        raise ValueError('the checksum of the iterators differs')
      for name, it in iterators.items():
        it.set_state(restored.iterators[name])
    except errors.UserError:  # the config asks for other data: the same on all processes
      raise
    except Exception as error:  # orbax raises a dozen kinds, none of them documented
      fault = f'{UNREADABLE} ({_brief(error)})'
    if processes.all_true(not fault):
      fault = _fault(sharding.paths(restored.state), sums, self.path / str(step))
      if processes.all_true(not fault):
        return restored.state, ''
    return None, fault or f'{UNREADABLE} by another process'

  def _read(self, step, abstract):
    """One checkpoint, without a wait for other processes: one that cannot read its part never comes to it."""
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    target = ocp.args.StandardRestore(abstract)
    if isinstance(abstract, dict):  # a part of the state
      target = ocp.args.PyTreeRestore(
        abstract, ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
      )
    items = {'state': target, 'iterators': ocp.args.JsonRestore()}
    if (self.path / str(step) / CHECKSUMS).exists():
      items[CHECKSUMS] = ocp.args.JsonRestore()
    with ocp.CheckpointManager(
      self.path, options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    ) as manager:
      return manager.restore(step, args=ocp.args.Composite(**items))

  def _put_aside(self, steps):
    """Renames unreadable checkpoints, so that their steps can be written again."""
    if not steps:
      return
    if processes.is_main_process():
      for step in steps:
        name = f'unreadable-{step}'
        taken = len(list(self.path.glob(f'{name}*')))
        (self.path / str(step)).rename(self.path / (f'{name}-{taken}' if taken else name))
    processes.barrier()
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
        logging.warning(
          'the last checkpoint in %s is not whole: %s', self.path, str(error).split('\n')[0]
        )

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(CLOSE_SECONDS)


def _sums(arrays):
  """Checksums of arrays, {name: int}, and names of parameters among them that are not finite."""
  results = {name: checksums.of(array) for name, array in arrays.items()}
  bad = [name for name, (_, finite) in results.items() if not finite and name.startswith('params/')]
  return {name: checksum for name, (checksum, _) in results.items()}, bad


def _fault(arrays, saved, path):
  """What is wrong with the arrays of a checkpoint, '' for nothing.

  Args:
    arrays: {name: array}, all of the state or a part of it.
    saved: what its item of checksums holds; None where it has none.
    path: of the checkpoint.
  """
  sums, bad = _sums(arrays)
  if saved is None:
    logging.warning(
      '%s has no checksums: an earlier version wrote it, and damage may go unseen', path
    )
    saved = {'arrays': sums}
  listed = saved.get('arrays')
  listed = listed if isinstance(listed, dict) else {}  # it may be damaged itself
  damaged = [name for name, checksum in sums.items() if listed.get(name) != checksum]
  if damaged:
    return f'is damaged: the checksum of {_some(damaged)} differs'
  return f'has values of {_some(bad)} that are NaN or infinite' if bad else ''


def _some(names):
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _brief(error):
  return f'{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}'


def load_params(path, name):
  """The parameters `name` of the newest sound checkpoint under `path`, without a config.

  Args:
    path: a run's working directory.
    name: key within TrainState.params, such as 'policy'.

  Returns:
    Pytree of arrays on the default device.

  Raises:
    UserError: there is no checkpoint, or none is sound.
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
      return params
    faults.append(fault)
    logging.warning(
      'checkpoint %d in %s %s%s',
      step,
      path,
      fault,
      '; trying the one before' if step != steps[-1] else '',
    )
  raise errors.UserError(
    f'none of the checkpoints {steps} in {path} is sound: {steps[0]} {faults[0]}. '
    'Put back a copy of one'
  )


def _params(manager, step, name, *, with_sums):
  """The parameters `name` of a checkpoint, and what its item of checksums holds, or None."""
  # Where the arrays lay says nothing here: other devices, or other processes, may have held them.
  place = SingleDeviceSharding(jax.local_devices()[0])
  saved = manager.item_metadata(step)['state'].tree['params'][name]
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved)
  places = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=place, dtype=x.dtype), target)
  items = {
    'state': ocp.args.PyTreeRestore(
      {'params': {name: target}}, restore_args={'params': {name: places}}, partial_restore=True
    )
  }
  if with_sums:
    items[CHECKSUMS] = ocp.args.JsonRestore()
  restored = manager.restore(step, args=ocp.args.Composite(**items))
  return restored['state']['params'][name], restored[CHECKSUMS] if with_sums else None

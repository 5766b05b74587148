"""Pipelines: several stages in order, such as pretraining, SFT, reward model and PPO.

Each stage has its own folder. `config.stages` names the stages to run. A stage is a sub-config of
one of two kinds. One with an `algorithm` is run by loop.py. One with a `function`, such as
'package.module:name', calls it with the folder of the stage and its other keys. In any value,
'$workdir' is replaced by the folder of the pipeline. A stage whose seed is None takes the seed of
the pipeline.

A function may have an attribute `check`, a function of the same keys without the folder. It is
called before the first stage runs and raises UserError if a key is wrong.

A finished stage is not run again; delete its folder to repeat it. --config.stages=ppo,evaluate
runs only these two stages.
"""

import contextlib
import inspect
import os
import pathlib
import time

import jax
import ml_collections

from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import interrupts
from rlhf_jax import loop
from rlhf_jax import processes
from rlhf_jax import runtime
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import build
from rlhf_jax.rewards import guard

DONE = 'done.json'


def run(config, workdir, *, fork_of=None):
  """Runs every unfinished stage.

  Args:
    config: ConfigDict with `stages`, `seed`, and a sub-config for every stage.
    workdir: Folder of the pipeline; stage X writes to workdir/X.
    fork_of: Folder of another run of the pipeline, whose finished stages are copied up to the
      first that differs, or None.

  Raises:
    UserError: A stage is unknown, its input is bad, or it was started with another config.
    Interrupted: See loop.run.
  """
  runtime.enable_compilation_cache()
  stages = {
    name: resolve(config[name], pathlib.Path(workdir).absolute(), config.seed)
    for name in stage_names(config)
  }
  for name, stage in stages.items():  # finds a mistake in any stage before the first one runs
    check(name, stage)
  with contextlib.ExitStack() as stack:
    processes.run_on_main_process(lambda: claim(config, workdir, fork_of, stack))
    workdir, ran = pathlib.Path(workdir).absolute(), []
    for number, (name, stage) in enumerate(stages.items(), 1):
      interrupts.check(workdir)
      folder = workdir / name
      heading = f'[{number}/{len(stages)}] {name}'
      if processes.broadcast_scalar((folder / DONE).exists()):
        note = f'; it was finished before {", ".join(ran)} ran' if ran else ''
        processes.print_on_main(
          f'{heading}: {workdir_lib.describe_finished(folder)} and the folders of the later '
          f'stages{note}'
        )
        continue
      started = time.perf_counter()
      ran.append(name)
      processes.print_on_main(heading)
      run_stage(stage, folder)
      if processes.is_main_process():
        identity.write_json(folder / DONE, {'seconds': round(time.perf_counter() - started, 1)})
      processes.wait_for_file(folder / DONE)
    if not ran:
      report = workdir / 'report.html'
      processes.print_on_main(
        f'{workdir}: all stages are finished{f"; report {report}" if report.exists() else ""}'
      )


def claim(config, workdir, fork_of, stack):
  """Checks and locks the folder of a pipeline and records its config; see workdir.claim.

  Args:
    config: ConfigDict of the pipeline.
    workdir: Folder of the pipeline.
    fork_of: Folder of another run of the pipeline, or None.
    stack: ExitStack that holds the lock.

  Raises:
    UserError: The folder cannot be used or is in use, or a stage was started with another config.
  """
  workdir = workdir_lib.check(workdir)
  stack.enter_context(workdir_lib.lock(workdir))
  workdir_lib.remove_leftovers(workdir)
  before = recorded(workdir)
  changed = check_changes(config, before, workdir) if before else []
  for change in changed:
    print(f'{workdir}: {change}', flush=True)
  config = with_earlier_stages(config, before or {})
  origin = (before or {}).get('forked_from')
  if fork_of and before and (origin or {}).get('workdir') != os.path.abspath(fork_of):
    raise errors.UserError(f'--fork={workdir} holds another run: name a new folder')
  if fork_of and not before:
    origin = {'workdir': os.path.abspath(fork_of)}
    check_fork(fork_of)
  identity.record_start(config, workdir, changed=changed, forked_from=origin)
  if origin and 'stages' not in origin:  # not all stages are copied yet
    origin |= {'stages': copy_finished_stages(config, origin['workdir'], workdir)}
    identity.record_start(config, workdir, changed=[], forked_from=origin)


def recorded(workdir):
  """Reads config.json of a pipeline; keys that the file does not have get their defaults."""
  before = identity.read(workdir)
  return before and {
    name: identity.completed(stage, build.defaults(stage['algorithm']))
    if isinstance(stage, dict) and 'algorithm' in stage
    else stage
    for name, stage in before.items()
  }


def with_earlier_stages(config, before):
  """Returns a config whose `stages` also has those of earlier starts, in order.

  Args:
    config: ConfigDict of the pipeline.
    before: Content of config.json, or {}.
  """
  earlier, now = split_names(before.get('stages', ())), stage_names(config)
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.stages = tuple(now if set(now) >= set(earlier) else dict.fromkeys([*earlier, *now]))
  return config


def split_names(stages):
  """Returns the names in `config.stages`; an entry from the command line may hold several."""
  return [name.strip() for entry in stages for name in entry.split(',')]


def check_changes(config, before, workdir):
  """Compares a config with that of earlier starts and returns the changes, all of them allowed.

  Keys of a stage that has not started may change, and so may the keys of identity.MAY_CHANGE.

  Args:
    config: ConfigDict of the pipeline.
    before: Content of config.json in `workdir`.
    workdir: Folder of the pipeline.

  Returns:
    List of identity.Change.

  Raises:
    UserError: Another key of a stage that has started differs.
  """
  after, refused, allowed = identity.to_plain_dict(config), [], []
  for change in identity.changes(
    {key: value for key, value in before.items() if key not in ('stages', 'forked_from')},
    {key: value for key, value in after.items() if key != 'stages'},
  ):
    name, _, key = change.key.partition('.')
    stages = [name] if key else stages_that_inherit(before, change.key)
    started = [workdir / stage for stage in stages if has_started(workdir / stage)]
    done = [folder for folder in started if (folder / DONE).exists()]
    free = identity.may_change(key) and not (done and key in identity.LENGTH_KEYS)
    (allowed if not started or free else refused).append(change)
  if refused:
    raise errors.UserError(identity.explain_refusal(refused, workdir, pipeline=True))
  return allowed


def stages_that_inherit(before, key):
  """Returns the names of the stages that take the pipeline's value of a key, such as its seed."""
  return [
    name
    for name, stage in before.items()
    if isinstance(stage, dict) and key in stage and stage[key] is None
  ]


def has_started(folder):
  """Returns whether a stage is finished or has a checkpoint to resume from."""
  return (folder / DONE).exists() or (folder / 'model').exists() or identity.has_checkpoint(folder)


def check_fork(source):
  """Raises UserError if a folder does not hold a pipeline."""
  before = identity.read(source)
  if before is None or 'stages' not in before:
    raise errors.UserError(f'--workdir={source} is not the folder of a pipeline: --fork needs one')


def copy_finished_stages(config, source, workdir):
  """Copies the finished stages of another run of the pipeline, up to the first that differs.

  Args:
    config: ConfigDict of the new run.
    source: Folder of the other run.
    workdir: Folder of the new run.

  Returns:
    List of the names of the copied stages.
  """
  source, names = pathlib.Path(source), []
  before, after = recorded(source), identity.to_plain_dict(config)
  same_seed = before['seed'] == after['seed']
  for name in dict.fromkeys([*split_names(before['stages']), *stage_names(config)]):
    new = after.get(name)
    same = (
      new is not None and before.get(name) == new and (same_seed or new.get('seed') is not None)
    )
    if not same or not (source / name / DONE).exists():
      break
    if not (workdir / name).exists():
      print(f'{name}: copied from {source / name}', flush=True)
      workdir_lib.copy(source / name, workdir / name)
    names.append(name)
  return names


def stage_names(config):
  """Returns the names in `config.stages`.

  Raises:
    UserError: A name is not a stage of the config.
  """
  known = [
    name
    for name, value in config.items()
    if isinstance(value, ml_collections.ConfigDict)
    and ('algorithm' in value or 'function' in value)
  ]
  names = split_names(config.stages)
  unknown = [name for name in names if name not in known]
  if unknown or not names:
    raise errors.UserError(
      f'config.stages={",".join(names)!r} names {unknown or "no stage"}: the stages of this '
      f'config are {", ".join(known)}'
    )
  return names


def check(name, stage):
  """Raises UserError if the config of a stage shows that it cannot run."""
  try:
    if 'algorithm' in stage:
      build.validate(stage, jax.device_count())
      return
    function, arguments = load_function(stage)
  except errors.UserError as error:
    raise errors.UserError(f'stage {name}: {error}') from error
  except (Exception, SystemExit) as error:  # a user's module may raise anything
    raise errors.UserError(
      f'stage {name}: config.{name}.function={stage.function!r} cannot be loaded '
      f"({type(error).__name__}: {error}): it must be 'package.module:name' of a function"
    ) from error
  config_keys.check_finite(arguments, f'stage {name}: config.{name}')
  signature = inspect.signature(function)
  try:
    signature.bind(None, **arguments)
  except TypeError as error:
    names = list(signature.parameters)[1:]
    hints = [config_keys.did_you_mean(key, names) for key in arguments if key not in names]
    raise errors.UserError(
      f'stage {name}: {stage.function} cannot be called with the keys of config.{name} '
      f'({error}): they must be its arguments. {" ".join(hints[:1])}'.rstrip()
    ) from error
  try:
    getattr(function, 'check', lambda **_: None)(**arguments)
  except errors.UserError as error:
    raise errors.UserError(f'stage {name}: {error}') from error


def load_function(stage):
  """Returns the function of a stage and a dict of its arguments without the folder."""
  arguments = stage.to_dict()
  module, _, name = arguments.pop('function').partition(':')
  return getattr(guard.import_module(module, guard.Call(f'importing {module}')), name), arguments


def run_stage(stage, folder):
  """Runs one stage, a function only on the main process. See `resolve` for `stage`."""
  if 'algorithm' in stage:
    loop.run(stage, folder)
  if 'algorithm' in stage or not processes.is_main_process():
    return
  folder.mkdir(parents=True, exist_ok=True)
  function, arguments = load_function(stage)
  function(folder, **arguments)


def resolve(stage, workdir, seed):
  """Returns a copy of a stage's config with '$workdir' replaced and a seed that is not None."""
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

"""Stages in order, each in its own folder: pretraining, SFT, reward model, PPO and so on.

`config.stages` names them. A stage is a sub-config that either has an `algorithm`, and is a run
of loop.py, or a `function` 'package.module:name', called with its folder and its other keys. A
string '$workdir' in any value stands for the pipeline's folder, and a stage whose seed is None takes
the pipeline's.

A function may have an attribute `check`, a function of the same keys, which is called before the
first stage runs and raises UserError if they are wrong.

A finished stage is not run again; delete its folder to repeat it. --config.stages=ppo,evaluate
runs these alone.
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
    workdir: folder; stage X writes to workdir/X.
    fork_of: folder of another run of the pipeline, whose finished stages are taken over up to the
      first that differs; None for none.

  Raises:
    UserError: a stage is unknown, its input is bad, or it has begun with another config.
    Interrupted: see loop.run.
  """
  runtime.keep_programs()
  stages = {
    name: resolve(config[name], pathlib.Path(workdir).absolute(), config.seed)
    for name in chosen(config)
  }
  for name, stage in stages.items():  # a mistake in the last is found before the first runs
    check(name, stage)
  with contextlib.ExitStack() as stack:
    processes.run_on_main_process(lambda: claim(config, workdir, fork_of, stack))
    workdir, ran = pathlib.Path(workdir).absolute(), []
    for number, (name, stage) in enumerate(stages.items(), 1):
      interrupts.check(workdir)
      folder = workdir / name
      heading = f'[{number}/{len(stages)}] {name}'
      if processes.broadcast_scalar((folder / DONE).exists()):
        old = f', and was made before {", ".join(ran)} ran' if ran else ''
        processes.print_on_main(
          f'{heading}: {workdir_lib.finished(folder)}, and the folders of the stages after it{old}'
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
  """Takes a folder for the pipeline, before anything is loaded; see workdir.claim.

  Raises:
    UserError: the folder cannot be used, is in use, or a stage in it has begun with another config.
  """
  workdir = workdir_lib.check(workdir)
  stack.enter_context(workdir_lib.lock(workdir))
  workdir_lib.remove_leftovers(workdir)
  before = recorded(workdir)
  changed = differing(config, before, workdir) if before else []
  for change in changed:
    print(f'{workdir}: {change}', flush=True)
  config = with_stages(config, before or {})
  origin = (before or {}).get('forked_from')
  if fork_of and before and (origin or {}).get('workdir') != os.path.abspath(fork_of):
    raise errors.UserError(f'--fork={workdir} holds another run: name a new folder')
  if fork_of and not before:
    origin = {'workdir': os.path.abspath(fork_of)}
    check_fork(fork_of)
  identity.start(config, workdir, changed=changed, forked_from=origin)
  if origin and 'stages' not in origin:  # not all of them are taken over yet
    origin |= {'stages': take_over(config, origin['workdir'], workdir)}
    identity.start(config, workdir, changed=[], forked_from=origin)


def recorded(workdir):
  """config.json of a pipeline; a key that it lacks, as of an earlier version, has its default."""
  before = identity.read(workdir)
  return before and {
    name: identity.completed(stage, build.defaults(stage['algorithm']))
    if isinstance(stage, dict) and 'algorithm' in stage
    else stage
    for name, stage in before.items()
  }


def with_stages(config, before):
  """A config whose `stages` names those of earlier starts too, in order; `before` is config.json, or {}."""
  earlier, now = named(before.get('stages', ())), chosen(config)
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.stages = tuple(now if set(now) >= set(earlier) else dict.fromkeys([*earlier, *now]))
  return config


def named(stages):
  """The names in `config.stages`; on the command line commas part them."""
  return [name.strip() for entry in stages for name in entry.split(',')]


def differing(config, before, workdir):
  """Compares the stages that have begun with what a config says.

  Args:
    config: ConfigDict of the pipeline.
    before: config.json of `workdir`.
    workdir: folder.

  Returns:
    List of identity.Change of what has not begun, or may change.

  Raises:
    UserError: a stage differs in another key.
  """
  after, refused, allowed = identity.plain(config), [], []
  for change in identity.changes(
    {key: value for key, value in before.items() if key not in ('stages', 'forked_from')},
    {key: value for key, value in after.items() if key != 'stages'},
  ):
    name, _, key = change.key.partition('.')
    stages = [name] if key else seeded(before, change.key)
    held = [workdir / stage for stage in stages if begun(workdir / stage)]
    done = [folder for folder in held if (folder / DONE).exists()]
    free = identity.may_change(key) and not (done and key in identity.LENGTH)
    (allowed if not held or free else refused).append(change)
  if refused:
    raise errors.UserError(identity.differ(refused, workdir, pipeline=True))
  return allowed


def seeded(before, key):
  """The stages that take the pipeline's value of a key, such as its seed."""
  return [
    name
    for name, stage in before.items()
    if isinstance(stage, dict) and key in stage and stage[key] is None
  ]


def begun(folder):
  """Whether a stage has results: it is finished, or has steps to resume from."""
  return (folder / DONE).exists() or (folder / 'model').exists() or identity.has_checkpoint(folder)


def check_fork(source):
  """Raises UserError where a folder is no pipeline's."""
  before = identity.read(source)
  if before is None or 'stages' not in before:
    raise errors.UserError(f'--workdir={source} is not the folder of a pipeline: --fork needs one')


def take_over(config, source, workdir):
  """Copies the finished stages of another run of the pipeline, up to the first that differs.

  Returns:
    Their names.
  """
  source, names = pathlib.Path(source), []
  before, after = recorded(source), identity.plain(config)
  same_seed = before['seed'] == after['seed']
  for name in dict.fromkeys([*named(before['stages']), *chosen(config)]):
    new = after.get(name)
    same = (
      new is not None and before.get(name) == new and (same_seed or new.get('seed') is not None)
    )
    if not same or not (source / name / DONE).exists():
      break
    if not (workdir / name).exists():
      print(f'{name}: taken from {source / name}', flush=True)
      workdir_lib.copy(source / name, workdir / name)
    names.append(name)
  return names


def chosen(config):
  """The names in `config.stages`.

  Raises:
    UserError: one is not a stage of the config.
  """
  known = [
    name
    for name, value in config.items()
    if isinstance(value, ml_collections.ConfigDict)
    and ('algorithm' in value or 'function' in value)
  ]
  names = named(config.stages)
  unknown = [name for name in names if name not in known]
  if unknown or not names:
    raise errors.UserError(
      f'config.stages={",".join(names)!r} names {unknown or "no stage"}: the stages of this '
      f'config are {", ".join(known)}'
    )
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
  except (Exception, SystemExit) as error:  # whatever a user's module does
    raise errors.UserError(
      f'stage {name}: config.{name}.function={stage.function!r} cannot be loaded ({type(error).__name__}: {error}): '
      "it has to be 'package.module:name' of a function"
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


def called(stage):
  """The function of a stage, and its arguments but for the folder."""
  arguments = stage.to_dict()
  module, _, name = arguments.pop('function').partition(':')
  return getattr(guard.import_module(module, guard.Call(f'importing {module}')), name), arguments


def run_stage(stage, folder):
  """Runs one stage whose placeholders are resolved; one that does not train on the first process alone."""
  if 'algorithm' in stage:
    loop.run(stage, folder)
  if 'algorithm' in stage or not processes.is_main_process():
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

"""The folder of a run: whether it can be used, who uses it, and how another run starts from it."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import sys
import threading
import time

import psutil

from rlhf_jax import errors
from rlhf_jax import identity

LOCK = 'lock'
BEAT_SECONDS = 10
DEAD_SECONDS = 60  # without a beat from another host
SETTLE_SECONDS = 1
# Keys that say which weights a run has; those a fork takes from its checkpoint.
WEIGHTS = (
  'algorithm',
  'model.path',
  'model.init',
  'model.lora',
  'model.unfrozen_layers',
  'model.param_dtype',
  'critic.kind',
  'critic.path',
  'tokenizer',
)
# What a run or a pipeline leaves beside its stages' folders; a folder with none of it is no run's.
MARKS = ('config.json', 'runs.jsonl', 'checkpoints', 'metrics.jsonl', LOCK)


def claim(config, workdir, fork_of, stack, defaults):
  """Takes a folder for a run, before anything is loaded.

  Args:
    config: of the run.
    workdir: its folder.
    fork_of: folder of the run it is to start from; None for none.
    stack: ExitStack that keeps the lock.
    defaults: see identity.completed.

  Returns:
    List of identity.Change since the last start.

  Raises:
    UserError: the folder cannot be used, is in use, or is another config's.
  """
  workdir = check(workdir)
  stack.enter_context(lock(workdir))
  remove_leftovers(workdir)
  if fork_of:
    check_fork(config, fork_of, workdir, defaults)
  changed = identity.check(config, workdir, defaults)
  for change in changed:
    scheduled = change.key in identity.LENGTH_KEYS and config.optim.schedule != 'constant'
    note = '; from here on the learning rate follows the new length' if scheduled else ''
    print(f'{workdir}: {change}{note}', flush=True)
  for key in identity.changed_code(config, workdir):
    print(f'{workdir}: the file of config.{key} has changed since the last start', flush=True)
  return changed


def check_fork(config, source, workdir, defaults):
  """Raises UserError where a run cannot start in `workdir` from the newest checkpoint in `source`."""
  recorded = identity.read(workdir)
  if recorded and (recorded.get('forked_from') or {}).get('workdir') != os.path.abspath(source):
    raise errors.UserError(f'--fork={workdir} holds another run: name a new folder')
  before = identity.completed(identity.read(source), defaults)
  if before is None or not identity.has_checkpoint(source):
    raise errors.UserError(
      f'--workdir={source} has no checkpoint for --fork={workdir} to start from'
    )
  differences = [
    change
    for change in identity.changes(before, identity.to_plain_dict(config))
    if change.key.startswith(WEIGHTS)
    and not identity.may_change(change.key)
    and identity.fingerprint(change.before) != identity.fingerprint(change.after)
  ]
  if differences:
    raise errors.UserError(
      f'--fork starts from the weights in {source}, which are of another model: '
      f'{"; ".join(map(str, differences))}. Leave them as they were, or start a new --workdir without --fork'
    )


def origin(workdir, fork_of):
  """The folder of the run that the one in `workdir` is a fork of; None where it is none."""
  config = identity.read(workdir) or {}
  source = (config.get('forked_from') or {}).get('workdir') or fork_of
  return source and os.path.abspath(source)


def finished(workdir):
  """What to say of a finished run, or of a finished stage."""
  workdir = pathlib.Path(workdir)
  marks = [path for path in (workdir / 'done.json', workdir / 'model') if path.exists()]
  when = time.strftime('%Y-%m-%d %H:%M', time.localtime(marks[0].stat().st_mtime))
  results = [
    f'{name} {workdir / file}'
    for name, file in (('model', 'model'), ('report', 'report.html'))
    if (workdir / file).exists()
  ]
  return '; '.join([f'finished on {when}', *results, f'to repeat it delete {workdir}'])


def check(workdir):
  """Finds out, before anything is loaded, that a run cannot be in a folder.

  Returns:
    pathlib.Path of the folder, which exists.

  Raises:
    UserError: no folder is named, it is a URL or a file, holds other things, or cannot be written.
  """
  if not workdir or not str(workdir).strip():
    raise errors.UserError('--workdir is empty: name a folder for what the run writes')
  if '://' in str(workdir):
    raise errors.UserError(
      f'--workdir={workdir} is a URL: only the checkpoints could be written there. Mount the '
      'bucket, for example with gcsfuse, and name the folder where it is mounted'
    )
  workdir = pathlib.Path(workdir).absolute()  # a user's code may change the working directory
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    names = [entry.name for entry in os.scandir(workdir)]
    probe = workdir / f'.write-{os.getpid()}'
    probe.write_text('x')
    probe.unlink()
  except OSError as error:
    raise errors.UserError(
      f'--workdir={workdir} cannot be written ({error.strerror}): name a folder that can'
    ) from None
  foreign = sorted(name for name in names if not name.startswith('.'))
  model = 'model_type' in _json(workdir / 'config.json')  # a model's folder has one too
  if foreign and (model or not set(MARKS) & set(foreign)):
    raise errors.UserError(
      f'--workdir={workdir} is no folder of a run, and holds {", ".join(foreign[:4])}: name a new '
      'or an empty folder'
    )
  return workdir


def _json(path):
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}


def remove_leftovers(workdir):
  """Removes what an export or a checkpoint that was killed has left half written."""
  for path in [
    *workdir.glob('.*.' + '[0-9a-f]' * 32),
    *workdir.glob('checkpoints/*.orbax-checkpoint-tmp*'),
    *workdir.glob('.*.copy'),
    *workdir.glob('.write-*'),
    *workdir.glob(f'.{LOCK}.*'),
    *workdir.glob('*.tmp'),
  ]:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def lock(workdir):
  """Holds a folder for this process; one whose holder is dead is taken over.

  The holder touches the file `lock` every ten seconds. On its own host it is dead when its process
  is gone; on another, when it has not touched the file for a minute.

  Raises:
    UserError: another process holds it; says which, on which host, and since when.
  """
  path, ours = (
    pathlib.Path(workdir) / LOCK,
    {
      'host': _host(),
      'pid': os.getpid(),
      'started': psutil.Process().create_time(),
      'time': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
    },
  )
  while not _create(path, ours):
    holder = _json(path)
    if _alive(path, holder):
      raise errors.UserError(
        f'{workdir} is in use by process {holder.get("pid")} on {_name(holder)} since '
        f'{holder.get("time")}: wait for it to end, or name another --workdir'
      )
    if _json(path) == holder:
      path.unlink(missing_ok=True)
    if _create(path, ours):
      time.sleep(SETTLE_SECONDS)  # one that saw the same dead holder may have taken ours for its
      if _json(path) == ours:
        break
  ended = threading.Event()

  def beat():
    while not ended.wait(BEAT_SECONDS):
      with contextlib.suppress(OSError):
        os.utime(path)
      if _json(path).keys() and _json(path) != ours:  # it was taken for dead, while it slept
        print(
          f'error: {workdir} was taken over by process {_json(path).get("pid")} on '
          f'{_name(_json(path))}',
          file=sys.stderr,
          flush=True,
        )
        os._exit(1)

  threading.Thread(target=beat, daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    if _json(path) == ours:
      path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a run that has not begun leaves no folder
      path.parent.rmdir()


def _name(holder):
  return str(holder.get('host')).partition(' ')[0]


def _create(path, content):
  """Whether the lock is ours now. It appears with its content, so that nobody reads half of it."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.{threading.get_ident()}')
  temporary.write_text(json.dumps(content))
  try:
    os.link(temporary, path)
    return True
  except FileExistsError:
    return False
  except OSError:  # a file system without hard links
    try:
      with open(path, 'x', encoding='utf-8') as file:
        file.write(json.dumps(content))
      return True
    except FileExistsError:
      return False
  finally:
    temporary.unlink()


def _host():
  """The name of this host, and what tells its boots and its containers apart."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{socket.gethostname()} {boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:  # no Linux
    return socket.gethostname()


def _alive(path, holder):
  """Whether the holder of a lock still is."""
  if not holder:
    return False
  if holder.get('host') == _host():
    end = time.monotonic() + SETTLE_SECONDS
    try:
      process = psutil.Process(holder['pid'])
      # Clocks are set: it is the same process if it started at about the same time.
      while (
        alive := abs(process.create_time() - holder['started']) < 60
        and process.status() != psutil.STATUS_ZOMBIE
      ) and time.monotonic() < end:
        time.sleep(0.05)  # one that was killed just now takes a moment to end
      return alive
    except (psutil.Error, KeyError):
      return False
  print(
    f'{path.parent}: looking whether process {holder.get("pid")} on {_name(holder)}, which held it last, '
    f'still does; up to {DEAD_SECONDS} s',
    flush=True,
  )
  try:
    first = path.stat().st_mtime
    # Clocks of hosts differ: whether the file is touched is seen by looking twice.
    end = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < end:
      time.sleep(1)
      if path.stat().st_mtime != first:
        return True
  except FileNotFoundError:
    return False
  return False


def copy(source, target):
  """A copy of a run's folder, there as a whole or not at all.

  What is large, and never written in place, is linked where both are on one disk.
  """
  half = target.with_name(f'.{target.name}.copy')
  shutil.rmtree(half, ignore_errors=True)
  half.parent.mkdir(parents=True, exist_ok=True)
  shutil.copytree(source, half, copy_function=_link)
  half.rename(target)


def _link(source, target):
  large = source.endswith('.safetensors') or 'checkpoints' in pathlib.Path(source).parts
  try:
    if not large:
      raise OSError
    os.link(source, target)
  except OSError:
    shutil.copy2(source, target)

"""Checks, locks and copies the folders of runs."""

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
HEARTBEAT_SECONDS = 10  # between two touches of the lock file
DEAD_SECONDS = 60  # a holder on another host is dead if it does not touch the file for this long
SETTLE_SECONDS = 1  # wait for another process to exit, or to finish with the lock file
# Keys that determine the weights of a run, which a fork takes from a checkpoint.
WEIGHT_KEYS = (
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
# Files of a run, a pipeline or a sweep; a folder with other files but none of these holds neither.
RUN_FILES = (
  'config.json',
  'runs.jsonl',
  'checkpoints',
  'metrics.jsonl',
  'sweep.json',
  'reference_logprobs',  # of DPO, written before all others
  LOCK,
)


def claim(config, workdir, fork_of, stack, defaults):
  """Checks and locks the folder of a run before anything is loaded.

  Args:
    config: Config of the run.
    workdir: Folder of the run.
    fork_of: Folder of the run whose checkpoint this one starts from, or None.
    stack: ExitStack that holds the lock.
    defaults: See identity.completed.

  Returns:
    List of identity.Change since the last start.

  Raises:
    UserError: The folder cannot be used, is in use, or holds a run with another config.
  """
  workdir = check(workdir)
  stack.enter_context(lock(workdir))
  remove_leftovers(workdir)
  if fork_of:
    check_fork(config, fork_of, workdir, defaults)
  changed = identity.check(config, workdir, defaults)
  for change in changed:
    scheduled = change.key in identity.LENGTH_KEYS and config.optim.schedule != 'constant'
    note = '; from now on the learning-rate schedule has the new length' if scheduled else ''
    print(f'{workdir}: {change}{note}', flush=True)
  for key in identity.changed_code(config, workdir):
    print(f'{workdir}: the file of config.{key} has changed since the last start', flush=True)
  return changed


def check_fork(config, source, workdir, defaults):
  """Raises UserError if a run in `workdir` cannot start from the newest checkpoint in `source`."""
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
    if change.key.startswith(WEIGHT_KEYS)
    and not identity.may_change(change.key)
    and identity.fingerprint(change.before) != identity.fingerprint(change.after)
  ]
  if differences:
    raise errors.UserError(
      f'--fork starts from the weights in {source}, which belong to another model: '
      f'{"; ".join(map(str, differences))}. Restore these keys, or start a new --workdir without '
      '--fork'
    )


def fork_source(workdir, fork_of):
  """Returns the folder of the run that the run in `workdir` is a fork of, or None."""
  config = identity.read(workdir) or {}
  source = (config.get('forked_from') or {}).get('workdir') or fork_of
  return source and os.path.abspath(source)


def describe_finished(workdir):
  """Returns a line about a finished run or stage: the time, the results, and how to repeat it."""
  workdir = pathlib.Path(workdir)
  ends = [path for path in (workdir / 'done.json', workdir / 'model') if path.exists()]
  when = time.strftime('%Y-%m-%d %H:%M', time.localtime(ends[0].stat().st_mtime))
  results = [
    f'{name} {workdir / file}'
    for name, file in (('model', 'model'), ('report', 'report.html'))
    if (workdir / file).exists()
  ]
  return '; '.join([f'finished on {when}', *results, f'to repeat it delete {workdir}'])


def check(workdir):
  """Checks, before anything is loaded, that a folder can hold a run, and creates it.

  Returns:
    Absolute pathlib.Path of the folder.

  Raises:
    UserError: The name is empty, a URL or a file, or the folder holds other files or cannot be
      written.
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
  # The folder of a model has a config.json, too.
  model = 'model_type' in _json(workdir / 'config.json')
  if foreign and (model or not set(RUN_FILES) & set(foreign)):
    raise errors.UserError(
      f'--workdir={workdir} is not the folder of a run, and holds {", ".join(foreign[:4])}: name '
      'a new or an empty folder'
    )
  return workdir


def _json(path):
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}


def remove_leftovers(workdir):
  """Removes the incomplete files of killed exports and checkpoints."""
  for path in [
    *workdir.glob('.*.' + '[0-9a-f]' * 32),
    *workdir.glob('checkpoints/*.orbax-checkpoint-tmp*'),
    *workdir.glob('reference_logprobs/*.tmp'),
    *workdir.glob('.*.copy'),
    *workdir.glob('.write-*'),
    *workdir.glob(f'.{LOCK}.*'),
    *workdir.glob('*.tmp'),
  ]:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def lock(workdir):
  """Locks a folder for this process, and takes over the lock of a dead process.

  The holder touches the file `lock` every ten seconds. A holder on this host is dead if its process
  is gone; a holder on another host is dead if it has not touched the file for a minute.

  Raises:
    UserError: Another process holds the lock; the message names it, its host, and since when.
  """
  path = pathlib.Path(workdir) / LOCK
  ours = {
    'host': _host(),
    'pid': os.getpid(),
    'started': psutil.Process().create_time(),
    'time': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
  }
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
      # Another process that saw the same dead holder may remove our file instead of the old one.
      time.sleep(SETTLE_SECONDS)
      if _json(path) == ours:
        break
  ended = threading.Event()

  def beat():
    while not ended.wait(HEARTBEAT_SECONDS):
      with contextlib.suppress(OSError):
        os.utime(path)
      # If this process was suspended, another one may have taken it for dead.
      holder = _json(path)  # read once, because the lock may be released at any time
      if holder and holder != ours and not ended.is_set():
        print(
          f'error: process {holder.get("pid")} on {_name(holder)} has taken the lock on {workdir}',
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
    with contextlib.suppress(OSError):  # removes the folder if it is empty
      path.parent.rmdir()


def _name(holder):
  return str(holder.get('host')).partition(' ')[0]


def _create(path, content):
  """Creates the lock file if there is none, atomically, and returns whether it did."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.{threading.get_ident()}')
  temporary.write_text(json.dumps(content))
  try:
    os.link(temporary, path)
    return True
  except FileExistsError:
    return False
  except OSError:  # the file system has no hard links
    try:
      with open(path, 'x', encoding='utf-8') as file:
        file.write(json.dumps(content))
      return True
    except FileExistsError:
      return False
  finally:
    temporary.unlink()


def _host():
  """Returns the name of this host with the IDs of its boot and of the container."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{socket.gethostname()} {boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:  # not Linux
    return socket.gethostname()


def _alive(path, holder):
  """Returns whether the process that holds a lock is still alive; this may take a minute."""
  if not holder:
    return False
  if holder.get('host') == _host():
    end = time.monotonic() + SETTLE_SECONDS
    try:
      process = psutil.Process(holder['pid'])
      # A PID may be reused: it is the same process if it started at about the same time, within a
      # minute because the clock may have been adjusted.
      while (
        alive := abs(process.create_time() - holder['started']) < 60
        and process.status() != psutil.STATUS_ZOMBIE
      ) and time.monotonic() < end:
        time.sleep(0.05)  # a process that was just killed takes a moment to end
      return alive
    except (psutil.Error, KeyError):
      return False
  print(
    f'{path.parent}: checking whether process {holder.get("pid")} on {_name(holder)} still uses '
    f'it; up to {DEAD_SECONDS} s',
    flush=True,
  )
  try:
    first = path.stat().st_mtime
    # The clocks of hosts differ, so the time is compared with an earlier one, not with now.
    end = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < end:
      time.sleep(1)
      if path.stat().st_mtime != first:
        return True
  except FileNotFoundError:
    return False
  return False


def copy(source, target):
  """Copies the folder of a run; `target` appears when the copy is complete.

  Weights and checkpoints, which are never written in place, are hard links if both folders are on
  one disk.
  """
  temporary = target.with_name(f'.{target.name}.copy')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.parent.mkdir(parents=True, exist_ok=True)
  shutil.copytree(source, temporary, copy_function=_copy_or_link)
  temporary.rename(target)


def _copy_or_link(source, target):
  large = source.endswith('.safetensors') or 'checkpoints' in pathlib.Path(source).parts
  try:
    if not large:
      raise OSError
    os.link(source, target)
  except OSError:
    shutil.copy2(source, target)

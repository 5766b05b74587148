"""rlhf sweep --config=CONFIG[:ARG] --workdir=DIR [--config.KEY=VALUE ...] [--commands]

Runs every run that get_hyper(h) of a config file lists, one after the other, each in a folder of
DIR, then writes the comparison of all of them to DIR/comparison.html. The same command resumes: a
finished run is not repeated. A run that fails does not stop the others.

--commands prints one command per run and starts nothing, for a cluster: each command can run on
another machine, and the same `rlhf sweep` writes the comparison when they are finished.

python -m rlhf_jax.sweep does the same.
"""

from collections.abc import Mapping
import contextlib
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from absl import flags

from rlhf_jax import command_line
from rlhf_jax import compare_runs
from rlhf_jax import config_files
from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import hyper
from rlhf_jax import identity
from rlhf_jax import pipeline
from rlhf_jax import workdir as workdir_lib

PROGRAM = (sys.executable, '-m', 'rlhf_jax.main')
# Statuses of a run that a signal stopped; negative if that was before it handled signals.
STOPPED = {
  status: number for number in (signal.SIGINT, signal.SIGTERM) for status in (128 + number, -number)
}
LOCK_SECONDS = 5.0  # between two checks of a lock that another process holds


def run(text, workdir, extra=()):
  """Runs the unfinished runs of a sweep and compares all of them.

  Args:
    text: Value of --config: a config file with get_hyper, and an optional argument after a colon.
    workdir: Folder of the sweep.
    extra: Further options of every run, such as '--config.steps=10'.

  Returns:
    Exit status: 0, 1 if a run failed, or that of the run that a signal stopped.

  Raises:
    UserError: The config or a run of the sweep is wrong.
  """
  workdir = workdir_lib.check(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(workdir_lib.lock(workdir))
    runs = read(text)
    identity.write_json(workdir / compare_runs.SWEEP, {'config': text, 'runs': runs})
    failed = []
    for number, (name, settings) in enumerate(runs.items(), 1):
      folder, heading = workdir / name, f'[{number}/{len(runs)}] {name}'
      _wait_for(folder)
      if finished(folder):
        print(f'{heading}: finished; to repeat it delete {folder}', flush=True)
        continue
      print(heading, flush=True)
      status = _start([*PROGRAM, *options(text, settings, folder, extra)])
      if status in STOPPED:
        print(f'stopped by {STOPPED[status].name}: the same command resumes', file=sys.stderr)
        return 128 + STOPPED[status]
      if status:
        failed.append(name)
    try:
      print(f'comparison: {compare_runs.of_sweep(workdir)}')
    except errors.UserError as error:  # for example, no run has metrics
      print(f'comparison: not written: {error}')
  for name in failed:
    print(f'error: {name} failed; see the messages above', file=sys.stderr)
  return int(bool(failed))


def read(text):
  """Reads the runs of a sweep and checks the keys and types of their settings.

  Args:
    text: Value of --config.

  Returns:
    {name of the run: {key: value}}; see hyper.py.

  Raises:
    UserError: The config has no get_hyper, or a setting is wrong.
  """
  name, _, arg = text.partition(':')
  path = config_files.find(name)
  runs = config_files.read_hyper(path)
  named = {hyper.name(settings, runs): settings for settings in runs}
  for label, settings in named.items():
    arguments, overrides = _split(settings)
    try:
      config = config_files.read(path, ','.join(filter(None, [arg, *arguments])) or None)
      config_files.override(config, overrides)
    except errors.UserError as error:
      raise errors.UserError(f'run {label}: {error}') from None
  return named


def options(text, settings, folder, extra=()):
  """Returns the options of `rlhf run` for a run, a list of words.

  Args:
    text: Value of --config.
    settings: {key: value} of the run.
    folder: Folder of the run.
    extra: Further options of every run.
  """
  arguments, overrides = _split(settings)
  name, _, arg = text.partition(':')
  arg = ','.join(filter(None, [arg, *arguments]))
  return [
    f'--config={name}:{arg}' if arg else f'--config={name}',
    f'--workdir={folder}',
    *(f'--config.{key}={value}' for key, value in _flat(overrides)),
    *extra,
  ]


def _split(settings):
  """Returns the arguments of get_config, as NAME=VALUE, and {config key: value}."""
  arguments = [f'{key[1:]}={value}' for key, value in settings.items() if key.startswith(':')]
  return arguments, {key: value for key, value in settings.items() if not key.startswith(':')}


def _flat(overrides, prefix=''):
  """Yields (key, value) with a dict split into the keys of its block.

  On the command line a dict replaces its block, which is right for open blocks only.
  """
  for name, value in overrides.items():
    key = prefix + name
    inside_open = any(f'.{block}.' in f'.{key}.' for block in config_keys.OPEN)
    if isinstance(value, Mapping) and not inside_open:
      yield from _flat(value, f'{key}.')
    else:
      yield key, value


def finished(folder):
  """Returns whether a folder holds a finished run, or a pipeline whose stages are all finished."""
  config = identity.read(folder) or {}
  if 'stages' in config:
    return all((folder / name / pipeline.DONE).exists() for name in config['stages'])
  return (folder / 'model').exists()


def _wait_for(folder):
  """Waits while another process, such as one of an earlier start, runs the run of a folder."""
  told = False
  while folder.exists():
    try:
      with workdir_lib.lock(folder):
        return
    except errors.UserError as error:
      if not told:
        print(f'waiting: {error}', flush=True)
      told = True
      time.sleep(LOCK_SECONDS)


def _start(words):
  """Runs a command and returns its status; passes SIGTERM on and leaves Ctrl-C to the command."""
  process = subprocess.Popen(words)
  handlers = {
    signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
  }
  try:
    return process.wait()
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def main(argv):
  """Runs the sweep of the command line, or prints its commands."""
  text = flags.FLAGS['config'].parser.text
  workdir = flags.FLAGS.workdir or command_line.default_workdir()
  extra = _overrides(sys.argv[1:])
  with command_line.exit_on_error():
    errors.need(len(argv) == 1, f'unexpected arguments {argv[1:]}: every option begins with --')
    errors.need(workdir, '--workdir is missing: name a new folder')
    if flags.FLAGS.commands:
      folder = pathlib.Path(workdir)
      for name, settings in read(text).items():
        print(shlex.join(['rlhf', 'run', *options(text, settings, folder / name, extra)]))
      return
    status = run(text, workdir, extra)
  sys.exit(status)


def _overrides(words):
  """Returns the options that set keys: --config.KEY=VALUE, --config.KEY VALUE or --noconfig.KEY."""
  kept = []
  for i, word in enumerate(words):
    name, equals, _ = word.lstrip('-').partition('=')
    if not word.startswith('-') or not name.startswith(('config.', 'noconfig.')):
      continue
    kept.append(word)
    alone = equals or name.startswith('no') or name in flags.FLAGS and flags.FLAGS[name].boolean
    kept += [] if alone else words[i + 1 : i + 2]
  return kept


def start():
  """Reads the command line and runs it."""
  command_line.define_config()
  flags.DEFINE_string(
    'workdir', None, 'Folder of the sweep; by default runs/ and the name of the config.'
  )
  flags.DEFINE_bool('commands', False, 'Print one command per run and exit.')
  command_line.start(main, required=('config',))


if __name__ == '__main__':
  start()

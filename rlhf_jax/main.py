"""rlhf run --config=CONFIG[:ARG] [--workdir=DIR] [--config.KEY=VALUE ...]

Runs one algorithm or a pipeline of stages. CONFIG is the name of a config of the package, such as
quickstart, or a file. The same command resumes the run. On SIGTERM or Ctrl-C the run saves its
state and stops; a second Ctrl-C stops it at once. With --config=CONFIG, --help prints the keys of
the config, and --print prints the config with all overrides.

python -m rlhf_jax.main does the same.
"""

import signal
import sys
import traceback

from absl import flags
from absl import logging

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import interrupts
from rlhf_jax import loop
from rlhf_jax import pipeline
from rlhf_jax import processes
from rlhf_jax import runtime
from rlhf_jax.evaluation import report

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder that the run writes to; by default runs/ and the name of the config.',
)
_FORK = flags.DEFINE_string(
  'fork',
  None,
  'New folder for a run with this config that starts from the newest checkpoint in --workdir. A '
  'pipeline reuses the finished stages up to the first whose config differs.',
)


def main(argv):
  """Runs the config. If the run ends early, prints why and exits with a status other than 0.

  The status is 1 for errors, 143 (128 + the signal's number) for SIGTERM, and 130 for Ctrl-C.
  """
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments {argv[1:]}: every option begins with --')
  signal.signal(signal.SIGTERM, interrupts.interrupt_now)
  try:
    run()
  except errors.UserError as error:
    logging.debug('details', exc_info=True)
    runtime.exit_now(str(error) and f'error: {error}', 1)
  except errors.Interrupted as stop:
    runtime.exit_now(str(stop) if processes.is_main_process() else '', stop.status, together=True)
  except KeyboardInterrupt:
    runtime.exit_now('stopped by SIGINT: the same command resumes', 130)
  except BaseException as error:  # user code may raise SystemExit
    logging.debug('details', exc_info=True)
    reason = errors.explain_disk_error(error)
    runtime.exit_now(f'error: {reason}' if reason else traceback.format_exc().rstrip(), 1)


def run():
  """Runs the config of the command line."""
  runtime.configure()
  config = _CONFIG.value
  config.lock()
  workdir, fork_of = folders()
  if 'stages' in config:
    pipeline.run(config, workdir, fork_of=fork_of)
    return
  loop.run(config, workdir, fork_of=fork_of)
  if processes.is_main_process():
    report.of_run(workdir, title=config.algorithm)


def folders():
  """Returns the folder of the run, and the folder of the run that it forks or None."""
  workdir = _WORKDIR.value
  if workdir is None:
    workdir = command_line.default_workdir()
    errors.need(
      workdir and not _FORK.value,
      '--workdir is missing: name '
      + ('the folder of the run to fork' if _FORK.value else 'a new folder'),
    )
    processes.print_on_main(f'--workdir={workdir}')
  return (_FORK.value, workdir) if _FORK.value else (workdir, None)


def start():
  """Reads the command line and runs it."""
  command_line.start(main, required=('config',))


if __name__ == '__main__':
  start()

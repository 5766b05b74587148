"""python -m rlhf_jax.main --config=configs/X.py[:arg] --workdir=DIR [--config.key=value]

Runs one stage, or a pipeline of stages where the config has `stages`. The same command with
the same --workdir resumes. SIGTERM or Ctrl-C saves first; a second Ctrl-C does not. --help behind
--config=FILE prints the keys of the config, --print the config itself with all overrides.
"""

import functools
import signal
import sys
import traceback

from absl import app
from absl import flags
from absl import logging

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import interrupts
from rlhf_jax import pipeline
from rlhf_jax import processes
from rlhf_jax import runtime
from rlhf_jax import train
from rlhf_jax.evaluation import report

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for everything the run writes.')
_FORK = flags.DEFINE_string(
  'fork',
  None,
  'New folder for a run with this config that starts from the newest checkpoint in --workdir; of a '
  'pipeline, from its finished stages up to the first that differs.',
)


def main(argv):
  """Runs the config; whatever ends it early is said in one line, with a status other than 0.

  The status is 1 for errors, and 128 + the signal's number for a run that was asked to stop: 143
  for SIGTERM, 130 for Ctrl-C.
  """
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments {argv[1:]}: every option begins with --')
  signal.signal(signal.SIGTERM, interrupts.end_now)
  try:
    run()
  except errors.UserError as error:
    logging.debug('details', exc_info=True)
    runtime.end(str(error) and f'error: {error}', 1)
  except errors.Interrupted as stop:
    runtime.end(str(stop) if processes.is_main_process() else '', stop.status, together=True)
  except KeyboardInterrupt:
    runtime.end('stopped by SIGINT: the same command resumes', 130)
  except BaseException as error:  # a user's code may raise SystemExit
    logging.debug('details', exc_info=True)
    reason = errors.of_disk(error)
    runtime.end(f'error: {reason}' if reason else traceback.format_exc().rstrip(), 1)


def run():
  """Runs what the command line names."""
  runtime.configure()
  config = _CONFIG.value
  config.lock()
  workdir, fork_of = _WORKDIR.value, None
  if _FORK.value:
    workdir, fork_of = _FORK.value, _WORKDIR.value
  if 'stages' in config:
    pipeline.run(config, workdir, fork_of=fork_of)
    return
  train.run(config, workdir, fork_of=fork_of)
  if processes.is_main_process():
    report.of_run(workdir, title=config.algorithm)


if __name__ == '__main__':
  app.run(main, flags_parser=functools.partial(command_line.parse, required=('config', 'workdir')))

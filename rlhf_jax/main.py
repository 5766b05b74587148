"""python -m rlhf_jax.main --config=configs/X.py[:arg] --workdir=DIR [--config.key=value]

Runs one stage, or a pipeline of stages where the config has `stages`. The same command with
the same --workdir goes on where it stopped.
"""

import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from rlhf_jax import compilation
from rlhf_jax import errors
from rlhf_jax import pipeline
from rlhf_jax import train
from rlhf_jax.evaluation import report

_CONFIG = config_flags.DEFINE_config_file('config', None, 'File in configs/, :arg for variants.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for everything the run writes.')


def main(argv):
  """Runs the config."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  compilation.configure()
  try:
    config = _CONFIG.value
    config.lock()
    if 'stages' in config:
      pipeline.run(config, _WORKDIR.value)
    else:
      train.run(config, _WORKDIR.value)
      report.of_run(_WORKDIR.value, title=config.algorithm)
  except errors.UserError as error:
    logging.debug('details', exc_info=True)
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)

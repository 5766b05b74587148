"""rlhf plan --config=ppo_llama3_8b --topology=v5e:16x16 [--search] [--config.KEY=VALUE ...]

Compiles the rollout, scoring and train step of a PPO config for TPUs, without access to any, and
prints their memory and time. --search tries other meshes, microbatch sizes and remat settings.

`python -m planner` is the same command.
"""

import pathlib
import shlex
import sys

from absl import flags
from absl import logging
import jax

from planner import plan as plan_lib
from planner import report
from rlhf_jax import command_line
from rlhf_jax import errors

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
  'topology', 'v5e:16x16', 'Chip and grid, such as v5e:16x16, v5p:4x4x4 or v6e:8x8.'
)
_SEARCH = flags.DEFINE_boolean(
  'search', False, 'Try other meshes, microbatch sizes and remat settings.'
)
_CONFIRM = flags.DEFINE_integer(
  'confirm', 3, 'In a search, compile candidates until this many fit.'
)
_EFFORT = flags.DEFINE_float(
  'effort',
  0.0,
  'Optimization effort of the compiler, from -1 to 1; real runs use 0. '
  '-1 compiles in half the time, but then only memory and collectives are accurate.',
)
_REPORT = flags.DEFINE_string('report', '', 'Markdown file to which the tables are also written.')


def run(config, topology):
  """Plans a config, or searches for its best variant, and prints the tables."""
  planner = plan_lib.Planner(topology, _EFFORT.value)
  if _SEARCH.value:
    chosen, tables = plan_lib.find(planner, config, _CONFIRM.value)
  else:
    chosen, tables = plan_lib.plan(planner, config)
  report.show(tables)
  capacity = report.size(planner.chip.memory)
  summary = (
    f'{planner.chips} {planner.chip.name} chips; mesh (data x fsdp x tensor), microbatch, remat: '
    f'{chosen.name}. {report.size(chosen.bytes)} of {capacity} GiB on each chip, '
  )
  summary += (
    f'{report.seconds(chosen.seconds)} s per iteration, '
    f'{chosen.tokens_per_second:.0f} tokens/s in the rollout.'
    if chosen.fits
    else 'which does not fit.'
  )
  print(summary)
  if _REPORT.value:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith('--report')]
    source = next((a.partition('=')[2] for a in arguments if a.startswith('--config=')), 'config')
    report.append(
      pathlib.Path(_REPORT.value),
      f'{source} on {topology}',
      shlex.join(['python', '-m', 'planner', *arguments]),
      summary,
      tables,
    )


def main(argv):
  """Runs the command, and reports user errors in one line."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments {argv[1:]}: every option begins with --')
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_platforms', 'cpu')  # libtpu would look for a TPU
  try:
    run(_CONFIG.value, _TOPOLOGY.value)
  except errors.UserError as error:
    sys.exit(f'error: {error}')


def start():
  """Reads the command line and runs the command."""
  command_line.start(main, required=('config',))


if __name__ == '__main__':
  start()

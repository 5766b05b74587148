"""rlhf plan --config=ppo_llama3_8b --topology=v5e:16x16 [--search] [--config.KEY=VALUE ...]

Compiles rollout, scoring and train step of a PPO config for TPUs that nobody has to own, and prints
what they need and how long they take. --search tries other meshes, microbatches and recomputations.

python -m planner does the same.
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
  'topology', 'v5e:16x16', 'Chip and grid: v5e:16x16, v5p:4x4x4, v6e:8x8 ...'
)
_SEARCH = flags.DEFINE_boolean(
  'search', False, 'Try other meshes, microbatches and recomputations.'
)
_CONFIRM = flags.DEFINE_integer(
  'confirm', 3, 'Ways that fit to find with the compiler in a search.'
)
_EFFORT = flags.DEFINE_float(
  'effort',
  0.0,
  'Of the compiler, -1 to 1. -1 takes half of the time, '
  'and tells memory and collectives only; runs have 0.',
)
_REPORT = flags.DEFINE_string('report', '', 'Markdown file to put the tables into as well.')


def run(config, topology):
  """The command."""
  planner = plan_lib.Planner(topology, _EFFORT.value)
  if _SEARCH.value:
    chosen, tables = plan_lib.find(planner, config, _CONFIRM.value)
  else:
    chosen, tables = plan_lib.plan(planner, config)
  report.show(tables)
  whole = report.size(planner.chip.memory)
  summary = (
    f'{planner.chips} chips of {planner.chip.name}; mesh (data x fsdp x tensor), microbatch, '
    'recomputation: '
    f'{chosen.name}. {report.size(chosen.bytes)} of {whole} GiB on each chip, '
  )
  summary += (
    f'{report.seconds(chosen.seconds)} s an iteration, '
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
  """Runs the command, with errors of the user in one line."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments {argv[1:]}: every option begins with --')
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_platforms', 'cpu')  # libtpu would look for a TPU
  try:
    run(_CONFIG.value, _TOPOLOGY.value)
  except errors.UserError as error:
    sys.exit(f'error: {error}')


def start():
  """Reads the command line and runs it."""
  command_line.start(main, required=('config',))


if __name__ == '__main__':
  start()

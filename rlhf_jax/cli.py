"""The command `rlhf`, with a subcommand for each program of the package.

Each subcommand is a module with a function `start`, which reads sys.argv. Only the module of the
subcommand is imported.
"""

import difflib
import importlib
import os
import sys

# {subcommand: (module, description)}.
COMMANDS = {
  'run': ('rlhf_jax.main', 'train with a config, or resume a run'),
  'generate': ('rlhf_jax.generate', 'sample text from a model or a run'),
  'merge': ('rlhf_jax.merge', 'merge adapters of experts into a model'),
  'evaluate': ('rlhf_jax.evaluate', 'compare policies, or run the evaluators of a run'),
  'report': ('rlhf_jax.report', 'rewrite the report of a run'),
  'sweep': ('rlhf_jax.sweep', 'train every run that a config lists, then compare them'),
  'compare': ('rlhf_jax.compare_runs', 'compare training runs over seeds'),
  'label': ('rlhf_jax.label', 'serve the page on which people compare responses'),
  'elo': ('rlhf_jax.elo_command', 'rate policies by the judgements of a feedback store'),
  'plan': ('planner.__main__', 'estimate what a config needs on TPUs, without a TPU'),
}
HELP = ('-h', '--help', 'help')


def usage():
  """Returns the text of `rlhf --help`."""
  width = max(map(len, COMMANDS)) + 2
  lines = [f'  {name:<{width}}{description}' for name, (_, description) in COMMANDS.items()]
  return '\n'.join(
    [
      'rlhf COMMAND [--OPTION=VALUE ...]',
      '',
      'Reinforcement learning from human feedback in JAX.',
      '',
      *lines,
      '',
      'First run, about five minutes on a laptop:  rlhf run --config=quickstart',
      'Options of a command:                       rlhf COMMAND --help',
    ]
  )


def main():
  """Runs the subcommand named on the command line."""
  name, *arguments = sys.argv[1:] or ['--help']
  if name in HELP:
    print(usage())
    return
  if name not in COMMANDS:
    like = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    hint = f'Did you mean {like[0]!r}? ' if like else ''
    sys.exit(f'error: rlhf has no command {name!r}. {hint}The commands are {", ".join(COMMANDS)}.')
  if os.getcwd() not in sys.path:  # as python -m does, for the user's rewards and algorithms
    sys.path.insert(0, os.getcwd())
  sys.argv = [f'rlhf {name}', *arguments]
  importlib.import_module(COMMANDS[name][0]).start()

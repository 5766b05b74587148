"""The command `rlhf`: a subcommand for each program of the package.

Each subcommand is a module with a function `start`, which reads sys.argv. Only the module of the
subcommand is imported.
"""

import difflib
import importlib
import os
import sys

# Subcommand: its module, and what it does.
COMMANDS = {
  'run': ('rlhf_jax.main', 'train what a config describes, or resume it'),
  'generate': ('rlhf_jax.generate', 'sample text from a model or a run'),
  'evaluate': ('rlhf_jax.evaluate', 'compare policies, or run the evaluators of a run'),
  'report': ('rlhf_jax.report', 'write the report of a run again'),
  'plan': ('planner.__main__', 'find out what a config needs on TPUs, without any'),
}
HELP = ('-h', '--help', 'help')


def usage():
  """What `rlhf --help` prints."""
  width = max(map(len, COMMANDS)) + 2
  lines = [f'  {name:<{width}}{purpose}' for name, (_, purpose) in COMMANDS.items()]
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
  """Runs the subcommand that the command line names."""
  name, *arguments = sys.argv[1:] or ['--help']
  if name in HELP:
    print(usage())
    return
  if name not in COMMANDS:
    like = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    hint = f'Did you mean {like[0]!r}? ' if like else ''
    sys.exit(f'error: rlhf has no command {name!r}. {hint}The commands are {", ".join(COMMANDS)}.')
  if os.getcwd() not in sys.path:  # as python -m does: rewards and algorithms of the user lie there
    sys.path.insert(0, os.getcwd())
  sys.argv = [f'rlhf {name}', *arguments]
  importlib.import_module(COMMANDS[name][0]).start()

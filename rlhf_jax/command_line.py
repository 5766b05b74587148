"""Command lines of programs: flags, --config, overrides --config.KEY=VALUE, --help, --print.

Errors that a user can fix are printed in one line: `parse` does so for errors in flags, and
`exit_on_error` for later errors.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import re
import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from rlhf_jax import config_files
from rlhf_jax import config_help
from rlhf_jax import errors
from rlhf_jax import runtime

HELP = {'--help', '-help', '--helpfull', '--helpshort', '-h'}
# Regular expressions for messages of Python and libraries about a flag's value, and replacements.
PLAIN = (
  (r'invalid literal for int\(\).*', 'must be a whole number'),
  (r'could not convert string to float.*', 'must be a number'),
  (r"\('Non-boolean argument to boolean flag'.*", 'must be True or False'),
  (r'Failed to parse .* as a ConfigDict.*', "must be a dict, such as {'path': 'x'}"),
)


class _Parser(flags.ArgumentParser):
  """Reads the config of `CONFIG[:ARG]`, and stores the flag's value in `text`."""

  text = ''

  def parse(self, text):
    self.text = text
    name, colon, arg = text.partition(':')
    errors.need(name, f'--config is empty: {flags.FLAGS["config"].help}')
    return config_files.read(config_files.find(name), arg if colon else None)


class Arguments(argparse.ArgumentParser):
  """Parser of a program without a config. Prints errors in one line."""

  def __init__(self, command, usage):
    """Creates the parser.

    Args:
      command: Command of the program, such as 'rlhf report'.
      usage: Docstring of its module, which --help prints above the options.
    """
    super().__init__(
      prog=command,
      usage=argparse.SUPPRESS,
      description=usage,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def error(self, message):
    sys.exit(f'error: {message}. `{self.prog} --help` lists the options.')


def define_config():
  """Defines --config and --print, and returns the flag --config."""
  flags.DEFINE_bool('print', False, 'Print the config with all overrides as JSON and exit.')
  holder = config_flags.DEFINE_config_file(
    'config',
    None,
    'Name of a config of the package, such as quickstart, a Python file with get_config, or '
    'config.json of a run. Add :ARG for a variant, such as quickstart:debug.',
  )
  flags.FLAGS['config'].parser = _Parser()
  return holder


def default_workdir():
  """Returns runs/CONFIG-ARG for the config on the command line, or '' for a config.json."""
  name, colon, arg = flags.FLAGS['config'].parser.text.partition(':')
  if name.endswith('.json'):
    return ''
  return os.path.join(
    'runs', re.sub(r'[^\w.]+', '-', f'{pathlib.Path(name).stem}{colon}{arg}').strip('-')
  )


def start(main, required=()):
  """Runs a program.

  Args:
    main: Function of the arguments that are not flags. --help prints the docstring of its module.
    required: Names of flags that must be set, except with --help and --print.
  """
  app.run(main, flags_parser=functools.partial(parse, required=required, module=main.__module__))


def parse(argv, required=(), module='__main__'):
  """Parses the command line, including `--config.KEY=None`.

  Exits after --help and --print, or with a message of one line if the command line has an error.

  Args:
    argv: Command line, with the program's name first.
    required: Names of flags that must be set, except with --help and --print.
    module: Name of the program's module, whose docstring and flags --help prints.

  Returns:
    The arguments that are not flags.
  """
  wanted = HELP & set(argv)
  try:
    arguments = _parse([arg for arg in argv if arg not in wanted])
    config, to_print = (
      flags.FLAGS[name].value if name in flags.FLAGS else None for name in ('config', 'print')
    )
    if wanted:
      print(_help(config, module))
      sys.exit(0)
    for name in ('config',) if to_print else required:
      if flags.FLAGS[name].value is None:
        sys.exit(f'error: --{name} is missing: {flags.FLAGS[name].help}')
    if to_print:
      print(config_help.resolved(config, flags.FLAGS.get_flag_value('workdir', None)))
      sys.exit(0)
    return arguments
  except (errors.UserError, flags.Error) as error:
    sys.exit(f'error: {errors.printable(_plain(" ".join(str(error).split())))}')
  except BrokenPipeError:  # the reader of --help or --print, such as `head`, has exited
    os._exit(1)
  except OSError as error:
    path = flags.FLAGS['config'].parser.text
    sys.exit(f'error: --config={path} cannot be read ({str(error).splitlines()[-1].strip()})')
  except (AttributeError, KeyError) as error:
    sys.exit(_no_such_key(argv, error))


@contextlib.contextmanager
def exit_on_error():
  """Exits with a message of one line if the body gets Ctrl-C or an error that a user can fix.

  It is for programs that do not train. `main` also prints how to resume.
  """
  try:
    yield
  except errors.UserError as error:
    logging.debug('details', exc_info=True)
    runtime.exit_now(f'error: {error}', 1)
  except KeyboardInterrupt:
    runtime.exit_now('stopped by SIGINT', 130)
  except Exception as error:
    reason = errors.explain_disk_error(error)
    if reason is None:
      raise
    runtime.exit_now(f'error: {reason.partition("; the same command")[0]}', 1)


def _plain(text):
  """Returns a plainer form of absl's message about a flag."""
  for pattern, plain in PLAIN:
    text = re.sub(rf'^flag (--.*?): {pattern}$', rf'flag \1: {plain}', text)
  return text.removeprefix('flag ')


def _parse(argv):
  absent = [arg for arg in argv if re.fullmatch(r'--?config\.[\w.]+=None', arg)]
  arguments = flags.FLAGS([arg for arg in argv if arg not in absent])
  for arg in absent:
    *blocks, name = arg.partition('config.')[2].removesuffix('=None').split('.')
    block = functools.reduce(lambda block, part: block[part], blocks, flags.FLAGS.config)
    block[name], _ = None, block[name]  # reading the key raises an error if it does not exist
  return arguments


def _no_such_key(argv, error):
  """Returns the message for a flag with an unknown config key; re-raises any other error."""
  within = re.search(
    r'does not support indexing. Attempting to lookup: ([\w.]+)', str(error.args[0])
  )
  if within:
    key = f'config.{within.group(1)}'
    flag = next((arg for arg in argv if f'-{key}' in arg), key)
    return f'error: {flag}: {key.rpartition(".")[0]} is a value, without keys below it'
  key = re.search(r'\w+', str(error.args[0]))
  key = key.group() if key else ''
  flag = next((arg for arg in argv if re.match(rf'--?config\.[^=]*\b{key}\b', arg)), None)
  if not key or flag is None:
    raise error
  hint = re.search(r'Did you mean "(\w+)"', str(error.args[0]))
  hint = f'Did you mean {hint.group(1)!r}?' if hint else 'Add --help to list its keys.'
  return f'error: {flag}: the config has no key {key!r}. {hint}'


def _help(config, module):
  """Returns the text of --help: the flags, and the keys of the config if --config is set."""
  usage = (sys.modules[module].__doc__ or '').strip()
  program = sys.argv[0] if module == '__main__' else module
  key_flags = [
    flag for name in (__name__, program) for flag in flags.FLAGS.get_key_flags_for_module(name)
  ]
  key_flags = [flag for flag in key_flags if '.' not in flag.name]
  width = max(len(flag.name) for flag in key_flags) + 2
  lines = [f'  --{flag.name:<{width}}{" ".join(flag.help.split())}' for flag in key_flags]
  if 'config' not in flags.FLAGS:
    return '\n'.join([usage, '', *lines])
  if config is None:
    return '\n'.join(
      [
        usage,
        '',
        *lines,
        '',
        f'Configs: {", ".join(config_files.names())}.',
        'With --config=CONFIG, --help also prints the keys of that config.',
      ]
    )
  return '\n'.join([usage, '', *lines, '', 'Keys of the config:', config_help.keys(config)])

"""The command line of a run: --config, its overrides --config.KEY=VALUE, --help and --print."""

import functools
import os
import re
import sys

from absl import flags
from ml_collections import config_flags

from rlhf_jax import config_files
from rlhf_jax import config_help
from rlhf_jax import errors

HELP = {'--help', '-help', '--helpfull', '--helpshort', '-h'}


class _Parser(flags.ArgumentParser):
  """Reads `FILE[:arg]` as config_files does."""

  def parse(self, path):
    path, colon, arg = path.partition(':')
    return config_files.read(path, arg if colon else None)


def define_config():
  """Defines --config and --print; returns the flag of the first."""
  flags.DEFINE_bool('print', False, 'Print the config with all overrides as JSON, and end.')
  holder = config_flags.DEFINE_config_file(
      'config', None, 'Python file with get_config, :arg for variants; or config.json of a run.')
  flags.FLAGS['config'].parser = _Parser()
  return holder


def parse(argv, required=()):
  """Parses the command line, `--config.KEY=None` too; a mistake in it is said in one line.

  With --help or --print it prints what was asked for, and ends the process.

  Args:
    argv: with the program's name first.
    required: flags that must be given, but for --help and --print.

  Returns:
    The arguments that are no flags.
  """
  wanted = HELP & set(argv)
  try:
    arguments = _parse([arg for arg in argv if arg not in wanted])
    config = flags.FLAGS.config
    if wanted:
      print(_help(config))
      sys.exit(0)
    for name in ('config',) if flags.FLAGS.print else required:
      if flags.FLAGS[name].value is None:
        sys.exit(f'error: --{name} is missing: {flags.FLAGS[name].help}')
    if flags.FLAGS.print:
      print(config_help.resolved(config, flags.FLAGS.get_flag_value('workdir', None)))
      sys.exit(0)
    return arguments
  except (errors.UserError, flags.Error) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')
  except OSError as error:
    path = next((arg.partition('=')[2] for arg in argv if re.match('--?config=', arg)), '')
    sys.exit(f'error: --config={path} cannot be read: name a file that exists, such as '
             f'configs/quickstart.py, from {os.getcwd()} ({str(error).splitlines()[-1].strip()})')
  except (AttributeError, KeyError) as error:
    sys.exit(_no_such_key(argv, error))


def _parse(argv):
  absent = [arg for arg in argv if re.fullmatch(r'--?config\.[\w.]+=None', arg)]
  arguments = flags.FLAGS([arg for arg in argv if arg not in absent])
  for arg in absent:
    *blocks, name = arg.partition('config.')[2].removesuffix('=None').split('.')
    block = functools.reduce(lambda block, part: block[part], blocks, flags.FLAGS.config)
    block[name], _ = None, block[name]  # the key must exist
  return arguments


def _no_such_key(argv, error):
  """The message of a KeyError, where a flag names the key; else the error is raised again."""
  key = re.search(r'\w+', str(error.args[0]))
  key = key.group() if key else ''
  flag = next((arg for arg in argv if re.match(rf'--?config\.[^=]*\b{key}\b', arg)), None)
  if not key or flag is None:
    raise error
  hint = re.search(r'Did you mean "(\w+)"', str(error.args[0]))
  hint = f'Did you mean {hint.group(1)!r}?' if hint else '--help behind --config lists its keys.'
  return f'error: {flag}: the config has no key {key!r}. {hint}'


def _help(config):
  """What --help prints: the flags, and the keys of the config if there is one."""
  usage = (sys.modules['__main__'].__doc__ or '').strip()
  own = [flag for module in (__name__, sys.argv[0]) for flag in flags.FLAGS.get_key_flags_for_module(module)]
  lines = [f'  --{flag.name:<10}{flag.help}' for flag in own if '.' not in flag.name]
  if config is None:
    return '\n'.join([usage, '', *lines, '', 'With --config=FILE, --help prints the keys of that config.'])
  return '\n'.join([usage, '', *lines, '', 'Keys of the config:', config_help.keys(config)])

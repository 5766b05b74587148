"""The command line of a program: its flags, --config with its overrides --config.KEY=VALUE, --help and --print.

What a user can mend is said in one line, of the flags in `parse`, of what follows in `one_line`.
"""

import contextlib
import functools
import os
import re
import sys

from absl import flags
from absl import logging
from ml_collections import config_flags

from rlhf_jax import config_files
from rlhf_jax import config_help
from rlhf_jax import errors
from rlhf_jax import runtime

HELP = {'--help', '-help', '--helpfull', '--helpshort', '-h'}
# What Python and libraries say of a flag's value, as regex, and what they mean.
PLAIN = (
  (r'invalid literal for int\(\).*', 'must be a whole number'),
  (r'could not convert string to float.*', 'must be a number'),
  (r"\('Non-boolean argument to boolean flag'.*", 'must be True or False'),
  (r'Failed to parse .* as a ConfigDict.*', "must be a dict, such as {'path': 'x'}"),
)


class _Parser(flags.ArgumentParser):
  """Reads `FILE[:arg]` as config_files does."""

  def parse(self, path):
    path, colon, arg = path.partition(':')
    errors.need(path, f'--config is empty: {flags.FLAGS["config"].help}')
    logged = os.path.join(path, 'config.json')
    errors.need(not os.path.isfile(logged), f'--config={path} is a folder: name {logged}')
    return config_files.read(path, arg if colon else None)


def define_config():
  """Defines --config and --print; returns the flag of the first."""
  flags.DEFINE_bool('print', False, 'Print the config with all overrides as JSON, and end.')
  holder = config_flags.DEFINE_config_file(
    'config', None, 'Python file with get_config, :arg for variants; or config.json of a run.'
  )
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
    config, to_print = (
      flags.FLAGS[name].value if name in flags.FLAGS else None for name in ('config', 'print')
    )
    if wanted:
      print(_help(config))
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
  except OSError as error:
    path = next((arg.partition('=')[2] for arg in argv if re.match('--?config=', arg)), '')
    sys.exit(
      f'error: --config={path} cannot be read: name a file that exists, such as '
      f'configs/quickstart.py, from {os.getcwd()} ({str(error).splitlines()[-1].strip()})'
    )
  except (AttributeError, KeyError) as error:
    sys.exit(_no_such_key(argv, error))


@contextlib.contextmanager
def one_line():
  """Ends the process with one line where its body raises what a user can mend, or Ctrl-C comes.

  For programs that read; a run says how to resume it.
  """
  try:
    yield
  except errors.UserError as error:
    logging.debug('details', exc_info=True)
    runtime.end(f'error: {error}', 1)
  except KeyboardInterrupt:
    runtime.end('stopped by SIGINT', 130)
  except Exception as error:
    reason = errors.of_disk(error)
    if reason is None:
      raise
    runtime.end(f'error: {reason.partition("; the same command")[0]}', 1)


def _plain(text):
  """What absl says of a flag, in plain words."""
  for pattern, plain in PLAIN:
    text = re.sub(rf'^flag (--.*?): {pattern}$', rf'flag \1: {plain}', text)
  return text.removeprefix('flag ')


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
  hint = f'Did you mean {hint.group(1)!r}?' if hint else '--help behind --config lists its keys.'
  return f'error: {flag}: the config has no key {key!r}. {hint}'


def _help(config):
  """What --help prints: the flags, and the keys of the config if there is one."""
  usage = (sys.modules['__main__'].__doc__ or '').strip()
  own = [
    flag
    for module in (__name__, sys.argv[0])
    for flag in flags.FLAGS.get_key_flags_for_module(module)
  ]
  own = [flag for flag in own if '.' not in flag.name]
  width = max(len(flag.name) for flag in own) + 2
  lines = [f'  --{flag.name:<{width}}{" ".join(flag.help.split())}' for flag in own]
  if 'config' not in flags.FLAGS:
    return '\n'.join([usage, '', *lines])
  if config is None:
    return '\n'.join(
      [usage, '', *lines, '', 'With --config=FILE, --help prints the keys of that config.']
    )
  return '\n'.join([usage, '', *lines, '', 'Keys of the config:', config_help.keys(config)])

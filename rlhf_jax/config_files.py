"""Reads configs from files: from get_config() of a Python file, or from the config.json of a run.

A Python file may import other files in its folder. Configs of the package are also found by name,
such as 'quickstart': in rlhf_jax/configs if installed from a wheel, in configs/ in a checkout.

A mistake in a file raises a UserError of one line that names the file and the line.
"""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import traceback

import ml_collections
from ml_collections.config_dict import placeholder

from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import hyper
from rlhf_jax.algorithms import build

PACKAGE = pathlib.Path(__file__).resolve().parent


def find(name):
  """Returns the path of a config.

  Args:
    name: Path of a file, or name of a config of the package.

  Raises:
    UserError: There is neither; the message suggests the most similar name.
  """
  if os.path.isfile(name):
    return name
  logged = os.path.join(name, 'config.json')
  errors.need(not os.path.isfile(logged), f'--config={name} is a folder: name {logged}')
  if name in names():
    return str(folder() / f'{name}.py')
  like = difflib.get_close_matches(pathlib.Path(name).stem, names(), 1, 0.6)
  hint = f'Did you mean {like[0]!r}? ' if like else ''
  raise errors.UserError(
    f'--config={name}: there is no such file in {os.getcwd()}, and no config of that name. {hint}'
    f'The configs are {", ".join(names())}.'
  )


def names():
  """Returns the sorted names of the configs of the package."""
  return sorted(path.stem for path in folder().glob('[a-z]*.py'))


def folder():
  """Returns the folder of the configs of the package."""
  installed = PACKAGE / 'configs'
  return installed if installed.is_dir() else PACKAGE.parent / 'configs'


def read(path, arg=None):
  """Returns the config of a file, locked; every key has its type, even if it is None.

  Args:
    path: Path of a Python file with get_config(arg), or of the config.json of a run.
    arg: Text after the colon on the command line, or None.

  Returns:
    ConfigDict with `algorithm`, or with `stages`.

  Raises:
    UserError: The file or `arg` is wrong.
    OSError: The file does not exist.
  """
  if path.endswith('.json'):
    errors.need(arg is None, f'{path}:{arg}: a config.json takes no argument after a colon')
    config = _from_json(path)
  else:
    config = _from_python(path, arg)
  if 'algorithm' in config:
    return _typed(config_keys.lock(config), build.load(config.algorithm).config())
  for stage in config.values():
    if isinstance(stage, ml_collections.ConfigDict):
      _typed(stage, build.load(stage.algorithm).config() if 'algorithm' in stage else None)
  return config.lock()


def of_run(path):
  """Returns the config in the config.json of a single run or a pipeline.

  Args:
    path: Path of config.json.

  Returns:
    The ConfigDict, and {'workdir', 'step'} of the checkpoint that the run started from, or None.

  Raises:
    UserError: The file cannot be read, or has a key that its algorithm does not have.
  """
  try:
    fields = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except ValueError as error:
    raise errors.UserError(f'{path}:{getattr(error, "lineno", 1)}: not JSON: {error}') from None
  errors.need(
    isinstance(fields, dict) and ('algorithm' in fields or 'stages' in fields),
    f'{path}: has neither algorithm nor stages: it is not the config.json of a run',
  )
  start = fields.pop('forked_from', None)
  if 'algorithm' in fields:
    return _single(fields, path), start
  return ml_collections.ConfigDict(
    {
      name: _single(value, f'{path}: stage {name}')
      if isinstance(value, dict) and 'algorithm' in value
      else _tuples(value)
      for name, value in fields.items()
    }
  ), start


def _from_json(path):
  config, start = of_run(path)
  if start:
    print(
      f'{path}: this run started from step {start.get("step")} of {start.get("workdir")}; this '
      'one starts from the beginning',
      file=sys.stderr,
    )
  return config


def _single(fields, where):
  """Returns the config of an algorithm with the values of a dict, and defaults for other keys."""
  config = build.load(fields['algorithm']).config()
  try:
    _fill(config, fields, 'config')
  except errors.UserError as error:
    raise errors.UserError(f'{where}: {error}') from None
  return config


def override(config, values):
  """Sets keys of a config, as --config.KEY=VALUE does.

  Args:
    config: ConfigDict of an algorithm.
    values: Dict from a dotted key to a value; a dict as value sets several keys of a block.

  Raises:
    UserError: A key does not exist, or a value has the wrong type.
  """
  for key, value in values.items():
    with config.unlocked():
      _set(config, key.split('.'), value, 'config')


def _set(block, parts, value, key):
  """Sets the dotted key with these parts; only blocks of config_keys.OPEN accept new keys."""
  name, *rest = parts
  if rest and isinstance(block.get(name), ml_collections.ConfigDict):
    _set(block[name], rest, value, f'{key}.{name}')
    return
  for part in reversed(rest):
    value = {part: value}
  inside_open = any(f'{key}.'.startswith(f'config.{name}.') for name in config_keys.OPEN)
  if inside_open and name not in block:
    block[name] = _tuples(value)
  else:
    _fill(block, {name: value}, key)


def _fill(block, fields, key):
  for name, value in fields.items():
    inner = f'{key}.{name}'
    if value is None and name not in block:  # an unused key of an earlier version
      continue
    errors.need(
      name in block, f'{key} has no key {name!r}. {config_keys.did_you_mean(name, list(block))}'
    )
    if not isinstance(block[name], ml_collections.ConfigDict):
      value = _tuples(value)
      config_keys.check_value(value, block.get_type(name), inner, optional=True)
      block[name] = value
    elif not isinstance(value, dict):
      raise errors.UserError(f'{inner}={value!r} must be an object, {{...}}')
    elif inner.partition('.')[2] in config_keys.OPEN:
      block[name] = ml_collections.ConfigDict(_tuples(value))
    else:
      _fill(block[name], value, inner)


def _tuples(value):
  """Returns a JSON value with tuples instead of lists."""
  if isinstance(value, dict):
    return {name: _tuples(item) for name, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _typed(block, defaults):
  """Gives the keys that are None the types of their defaults; unknown keys take any type."""
  for name, value in block.items():
    known = defaults is not None and name in defaults
    if isinstance(value, ml_collections.ConfigDict):
      inner = defaults[name] if known else None
      _typed(value, inner if isinstance(inner, ml_collections.ConfigDict) else None)
    elif value is None and block.get_type(name) is type(None):
      with block.ignore_type():
        block[name] = placeholder(defaults.get_type(name) if known else object)
  return block


def read_hyper(path):
  """Returns the runs that get_hyper(h) of a Python file lists; see hyper.py.

  Raises:
    UserError: The file has no get_hyper, or it raises or returns something else.
  """
  errors.need(
    path.endswith('.py'), f'{path}: a sweep needs a Python file with get_hyper(h); see hyper.py'
  )
  with _user_errors(path):
    function = getattr(_module(path), 'get_hyper', None)
    errors.need(
      callable(function), f'{path}:1: defines no get_hyper(h), which lists the runs of a sweep'
    )
    runs = function(hyper)
  return hyper.check(runs, f'{path}:{inspect.unwrap(function).__code__.co_firstlineno}')


def _module(path):
  """Returns the module of a config file."""
  loader = importlib.machinery.SourceFileLoader('config_file', path)
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader('config_file', loader))
  sys.modules['config_file'] = module  # dataclasses look up the module of a class
  loader.exec_module(module)
  return module


@contextlib.contextmanager
def _user_errors(path):
  """Raises any error of the body, which runs code of a config file, as a UserError of one line."""
  try:
    with importable(os.path.dirname(os.path.abspath(path))):
      yield
  except errors.UserError:
    raise
  except OSError as error:
    if error.filename and os.path.abspath(error.filename) == os.path.abspath(path):
      raise
    raise errors.UserError(f'{_place(error, path)}: {error}') from error
  except (Exception, SystemExit) as error:  # a user's file may raise anything
    raise errors.UserError(f'{_place(error, path)}: {_explain(error, path)}') from error


def _from_python(path, arg):
  with _user_errors(path):
    function = getattr(_module(path), 'get_config', None)
    errors.need(
      callable(function), f'{path}:1: defines no get_config(arg=None), which returns the config'
    )
    config = function(*([] if arg is None else [arg]))
  line = inspect.unwrap(function).__code__.co_firstlineno
  problem = _problem(config)
  errors.need(not problem, f'{path}:{line}: {problem}')
  runs = (
    {'config': config}
    if 'algorithm' in config
    else {
      f'config.{name}': stage
      for name, stage in config.items()
      if isinstance(stage, ml_collections.ConfigDict) and 'algorithm' in stage
    }
  )
  for key, run in runs.items():
    for block, names in _lacking(run, build.load(run.algorithm).config(), key):
      raise errors.UserError(
        f'{path}:{_assigned(path, block) or line}: {block} lacks {", ".join(names[:3])}'
        f'{" and others" if names[3:] else ""}: set single keys, {block}.KEY = ..., or several '
        f'with {block}.update(...)'
      )
  return config


@contextlib.contextmanager
def importable(folder):
  """Context in which files of a folder can be imported, as Python does for a script's folder."""
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


def _lacking(block, defaults, key):
  """Returns (dotted key, missing keys) of each block that a dict without all keys replaced."""
  missing = [name for name in defaults if name not in block]
  lacking = [(key, missing)] if missing else []
  for name, default in defaults.items():
    inner = block.get(name)
    if isinstance(default, ml_collections.ConfigDict) and isinstance(
      inner, ml_collections.ConfigDict
    ):
      lacking += _lacking(inner, default, f'{key}.{name}')
  return lacking


def _assigned(path, key):
  """Returns the line of a file that assigns a dotted key, or None if that is ambiguous."""
  tree = ast.parse(pathlib.Path(path).read_text(encoding='utf-8'))
  lines = [
    node.lineno
    for node in ast.walk(tree)
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Attribute) and target.attr == key.rpartition('.')[2]
  ]
  return lines[0] if len(lines) == 1 else None


def _place(error, path):
  """Returns 'FILE:LINE' of an error: the innermost line of the config file in its traceback."""
  if isinstance(error, SyntaxError) and error.filename:
    return f'{os.path.relpath(error.filename)}:{error.lineno or 1}'
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if os.path.abspath(frame.filename) == os.path.abspath(path)
  ]
  return f'{path}:{lines[-1] if lines else 1}'


def _explain(error, path):
  """Returns a line that explains an error and names an unknown key or a wrong value."""
  text = str(error.args[0] if error.args else error)
  if isinstance(error, SyntaxError):
    line = (error.text or '').strip()
    return f'{error.msg}: {line}' if line else error.msg
  if isinstance(error, SystemExit):
    return f'sys.exit({error.code!r}) is called: the file must return its config'
  if isinstance(error, TypeError) and _wrong_value(error, path):
    return _wrong_value(error, path)
  # A key that does not exist is set or read.
  key = re.search(r'Key "(\w+)" does not exist', text) or re.match(
    r"""[\\'"]*(\w+)[\\'"]*(\\n|\n|$)""", text
  )
  if isinstance(error, (AttributeError, KeyError)) and key:
    hint = re.search(r'Did you mean "(\w+)"', text)
    return f'the config has no key {key.group(1)!r}' + (
      f'. Did you mean {hint.group(1)!r}?' if hint else ''
    )
  return f'{type(error).__name__}: {" ".join(text.split())}'


def _wrong_value(error, path):
  """Returns what the value of a dotted key must be, or '' if the error is not a wrong value."""
  variables = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
  of_config = [
    names
    for names in variables
    if isinstance(names.get('self'), ml_collections.ConfigDict)
    and isinstance(names.get('key'), str)
    and 'value' in names
  ]
  if not of_config:
    return ''
  block, name, value = (of_config[-1][name] for name in ('self', 'key', 'value'))
  roots = [
    root
    for frame, _ in traceback.walk_tb(error.__traceback__)
    if os.path.abspath(frame.f_code.co_filename) == os.path.abspath(path)
    for root in frame.f_locals.values()
    if isinstance(root, ml_collections.ConfigDict)
  ]
  key = next(
    (dotted for dotted in (_dotted(block, root, 'config') for root in roots) if dotted), 'config'
  )
  kind = block.get_type(name)
  if kind is ml_collections.ConfigDict:
    return f'{key}.{name}={value!r} must be a dict'
  try:
    config_keys.check_value(value, kind, f'{key}.{name}')
  except errors.UserError as reason:
    return str(reason)
  return ''


def _dotted(block, root, key):
  """Returns the dotted key of a block in the config named `key`; None if the config lacks it."""
  if block is root:
    return key
  inner = (
    _dotted(block, value, f'{key}.{name}')
    for name, value in root.items()
    if isinstance(value, ml_collections.ConfigDict)
  )
  return next((dotted for dotted in inner if dotted), None)


def _problem(config):
  """Returns what is wrong with the result of get_config(), or ''."""
  if not isinstance(config, ml_collections.ConfigDict):
    what = 'nothing' if config is None else f'a {type(config).__name__}'
    return f'get_config() returns {what}: it must return a ConfigDict, such as that of ppo.config()'
  if 'algorithm' in config:
    return ''
  if 'stages' not in config or 'seed' not in config:
    return (
      'the config of get_config() must come from the config() of an algorithm; or have seed, '
      'stages, and a block for every stage'
    )
  for name, value in config.items():
    if name not in ('seed', 'stages') and not isinstance(value, ml_collections.ConfigDict):
      return (
        f'config.{name}={value!r} has no effect: besides seed and stages, a pipeline has only the '
        'blocks of its stages'
      )
  return ''

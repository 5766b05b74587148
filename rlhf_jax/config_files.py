"""Configs from files: what get_config() of a Python file returns, or the config.json of a run.

A Python file may import other files of its folder. The configs that come with the package are found
by name, such as 'quickstart': a wheel has them in rlhf_jax/configs, a checkout in configs.

A mistake in a file is a UserError of one line that names the file and the line.
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
from rlhf_jax.algorithms import build

PACKAGE = pathlib.Path(__file__).resolve().parent


def find(name):
  """The path of a config.

  Args:
    name: path of a file, or the name of a config of the package.

  Raises:
    UserError: there is neither; suggests the nearest name.
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
  """The names of the configs that come with the package, sorted."""
  return sorted(path.stem for path in folder().glob('[a-z]*.py'))


def folder():
  """The folder of the configs that come with the package."""
  installed = PACKAGE / 'configs'
  return installed if installed.is_dir() else PACKAGE.parent / 'configs'


def read(path, arg=None):
  """The config of a file, locked, in which every key knows its type, also where it is None.

  Args:
    path: a Python file with get_config(arg), or config.json of a run.
    arg: what stands behind the colon on the command line, or None.

  Returns:
    ConfigDict with `algorithm`, or with `stages`.

  Raises:
    UserError: something in the file, or in `arg`, is wrong.
    OSError: there is no such file.
  """
  if path.endswith('.json'):
    errors.need(arg is None, f'{path}:{arg}: a config.json takes no arguments behind a colon')
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
  """The config in the config.json of a single run or a pipeline.

  Args:
    path: of the file.

  Returns:
    ConfigDict, and {'workdir', 'step'} of the checkpoint that the run started from, or None.

  Raises:
    UserError: the file cannot be read, or has another key than its algorithm.
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
      f'{path}: this run started from step {start.get("step")} of {start.get("workdir")}; this one starts '
      'from the beginning',
      file=sys.stderr,
    )
  return config


def _single(fields, where):
  """The config of an algorithm with the values of a dict; keys that it lacks keep their defaults."""
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
    values: {dotted key: value}; a dict sets several keys of a block.

  Raises:
    UserError: there is no such key, or the value has another type.
  """
  for key, value in values.items():
    with config.unlocked():
      _set(config, key.split('.'), value, 'config')


def _set(block, parts, value, key):
  """Sets the key `parts` of a block; new keys are allowed inside the blocks of config_keys.OPEN."""
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
    if value is None and name not in block:  # a key of an earlier version, without effect
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
  """JSON with tuples instead of lists."""
  if isinstance(value, dict):
    return {name: _tuples(item) for name, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _typed(block, defaults):
  """Lets a key that is None take a value of its default's type; of any, where that is not known."""
  for name, value in block.items():
    known = defaults is not None and name in defaults
    if isinstance(value, ml_collections.ConfigDict):
      inner = defaults[name] if known else None
      _typed(value, inner if isinstance(inner, ml_collections.ConfigDict) else None)
    elif value is None and block.get_type(name) is type(None):
      with block.ignore_type():
        block[name] = placeholder(defaults.get_type(name) if known else object)
  return block


def _from_python(path, arg):
  loader = importlib.machinery.SourceFileLoader('config_file', path)
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader('config_file', loader))
  sys.modules['config_file'] = module  # dataclasses look for the module of a class
  try:
    with importable(os.path.dirname(os.path.abspath(path))):
      loader.exec_module(module)
      function = getattr(module, 'get_config', None)
      errors.need(
        callable(function), f'{path}:1: defines no get_config(arg=None), which returns the config'
      )
      config = function(*([] if arg is None else [arg]))
  except errors.UserError:
    raise
  except OSError as error:
    if error.filename and os.path.abspath(error.filename) == os.path.abspath(path):
      raise
    raise errors.UserError(f'{_place(error, path)}: {error}') from error
  except (Exception, SystemExit) as error:  # whatever a file of the user's does
    raise errors.UserError(f'{_place(error, path)}: {_explain(error, path)}') from error
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
        f'{" and others" if names[3:] else ""}: set single keys, {block}.KEY = ..., or several with '
        f'{block}.update(...)'
      )
  return config


@contextlib.contextmanager
def importable(folder):
  """Lets files of a folder be imported, as Python does for the folder of a script."""
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


def _lacking(block, defaults, key):
  """(dotted name, missing keys) of the blocks below one that a dict has replaced."""
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
  """The line of a file in which alone an attribute of the name of a dotted key is assigned; or None."""
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
  """'FILE:LINE' of an error: the last line of the config file that led to it."""
  if isinstance(error, SyntaxError) and error.filename:
    return f'{os.path.relpath(error.filename)}:{error.lineno or 1}'
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if os.path.abspath(frame.filename) == os.path.abspath(path)
  ]
  return f'{path}:{lines[-1] if lines else 1}'


def _explain(error, path):
  """An error in one line; a key that a config does not have, or whose value does not fit, by its name."""
  text = str(error.args[0] if error.args else error)
  if isinstance(error, SyntaxError):
    line = (error.text or '').strip()
    return f'{error.msg}: {line}' if line else error.msg
  if isinstance(error, SystemExit):
    return f'sys.exit({error.code!r}) is called: the file must return its config'
  if isinstance(error, TypeError) and _wrong_value(error, path):
    return _wrong_value(error, path)
  # A key that is written, or read, that does not exist.
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
  """What a value must be that a config did not take, by the key's dotted name; '' for other errors."""
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
    (found for found in (_dotted(block, root, 'config') for root in roots) if found), 'config'
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
  """The dotted name of a block in a config named `key`; None where it is not in there."""
  if block is root:
    return key
  inner = (
    _dotted(block, value, f'{key}.{name}')
    for name, value in root.items()
    if isinstance(value, ml_collections.ConfigDict)
  )
  return next((found for found in inner if found), None)


def _problem(config):
  """What is wrong with what get_config() returned; '' if nothing."""
  if not isinstance(config, ml_collections.ConfigDict):
    what = 'nothing' if config is None else f'a {type(config).__name__}'
    return f'get_config() returns {what}: it must return a ConfigDict, such as that of ppo.config()'
  if 'algorithm' in config:
    return ''
  if 'stages' not in config or 'seed' not in config:
    return (
      'the config of get_config() must come from the config() of an algorithm; or have seed, stages, '
      'and a block for every stage'
    )
  for name, value in config.items():
    if name not in ('seed', 'stages') and not isinstance(value, ml_collections.ConfigDict):
      return f'config.{name}={value!r} has no effect: beside seed and stages a pipeline has blocks of its stages'
  return ''

"""Prints the keys of a config with their values and docs, and the resolved config.

The docs are the comments beside the keys in the functions that create them. For `config.rl`, they
are the attributes in the docstring of the algorithm's `Settings`.
"""

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize

import ml_collections

from rlhf_jax import config as config_lib
from rlhf_jax import pipeline
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import on_policy_warnings
from rlhf_jax.rewards import scorers

PIPELINE = {
  'seed': 'random seed of all stages whose seed is None',
  'stages': 'names of stages to run, in order',
}


def keys(config):
  """Returns lines `--config.KEY=VALUE  doc` for all keys of a config.

  Args:
    config: ConfigDict of a single run or a pipeline.

  Returns:
    Text with one line per key.
  """
  if 'algorithm' in config:
    return '\n'.join(_lines(config, docs(config.algorithm), 'config'))
  lines = _lines({name: config[name] for name in PIPELINE}, PIPELINE, 'config')
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      found = docs(value.algorithm) if 'algorithm' in value else arguments(value.function)
      lines += ['', f'Stage {name}', *_lines(value, found, f'config.{name}')]
  return '\n'.join(lines)


def resolved(config, workdir=None):
  """Returns a config as JSON, which --config can read.

  Args:
    config: ConfigDict of a single run or a pipeline.
    workdir: Folder of a pipeline, which replaces '$workdir', or None to keep '$workdir'.
  """
  if 'stages' in config:
    config = config.copy_and_resolve_references().unlock()
    for name in [name for name in config if isinstance(config[name], ml_collections.ConfigDict)]:
      config[name] = pipeline.resolve(config[name], workdir or '$workdir', config.seed)
  return json.dumps(config.to_dict(), indent=2)


def docs(algorithm):
  """Returns {dotted key: doc} of an algorithm's config, with '*' for the name of an evaluator."""
  module = build.load(algorithm)
  config = module.config()
  functions = [
    (config_lib.common, ''),
    (config_lib.data, 'data.'),
    (config_lib.evaluator, 'evals.*.'),
    (scorers.config, 'evals.*.reward.'),
    (scorers.config, 'reward.'),
  ]
  if 'sampling' in config:
    functions += [(on_policy_config.prompts, ''), (on_policy_config.sampling, 'sampling.')]
  if 'rl' in config:
    functions += [
      (config_lib.data, 'ptx.'),
      (on_policy_warnings.config, 'warn.'),
      (on_policy_config.config, ''),
      (on_policy_config.critic, 'critic.'),
    ]
  entries = {}
  for function, prefix in (*functions, (module.config, '')):
    entries |= {prefix + key.removeprefix('keys.'): doc for key, doc in comments(function).items()}
  if 'rl' in config:
    settings = getattr(module, 'Settings', on_policy_config.Settings)
    for cls in reversed(settings.__mro__):  # the docs of a subclass replace those of its bases
      entries |= {f'rl.{key}': doc for key, doc in attributes(cls).items()}
  return entries


def comments(function):
  """Returns {dotted key: comment} of the keys that a function sets.

  Args:
    function: Function with dict literals that have lines `'key': default,  # doc`, alone or in
      `name.block = ...({...})`, or with lines `name['key'] = default  # doc`. If a default spans
      several lines, the doc may be on its last line.
  """
  source = textwrap.dedent(inspect.getsource(function))
  beside = {
    token.start[0]: token.string.lstrip('# ')
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  entries = {}

  def walk(node, prefix):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Name)):
      target = node.targets[0]
      name = target.attr if isinstance(target, ast.Attribute) else target.id
      if isinstance(node.value, ast.Call) and beside.get(node.lineno):
        entries[name] = beside[node.lineno]
      prefix = f'{name}.'
    if (
      isinstance(node, ast.Assign)
      and isinstance(node.targets[0], ast.Subscript)
      and beside.get(node.lineno)
    ):
      entries[node.targets[0].slice.value] = beside[node.lineno]
    if not isinstance(node, ast.Dict):
      for child in ast.iter_child_nodes(node):
        walk(child, prefix)
      return
    for key, value in zip(node.keys, node.values):
      name = f'{prefix}{key.value}'
      doc = beside.get(key.lineno) or beside.get(value.end_lineno)
      if doc:
        entries[name] = doc
      walk(value, f'{name}.')

  walk(ast.parse(source), '')
  return entries


def attributes(settings):
  """Returns {name: doc} from `Attributes:` of a class's or `Args:` of a function's docstring."""
  text = inspect.getdoc(settings) or ''
  part = re.search(r'^(?:Attributes|Args):\n((?:  .*\n?|\n)+)', text, re.MULTILINE)
  entries = re.findall(r'^  (\w+): (.*(?:\n    .*)*)', part.group(1), re.MULTILINE) if part else []
  return {name: ' '.join(doc.split()).rstrip('.') for name, doc in entries}


def arguments(function):
  """Returns {argument: doc} of the function 'package.module:name' of a stage."""
  return attributes(pipeline.load_function(ml_collections.ConfigDict({'function': function}))[0])


def _lines(block, entries, key, prefix=''):
  """Returns the lines of the keys of a block and of the blocks in it."""
  lines = []
  for name, value in block.items():
    if isinstance(value, (ml_collections.ConfigDict, dict)) and len(value):
      lines += _lines(value, entries, f'{key}.{name}', f'{prefix}{name}.')
      continue
    value = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
    line = f'  --{key}.{name}={value!r}'
    doc = entries.get(re.sub(r'^evals\.[^.]+', 'evals.*', f'{prefix}{name}'), '')
    lines.append(f'{line:<50}  {doc}'.rstrip())
  return lines

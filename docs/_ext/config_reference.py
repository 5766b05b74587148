"""Every config key with its type, default and meaning, as Markdown made from the code."""

import collections
import importlib
import inspect
import pathlib
import re
from typing import NamedTuple

import ml_collections

from rlhf_jax import config as config_lib
from rlhf_jax import config_help
from rlhf_jax.algorithms import build

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'
KINDS = ('loss', 'prompts', 'win_rate', 'text', 'function')


class Key(NamedTuple):
  """A key of one algorithm.

  Attributes:
    type: of its values.
    default: as Python writes it.
    doc: its comment in the code.
  """

  type: str
  default: str
  doc: str


def page():
  """All sections of the page."""
  found = keys()
  lines = []
  for block in dict.fromkeys(key.rpartition('.')[0] for key in found):
    inside = {key: rows for key, rows in found.items() if key.rpartition('.')[0] == block}
    lines += [f'## {code(block) if block else "The run"}', '', *table(inside), '']
  return '\n'.join([*lines, *evaluators(), *presets(), *stages()])


def modules():
  """{name: module} of all algorithms, those that learn from data first."""
  found = {name: build.load(name) for name in build.names()}
  return dict(sorted(found.items(), key=lambda pair: ('rl' in pair[1].config(), pair[0])))


def keys():
  """{dotted key: {algorithm: Key}}, in the order of the code."""
  found, order = collections.defaultdict(dict), {}
  for name, module in modules().items():
    docs = config_help.docs(name)
    order |= dict.fromkeys(docs)
    for key, kind, default in leaves(module.config()):
      found[key][name] = Key(kind, 'its name' if key == 'algorithm' else default, docs.get(key, ''))
  places = {key: place for place, key in enumerate(order)}
  return dict(sorted(found.items(), key=lambda pair: places.get(pair[0], len(places))))


def leaves(block, prefix=''):
  """Yields (dotted key, type, default) of a ConfigDict; a dict without fixed keys is one key."""
  for name, value in block.items():
    key = f'{prefix}{name}'
    if isinstance(value, ml_collections.ConfigDict) and len(value) and key != 'evals':
      yield from leaves(value, f'{key}.')
    elif isinstance(value, ml_collections.ConfigDict):
      yield key, 'dict', repr(value.to_dict())
    else:
      kind = block.get_type(name).__name__
      yield key, kind if value is not None else f'{kind} or None', repr(value)


def table(found):
  """The keys of a block: one row for each different default or meaning."""
  everyone = set().union(*found.values())
  lines = []
  if everyone < set(modules()):
    lines += [f'For {" and ".join(sorted(code(name) for name in everyone))} only.', '']
  lines += ['| key | type | default | meaning |', '|---|---|---|---|']
  for key, by_algorithm in found.items():
    rows = collections.defaultdict(list)
    for name, row in by_algorithm.items():
      rows[row].append(name)
    for row, names in rows.items():
      only = '' if set(names) == everyone else f' ({", ".join(names)})'
      lines.append(f'| {code(key)}{only} | {row.type} | {code(row.default)} | {text(row.doc)} |')
  return lines


def evaluators():
  """The keys of each kind of evaluator."""
  docs = config_help.docs('ppo')
  lines = ['## `evals.NAME`', '', 'An evaluator has the keys of its kind.', '']
  lines += ['| key | kinds | default | meaning |', '|---|---|---|---|']
  kinds, defaults = collections.defaultdict(list), {}
  for kind in KINDS:
    block = {'function': ''} if kind == 'function' else {}
    for key, value in config_lib.evaluator(kind, block).to_dict().items():
      kinds[key].append(kind)
      defaults[key] = code(repr(value))
  defaults |= {'kind': 'NAME', 'function': 'required'}
  for key in sorted(kinds, key=lambda key: list(docs).index(f'evals.*.{key}')):
    lines.append(
      f'| {code(f"evals.NAME.{key}")} | {", ".join(kinds[key])} | {defaults[key]} | '
      f'{text(docs[f"evals.*.{key}"])} |'
    )
  return [*lines, '']


def presets():
  """What the presets of each algorithm change."""
  lines = ['## Presets', '', 'A preset changes the defaults of these keys.', '']
  lines += ['| algorithm | preset | changes |', '|---|---|---|']
  for name, module in modules().items():
    for preset, changes in getattr(module, 'PRESETS', {}).items():
      changed = ', '.join(code(f'{key}={value!r}') for key, value in changes.items())
      lines.append(f'| {code(name)} | {code(preset)} | {changed} |')
  return [*lines, '']


def stages():
  """The keys of a pipeline, and the arguments of the functions that shipped pipelines call."""
  lines = ['## Pipelines', '', 'A config with `stages` is a pipeline.', '']
  lines += ['| key | meaning |', '|---|---|']
  lines += [f'| {code(key)} | {text(doc)} |' for key, doc in config_help.PIPELINE.items()]
  lines += ['| `STAGE.algorithm` | a stage that trains: it has the keys of its algorithm |']
  lines += [
    '| `STAGE.function` | or a stage that calls a function, with its arguments as keys |',
    '',
  ]
  for name in functions():
    parameters = dict(list(inspect.signature(load(name)).parameters.items())[1:])
    docs = config_help.arguments(name)
    lines += [f'### `{name}`', '', text(inspect.getdoc(load(name)).partition('\n')[0]), '']
    lines += ['| key | default | meaning |', '|---|---|---|']
    for key, parameter in parameters.items():
      required = parameter.default is inspect.Parameter.empty
      default = 'required' if required else code(repr(parameter.default))
      lines.append(f'| {code(key)} | {default} | {text(docs.get(key, ""))} |')
    lines.append('')
  return lines


def functions():
  """'package.module:name' of the functions in shipped configs whose first argument is a folder.

  Modules of rewards have none, and some need packages that the documentation does not.
  """
  named = set()
  for path in CONFIGS.glob('*.py'):
    source = path.read_text(encoding='utf-8')
    named |= set(re.findall(r"'(rlhf_jax\.(?!rewards\.)[\w.]*:\w+)'", source))
  return sorted(name for name in named if 'folder' in inspect.signature(load(name)).parameters)


def load(name):
  """The function 'package.module:name'."""
  module, _, attribute = name.partition(':')
  return getattr(importlib.import_module(module), attribute)


def code(name):
  """A text as code in a table."""
  return f'`{name}`'.replace('|', '\\|')


def text(doc):
  """A comment as Markdown in a table: its quoted strings are code, and nothing else is markup."""
  parts = re.split(r"(?<!\w)('[^' ]*'|`[^`]*`)(?!\w)", doc)
  plain = lambda part: re.sub(r'([|*$<\[\]])', r'\\\1', part)
  return ''.join(code(part.strip('`')) if i % 2 else plain(part) for i, part in enumerate(parts))

"""Adapters from and to PEFT's folders: adapter_config.json and adapter_model.safetensors.

See https://huggingface.co/docs/peft. PEFT adapts a linear map of the Hugging Face model; where
that holds several of ours (GPT-2's fused query, key and value) one of its adapters is several of
ours that share A, and several of ours are one of its with blocks on the diagonal of B. Both ways
the function is the same; the rank grows on the way out.

Letters: L layers, I inputs, O outputs, r rank.
"""

import json
import math
import pathlib
import re

import numpy as np
import safetensors.numpy

from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf_files
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.naming import Source

CONFIG, WEIGHTS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'
# Fields that are read here, or that change nothing once an adapter is trained. Any other has to be
# null, false or empty: it may make the adapter something that lora.py does not compute.
KNOWN = frozenset(
  {
    'r',
    'lora_alpha',
    'rank_pattern',
    'alpha_pattern',
    'use_rslora',
    'fan_in_fan_out',
    'peft_type',
    'bias',
    'target_modules',
    'exclude_modules',
    'layers_to_transform',
    'layers_pattern',
    'lora_dropout',
    'task_type',
    'base_model_name_or_path',
    'revision',
    'auto_mapping',
    'inference_mode',
    'init_lora_weights',
    'peft_version',
    'megatron_core',
    'qalora_group_size',
    'loftq_config',
  }
)


def save(path, model, adapters):
  """Writes a folder that PEFT reads on top of the base model; called by all processes, written by the first.

  Args:
    path: the folder.
    model: Model with its Lora.
    adapters: its trained adapters; those of the top layers alone lie under 'top'.
  """
  tensors, found, in_rows = {}, {}, True
  leaves = sharding.paths(adapters.get('top', adapters))
  shapes = sharding.paths(model.shapes())
  for name, members in _modules(model).items():
    adapted = [(path, source) for path, source in members if f'{path}/lora/a' in leaves]
    if not adapted:
      continue
    scale = model.lora.find(adapted[0][0])[1]
    parts = [
      (
        processes.to_host(leaves[f'{path}/lora/a']).astype(np.float32),
        processes.to_host(leaves[f'{path}/lora/b']).astype(np.float32)
        * (model.lora.find(path)[1] / scale),
        source,
      )
      for path, source in adapted
    ]
    kernels = [shapes[f'{path}/kernel'].shape for path, _ in members]
    a, b = _fuse(parts, sum(shape[-1] for shape in kernels))
    in_rows = adapted[0][1].transpose
    numbers = range(kernels[0][0] - len(a), kernels[0][0]) if adapted[0][1].stacked else [None]
    found[_regex(name, numbers)] = a.shape[-1], scale
    for index, number in enumerate(numbers):
      module = PREFIX + name.format(layer=number)
      here = (a, b) if number is None else (a[index], b[index])
      for letter, array in zip('AB', here):
        tensors[f'{module}.lora_{letter}.weight'] = np.ascontiguousarray(array.T)
  if not processes.is_main_process():
    return
  config = _config(found, model.lora.rslora, fan_in_fan_out=not in_rows)
  with hf_files.replacing(path) as folder:
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={'format': 'pt'})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def _config(found, rslora, *, fan_in_fan_out):
  """The dict of adapter_config.json, for {regex on a module's name: (rank, scale)}."""
  alphas = {name: scale * (rank**0.5 if rslora else rank) for name, (rank, scale) in found.items()}
  ranks = {name: rank for name, (rank, _) in found.items()}
  first = next(iter(found))
  return {
    'peft_type': 'LORA',
    'task_type': None,
    'base_model_name_or_path': None,
    'inference_mode': True,
    'bias': 'none',
    'lora_dropout': 0.0,
    'fan_in_fan_out': fan_in_fan_out,
    'use_rslora': rslora,
    'target_modules': '|'.join(found),
    'r': ranks[first],
    'lora_alpha': alphas[first],
    'rank_pattern': ranks,
    'alpha_pattern': alphas,
  }


def load(path, model):
  """Reads an adapter that PEFT, or `save`, wrote.

  Args:
    path: the folder.
    model: Model of the base weights.

  Returns:
    Lora and adapters (NumPy, float32). Layers that the folder has no adapter for get zeros, which
    change nothing and stay so.

  Raises:
    UserError: files missing; an adapter of another kind, or for another model.
  """
  path = pathlib.Path(path)
  config = hf_files.read_json(path / CONFIG)
  _check(path, config)
  tensors = _tensors(path, model)
  rslora = bool(config.get('use_rslora'))
  shapes, targets, adapters = sharding.paths(model.shapes()), [], {}
  for name, members in _modules(model).items():
    stacked = members[0][1].stacked
    numbers = range(shapes[f'{members[0][0]}/kernel'].shape[0]) if stacked else [None]
    taken = [_take(tensors, name.format(layer=number)) for number in numbers]
    present = [pair for pair in taken if pair is not None]
    if not present:
      continue
    a, b = present[0]
    if any(pair[0].shape != a.shape or pair[1].shape != b.shape for pair in present):
      raise UserError(
        f'{path}: the adapters of {name} have different shapes in different layers; '
        'one rank for all layers is supported'
      )
    alphas = {
      _pattern(config, name.format(layer=number))
      for number, pair in zip(numbers, taken)
      if pair is not None
    }
    if len(alphas) > 1:
      raise UserError(
        f'{path}: alpha_pattern gives {name} different alphas in different layers: {sorted(alphas)}'
      )
    pairs = [(np.zeros_like(a), np.zeros_like(b)) if pair is None else pair for pair in taken]
    a, b = (np.stack(part) if stacked else part[0] for part in zip(*pairs))
    for where, source in members:
      inputs, outputs = shapes[f'{where}/kernel'].shape[-2:]
      if a.shape[-2] != inputs or b.shape[-1] < outputs:
        raise UserError(
          f'{path}: the adapter of {name} is for a map from {a.shape[-2]} to {b.shape[-1]}; the model '
          f'has one from {inputs} to {outputs}'
        )
      lora_lib.insert(adapters, where, {'lora': {'a': a, 'b': b[..., _columns(source, outputs)]}})
      targets.append((f'^{re.escape(where)}$', a.shape[-1], alphas.copy().pop()))
  # Beside the adapter of an unembedding PEFT keeps a copy of the frozen weight.
  tensors = {name for name in tensors if not name.endswith('.base_layer.weight')}
  if tensors:
    raise UserError(
      f'{path}: tensors that fit no linear map of a {model.family} model of this config: '
      f'{", ".join(sorted(tensors)[:6])} ({len(tensors)} in all)'
    )
  return lora_lib.Lora(tuple(targets), rslora=rslora), adapters


def _tensors(path, model):
  """The adapter's arrays by name, read where the header says that none is larger than the model's.

  Raises:
    UserError: no safetensors; or a tensor that is quantised, larger, or not finite.
  """
  if not (path / WEIGHTS).exists():
    raise UserError(
      f'{path}: no {WEIGHTS}, only {sorted(entry.name for entry in path.iterdir())}; '
      'adapters of other kinds (adapter_model.bin, ...) have to be converted to safetensors first'
    )
  largest = max(math.prod(leaf.shape) for leaf in sharding.paths(model.shapes()).values())
  with hf_files.opened(path / WEIGHTS) as file:
    for name in file.keys():
      part = file.get_slice(name)
      if part.get_dtype() not in hf_files.FLOATS:
        raise UserError(
          f'{path}: {name} is {part.get_dtype()}, which is not floating point; convert it first'
        )
      if len(part.get_shape()) != 2 or math.prod(part.get_shape()) > largest:
        raise UserError(
          f'{path}: {name} has shape {tuple(part.get_shape())}, which no adapter of this model has'
        )
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  bad = sorted(name for name, array in tensors.items() if not np.isfinite(array).all())
  if bad:
    raise UserError(
      f'{path}: NaN or infinity in {", ".join(bad[:6])} ({len(bad)}); '
      'take another copy of the adapter'
    )
  return tensors


def _check(path, config):
  """Refuses adapters that are not what lora.py computes."""
  if config.get('peft_type') != 'LORA' or config.get('bias', 'none') != 'none':
    raise UserError(
      f'{path / CONFIG}: peft_type={config.get("peft_type")!r} with bias={config.get("bias")!r}; '
      "only 'LORA' with bias 'none' is supported"
    )
  pattern = config.get('alpha_pattern') or {}
  alphas = [
    config.get('lora_alpha'),
    *(pattern.values() if isinstance(pattern, dict) else [pattern]),
  ]
  if not all(isinstance(alpha, (int, float)) and math.isfinite(alpha) for alpha in alphas):
    raise UserError(
      f'{path / CONFIG}: lora_alpha={config.get("lora_alpha")!r} with '
      f'alpha_pattern={pattern!r}: must be a number, and a dict from regexes to numbers'
    )
  other = {name: value for name, value in config.items() if name not in KNOWN and value}
  if other:
    raise UserError(
      f'{path / CONFIG}: {other} is not supported: the adapter would compute something else'
    )


def _modules(model):
  """Linear maps as the files have them: {module's name: [(path of ours, Source)]}."""
  family = FAMILIES[model.family]
  found = {}
  for path, source in family.sources(model.config).items():
    if path.endswith('/kernel'):
      name = family.PREFIX + source.name.removesuffix('.weight')
      found.setdefault(name, []).append((path.removesuffix('/kernel'), source))
  if not model.config.tie_word_embeddings:
    source = Source(family.UNEMBED, transpose=True)
    found[family.UNEMBED.removesuffix('.weight')] = [('unembed', source)]
  return found


def _columns(source, width):
  """Which columns of the tensor are the parameter's, [width] int."""
  return np.concatenate([np.arange(run.start, run.stop) for run in source.columns.runs(0, width)])


def _fuse(parts, width):
  """One adapter of several on one tensor: A side by side, B on the diagonal.

  Args:
    parts: (a [..., I, r], b [..., r, O], Source) of each.
    width: columns of the tensor.

  Returns:
    A [..., I, R] and B [..., R, width], R the sum of the ranks.
  """
  a = np.concatenate([a for a, _, _ in parts], axis=-1)
  b = np.zeros((*a.shape[:-2], a.shape[-1], width), np.float32)
  row = 0
  for _, part, source in parts:
    rank = part.shape[-2]
    b[..., row : row + rank, _columns(source, part.shape[-1])] = part
    row += rank
  return a, b


def _regex(name, numbers):
  """Regex that finds a module in the given layers."""
  layers = '(' + '|'.join(map(str, numbers)) + ')'
  return re.escape(name).replace(re.escape('{layer}'), layers)


def _take(tensors, module):
  """A [I, r] and B [r, O] of a module, taken out of the dict; None where it has none."""
  names = [f'{PREFIX}{module}.lora_{letter}.weight' for letter in 'AB']
  if not all(name in tensors for name in names):
    return None
  return tuple(tensors.pop(name).astype(np.float32).T for name in names)


def _pattern(config, module):
  """The alpha of a module: of the first key of alpha_pattern that its name ends with, or the general one."""
  for key, alpha in (config.get('alpha_pattern') or {}).items():
    try:
      found = re.match(rf'(.*\.)?({key})$', module)
    except re.error as error:
      raise UserError(
        f'{CONFIG}: alpha_pattern has the key {key!r}, which is no regex: {error}'
      ) from None
    if found:
      return float(alpha)
  return float(config['lora_alpha'])

"""Loads and saves adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

See https://huggingface.co/docs/peft. PEFT adapts linear maps of the Hugging Face model. If such a
map fuses several of ours (query, key and value in GPT-2), one PEFT adapter becomes several of ours
that share A. On saving, our adapters become one PEFT adapter: A side by side, B block-diagonal, and
the rank is the sum of the ranks. The function is the same in both directions.

Letters: L layers, I inputs, O outputs, r rank.
"""

import json
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlhf_jax import checksums
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf_files
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.naming import Source

CONFIG, WEIGHTS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'
BASE = 'base.json'  # {"checksum": base_checksum}; PEFT ignores this file
# Fields that are read here, or that have no effect on a trained adapter. Any other field must be
# null, false or empty, because it could ask for something that lora.py does not compute.
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


def save(path, model, adapters, *, base=None):
  """Saves a folder that PEFT loads onto the base model.

  All processes must call this; the main process writes.

  Args:
    path: Folder to write.
    model: Model with its Lora.
    adapters: Its trained adapters; under 'top' if only the top layers are trained.
    base: Parameters of the base model, whose checksum `check_base` compares; None to save none.
  """
  checksum = None if base is None else base_checksum(base)
  tensors, ranks_and_scales, transposed = {}, {}, True
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
    transposed = adapted[0][1].transpose
    numbers = range(kernels[0][0] - len(a), kernels[0][0]) if adapted[0][1].stacked else [None]
    ranks_and_scales[_regex(name, numbers)] = a.shape[-1], scale
    for index, number in enumerate(numbers):
      module = PREFIX + name.format(layer=number)
      pair = (a, b) if number is None else (a[index], b[index])
      for letter, array in zip('AB', pair):
        tensors[f'{module}.lora_{letter}.weight'] = np.ascontiguousarray(array.T)
  if not processes.is_main_process():
    return
  config = _config(ranks_and_scales, model.lora.rslora, fan_in_fan_out=not transposed)
  with hf_files.atomic_folder(path) as folder:
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={'format': 'pt'})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
    if checksum is not None:
      (folder / BASE).write_text(json.dumps({'checksum': checksum}) + '\n')


def base_checksum(params):
  """Returns a checksum of all parameters of a base model, rounded to bfloat16.

  So it is the same whichever dtype, mesh and processes they are loaded with. All processes must
  call this.
  """
  leaves = sorted(sharding.paths(params).items())
  return checksums.of_json([(name, checksums.of(x.astype(jnp.bfloat16))[0]) for name, x in leaves])


def check_base(path, checksum):
  """Checks that an adapter was trained on a base model, and returns whether that is known.

  Args:
    path: Folder of the adapter. If it was not written by `save`, nothing is known.
    checksum: `base_checksum` of the base model.

  Raises:
    UserError: It was trained on another model.
  """
  path = pathlib.Path(path)
  if not (path / BASE).exists():
    return False
  if hf_files.read_json(path / BASE).get('checksum') != checksum:
    raise UserError(
      f'{path}: this adapter was trained on a base model with other weights. Use the model that '
      'config.model.path named when it was trained.'
    )
  return True


def _config(ranks_and_scales, rslora, *, fan_in_fan_out):
  """Returns the dict of adapter_config.json from {regex on a module's name: (rank, scale)}."""
  alphas = {
    name: scale * (rank**0.5 if rslora else rank)
    for name, (rank, scale) in ranks_and_scales.items()
  }
  ranks = {name: rank for name, (rank, _) in ranks_and_scales.items()}
  first = next(iter(ranks))
  return {
    'peft_type': 'LORA',
    'task_type': None,
    'base_model_name_or_path': None,
    'inference_mode': True,
    'bias': 'none',
    'lora_dropout': 0.0,
    'fan_in_fan_out': fan_in_fan_out,
    'use_rslora': rslora,
    'target_modules': '|'.join(ranks),
    'r': ranks[first],
    'lora_alpha': alphas[first],
    'rank_pattern': ranks,
    'alpha_pattern': alphas,
  }


def load(path, model):
  """Loads an adapter written by PEFT or by `save`.

  Args:
    path: Folder of the adapter.
    model: Model of the base weights.

  Returns:
    (Lora, adapters as float32 NumPy arrays). Layers without an adapter in the folder get A = B = 0,
    which has no effect and stays 0 in training.

  Raises:
    UserError: Files are missing, or the adapter is of an unsupported kind or for another model.
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
        'all layers must have the same rank'
      )
    alphas = {
      _alpha(config, name.format(layer=number))
      for number, pair in zip(numbers, taken)
      if pair is not None
    }
    if len(alphas) > 1:
      raise UserError(
        f'{path}: alpha_pattern gives {name} different alphas in its layers: {sorted(alphas)}; '
        'all layers must have the same alpha'
      )
    pairs = [(np.zeros_like(a), np.zeros_like(b)) if pair is None else pair for pair in taken]
    a, b = (np.stack(part) if stacked else part[0] for part in zip(*pairs))
    for our_path, source in members:
      inputs, outputs = shapes[f'{our_path}/kernel'].shape[-2:]
      if a.shape[-2] != inputs or b.shape[-1] < outputs:
        raise UserError(
          f'{path}: the adapter of {name} is for a linear map from {a.shape[-2]} to {b.shape[-1]}, '
          f'but the one in the model is from {inputs} to {outputs}'
        )
      lora_lib.insert(
        adapters, our_path, {'lora': {'a': a, 'b': b[..., _columns(source, outputs)]}}
      )
      targets.append((f'^{re.escape(our_path)}$', a.shape[-1], alphas.copy().pop()))
  # PEFT saves a copy of the frozen weight with the adapter of an unembedding.
  tensors = {name for name in tensors if not name.endswith('.base_layer.weight')}
  if tensors:
    raise UserError(
      f'{path}: tensors that match no linear map of this {model.family} model: '
      f'{", ".join(sorted(tensors)[:6])} ({len(tensors)} in total)'
    )
  return lora_lib.Lora(tuple(targets), rslora=rslora), adapters


def _tensors(path, model):
  """Reads the adapter's arrays by name, after checking dtypes and shapes in the header.

  Raises:
    UserError: There is no safetensors file, or a tensor is quantised, not finite, or larger than
      every parameter of the model.
  """
  if not (path / WEIGHTS).exists():
    raise UserError(
      f'{path}: has no {WEIGHTS}, only {sorted(entry.name for entry in path.iterdir())}; '
      'convert files of other kinds (adapter_model.bin, ...) to safetensors first'
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
      'use another copy of the adapter'
    )
  return tensors


def _check(path, config):
  """Raises UserError if the config asks for something that lora.py does not compute."""
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
      f'alpha_pattern={pattern!r}: the first must be a number, the second a dict from regexes to '
      'numbers'
    )
  other = {name: value for name, value in config.items() if name not in KNOWN and value}
  if other:
    raise UserError(
      f'{path / CONFIG}: {other} is not supported; only plain LoRA adapters can be loaded'
    )


def _modules(model):
  """Returns the linear maps in the files: {module's name: [(path of our layer, Source)]}."""
  family = FAMILIES[model.family]
  modules = {}
  for path, source in family.sources(model.config).items():
    if path.endswith('/kernel'):
      name = family.PREFIX + source.name.removesuffix('.weight')
      modules.setdefault(name, []).append((path.removesuffix('/kernel'), source))
  if not model.config.tie_word_embeddings:
    source = Source(family.UNEMBED, transpose=True)
    modules[family.UNEMBED.removesuffix('.weight')] = [('unembed', source)]
  return modules


def _columns(source, width):
  """Returns the indices [width] of a parameter's columns in its tensor."""
  return np.concatenate([np.arange(run.start, run.stop) for run in source.columns.runs(0, width)])


def _fuse(parts, width):
  """Fuses the adapters on one tensor: concatenates A, and builds a block-diagonal B.

  Args:
    parts: (A [..., I, r], B [..., r, O], Source) of each adapter.
    width: Number of columns of the tensor.

  Returns:
    A [..., I, R] and B [..., R, width], where R is the sum of the ranks.
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
  """Returns a regex that matches a module in the given layers."""
  layers = '(' + '|'.join(map(str, numbers)) + ')'
  return re.escape(name).replace(re.escape('{layer}'), layers)


def _take(tensors, module):
  """Pops A [I, r] and B [r, O] of a module from the dict; returns None if it has no adapter."""
  names = [f'{PREFIX}{module}.lora_{letter}.weight' for letter in 'AB']
  if not all(name in tensors for name in names):
    return None
  return tuple(tensors.pop(name).astype(np.float32).T for name in names)


def _alpha(config, module):
  """Returns a module's alpha: by the first key of alpha_pattern that matches, else lora_alpha."""
  for key, alpha in (config.get('alpha_pattern') or {}).items():
    try:
      matches = re.match(rf'(.*\.)?({key})$', module)
    except re.error as error:
      raise UserError(
        f'{CONFIG}: alpha_pattern has the key {key!r}, which is not a regex: {error}'
      ) from None
    if matches:
      return float(alpha)
  return float(config['lora_alpha'])

"""Loads and saves Hugging Face folders: config.json, safetensors and tokenizer files.

This does not need transformers: tensor names, transposes and fused tensors are tables in the
families' files. Each device reads only its own shards, and the host holds a few tensors at a time.

A reward model's folder may hold 'score.bias', which transformers does not know (its heads of that
name have no bias). It is written only if it is not zero.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np
import safetensors.numpy

from rlhf_jax import folders
from rlhf_jax import models
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.errors import brief
from rlhf_jax.errors import UserError
from rlhf_jax.models import heads
from rlhf_jax.models import hf_arrays
from rlhf_jax.models import hf_config
from rlhf_jax.models import hf_files
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.naming import Source

MAX_SHARD_BYTES = 5 * 10**9


def load(path, *, mesh=None, dtype='float32', remat='none', unroll=1, param_dtype='float32'):
  """Loads a language model.

  Args:
    path: Folder with config.json and safetensors files, or the workdir of a finished run.
    mesh: Mesh on which the family's rules place the parameters; None for the default device.
    dtype, remat, unroll: Settings of the Model.
    param_dtype: Dtype of the parameters.

  Returns:
    (Model, params).

  Raises:
    UserError: Files are missing or damaged; a config field is unknown or not supported; or a tensor
      is missing, unknown, not finite, or has the wrong shape or dtype.
  """
  model, module, tensors = _open(path, dtype=dtype, remat=remat, unroll=unroll)
  weight, _ = _head_names(model)
  if isinstance(model, models.Encoder):
    raise UserError(
      f'{path}: a {model.family} model cannot generate text; it can only be a reward model'
    )
  if weight in tensors.names():
    raise UserError(
      f'{path}: has {weight}, so it is a reward model, not a language model; '
      'give the folder of a language model'
    )
  shapes, sources = model.shapes(), module.sources(model.config)
  if 'unembed' in shapes:
    sources['unembed/kernel'] = Source(module.UNEMBED, transpose=True)
  params = _read(path, tensors, model, shapes, sources, mesh=mesh, param_dtype=param_dtype)
  return model, params


def load_reward(path, *, mesh=None, dtype='float32', remat='none', unroll=1, param_dtype='float32'):
  """Loads a reward model: a sequence classifier with one label, or one for each of its heads.

  Args:
    path, mesh, dtype, remat, unroll, param_dtype: See `load`.

  Returns:
    (Model, {'backbone': params, 'head': {'kernel': [D], 'bias': []}}); see heads.init_scalar for
    several heads. The backbone has no unembedding, because files of classifiers have none.

  Raises:
    UserError: See `load`; or there are several labels that are not heads of a reward model.
  """
  model, module, tensors = _open(path, dtype=dtype, remat=remat, unroll=unroll)
  head = _read_head(path, tensors, model)
  shapes = {name: tree for name, tree in model.shapes().items() if name != 'unembed'}
  backbone = _read(
    path, tensors, model, shapes, module.sources(model.config), mesh=mesh, param_dtype=param_dtype
  )
  head = jax.tree.map(lambda leaf: leaf.astype(param_dtype), head)
  place = sharding.replicated(mesh) if mesh is not None else None
  return model, {'backbone': backbone, 'head': jax.device_put(head, place)}


def load_encoder(path, *, layers=None):
  """Loads the states of an encoder's tokens: the model without heads.

  Args:
    path: Folder of a masked language model, a classifier or another model of an encoder's family.
    layers: Number of layers to keep, the first ones; None for all.

  Returns:
    (Encoder, params) for `Encoder.token_states`. The pooler, which that does not need and which
    masked language models lack, is 0.

  Raises:
    UserError: See `load`; or the model is no encoder, or has fewer layers.
  """
  model, module, tensors = _open(path, dtype='float32', remat='none', unroll=None)
  if not isinstance(model, models.Encoder):
    raise UserError(f'{path}: a {model.family} model is not an encoder, such as BERT or RoBERTa')
  if layers is not None and not 0 < layers <= model.config.depth:
    raise UserError(f'{path}: has {model.config.depth} layers, so there are no first {layers}')
  shapes, sources = model.shapes(), module.sources(model.config)
  pooler = shapes.pop('pooler')
  unused = {sources[f'pooler/{name}'].name for name in pooler}
  params = _read(
    path, tensors, model, shapes, sources, mesh=None, param_dtype='float32', unused=unused
  )
  params['pooler'] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), pooler)
  if layers is not None:
    params['blocks'] = jax.tree.map(lambda x: x[:layers], params['blocks'])
  return model, params


def save(
  path,
  model,
  params,
  *,
  tokenizer=None,
  head=None,
  files=None,
  max_shard_bytes=MAX_SHARD_BYTES,
):
  """Saves a folder that `load` (or `load_reward`) and transformers can read.

  The complete folder replaces an older one in a single step. All processes must call this; the main
  process writes.

  Args:
    path: Folder to write.
    model: Model.
    params: Its parameters, all of one dtype.
    tokenizer: Tokenizer of transformers to save with the model; its special token ids are written
      to config.json.
    head: Head of a reward model, {'kernel': [D], 'bias': []}; the folder then holds a sequence
      classifier with one label and no unembedding. Several heads, {'kernel': [D, M], 'bias': [M]},
      become the labels reward_0, reward_1 and so on.
    files: {name: {name of a tensor: NumPy array}} of other safetensors files in the folder, or
      None.
    max_shard_bytes: Largest safetensors file; a larger model is written as several files.
  """
  tensors = _tensors(model, params, head)
  if not processes.is_main_process():
    for _ in tensors:
      pass
  else:
    with hf_files.atomic_folder(path) as folder:
      hf_files.write(folder, tensors, max_shard_bytes=max_shard_bytes)
      config = _config_json(model, params, tokenizer, head)
      (folder / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
      if tokenizer is not None:
        tokenizer.save_pretrained(folder)
      for name, contents in (files or {}).items():
        safetensors.numpy.save_file(contents, folder / name)
  processes.barrier()


def read_model(path, **settings):
  """Returns the Model that a folder's config.json describes, without reading parameters."""
  if os.path.isfile(path):
    raise UserError(
      f'{path}: is a file; a model is a folder with config.json and safetensors files'
    )
  file = pathlib.Path(path) / 'config.json'
  fields = hf_files.read_json(file)
  if not isinstance(fields.get('model_type'), str):
    raise UserError(
      f'{file}: model_type is missing or not a string; set it to one of {sorted(FAMILIES)}'
    )
  try:
    model = models.create(fields, **settings)
  except UserError as error:
    raise UserError(f'{file}: {error}') from None
  _check_architectures(file, fields.get('architectures'), FAMILIES[model.family])
  return model


def _open(path, **settings):
  """Returns the Model of a folder, the module of its family, and its hf_files.Tensors."""
  path = folders.find_model(path)
  model = read_model(path, **settings)
  module = FAMILIES[model.family]
  tensors = hf_files.Tensors(path, prefix=module.PREFIX)
  config = model.config.for_tensors(tensors.names())
  return dataclasses.replace(model, config=config), module, tensors


def _check_architectures(file, architectures, module):
  """Raises UserError if `architectures` in a config.json contradicts its model_type.

  Bare models and all heads of the family pass; the tensors show later if the head is the right one.
  """
  if architectures is None:
    return
  expected = module.ARCHITECTURE
  if not isinstance(architectures, list) or not all(
    isinstance(name, str) for name in architectures
  ):
    raise UserError(
      f'{file}: architectures={brief(json.dumps(architectures))}: must be a list of names, '
      f'like ["{expected}"]'
    )
  stem = re.split(r'For[A-Z]|LMHeadModel$', expected)[0]
  of_family = rf'{stem}(\w*Model|For\w+)|{module.CLASSIFIER}'
  if architectures and not any(re.fullmatch(of_family, name) for name in architectures):
    raise UserError(
      f'{file}: architectures={brief(json.dumps(architectures))} is not supported, or contradicts '
      f'model_type; if the model is a "{expected}", write that'
    )


def _head_names(model):
  """Returns the names of the weight and the bias of a reward model's head."""
  return f'{model.config.head}.weight', f'{model.config.head}.bias'


def _read_head(path, tensors, model):
  """Reads a reward model's head or heads as NumPy arrays; see `load_reward`."""
  names = tensors.names()
  weight, bias = _head_names(model)
  if weight not in names:
    raise UserError(
      f'{path}: has no {weight}, so it is not a reward model '
      f'({FAMILIES[model.family].CLASSIFIER} with num_labels 1)'
    )
  count = _head_count(path)
  if tensors.shape(weight) != (count, model.width):
    labels = 'one label' if count == 1 else f'{count} heads in config.json'
    raise UserError(
      f'{path}: {weight} has shape {tensors.shape(weight)}; '
      f'a reward model has {labels}, so it must be ({count}, {model.width})'
    )
  expected = {weight: (count, model.width)} | ({bias: (count,)} if bias in names else {})
  _check(path, tensors, expected)
  kernel = tensors.read(weight, ())
  bias = tensors.read(bias, ()) if bias in names else np.zeros(count, kernel.dtype)
  return {'kernel': kernel.T, 'bias': bias} if count > 1 else {'kernel': kernel[0], 'bias': bias[0]}


def _head_count(path):
  """Returns the number of reward heads that config.json lists; 1 if it lists none."""
  labels = hf_files.read_json(folders.find_model(path) / 'config.json').get('id2label')
  count = len(labels) if isinstance(labels, dict) else 1
  return count if labels == _head_labels(count) else 1


def _head_labels(count):
  """Returns `id2label` of a reward model with several heads."""
  return {str(i): f'reward_{i}' for i in range(count)}


def _read(path, tensors, model, shapes, sources, *, mesh, param_dtype, unused=()):
  """Reads the parameters of a model as a dict of sharded arrays.

  Args:
    path: Folder, for messages.
    tensors: hf_files.Tensors.
    model: Model.
    shapes: Tree of ShapeDtypeStructs to read.
    sources: {path in the tree: Source}.
    mesh, param_dtype: See `load`.
    unused: Names of tensors of the model that may be in the files and are not read.
  """
  expected = _expected(sharding.paths(shapes), sources)
  _check(path, tensors, expected, extra=_extra(tensors, model, {*expected, *unused}))
  _check_copy(path, tensors, model, sources)
  if mesh is None:
    places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
  else:
    places = sharding.shardings(shapes, model.rules, mesh)
  params = sharding.map_with_path(
    lambda name, leaf, place: hf_arrays.read(
      tensors, sources[name], leaf.shape, place, param_dtype
    ),
    shapes,
    places,
  )
  bad = tensors.not_finite()
  if bad:
    raise UserError(
      f'{path}: NaN or infinity in {_some(bad)}; the weights are damaged: '
      'use another copy or an earlier checkpoint'
    )
  return params


def _expected(leaves, sources):
  """Returns {name in the files: shape} of all tensors; the widths of fused parameters add up."""
  widths = collections.Counter()
  for path, leaf in leaves.items():
    widths[sources[path].name] += leaf.shape[-1]
  expected = {}
  for path, leaf in leaves.items():
    source = sources[path]
    shape = (*leaf.shape[1 if source.stacked else 0 : -1], widths[source.name])
    # The limit stops a mistyped depth early; no model has that many layers.
    for layer in range(min(leaf.shape[0], 10000) if source.stacked else 1):
      expected[source.name.format(layer=layer)] = shape[::-1] if source.transpose else shape
  return expected


def _extra(tensors, model, expected):
  """Returns names of tensors that do not belong to the model and are not known to be harmless."""
  module = FAMILIES[model.family]
  ignored = re.compile(module.IGNORED_TENSORS)
  unknown = tensors.names() - set(expected) - set(_head_names(model))
  if model.config.tie_word_embeddings:
    unknown -= {module.UNEMBED}  # some tools save a copy of the tied embedding
  return [name for name in unknown if not ignored.search(name)]


def _check(path, tensors, expected, *, extra=()):
  """Compares names, shapes and dtypes in the files with those of the model, before reading any."""
  names = tensors.names()
  present = {name: shape for name, shape in expected.items() if name in names}
  defects = {
    'missing': set(expected) - names,
    'not of this model': extra,
    'wrong shape': [
      f'{name} is {tensors.shape(name)}, expected {shape}'
      for name, shape in present.items()
      if tensors.shape(name) != shape
    ],
    'not floating point (convert quantised weights first)': [
      f'{name} is {tensors.dtype(name)}'
      for name in present
      if tensors.dtype(name) not in hf_files.FLOATS
    ],
  }
  problems = [f'{label}: {_some(wrong)}' for label, wrong in defects.items() if wrong]
  if problems:
    raise UserError(
      f'{path}: tensors do not match config.json: {"; ".join(problems)}. '
      'Take both from the same model'
    )


def _some(names):
  """Returns the first few of some names, and their number, for a message."""
  return f'{", ".join(sorted(names)[:8])}{" ..." if len(names) > 8 else ""} ({len(names)})'


def _check_copy(path, tensors, model, sources):
  """Raises UserError if the files have an unembedding that differs from the tied embedding."""
  copy = FAMILIES[model.family].UNEMBED
  if (
    not model.config.tie_word_embeddings
    or copy not in tensors.names()
    or 'embed/embedding' not in sources
  ):
    return
  embedding = sources['embed/embedding'].name
  rows, width = tensors.shape(embedding)
  step = max(hf_arrays.STEP_BYTES // (4 * width), 1)
  if tensors.shape(copy) != (rows, width) or not all(
    np.array_equal(
      *(tensors.read(name, (slice(first, min(first + step, rows)),)) for name in (copy, embedding))
    )
    for first in range(0, rows, step)
  ):
    raise UserError(
      f'{path}: {copy} differs from {embedding}, but tie_word_embeddings is true in config.json or '
      f'by default; set it to false to use {copy}, or remove the tensor'
    )


def _tensors(model, params, head):
  """Yields (name, NumPy array) of all tensors to write; gathers a few layers at a time."""
  module = FAMILIES[model.family]
  leaves = sharding.paths(params)
  groups = collections.defaultdict(list)
  for path, source in module.sources(model.config).items():
    groups[source.name].append((source, leaves[path]))
  for name, members in groups.items():
    sources = [source for source, _ in members]
    layers = zip(
      *(
        hf_arrays.layers(leaf) if source.stacked else [processes.to_host(leaf)]
        for source, leaf in members
      )
    )
    for layer, parts in enumerate(layers):
      yield module.PREFIX + name.format(layer=layer), hf_arrays.assemble(sources, parts)
  if head is not None:
    weight, bias = _head_names(model)
    kernel, value = (np.atleast_1d(processes.to_host(head[name]).T) for name in ('kernel', 'bias'))
    yield weight, np.ascontiguousarray(kernel.reshape(len(value), -1))
    if np.any(value) or model.config.head != hf_config.SCORE:
      yield bias, value
  elif not model.config.tie_word_embeddings:
    source = Source(module.UNEMBED, transpose=True)
    yield source.name, hf_arrays.assemble([source], [processes.to_host(leaves['unembed/kernel'])])


def _config_json(model, params, tokenizer, head):
  """Returns the dict to write to config.json."""
  module = FAMILIES[model.family]
  config = model.config.to_hf()
  config['torch_dtype'] = str(
    next(leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating))
  )
  config['architectures'] = [module.ARCHITECTURE if head is None else module.CLASSIFIER]
  if head is not None:
    # transformers counts these labels; without them a classifier has two.
    count = heads.count(head)
    config['id2label'] = _head_labels(count) if count > 1 else {'0': 'reward'}
    config['label2id'] = {name: int(i) for i, name in config['id2label'].items()}
  for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
    token_id = getattr(tokenizer, name, None)
    if token_id is not None and name not in model.config.kept_token_ids:
      config[name] = token_id
  return config

"""Weights from and to Hugging Face folders: config.json, safetensors and tokenizer files.

Nothing of transformers is needed for this: names, transposes and fused tensors are tables in
the families' files. Every tensor goes straight to its place on the mesh, so a model is never
whole on one device.

Beside what transformers knows, a reward model's folder may hold 'score.bias' (their heads have
no bias); it is written only where it is not zero.
"""

import json
import pathlib
import re
import shutil
import uuid

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf_files
from rlhf_jax.models.naming import Source
from rlhf_jax.models.transformer import FAMILIES, Model

HEAD_WEIGHT, HEAD_BIAS, UNEMBED = 'score.weight', 'score.bias', 'lm_head.weight'
MAX_SHARD_BYTES = 5 * 10**9


def load(path, *, mesh=None, dtype='float32', remat='none', unroll=1, param_dtype='float32'):
  """Reads a causal language model.

  Args:
    path: folder with config.json and safetensors files.
    mesh: where the parameters go, by the family's rules; None: the default device.
    dtype, remat, unroll: of the Model.
    param_dtype: of the parameters.

  Returns:
    (Model, params).

  Raises:
    UserError: files missing; a config field that is unknown or not supported; tensors missing,
      left over or of the wrong shape.
  """
  model = _model(path, dtype=dtype, remat=remat, unroll=unroll)
  sources = FAMILIES[model.family].sources(model.config)
  if not model.config.tie_word_embeddings:
    sources['unembed/kernel'] = Source(UNEMBED, transpose=True)
  with hf_files.Tensors(path, prefix=FAMILIES[model.family].PREFIX) as tensors:
    if HEAD_WEIGHT in tensors.names():
      raise UserError(f'{path}: holds {HEAD_WEIGHT}: it is a reward model, not a language model')
    params = _read(path, tensors, model, sources, mesh=mesh, param_dtype=param_dtype)
  return model, params


def load_reward(path, *, mesh=None, dtype='float32', remat='none', unroll=1, param_dtype='float32'):
  """Reads a sequence classifier with one label.

  Args:
    path, mesh, dtype, remat, unroll, param_dtype: see `load`.

  Returns:
    (Model, {'backbone': params, 'head': {'kernel': [D], 'bias': []}}). The backbone has no
    separate unembedding: such files have none.

  Raises:
    UserError: see `load`; or the head has more than one label.
  """
  model = _model(path, dtype=dtype, remat=remat, unroll=unroll)
  with hf_files.Tensors(path, prefix=FAMILIES[model.family].PREFIX) as tensors:
    names = tensors.names()
    if HEAD_WEIGHT not in names:
      raise UserError(f'{path}: has no {HEAD_WEIGHT}: it is not a reward model '
                      f'({FAMILIES[model.family].CLASSIFIER} with num_labels 1)')
    if tensors.shape(HEAD_WEIGHT) != (1, model.width):
      raise UserError(f'{path}: {HEAD_WEIGHT} has shape {tensors.shape(HEAD_WEIGHT)}; '
                      f'a reward model has one label: (1, {model.width})')
    kernel = tensors.read(HEAD_WEIGHT, ())[0]
    bias = tensors.read(HEAD_BIAS, ())[0] if HEAD_BIAS in names else np.zeros((), kernel.dtype)
    sources = FAMILIES[model.family].sources(model.config)
    backbone = _read(path, tensors, model, sources, mesh=mesh, param_dtype=param_dtype)
  place = sharding.replicated(mesh) if mesh is not None else None
  head = {'kernel': np.asarray(kernel, param_dtype), 'bias': np.asarray(bias, param_dtype)}
  return model, {'backbone': backbone, 'head': jax.device_put(head, place)}


def save(path, model, params, *, tokenizer=None, head=None, max_shard_bytes=MAX_SHARD_BYTES):
  """Writes a folder that `load` (or `load_reward`) and transformers read back.

  The folder appears at once when it is complete, in place of an older one. With several
  processes all of them call this and the first one writes.

  Args:
    path: the folder.
    model: the Model.
    params: its parameters, of one dtype.
    tokenizer: of transformers; saved beside, its special token ids go to config.json.
    head: of a reward model, {'kernel': [D], 'bias': []}; the folder then holds a sequence
      classifier with one label, without an unembedding.
    max_shard_bytes: largest safetensors file; a larger model becomes several with an index.
  """
  path = pathlib.Path(path)
  writer = jax.process_index() == 0
  temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex}'
  tensors = _tensors(model, params, head)
  if not writer:
    for _ in tensors:
      pass
  else:
    temporary.mkdir(parents=True)
    try:
      hf_files.write(temporary, tensors, max_shard_bytes=max_shard_bytes)
      config = _config_json(model, params, tokenizer, head)
      (temporary / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
      if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
      _replace(path, temporary)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'saved {path}')


def _model(path, **settings):
  fields = hf_files.read_json(pathlib.Path(path) / 'config.json')
  try:
    return Model.create(fields, **settings)
  except UserError as error:
    raise UserError(f'{path}/config.json: {error}') from None


def _read(path, tensors, model, sources, *, mesh, param_dtype):
  """Parameters of a model as a dict, each array read directly into its shards."""
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  if 'unembed/kernel' not in sources:
    abstract.pop('unembed', None)
  _check(path, tensors, model, sources, abstract)
  if mesh is None:
    places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
  else:
    places = sharding.shardings(abstract, model.rules, mesh)

  def read(name, leaf, place):
    source, found = sources[name], {}

    def part(index):
      if repr(index) not in found:  # Devices that hold the same part share one reading.
        found[repr(index)] = _part(tensors, source, index, leaf.shape).astype(param_dtype)
      return found[repr(index)]

    return jax.make_array_from_callback(leaf.shape, place, part)

  return sharding.map_with_path(read, abstract, places)


def _check(path, tensors, model, sources, abstract):
  """Compares names and shapes in the files with those of the model, all before reading any."""
  expected = {}
  for name, leaf in sharding.paths(abstract).items():
    source = sources[name]
    shape = leaf.shape[1:] if source.stacked else leaf.shape
    shape = shape[::-1] if source.transpose else shape
    shape = shape[:-1] + (shape[-1] * source.parts,)
    for layer in range(model.config.depth if source.stacked else 1):
      expected[source.name.format(layer=layer)] = shape
  names = tensors.names()
  missing = sorted(set(expected) - names)
  ignored = re.compile(FAMILIES[model.family].IGNORED_TENSORS)
  spare = names - set(expected) - {HEAD_WEIGHT, HEAD_BIAS}
  if model.config.tie_word_embeddings:
    spare -= {UNEMBED}  # A copy of the embedding that some writers leave in.
  extra = sorted(name for name in spare if not ignored.search(name))
  wrong = [f'{name} is {tensors.shape(name)} and should be {shape}'
           for name, shape in sorted(expected.items()) if name in names and tensors.shape(name) != shape]
  problems = [f'{label}: {", ".join(found[:8])}{" ..." if len(found) > 8 else ""} ({len(found)})'
              for label, found in (('missing', missing), ('not of this model', extra), ('wrong shape', wrong)) if found]
  if problems:
    raise UserError(f'{path}: tensors do not fit config.json: ' + '; '.join(problems))


def _part(tensors, source, index, shape):
  """Reads the part of a parameter of the given shape that a tuple of slices selects."""
  bounds = [slice(*entry.indices(size)[:2]) for entry, size in zip(index, shape)]
  layers = range(bounds[0].start, bounds[0].stop) if source.stacked else [0]
  inner = bounds[1:] if source.stacked else bounds
  if source.transpose:
    inner = inner[::-1]
  offset = source.part * shape[-1]
  inner[-1] = slice(inner[-1].start + offset, inner[-1].stop + offset)
  read = [tensors.read(source.name.format(layer=layer), tuple(inner)) for layer in layers]
  read = [array.T for array in read] if source.transpose else read
  return np.stack(read) if source.stacked else read[0]


def _tensors(model, params, head):
  """Yields (name in the file, numpy array) for all parameters, one stack of layers at a time."""
  module = FAMILIES[model.family]
  leaves = sharding.paths(params)
  groups = {}
  for path, source in module.sources(model.config).items():
    groups.setdefault(source.name, []).append((source, leaves[path]))
  for name, members in groups.items():
    members.sort(key=lambda member: member[0].part)
    arrays = [_host(leaf) for _, leaf in members]
    stacked, transpose = members[0][0].stacked, members[0][0].transpose
    for layer in range(model.config.depth if stacked else 1):
      parts = [array[layer] if stacked else array for array in arrays]
      whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
      yield module.PREFIX + name.format(layer=layer), np.ascontiguousarray(whole.T if transpose else whole)
  if head is not None:
    yield HEAD_WEIGHT, _host(head['kernel'])[None]
    bias = _host(head['bias'])
    if bias != 0:
      yield HEAD_BIAS, bias[None]
  elif not model.config.tie_word_embeddings:
    yield UNEMBED, np.ascontiguousarray(_host(leaves['unembed/kernel']).T)


def _host(array):
  """The whole of an array as numpy, wherever its shards are."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def _config_json(model, params, tokenizer, head):
  """The dict for config.json."""
  module = FAMILIES[model.family]
  config = model.config.to_hf()
  config['torch_dtype'] = str(jnp.dtype(params['embed']['embedding'].dtype))
  config['architectures'] = [module.ARCHITECTURE if head is None else module.CLASSIFIER]
  if head is not None:
    # Two entries of labels make the default of two; the number of labels is their count.
    config['id2label'] = {'0': 'reward'}
    config['label2id'] = {'reward': 0}
  for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
    given = getattr(tokenizer, name, None)
    if given is not None:
      config[name] = given
  return config


def _replace(path, temporary):
  """Puts the finished folder in place of an older one."""
  if not path.exists():
    temporary.rename(path)
    return
  old = path.parent / f'.{path.name}.{uuid.uuid4().hex}'
  path.rename(old)
  temporary.rename(path)
  shutil.rmtree(old)

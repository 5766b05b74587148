"""Folders of safetensors files: reading slices of tensors, writing shards with an index."""

import contextlib
import json
import pathlib

from safetensors import SafetensorError, safe_open
import safetensors.numpy

from rlhf_jax.errors import UserError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'


def read_json(path):
  """A JSON file as a dict.

  Raises:
    UserError: no such file, or not JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_text())
  except FileNotFoundError:
    raise UserError(f'{path}: no such file; a model folder holds config.json and safetensors files') from None
  except ValueError as error:
    raise UserError(f'{path}: not JSON: {error}') from None


class Tensors:
  """The tensors of a model folder, read lazily. A context manager.

  Args:
    folder: with model.safetensors, or shards and their index.
    prefix: taken off the names that have it (files of bare backbones lack it).

  Raises:
    UserError: files missing or damaged.
  """

  def __init__(self, folder, *, prefix):
    self._folder = pathlib.Path(folder)
    self._stack = contextlib.ExitStack()
    self._slices = {}
    for file in self._files():
      try:
        opened = self._stack.enter_context(safe_open(file, 'np'))
      except (OSError, SafetensorError) as error:
        raise UserError(f'{file}: cannot be read: {error}') from None
      for name in opened.keys():
        self._slices[name.removeprefix(prefix)] = opened.get_slice(name)

  def _files(self):
    if (self._folder / SINGLE).exists():
      return [self._folder / SINGLE]
    if (self._folder / INDEX).exists():
      weight_map = read_json(self._folder / INDEX).get('weight_map', {})
      return [self._folder / file for file in sorted(set(weight_map.values()))]
    raise UserError(f'{self._folder}: no {SINGLE} and no {INDEX}; '
                    'files of other kinds (pytorch_model.bin, ...) have to be converted to safetensors first')

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._stack.close()

  def names(self):
    """Names of all tensors, without the prefix."""
    return set(self._slices)

  def shape(self, name):
    """Shape of a tensor."""
    return tuple(self._slices[name].get_shape())

  def read(self, name, index):
    """The part of a tensor that a tuple of slices selects, as a numpy array; only it is read."""
    return self._slices[name][index] if index else self._slices[name][...]


def write(folder, tensors, *, max_shard_bytes):
  """Writes tensors in order, one file after another, and the index if there is more than one.

  Args:
    folder: exists.
    tensors: iterable of (name, numpy array); no more than a shard of them is held at a time.
    max_shard_bytes: size beyond which a new file is begun.
  """
  folder = pathlib.Path(folder)
  shards, held, size, total = [], {}, 0, 0

  def flush():
    file = folder / f'shard-{len(shards):05d}'
    safetensors.numpy.save_file(held, file, metadata={'format': 'pt'})
    shards.append((file, list(held)))

  for name, array in tensors:
    if held and size + array.nbytes > max_shard_bytes:
      flush()
      held, size = {}, 0
    held[name] = array
    size += array.nbytes
    total += array.nbytes
  flush()
  if len(shards) == 1:
    shards[0][0].rename(folder / SINGLE)
    return
  weight_map = {}
  for number, (file, names) in enumerate(shards, 1):
    final = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    file.rename(folder / final)
    weight_map |= dict.fromkeys(names, final)
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')

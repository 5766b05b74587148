"""Folders of safetensors files: reading slices of tensors, writing shards with an index."""

import contextlib
import json
import os
import pathlib
import shutil
from typing import NamedTuple
import uuid

import numpy as np
from safetensors import safe_open
from safetensors import SafetensorError
import safetensors.numpy

from rlhf_jax import folders
from rlhf_jax.errors import UserError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
FLOATS = ('F64', 'F32', 'F16', 'BF16')


def read_json(path):
  """A JSON file as a dict.

  Raises:
    UserError: no such file, or not a JSON object.
  """
  try:
    folders.check_file(path)
    content = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(
      f'{path}: no such file; a model folder holds config.json and safetensors files'
    ) from None
  except OSError as error:
    raise UserError(f'{path}: cannot be read: {error.strerror}') from None
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: not JSON: {error}; mend it or copy it again') from None
  if not isinstance(content, dict):
    raise UserError(
      f'{path}: holds a JSON {type(content).__name__} and should hold an object, {{...}}'
    )
  return content


class _Entry(NamedTuple):
  """One tensor: the file it is in, its name there, shape and dtype as safetensors spells it."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str


class Tensors:
  """The tensors of a model folder, read lazily.

  Args:
    folder: with model.safetensors, or shards and their index.
    prefix: taken off the names that have it (files of bare backbones lack it).

  Raises:
    UserError: files missing or damaged, or the index and they do not agree.
  """

  def __init__(self, folder, *, prefix):
    self._entries = {}
    self._not_finite = set()
    for file, listed in _layout(pathlib.Path(folder)).items():
      for entry in _entries(file, listed):
        name = entry.name.removeprefix(prefix)
        other = self._entries.setdefault(name, entry)
        if other is not entry:
          raise UserError(
            f'{folder}: {entry.name} is there twice, in {other.file.name} (as {other.name}) '
            f'and {entry.file.name}; remove one of them'
          )

  def names(self):
    """Names of all tensors, without the prefix."""
    return set(self._entries)

  def shape(self, name):
    """Shape of a tensor."""
    return self._entries[name].shape

  def dtype(self, name):
    """Dtype of a tensor as safetensors spells it: 'F32', 'BF16', 'I8', ..."""
    return self._entries[name].dtype

  def read(self, name, *indices, axis=0):
    """The parts of a tensor that tuples of slices select, joined along an axis, as a numpy array.

    The file is opened for this alone: pages read from one that stays open count as memory of the
    process. Double precision, which no parameter has, is read as float32.
    """
    entry = self._entries[name]
    with opened(entry.file) as file:
      tensor = file.get_slice(entry.name)
      parts = [tensor[index] for index in indices]
      del tensor  # It keeps the file open as well.
    array = np.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    array = array.astype(np.float32) if entry.dtype == 'F64' else array
    if not np.isfinite(array).all():
      self._not_finite.add(name)
    return array

  def not_finite(self):
    """Names of the tensors that were found, while reading them, to hold NaN or infinity."""
    return set(self._not_finite)


@contextlib.contextmanager
def opened(file):
  """A safetensors file, open; the library checks that its header fits its size.

  Raises:
    UserError: it cannot be read.
  """
  if file.exists() and not file.is_file():
    raise UserError(f'{file}: cannot be read: it is a folder, a device or a pipe, not a file')
  try:
    with safe_open(file, 'np') as tensors:
      yield tensors
  except (OSError, SafetensorError) as error:
    raise UserError(
      f'{file}: cannot be read as safetensors ({error}); if it was cut off or is a placeholder '
      'for the real file, copy or download it again'
    ) from None


def _layout(folder):
  """The files of a folder: {path: names of the tensors it has to hold, or None where no index says}."""
  single, index = folder / SINGLE, folder / INDEX
  if not index.exists():
    if not single.exists():
      held = sorted(os.listdir(folder)) if folder.is_dir() else []
      raise UserError(
        f'{folder}: no {SINGLE} and no {INDEX}, only {held}; '
        'files of other kinds (pytorch_model.bin, ...) have to be converted to safetensors first'
      )
    return {single: None}
  layout = {}
  for name, file in _weight_map(index).items():
    layout.setdefault(folder / file, set()).add(name)
  missing = sorted(file.name for file in layout if not file.exists())
  if missing:
    raise UserError(
      f'{index}: names files that are not there: {", ".join(missing)}; copy or download them'
    )
  if single.exists() and single not in layout:
    raise UserError(
      f'{folder}: holds both {SINGLE} and {INDEX} with other files; remove those that are out of date'
    )
  return dict(sorted(layout.items()))


def _weight_map(index):
  """The index's {name of a tensor: name of a file}."""
  found = read_json(index).get('weight_map')
  if not isinstance(found, dict) or not found:
    raise UserError(f'{index}: has no weight_map from names of tensors to names of files')
  for name, file in found.items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise UserError(
        f'{index}: weight_map[{name!r}] is {file!r} and should be the name of a file beside it'
      )
  return found


def _entries(file, listed):
  """The tensors of one file, checked against the names that the index lists for it (None: no index)."""
  with opened(file) as tensors:
    entries = []
    for name in tensors.keys():
      tensor = tensors.get_slice(name)
      entries.append(_Entry(file, name, tuple(tensor.get_shape()), tensor.get_dtype()))
  names = {entry.name for entry in entries}
  if listed is not None and names != listed:
    problems = [
      f'{label} {", ".join(sorted(wrong)[:8])} ({len(wrong)})'
      for label, wrong in (('lacks', listed - names), ('holds, unlisted,', names - listed))
      if wrong
    ]
    raise UserError(
      f'{file}: does not hold what {INDEX} says: it {"; it ".join(problems)}; '
      'the files are of different models or writings, take all from one'
    )
  return entries


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
    held[name] = np.ascontiguousarray(array)  # The writer copies memory as it lies.
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


@contextlib.contextmanager
def replacing(path):
  """A folder to write to, in the place of `path` when the body ends, and removed where it raises.

  What a killed process leaves has a name that `workdir.remove_leftovers` knows.
  """
  path = pathlib.Path(path)
  temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex}'
  temporary.mkdir(parents=True)
  try:
    yield temporary
    settle(temporary)
    if path.exists():
      old = path.parent / f'.{path.name}.{uuid.uuid4().hex}'
      path.rename(old)
      temporary.rename(path)
      shutil.rmtree(old)
    else:
      temporary.rename(path)
    sync(path.parent)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def settle(folder):
  """Makes a folder's files as readable as other new files, and waits until the disk has them."""
  mask = os.umask(0)
  os.umask(mask)
  folder = pathlib.Path(folder)
  for path in [*folder.rglob('*'), folder]:
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)  # safetensors lets the owner alone read
    sync(path)


def sync(path):
  """Waits until the disk has a file, or the names in a folder."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)

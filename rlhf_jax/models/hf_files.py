"""Reads slices of tensors from folders of safetensors files, and writes such folders."""

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
  """Reads a JSON object as a dict.

  Raises:
    UserError: The file does not exist, cannot be read or does not hold a JSON object.
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
    raise UserError(f'{path}: not JSON: {error}; fix it or copy it again') from None
  if not isinstance(content, dict):
    raise UserError(
      f'{path}: holds a JSON {type(content).__name__}; it must hold an object, {{...}}'
    )
  return content


class _Entry(NamedTuple):
  """A tensor: its file, its name there, its shape, and its dtype as safetensors spells it."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str


class Tensors:
  """The tensors of a model folder, read lazily.

  Args:
    folder: Folder with model.safetensors, or with shards and their index.
    prefix: Prefix to remove from names; files of bare backbones lack it.

  Raises:
    UserError: Files are missing or damaged, or do not match the index.
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
            f'{folder}: holds {entry.name} twice, in {other.file.name} (as {other.name}) '
            f'and {entry.file.name}; remove one of them'
          )

  def names(self):
    """Returns the names of all tensors, without the prefix."""
    return set(self._entries)

  def shape(self, name):
    """Returns the shape of a tensor."""
    return self._entries[name].shape

  def dtype(self, name):
    """Returns the dtype of a tensor as safetensors spells it: 'F32', 'BF16', 'I8', ..."""
    return self._entries[name].dtype

  def read(self, name, *indices, axis=0):
    """Reads slices of a tensor and concatenates them as a NumPy array.

    The file is opened for each call, because pages read from a file that stays open count as memory
    of the process. float64, which no parameter has, is converted to float32.

    Args:
      name: Name of the tensor.
      *indices: Tuples of slices.
      axis: Axis along which the selected parts are concatenated.
    """
    entry = self._entries[name]
    with opened(entry.file) as file:
      tensor = file.get_slice(entry.name)
      parts = [tensor[index] for index in indices]
      del tensor  # it also keeps the file open
    array = np.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    array = array.astype(np.float32) if entry.dtype == 'F64' else array
    if not np.isfinite(array).all():
      self._not_finite.add(name)
    return array

  def not_finite(self):
    """Returns the names of the tensors read so far that hold NaN or infinity."""
    return set(self._not_finite)


@contextlib.contextmanager
def opened(file):
  """Opens a safetensors file; the library checks that the header matches the file's size.

  Raises:
    UserError: The file cannot be read.
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
  """Returns {file: names of its tensors that the index lists, or None without an index}."""
  single, index = folder / SINGLE, folder / INDEX
  if not index.exists():
    if not single.exists():
      present = sorted(os.listdir(folder)) if folder.is_dir() else []
      raise UserError(
        f'{folder}: has neither {SINGLE} nor {INDEX}, only {present}; '
        'convert files of other kinds (pytorch_model.bin, ...) to safetensors first'
      )
    return {single: None}
  layout = {}
  for name, file in _weight_map(index).items():
    layout.setdefault(folder / file, set()).add(name)
  missing = sorted(file.name for file in layout if not file.exists())
  if missing:
    raise UserError(
      f'{index}: lists files that do not exist: {", ".join(missing)}; copy or download them'
    )
  if single.exists() and single not in layout:
    raise UserError(
      f'{folder}: holds both {SINGLE} and {INDEX}, which lists other files; remove the outdated'
    )
  return dict(sorted(layout.items()))


def _weight_map(index):
  """Reads {name of a tensor: name of its file} from an index."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index}: has no weight_map from names of tensors to names of files')
  for name, file in weight_map.items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise UserError(
        f'{index}: weight_map[{name!r}] is {file!r}; it must name a file in the same folder'
      )
  return weight_map


def _entries(file, listed):
  """Returns the tensors of a file, after comparing their names with those that the index lists.

  Args:
    file: Path of the file.
    listed: Set of names, or None if there is no index.
  """
  with opened(file) as tensors:
    entries = []
    for name in tensors.keys():
      tensor = tensors.get_slice(name)
      entries.append(_Entry(file, name, tuple(tensor.get_shape()), tensor.get_dtype()))
  names = {entry.name for entry in entries}
  if listed is not None and names != listed:
    problems = [
      f'{label} {", ".join(sorted(wrong)[:8])} ({len(wrong)})'
      for label, wrong in (('lacks', listed - names), ('also holds', names - listed))
      if wrong
    ]
    raise UserError(
      f'{file}: does not match {INDEX}: it {"; it ".join(problems)}; '
      'the files come from different models or saves: take all of them from one'
    )
  return entries


def write(folder, tensors, *, max_shard_bytes):
  """Writes tensors in order to one or more files, and an index if there are several files.

  Args:
    folder: Existing folder.
    tensors: Iterable of (name, NumPy array); at most one shard of them is in memory at a time.
    max_shard_bytes: Largest size of a file, unless a single tensor is larger.
  """
  folder = pathlib.Path(folder)
  shards, shard, size, total = [], {}, 0, 0

  def flush():
    file = folder / f'shard-{len(shards):05d}'
    safetensors.numpy.save_file(shard, file, metadata={'format': 'pt'})
    shards.append((file, list(shard)))

  for name, array in tensors:
    if shard and size + array.nbytes > max_shard_bytes:
      flush()
      shard, size = {}, 0
    shard[name] = np.ascontiguousarray(array)  # the writer ignores strides
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
def atomic_folder(path):
  """Yields a temporary folder to write to, which replaces `path` if the body does not raise.

  `workdir.remove_leftovers` removes the temporary folder of a killed process by its name.
  """
  path = pathlib.Path(path)
  temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex}'
  temporary.mkdir(parents=True)
  try:
    yield temporary
    flush_folder(temporary)
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


def flush_folder(folder):
  """Gives the files of a folder default permissions, and flushes them to disk."""
  mask = os.umask(0)
  os.umask(mask)
  folder = pathlib.Path(folder)
  for path in [*folder.rglob('*'), folder]:
    # safetensors makes its files readable by the owner only.
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    sync(path)


def sync(path):
  """Flushes a file, or the list of a folder's files, to disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)

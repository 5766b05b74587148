"""Finds the folder of a model if a user names the folder of a run; checks and replaces files."""

from collections.abc import Iterator
import contextlib
import errno
import json
import os
import pathlib
import stat
from typing import BinaryIO

from rlhf_jax import errors

MAX_BYTES = 512 * 2**20  # largest file that is read at once; the largest tokenizers have 40 MiB


def check_file(path):
  """Raises OSError if a path is a device or a pipe, or a file too large to be read at once."""
  status = os.stat(path)
  if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
    raise OSError(errno.EINVAL, 'is a device or a pipe, not a file', os.fspath(path))
  if status.st_size > MAX_BYTES:
    raise OSError(
      errno.EFBIG, f'has {status.st_size} bytes, and at most {MAX_BYTES} are read', os.fspath(path)
    )


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file that replaces `path` when all of it is written; creates the folder.

  Readers see the old file or the new one. Processes, also of several machines, may write at once.

  Raises:
    OSError: The file cannot be written.
  """
  temporary = path.with_name(f'{path.name}.{os.uname().nodename}.{os.getpid()}.tmp')
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(temporary, 'wb') as stream:
    yield stream
  os.replace(temporary, path)


def find_model(path):
  """Returns the folder of a model: the path itself, or `model/` in the folder of a run.

  Both have a config.json: that of a model has a `model_type`, that of a run an `algorithm`.

  Args:
    path: Folder of a model or of a finished run.

  Returns:
    pathlib.Path of the model; the path itself if it is neither.

  Raises:
    UserError: It is the folder of a pipeline, or of a run that has not finished.
  """
  path = pathlib.Path(path)
  try:
    check_file(path / 'config.json')
    fields = json.loads((path / 'config.json').read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    fields = {}
  if not isinstance(fields, dict) or 'model_type' in fields:
    return path
  if (path / 'model').is_dir():
    return path / 'model'
  if 'stages' in fields:
    raise errors.UserError(
      f'{path}: is the folder of a pipeline: name the folder of a stage, such as {path}/'
      f'{fields["stages"][-1]}'
    )
  if 'algorithm' in fields:
    raise errors.UserError(
      f'{path}: is the folder of a run that has not finished, and holds no model yet: '
      'resume it with the same command'
    )
  return path

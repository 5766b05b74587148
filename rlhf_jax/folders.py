"""Which folder a model is in, where a user names that of a run."""

import errno
import json
import os
import pathlib
import stat

from rlhf_jax import errors

MOST_BYTES = 512 * 2**20  # of a file that is read whole; the largest tokenizers have 40 MiB


def check_file(path):
  """Raises OSError where a file may have no end, or is too large to be read whole."""
  status = os.stat(path)
  if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
    raise OSError(errno.EINVAL, 'is a device or a pipe, not a file', os.fspath(path))
  if status.st_size > MOST_BYTES:
    raise OSError(
      errno.EFBIG, f'has {status.st_size} bytes, and at most {MOST_BYTES} are read', os.fspath(path)
    )


def model(path):
  """The Hugging Face folder that a path names: itself, or `model/` in the folder of a finished run.

  Both have a config.json; that of a model has a `model_type`, that of a run an `algorithm`.

  Args:
    path: folder.

  Returns:
    pathlib.Path; where there is nothing it knows, the path itself.

  Raises:
    UserError: it is the folder of a pipeline, or of a run that has not finished.
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
      f'{path}: is the folder of a pipeline: name that of a stage, such as {path}/'
      f'{fields["stages"][-1]}'
    )
  if 'algorithm' in fields:
    raise errors.UserError(
      f'{path}: is the folder of a run that has not finished, and holds no model yet: '
      'resume it with the same command'
    )
  return path

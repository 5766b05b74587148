"""Which folder a model is in, where a user names that of a run."""

import json
import pathlib

from rlhf_jax import errors


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
    fields = json.loads((path / 'config.json').read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    fields = {}
  if not isinstance(fields, dict) or 'model_type' in fields:
    return path
  if (path / 'model').is_dir():
    return path / 'model'
  if 'stages' in fields:
    raise errors.UserError(f'{path}: is the folder of a pipeline: name that of a stage, such as {path}/'
                           f'{fields["stages"][-1]}')
  if 'algorithm' in fields:
    raise errors.UserError(f'{path}: is the folder of a run that has not finished, and holds no model yet: '
                           'resume it with the same command')
  return path

"""The Q functions of ILQL in a model's folder, beside the policy.

The file is not read by transformers. It holds the two Q heads that guide the sampler and, if they
have a backbone of their own, its parameters; see rollout/guided.py.
"""

import pathlib

import jax.numpy as jnp

from rlhf_jax import folders
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.models import hf_files

FILE = 'q_functions.safetensors'


def files(params):
  """Returns {name of the file: {path of a parameter: NumPy array}}, for `hf.save`.

  All processes must call this.

  Args:
    params: {'q1', 'q2' and, if they have one, 'backbone'}.
  """
  return {FILE: {path: processes.to_host(x) for path, x in sharding.paths(params).items()}}


def load(path):
  """Reads Q functions.

  Args:
    path: Folder of a model, or of the run that trained it.

  Returns:
    See `files`; None if the folder has no such file.

  Raises:
    UserError: The file is damaged.
  """
  file = pathlib.Path(folders.find_model(path)) / FILE
  if not file.exists():
    return None
  params = {}
  with hf_files.opened(file) as tensors:
    for name in tensors.keys():
      *parents, leaf = name.split('/')
      node = params
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = jnp.asarray(tensors.get_tensor(name))
  return params

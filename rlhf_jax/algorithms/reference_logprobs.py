"""Log-probabilities of data by the reference, computed once before training and kept on disk.

A file belongs to one reference and one data set: it has a fingerprint of the parameters, of the
model's description and of the tokens. With another model or other data it is refused.

Letters: N examples, B rows of a batch, M examples of a row.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any
import zipfile

import jax
from jaxtyping import Array, Float, PyTree
import numpy as np

from rlhf_jax import checksums
from rlhf_jax import errors
from rlhf_jax import folders
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import pipelines
from rlhf_jax.data import preferences
from rlhf_jax.data import progress

FOLDER = 'reference_logprobs'  # in the folder of the run


@dataclasses.dataclass
class ReferenceLogprobs:
  """Log-probabilities of the data sets of a run by its reference.

  Attributes:
    logprobs: Jitted function (parameters, types.Preferences) -> [B, 2, M].
    params: Parameters of the reference, in arrays that are not donated before `prepare` returns.
    model: JSON value that describes the model, without its parameters.
    batch_size: B.
    mesh: Device mesh.
    folder: Folder of the files; None for FOLDER in the folder of the run.
    rows: {name: preferences.Rows} of the data sets.
    arrays: {name: [N, 2] float32} of the data sets that are ready.
  """

  logprobs: Callable[[PyTree, types.Preferences], Float[Array, 'B 2 M']]
  params: PyTree
  model: Any
  batch_size: int
  mesh: jax.sharding.Mesh
  folder: str | None = None
  rows: dict[str, preferences.Rows] = dataclasses.field(default_factory=dict)
  arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def prepare(self, workdir: pathlib.Path | None = None) -> None:
    """Reads or computes the log-probabilities of all data sets, and frees the reference.

    Args:
      workdir: Folder of the run; None keeps nothing on disk.

    Raises:
      UserError: A file is of another model or other data, or cannot be read.
    """
    missing = [name for name in self.rows if name not in self.arrays]
    if not missing:
      return
    if workdir is not None:
      folder = pathlib.Path(self.folder) if self.folder else workdir / FOLDER
      model = fingerprint(self.params, self.model)
    for name in missing:
      if workdir is None:
        self.arrays[name] = self._compute(name)
        continue
      path = folder / f'{name}.npz'
      now = {'model': model, 'data': self.rows[name].digest()}
      if not processes.broadcast_scalar(path.exists()):
        computed = self._compute(name)
        processes.run_on_main_process(lambda: write(path, computed, now))
        processes.wait_for_file(path)
      self.arrays[name] = read(path, now)
    self.params = None

  def look_up(self, name: str, batch: types.Preferences) -> types.Preferences:
    """Returns a batch of a data set with its `ref_logprobs`."""
    self.prepare()
    values = self.arrays[name][np.maximum(batch.index, 0)]  # [B, M, 2]
    return batch.replace(ref_logprobs=np.moveaxis(values, 2, 1))

  def _compute(self, name):
    rows = self.rows[name]
    result = np.zeros((len(rows.data), 2), np.float32)
    batches = pipelines.preference_batches(rows, batch_size=self.batch_size)
    total = -(-len(rows.index) // self.batch_size)
    for batch, _ in progress.bar(
      batches, 'log-probabilities of the reference', 'batches', total=total
    ):
      found = processes.to_host(self.logprobs(self.params, sharding.put_rows(batch, self.mesh)))
      result[batch.index[batch.present]] = np.moveaxis(found, 1, 2)[batch.present]
    return result


def fingerprint(params: PyTree, model: Any) -> int:
  """Returns a checksum of a model's parameters and description.

  All processes that hold a shard of the parameters must call this.

  Args:
    params: Parameters.
    model: JSON value.
  """
  sums = {path: checksums.of(array)[0] for path, array in sharding.paths(params).items()}
  return checksums.of_json([model, sums])


def write(path: pathlib.Path, logprobs: np.ndarray, expected: dict[str, Any]) -> None:
  """Writes log-probabilities and the fingerprint that `read` will expect, atomically.

  Raises:
    UserError: The file cannot be written.
  """
  try:
    with folders.replacing(path) as stream:
      np.savez(stream, logprobs=logprobs, fingerprint=json.dumps(expected))
  except OSError as error:
    raise errors.UserError(
      f'{path}: the log-probabilities of the reference cannot be written ({error}). Free some '
      'space, or set config.dpo.reference_logprobs to another folder.'
    ) from error


def read(path: pathlib.Path, expected: dict[str, Any]) -> np.ndarray:
  """Returns log-probabilities [N, 2] that `write` has written.

  Args:
    path: File.
    expected: {'model': checksum, 'data': hash}, which must be that of the file.

  Raises:
    UserError: The file cannot be read, or has another fingerprint.
  """
  remedy = (
    'Delete the file to compute them again, or set config.dpo.reference_logprobs to another folder.'
  )
  try:
    with np.load(path) as stored:
      logprobs, recorded = stored['logprobs'], json.loads(str(stored['fingerprint']))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise errors.UserError(
      f'{path}: the log-probabilities of the reference cannot be read ({error}). {remedy}'
    ) from error
  differ = [name for name in expected if recorded.get(name) != expected[name]]
  if differ:
    which = ' and '.join({'model': 'another reference', 'data': 'other data'}[n] for n in differ)
    raise errors.UserError(
      f'{path} holds the log-probabilities of {which} than this run has: the parameters of the '
      f'model, the texts, the tokenizer or config.data have changed. {remedy}'
    )
  return logprobs

"""Compiles programs for TPUs on a machine without one, and caches the analysis on disk.

libtpu can compile for a topology from its description alone (jax.experimental.topologies).
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from typing import NamedTuple

from absl import logging
import jax
from jax.experimental import topologies

from planner import hlo
from rlhf_jax import errors

# '... temporaries (36.55G) exceeds available HBM (15.75G)', or 'Used 36.55G of 15.75G hbm'.
TOO_LARGE = re.compile(r'([\d.]+)([KMG])\)? (?:exceeds available HBM|of [\d.]+[KMG] hbm)')
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30}
# Without these settings libtpu queries the cloud for the type of the machine.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_MIN_LOG_LEVEL': '3',
}


class Compiled(NamedTuple):
  """The compiler's analysis of a program on one chip.

  Attributes:
    temporaries: Bytes of temporaries, without arguments and results.
    results: Bytes of results that do not alias an argument.
    cycles: The compiler's estimate of cycles.
    sent: [[kind of collective, chips per group, bytes, number of calls], ...].
    unbounded: Number of loops counted as one iteration because their trip count is unknown.
    seconds: Compile time.
    needed: Bytes of temporaries if the program does not fit into memory, else 0. If it does not
      fit, nothing else is known.
  """

  temporaries: float
  results: float
  cycles: float
  sent: list[list]
  unbounded: int
  seconds: float
  needed: float = 0.0


def devices(topology):
  """Returns the devices of a topology such as 'v5e:16x16'.

  Raises:
    UserError: libtpu is not installed, is in use, or does not know the topology.
  """
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    version = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise errors.UserError(
      'planner needs the TPU compiler of the package libtpu, which works without a TPU: '
      "pip install 'jax[tpu]'. Install it in a separate environment: JAX looks for a TPU first."
    ) from None
  try:
    with hide_stderr():
      return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:  # libtpu's exceptions are not documented
    text = ' '.join(str(error).split())
    remedy = (
      'only one process at a time can load libtpu: wait for the other one, or set '
      'ALLOW_MULTIPLE_LIBTPU_LOAD=1'
      if 'lock' in text.lower() or 'in use' in text
      else 'choose another --topology, such as v5e:4x4'
    )
    raise errors.UserError(
      f'libtpu {version} cannot describe the topology {topology!r} ({text[:300]}): {remedy}'
    ) from error


@contextlib.contextmanager
def hide_stderr():
  """Hides stderr while libtpu is loaded, because it complains that there is no TPU."""
  sys.stderr.flush()
  original = os.dup(2)
  with open(os.devnull, 'w') as null:
    os.dup2(null.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(original, 2)
      os.close(original)


def compile(function, arguments, mesh, *, effort, folder):
  """Compiles a program, or reads its analysis from the cache.

  Args:
    function: Jitted function.
    arguments: ShapeDtypeStructs on `mesh`.
    mesh: Mesh of a topology's devices.
    effort: Optimization effort of the compiler, -1 to 1; real runs use 0.
    folder: Folder of the cache.

  Returns:
    Compiled.
  """
  with jax.set_mesh(mesh):
    lowered = function.lower(*arguments)
    device = mesh.devices.flat[0]
    key = '\n'.join(
      [
        lowered.as_text(),
        device.device_kind,
        str([d.id for d in mesh.devices.flat]),
        str(effort),
        jax.__version__,
        importlib.metadata.version('libtpu'),
      ]
    )
    path = pathlib.Path(folder) / f'{hashlib.sha256(key.encode()).hexdigest()[:32]}.json'
    if path.exists():
      return Compiled(**json.loads(path.read_text()))
    started = time.perf_counter()
    jax.config.update('jax_exec_time_optimization_effort', effort)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      match = TOO_LARGE.search(str(error))
      if match is None:
        raise
      needed = float(match.group(1)) * UNITS[match.group(2)]
      result = Compiled(0.0, 0.0, 0.0, [], 0, time.perf_counter() - started, needed)
    else:
      result = read(compiled, time.perf_counter() - started)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(result._asdict()))
  os.replace(temporary, path)
  return result


def read(compiled, seconds):
  """Returns the Compiled of a jax.stages.Compiled and its compile time."""
  memory = compiled.memory_analysis()
  totals = hlo.totals(compiled.as_text())
  if totals.unbounded:
    logging.warning(
      '%d loops have an unknown trip count and are counted as one iteration', totals.unbounded
    )
  sent = [
    [kind, size, amount, totals.calls[kind, size]] for (kind, size), amount in totals.sent.items()
  ]
  return Compiled(
    memory.temp_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    totals.cycles,
    sorted(sent, key=lambda row: -row[2]),
    totals.unbounded,
    seconds,
  )

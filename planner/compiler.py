"""The TPU's compiler on a machine without one, and what it says of a program; kept on disk.

libtpu compiles for topologies that are only described (jax.experimental.topologies).
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
# libtpu would ask the cloud what machine it is on.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_MIN_LOG_LEVEL': '3',
}


class Compiled(NamedTuple):
  """A program on one chip.

  Attributes:
    temporaries: bytes it needs beside arguments and results.
    results: bytes of results that take no argument's place.
    cycles: the compiler's estimate.
    sent: [[kind of collective, chips of a group, bytes, times run], ...].
    unbounded: loops counted once for want of a number of rounds.
    seconds: that the compiler took.
    needed: 0; or the temporaries of a program that does not fit the memory, of which nothing else
      is known.
  """

  temporaries: float
  results: float
  cycles: float
  sent: list[list]
  unbounded: int
  seconds: float
  needed: float = 0.0


def devices(topology):
  """The devices of a topology such as 'v5e:16x16'.

  Raises:
    UserError: libtpu is not installed, is in use, or does not know the topology.
  """
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    version = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise errors.UserError(
      'planner needs the TPU compiler, in the package libtpu, which works without a TPU: '
      "pip install 'jax[tpu]'. Elsewhere keep it out: JAX would look for a TPU first."
    ) from None
  try:
    with quiet():
      return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:  # whatever libtpu raises
    text = ' '.join(str(error).split())
    remedy = (
      'only one process at a time can load libtpu: wait for the other, or set '
      'ALLOW_MULTIPLE_LIBTPU_LOAD=1'
      if 'lock' in text.lower() or 'in use' in text
      else 'choose another --topology, such as v5e:4x4'
    )
    raise errors.UserError(
      f'libtpu {version} gives no topology {topology!r} ({text[:300]}): {remedy}'
    ) from error


@contextlib.contextmanager
def quiet():
  """Hides what libtpu writes to stderr while it is loaded: complaints that there is no TPU."""
  sys.stderr.flush()
  kept = os.dup(2)
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)


def compile(function, arguments, mesh, *, effort, folder):
  """Compiles a program, or finds what was said of it before.

  Args:
    function: jitted.
    arguments: ShapeDtypeStructs on `mesh`.
    mesh: of a topology's devices.
    effort: -1 to 1, what the compiler spends on fast code; runs have 0.
    folder: where results are kept.

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
  """Compiled of a jax.stages.Compiled."""
  memory = compiled.memory_analysis()
  totals = hlo.totals(compiled.as_text())
  if totals.unbounded:
    logging.warning(
      '%d loops have no known number of rounds and are counted once', totals.unbounded
    )
  sent = [
    [kind, size, amount, totals.rounds[kind, size]] for (kind, size), amount in totals.sent.items()
  ]
  return Compiled(
    memory.temp_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    totals.cycles,
    sorted(sent, key=lambda row: -row[2]),
    totals.unbounded,
    seconds,
  )

"""Process-wide settings: several hosts, compiled programs kept on disk, memory kept by malloc."""

import ctypes
import os
import pathlib

from absl import logging
import jax


def configure():
  """Joins the other processes of a cluster, and keeps compiled programs for the next start.

  Also keeps freed memory in the process, see `keep_memory`.

  On Cloud TPU pods, under SLURM and under Open MPI the coordinator is found by itself; elsewhere
  it is named by COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_ID.
  """
  logging.set_verbosity(logging.WARNING)  # Orbax and Grain narrate every step of theirs
  keep_memory()
  if 'COORDINATOR_ADDRESS' in os.environ:
    jax.distributed.initialize(
        os.environ['COORDINATOR_ADDRESS'], int(os.environ['PROCESS_COUNT']),
        int(os.environ['PROCESS_ID']))
  elif any(name in os.environ for name in ('TPU_WORKER_HOSTNAMES', 'SLURM_JOB_NUM_NODES')) and (
      os.environ.get('TPU_WORKER_HOSTNAMES', '').count(',') > 0
      or int(os.environ.get('SLURM_JOB_NUM_NODES', '1')) > 1):
    jax.distributed.initialize()
  if jax.config.jax_compilation_cache_dir is None:
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache'))
    jax.config.update('jax_compilation_cache_dir', str(cache / 'rlhf_jax' / 'xla'))


def keep_memory():
  """Tells glibc to keep large freed blocks, all in one arena, for the next step.

  XLA on the CPU allocates its temporaries anew every step. Returned to the system and mapped
  again, their pages are zeroed by the kernel each time: without this a small train step takes
  1.5 times as long. Other arenas hold no block above 64 MB, hence the one.
  """
  try:
    libc = ctypes.CDLL('libc.so.6')
  except OSError:
    return  # another C library; only slower
  for parameter, value in ((-1, -1), (-4, 0), (-8, 1)):  # never trim, never map, one arena
    libc.mallopt(parameter, value)

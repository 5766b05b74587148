"""Process-wide settings of JAX: several hosts, and compiled programs kept on disk."""

import os
import pathlib

import jax


def configure():
  """Joins the other processes of a cluster, and keeps compiled programs for the next start.

  On Cloud TPU pods, under SLURM and under Open MPI the coordinator is found by itself; elsewhere
  it is named by COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_ID.
  """
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

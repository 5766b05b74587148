"""When a process joins others, and what it tells jax.distributed."""

import jax
import pytest

from rlhf_jax import compilation
from rlhf_jax import errors

WAIT = {'heartbeat_timeout_seconds': compilation.HEARTBEAT_SECONDS}
NAMES = ('COORDINATOR_ADDRESS', 'PROCESS_COUNT', 'PROCESS_ID', 'TPU_WORKER_HOSTNAMES', 'SLURM_STEP_NUM_TASKS',
         'OMPI_COMM_WORLD_SIZE')


@pytest.fixture
def joined(monkeypatch):
  """Calls of jax.distributed.initialize, by a process without any of the variables."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **rest: calls.append((args, rest)))
  for name in NAMES:
    monkeypatch.delenv(name, raising=False)
  return calls


@pytest.mark.parametrize('variables', [
    {}, {'SLURM_STEP_NUM_TASKS': '1'}, {'TPU_WORKER_HOSTNAMES': 'localhost'}, {'OMPI_COMM_WORLD_SIZE': '1'},
    {'PROCESS_COUNT': '4'}], ids=str)
def test_alone(joined, monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  compilation.join()
  assert joined == []


@pytest.mark.parametrize('variables', [
    {'SLURM_STEP_NUM_TASKS': '8'}, {'TPU_WORKER_HOSTNAMES': 'a,b'}, {'OMPI_COMM_WORLD_SIZE': '2'},
    {'COORDINATOR_ADDRESS': 'auto'}], ids=str)
def test_clusters_that_tell_by_themselves(joined, monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  compilation.join()
  assert joined == [((), WAIT)]


def test_a_coordinator_that_is_named(joined, monkeypatch):
  for name, value in {'COORDINATOR_ADDRESS': 'host:1234', 'PROCESS_COUNT': '4', 'PROCESS_ID': '3'}.items():
    monkeypatch.setenv(name, value)
  compilation.join()
  assert joined == [(('host:1234', 4, 3), WAIT | {'cluster_detection_method': 'deactivate'})]
  monkeypatch.setenv('PROCESS_ID', 'three')
  with pytest.raises(errors.UserError, match='COORDINATOR_ADDRESS=host:1234 needs PROCESS_ID beside it'):
    compilation.join()

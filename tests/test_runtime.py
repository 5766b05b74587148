"""When a process joins others, the arguments of jax.distributed, and memory settings."""

import json
import os
import pathlib
import platform
import subprocess
import sys

from absl import flags
from absl import logging
import jax
import pytest

from rlhf_jax import errors
from rlhf_jax import runtime

WAIT = {'heartbeat_timeout_seconds': runtime.HEARTBEAT_SECONDS}
NAMES = (
  'COORDINATOR_ADDRESS',
  'PROCESS_COUNT',
  'PROCESS_ID',
  'TPU_WORKER_HOSTNAMES',
  'SLURM_STEP_NUM_TASKS',
  'OMPI_COMM_WORLD_SIZE',
)


@pytest.mark.parametrize(
  'arguments, level', [([], logging.WARNING), (['--verbosity=1'], logging.DEBUG)]
)
def test_the_verbosity_of_the_command_line_counts(arguments, level, monkeypatch):
  values, before = flags.FLAGS, logging.get_verbosity()
  monkeypatch.setattr(runtime, 'configure_malloc', lambda: None)
  try:
    values['verbosity'].unparse()
    logging.set_verbosity(logging.INFO)  # as absl's app.run does at its start
    values(['main', *arguments])
    runtime.configure()
    assert logging.get_verbosity() == level
  finally:
    values['verbosity'].unparse()
    logging.set_verbosity(before)


@pytest.fixture
def joined(monkeypatch):
  """Returns the calls of jax.distributed.initialize in a process without any variables."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *args, **rest: calls.append((args, rest))
  )
  for name in NAMES:
    monkeypatch.delenv(name, raising=False)
  return calls


@pytest.mark.parametrize(
  'variables',
  [
    {},
    {'SLURM_STEP_NUM_TASKS': '1'},
    {'TPU_WORKER_HOSTNAMES': 'localhost'},
    {'OMPI_COMM_WORLD_SIZE': '1'},
    {'PROCESS_COUNT': '4'},
  ],
  ids=str,
)
def test_alone(joined, monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  runtime.join_processes()
  assert joined == []


@pytest.mark.parametrize(
  'variables',
  [
    {'SLURM_STEP_NUM_TASKS': '8'},
    {'TPU_WORKER_HOSTNAMES': 'a,b'},
    {'OMPI_COMM_WORLD_SIZE': '2'},
    {'COORDINATOR_ADDRESS': 'auto'},
  ],
  ids=str,
)
def test_clusters_that_tell_by_themselves(joined, monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  runtime.join_processes()
  assert joined == [((), WAIT)]


def test_a_coordinator_that_is_named(joined, monkeypatch):
  for name, value in {
    'COORDINATOR_ADDRESS': 'host:1234',
    'PROCESS_COUNT': '4',
    'PROCESS_ID': '3',
  }.items():
    monkeypatch.setenv(name, value)
  runtime.join_processes()
  assert joined == [(('host:1234', 4, 3), WAIT | {'cluster_detection_method': 'deactivate'})]
  monkeypatch.setenv('PROCESS_ID', 'three')
  with pytest.raises(errors.UserError, match='COORDINATOR_ADDRESS=host:1234 also needs PROCESS_ID'):
    runtime.join_processes()


# Prints the folder of the compilation cache, and its number of programs after a model has run.
FROM_PYTHON = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
import jax, jax.numpy as jnp
jax.jit(lambda x: x + 1)(jnp.zeros(2))  # an earlier program, as in a notebook
from rlhf_jax import policy
policy.TextPolicy.load({model!r}).sample(['w1'], jax.random.key(0), max_new_tokens=2)
folder = jax.config.jax_compilation_cache_dir
print(folder, len(os.listdir(folder)))
"""


def test_programs_are_cached_from_python_too(world, tmp_path):
  code = FROM_PYTHON.format(tests=str(pathlib.Path(__file__).parent), model=f'{world}/model')
  environment = os.environ | {'XLA_FLAGS': '', 'XDG_CACHE_HOME': f'{tmp_path}'}
  del environment['JAX_COMPILATION_CACHE_DIR']
  run = subprocess.run(
    [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
  )
  folder, count = run.stdout.split()
  assert folder == f'{tmp_path}/rlhf_jax/xla' and int(count) > 0


def test_programs_stay_in_the_configured_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  before = jax.config.jax_compilation_cache_dir
  runtime.enable_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == before and list(tmp_path.iterdir()) == []


def test_devices_that_are_not_there(tmp_path):
  run = subprocess.run(
    [
      sys.executable,
      '-m',
      'rlhf_jax.main',
      '--config=configs/quickstart.py',
      f'--workdir={tmp_path}/run',
    ],
    env=os.environ | {'JAX_PLATFORMS': 'cuda'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 1 and run.stderr.startswith('error: ') and run.stderr.count('\n') == 1, (
    run.stderr
  )
  assert run.stderr.startswith('error: there are no devices for JAX_PLATFORMS=cuda: '), run.stderr
  assert 'Unset it' in run.stderr and 'pip install "jax[cuda13]"' in run.stderr
  assert not (tmp_path / 'run').exists()


HUGE_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
# Touches 64 MiB eight times, each time freed, and prints page faults of the first time and of all
# others.
TOUCH = """
import json, resource
if {keep}:
  from rlhf_jax import runtime
  runtime.configure_malloc()
faults = []
for _ in range(8):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  bytearray(b'1') * 2**26
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([faults[0], sum(faults[1:])]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a matter of glibc')
def test_on_cpus_freed_memory_stays_in_huge_pages(tmp_path):
  (tmp_path / 'jax_plugins').mkdir()  # as in JAX for CUDA

  def faults(keep, **environment):
    run = subprocess.run(
      [sys.executable, '-c', TOUCH.format(keep=keep)],
      capture_output=True,
      text=True,
      check=True,
      env=os.environ | environment,
    )
    return json.loads(run.stdout)

  pages = 2**26 // 4096
  assert faults(False)[1] > pages
  assert faults(True, JAX_PLATFORMS='cuda,cpu')[1] > pages
  path = os.pathsep.join([str(tmp_path), *sys.path])
  assert faults(True, JAX_PLATFORMS='', PYTHONPATH=path)[1] > pages
  first, later = faults(True)
  assert later < 100
  if '[never]' not in HUGE_PAGES.read_text():
    assert first < pages / 8

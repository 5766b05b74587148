"""Starts the peers' processes for benchmarks/run.py, gives them turns, and ends them."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# glibc settings: keep freed memory, and use one arena of huge pages.
ALLOCATOR = {
  'MALLOC_TRIM_THRESHOLD_': str(2**30),
  'MALLOC_MMAP_THRESHOLD_': str(2**30),
  'MALLOC_ARENA_MAX': '1',
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
}


@dataclasses.dataclass(frozen=True)
class Peer:
  """An implementation of PPO.

  Attributes:
    module: Name of its module in benchmarks.peers.
    venv: Name of its virtual environment; '' for the current one.
    variant: Trained parameters; see workloads.VARIANTS.
  """

  module: str
  venv: str = ''
  variant: str = 'separate'


PEERS = {
  'ours': Peer('ours'),
  'ours-trunk': Peer('ours', variant='trunk'),
  'ours-hydra': Peer('ours', variant='hydra'),
  'ours-lora': Peer('ours', variant='lora'),
  'trl': Peer('trl', 'trl'),
  'tunix': Peer('tunix', 'tunix'),
  'easydel': Peer('easydel', 'easydel', variant='trunk'),  # the only variant that it supports
  'hf': Peer('hf', 'trl'),
}


class PeerError(Exception):
  """A peer is not installed, or exited early."""


def python(venv, venvs):
  """Returns the Python interpreter of a peer.

  Raises:
    PeerError: If the peer is not installed.
  """
  if not venv:
    return sys.executable
  path = pathlib.Path(venvs) / venv / 'bin' / 'python'
  if not path.exists():
    raise PeerError(
      f'{path} does not exist: install the peer with `VENVS={venvs} benchmarks/install.sh {venv}`'
    )
  return str(path)


def environment(device, threads):
  """Returns the environment variables of every peer.

  The allocator settings are those of `rlhf_jax.runtime.configure_malloc`. They help all peers on a
  CPU: with glibc's defaults the peers spend a third of their time on pages that the kernel zeroes
  again and again. They are not set for accelerators, because the threads that compile would wait
  for each other in one arena.
  """
  allocator = ALLOCATOR if device == 'cpu' else {}
  return (
    os.environ
    | allocator
    | {
      'PYTHONPATH': str(ROOT),
      'PYTHONUNBUFFERED': '1',
      'HF_HUB_OFFLINE': '1',
      'TOKENIZERS_PARALLELISM': 'false',
      'OMP_NUM_THREADS': str(threads),
      'JAX_PLATFORMS': {'gpu': 'cuda'}.get(device, device),
      'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0')
      if device == 'gpu'
      else '',
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    }
  )


class Process:
  """A running peer."""

  def __init__(self, interpreter, module, workload, *, device, threads, log, options=()):
    """Starts the peer and waits until it is set up.

    Args:
      interpreter: Path of the Python interpreter.
      module: Name of the module in benchmarks.peers.
      workload: Workload.
      device: 'cpu', 'gpu' or 'tpu'.
      threads: Number of threads on a CPU.
      log: File for the peer's output.
      options: Further command-line arguments.

    Raises:
      PeerError: If the peer exits during its set-up.
    """
    self._log = pathlib.Path(log)
    self._name = module
    with open(self._log, 'wb') as stream:
      self._process = subprocess.Popen(
        [
          interpreter,
          '-m',
          f'benchmarks.peers.{module}',
          '--workload',
          workload.to_json(),
          '--device',
          device,
          '--threads',
          str(threads),
          *options,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stream,
        cwd=ROOT,
        env=environment(device, threads),
        text=True,
      )
    self.about = self._answer()

  def turn(self, command='iterate'):
    """Sends a command, and returns the peer's report."""
    try:
      self._process.stdin.write(command + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # the peer has exited; `_answer` raises an error with the end of its log
    return self._answer()

  def end(self):
    """Ends the peer, and kills it if it does not exit."""
    with contextlib.suppress(BrokenPipeError):  # the peer exited before it read a command
      self._process.stdin.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()

  def _answer(self):
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    tail = ''.join(self._log.read_text(encoding='utf-8', errors='replace').splitlines(True)[-15:])
    raise PeerError(
      f'{self._name} exited with status {self._process.wait()}; the end of {self._log}:\n{tail}'
    )

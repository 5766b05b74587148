"""The peers' processes as seen from benchmarks/run.py: start one, give it a turn, end it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# glibc keeps what is freed, in one arena of huge pages.
ALLOCATOR = {
  'MALLOC_TRIM_THRESHOLD_': str(2**30),
  'MALLOC_MMAP_THRESHOLD_': str(2**30),
  'MALLOC_ARENA_MAX': '1',
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
}


@dataclasses.dataclass(frozen=True)
class Peer:
  """Somebody's PPO.

  Attributes:
    module: what is run, benchmarks.peers.<module>.
    venv: name of its virtual environment; empty for the one this runs in.
    way: what is trained; see workloads.WAYS.
  """

  module: str
  venv: str = ''
  way: str = 'separate'


PEERS = {
  'ours': Peer('ours'),
  'ours-trunk': Peer('ours', way='trunk'),
  'ours-hydra': Peer('ours', way='hydra'),
  'ours-lora': Peer('ours', way='lora'),
  'trl': Peer('trl', 'trl'),
  'tunix': Peer('tunix', 'tunix'),
  'easydel': Peer('easydel', 'easydel', way='trunk'),  # it knows no other
  'hf': Peer('hf', 'trl'),
}


class PeerError(Exception):
  """A peer ended before its turn did."""


def python(venv, venvs):
  """The interpreter of a peer.

  Raises:
    PeerError: it is not installed.
  """
  if not venv:
    return sys.executable
  path = pathlib.Path(venvs) / venv / 'bin' / 'python'
  if not path.exists():
    raise PeerError(
      f'{path} is not there: install the peer with `VENVS={venvs} benchmarks/install.sh {venv}`'
    )
  return str(path)


def environment(device, threads):
  """Environment of every peer: threads, no network, no preallocation; on a CPU, glibc keeps memory.

  The allocator's settings are those of `rlhf_jax.runtime.configure_malloc`, and help all peers on a
  CPU: with glibc's own they spend a third of their time on pages that the kernel zeroes again and
  again. Where an accelerator computes they do not: the threads that compile for it wait for each
  other in one arena.
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
    """Starts it and waits until it is set up.

    Args:
      interpreter: path of a Python.
      module: within benchmarks.peers.
      workload: Workload.
      device: 'cpu', 'gpu' or 'tpu'.
      threads: on a CPU.
      log: file for what it prints.
      options: more words for its command line.

    Raises:
      PeerError: it ended instead.
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
    """Lets it compute, and returns what it reports."""
    try:
      self._process.stdin.write(command + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # what it last said is in its log
    return self._answer()

  def end(self):
    """Ends it, if need be by force."""
    with contextlib.suppress(BrokenPipeError):  # of a command that it never read, as it had ended
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
      f'{self._name} ended with status {self._process.wait()}; the end of {self._log}:\n{tail}'
    )

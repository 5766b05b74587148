"""Protocol between benchmarks/run.py and a peer's process: commands in, lines of JSON out.

After its set-up a peer reports its versions and waits. On the command `iterate` it runs and times
one iteration, and reports the times; at the end of its input it exits. So several peers can take
turns, and only one of them computes at a time. Other output goes to standard error.

This module imports only the standard library, because each peer has its own virtual environment.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time

from benchmarks import workloads


def arguments(doc, **texts):
  """Reads the flags that all peers have, and the text flags named in `texts`."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument('--workload', type=workloads.read, required=True)
  parser.add_argument('--device', choices=('cpu', 'gpu', 'tpu'), default='cpu')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--variant', choices=tuple(workloads.VARIANTS), default='separate')
  for name, default in texts.items():
    parser.add_argument(f'--{name}', default=default)
  return parser.parse_args()


def versions(*packages):
  """Returns {package: version} of this virtual environment."""
  return {name: importlib.metadata.version(name) for name in packages}


class Turns:
  """The peer's side of the protocol, and its clock."""

  def __init__(self, *, wait=lambda: None, device_peak=lambda: None):
    """Reserves standard output for the protocol, and redirects prints to standard error.

    Args:
      wait: Function that waits for the computations dispatched to the device.
      device_peak: Function () -> peak bytes of device memory, or None.
    """
    self._out = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    self._wait, self._device_peak = wait, device_peak
    self._started = time.perf_counter()
    self._last, self._parts = None, {}

  def ready(self, packages, note='', epochs=workloads.EPOCHS):
    """Reports that iterations can begin.

    Args:
      packages: {name: version}.
      note: Note below the table about differences of this peer.
      epochs: Number of epochs that the peer runs.
    """
    self._send(
      versions=packages, note=note, epochs=epochs, setup=time.perf_counter() - self._started
    )

  def wait(self):
    """Waits for the next command, starts the clock and returns the command.

    Exits the process if the input has ended.
    """
    command = sys.stdin.readline().strip()
    if not command:
      self._out.flush()
      os._exit(0)  # called from inside the peer's training loop
    self._parts = {}
    self._last = time.perf_counter()
    return command

  def lap(self, part):
    """Adds the seconds since the previous lap to a part of the iteration."""
    self._wait()
    now = time.perf_counter()
    self._parts[part] = self._parts.get(part, 0.0) + now - self._last
    self._last = now

  def move(self, source, target, seconds):
    """Moves seconds from one part to another."""
    self._parts[source] -= seconds
    self._parts[target] = self._parts.get(target, 0.0) + seconds

  def report(self, **more):
    """Ends the iteration and reports seconds by part, peak memory in bytes, and `more`."""
    self._send(parts=self._parts, peak=peak(), device_peak=self._device_peak(), **more)

  def _send(self, **message):
    self._out.write(json.dumps(message) + '\n')


def peak():
  """Returns the peak resident memory of this process in bytes."""
  with open('/proc/self/status', encoding='ascii') as lines:
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM:'))

"""How a peer's process talks to benchmarks/run.py: a line in per iteration, a line of JSON out.

A peer says what it is once it is set up, then waits. At `iterate` it runs one iteration, taking the
time of its parts, and reports; at the end of its input it ends. So only one peer computes at a
time, and several can take turns. Whatever else it prints goes to standard error.

Needs nothing but Python: peers run in virtual environments of their own.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time

from benchmarks import workloads


def arguments(doc, **texts):
  """Reads the flags of every peer: workload, device, threads, what is trained; and `texts`."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument('--workload', type=workloads.read, required=True)
  parser.add_argument('--device', choices=('cpu', 'gpu', 'tpu'), default='cpu')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--way', choices=tuple(workloads.WAYS), default='separate')
  for name, default in texts.items():
    parser.add_argument(f'--{name}', default=default)
  return parser.parse_args()


def versions(*packages):
  """{package: version} of this virtual environment."""
  return {name: importlib.metadata.version(name) for name in packages}


class Turns:
  """This process's side of the conversation, and its clock."""

  def __init__(self, *, wait=lambda: None, device_peak=lambda: None):
    """Takes standard output for itself.

    Args:
      wait: waits for what was dispatched to the device.
      device_peak: () -> bytes the device held at most, or None.
    """
    self._out = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    self._wait, self._device_peak = wait, device_peak
    self._started = time.perf_counter()
    self._last, self._parts = None, {}

  def ready(self, packages, note='', epochs=workloads.EPOCHS):
    """Says that iterations can begin.

    Args:
      packages: {name: version}.
      note: what a reader of the table has to know about this peer.
      epochs: how many it runs.
    """
    self._say(
      versions=packages, note=note, epochs=epochs, setup=time.perf_counter() - self._started
    )

  def wait(self):
    """Waits for the next command, starts the clock and returns it; exits if the input has ended."""
    command = sys.stdin.readline().strip()
    if not command:
      self._out.flush()
      os._exit(0)  # from within somebody's training loop
    self._parts = {}
    self._last = time.perf_counter()
    return command

  def lap(self, part):
    """Adds the seconds since the last lap to a part of the iteration."""
    self._wait()
    now = time.perf_counter()
    self._parts[part] = self._parts.get(part, 0.0) + now - self._last
    self._last = now

  def move(self, source, target, seconds):
    """Counts seconds of one part to another."""
    self._parts[source] -= seconds
    self._parts[target] = self._parts.get(target, 0.0) + seconds

  def report(self, **more):
    """Ends the iteration and reports seconds by part, peak memory in bytes, and `more`."""
    self._say(parts=self._parts, peak=peak(), device_peak=self._device_peak(), **more)

  def _say(self, **message):
    self._out.write(json.dumps(message) + '\n')


def peak():
  """The most bytes of memory that this process had resident."""
  with open('/proc/self/status', encoding='ascii') as lines:
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM:'))

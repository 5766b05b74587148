"""Devices for tests of several: eight on a CPU, as conftest.py has it; what there is on other platforms."""

import jax
import pytest


def first(count):
  """The first `count` devices; skips the test where there are fewer, as on a machine with one GPU."""
  if jax.device_count() < count:
    pytest.skip(f'needs {count} devices, there are {jax.device_count()}')
  return jax.devices()[:count]

"""Devices for tests that need several: eight fake ones on a CPU (conftest.py), or real ones."""

import jax
import pytest


def first(count):
  """Returns the first `count` devices; skips the test if there are fewer, as with one GPU."""
  if jax.device_count() < count:
    pytest.skip(f'needs {count} devices, there are {jax.device_count()}')
  return jax.devices()[:count]

"""Checksums of arrays against a plain loop, on one device and on eight."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from rlhf_jax import checksums
from rlhf_jax import sharding

BITS = 2**32


def by_hand(words):
  """Computes the checksum with Python's integers."""
  total = 0
  for index, word in enumerate(words):
    mixed = word ^ (index * 0x9E3779B1) % BITS
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B % BITS
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 % BITS
    total += mixed ^ (mixed >> 16)
  return total % BITS


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'int8', 'bool'])
@pytest.mark.parametrize('shape', [(), (8, 3, 2), (0, 3)])
def test_small_large_and_divided_arrays_have_the_checksum_of_their_bits(dtype, shape, monkeypatch):
  array = jnp.asarray(np.random.default_rng(0).integers(-99, 99, shape)).astype(dtype)
  raw = np.asarray(array)
  words = np.frombuffer(raw.tobytes(), f'uint{8 * raw.dtype.itemsize}').tolist()
  expected = by_hand(words), True
  assert checksums.of(array) == expected
  monkeypatch.setattr(checksums, 'MAX_NUMPY', -1)
  assert checksums.of(array) == expected
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  place = NamedSharding(mesh, P('fsdp', None, 'tensor') if len(shape) == 3 else P())
  assert checksums.of(jax.device_put(array, place)) == expected


def test_an_array_may_lie_on_other_devices_than_the_mesh_that_is_set(monkeypatch):
  expected = checksums.of(jnp.arange(8))
  monkeypatch.setattr(checksums, 'MAX_NUMPY', -1)
  part = sharding.make_mesh({'fsdp': 2}, devices=jax.devices()[2:4])
  with jax.set_mesh(sharding.make_mesh({'fsdp': 8})):
    for place in (SingleDeviceSharding(jax.devices()[3]), NamedSharding(part, P('fsdp'))):
      assert checksums.of(jax.device_put(np.arange(8, dtype=np.int32), place)) == expected


def test_every_flipped_bit_and_every_swap_shows():
  words = np.random.default_rng(0).integers(0, BITS, 8, dtype=np.uint32)
  first = checksums.of(jnp.asarray(words))
  for index in range(8):
    for bit in range(32):
      changed = words.copy()
      changed[index] ^= np.uint32(1 << bit)
      assert checksums.of(jnp.asarray(changed)) != first
    swapped = words.copy()
    swapped[[index, index - 1]] = swapped[[index - 1, index]]
    assert checksums.of(jnp.asarray(swapped)) != first


@pytest.mark.parametrize('small', [-1, 100])
def test_values_that_are_not_finite_show(small, monkeypatch):
  monkeypatch.setattr(checksums, 'MAX_NUMPY', small)
  for value, finite in ((1.0, True), (np.nan, False), (np.inf, False)):
    assert checksums.of(jnp.array([0.0, value], jnp.bfloat16))[1] == finite
  assert checksums.of(jnp.array([1, 2]))[1]


def test_random_keys_and_json():
  assert checksums.of(jax.random.key(1)) == checksums.of(jax.random.key_data(jax.random.key(1)))
  assert checksums.of_json({'a': (1, 2), 'b': {3: None}}) == checksums.of_json(
    {'b': {'3': None}, 'a': [1, 2]}
  )
  assert checksums.of_json({'a': 1}) != checksums.of_json({'a': 2})

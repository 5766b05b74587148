"""Checksums of arrays that do not depend on the sharding of an array."""

import json
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

MAX_NUMPY = 1 << 20  # elements; up to this size NumPy is faster than compiling a program


def of(array):
  """Returns the checksum of an array and whether its values are finite.

  Any change within one aligned word of 32 bits always changes the checksum, any other change with a
  probability of 1 - 2^-32. The checksum is computed on the devices of the array; all processes that
  hold a shard of it must call this.

  Args:
    array: JAX array, or array of random keys.

  Returns:
    The checksum, an int below 2^32, and a bool.
  """
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  if array.size > MAX_NUMPY or not (array.is_fully_addressable or array.is_fully_replicated):
    mesh = getattr(array.sharding, 'mesh', None) or Mesh(list(array.sharding.device_set), 'device')
    with jax.set_mesh(mesh):  # the current mesh may have other devices
      checksum, finite = _on_devices(array)
  else:
    local = array.addressable_data(0) if array.is_fully_replicated else array
    checksum, finite = _of_numpy(np.asarray(local))
  return int(checksum), bool(finite)


def of_json(value):
  """Returns the checksum of a value as it is read back from JSON."""
  return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


def _of_numpy(array):
  words = np.ascontiguousarray(array).reshape(-1)
  words = words.view(_word(array.dtype)).astype(np.uint32)
  mixed = _mixed(words, np.arange(words.size, dtype=np.uint32))
  return mixed.sum(dtype=np.uint32), _finite(array, np)


@jax.jit
def _on_devices(array):
  words = array
  if array.dtype != bool:
    words = jax.lax.bitcast_convert_type(array, _word(array.dtype))
  words, index = words.astype(jnp.uint32), jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(words.shape):  # without a reshape, which would gather the shards
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index = index * np.uint32(size % 2**32) + along
  return _mixed(words, index).sum(dtype=jnp.uint32), _finite(array, jnp)


def _word(dtype):
  return np.dtype(f'uint{8 * min(np.dtype(dtype).itemsize, 4)}')


def _mixed(words, index):
  """Mixes words with their indices; for each index it is a bijection of the words.

  See MurmurHash3's finalizer (https://github.com/aappleby/smhasher).
  """
  mixed = words ^ (index * np.uint32(0x9E3779B1))
  mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return mixed ^ (mixed >> np.uint32(16))


def _finite(array, library):
  return library.isfinite(array).all() if jnp.issubdtype(array.dtype, jnp.floating) else True

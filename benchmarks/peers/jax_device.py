"""Peak memory of the device, for the peers that run on JAX."""

import jax


def peak():
  """Returns the peak bytes of device memory; None if JAX does not report it, as on CPUs."""
  return (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')

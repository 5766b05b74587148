"""Memory of the device, for the peers that run on JAX."""

import jax


def peak():
  """The most bytes an accelerator held; None where it does not say, as CPUs do not."""
  return (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')

"""Published specifications of TPU chips.

Peaks, memory and bandwidths: https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e. The bandwidth of
a link is in one direction: half of the bidirectional interconnect figure there, divided by the
ports of a chip. The clock is not published. It is computed as the peak divided by the operations
per cycle, 2 for each cell of the matrix units (4 of 128 x 128 in v5e, 8 in v5p, 4 of 256 x 256 in
v6e).
"""

import dataclasses
import math

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """A type of TPU chip.

  Attributes:
    name: Name in topologies.
    flops: Peak of bfloat16 matmuls, FLOP/s.
    memory: Bytes that the compiler can allocate, out of 16, 95 and 32 GB.
    bandwidth: Memory bandwidth, bytes/s.
    link: Bandwidth of one link to a neighbour in one direction, bytes/s.
    torus: Smallest number of chips along a grid dimension that closes to a ring.
    clock: Cycles/s.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  torus: int
  clock: float


CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 197e12, 15.75 * 2**30, 819e9, 50e9, 16, 1.5e9),
    Chip('v5p', 459e12, 95.74 * 2**30, 2765e9, 100e9, 4, 1.75e9),
    Chip('v6e', 918e12, 31.25 * 2**30, 1638e9, 100e9, 16, 1.75e9),
  )
}


def of_topology(name):
  """Returns the chip of a topology and the extents of its grid.

  Args:
    name: Name of the topology, such as 'v5e:16x16'.

  Raises:
    UserError: The name is malformed, or the chip is unknown.
  """
  kind, _, grid = name.partition(':')
  try:
    extents = tuple(int(size) for size in grid.split('x'))
  except ValueError:
    extents = ()
  if kind not in CHIPS or not extents or min(extents) < 1:
    raise UserError(
      f'--topology={name!r} must be CHIP:AxB or CHIP:AxBxC, with CHIP one of {", ".join(CHIPS)}: '
      'v5e:16x16 (256 chips), v5p:4x4x4 (64, sold as v5p-128) or v6e:8x8'
    )
  return CHIPS[kind], extents


def count(extents):
  """Returns the number of chips in a grid."""
  return math.prod(extents)

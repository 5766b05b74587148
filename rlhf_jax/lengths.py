"""Rows of responses sorted by length, and computations cut to what the longest of them fills.

Letters: B rows, R response slots.
"""

import jax
import jax.numpy as jnp

from rlhf_jax import processes

SHORTEST = 16  # slots that make another program worth its compilation


def stages(slots, most):
  """At most `most` lengths of a response, `SHORTEST` slots apart at least, the last all of `slots`."""
  count = min(most, max(slots // SHORTEST, 1))
  return [slots * (stage + 1) // count for stage in range(count)]


def filled(mask):
  """Slots of a mask [B, R] bool up to the last that is set, [B] int32."""
  return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)


def order(mask):
  """Rows of a mask [B, R] bool from the one that fills fewest slots on, [B] int32."""
  return jnp.argsort(filled(mask))


def cut(function, rows, mask, most):
  """`function(rows)` without slots at the end that no row fills.

  It is compiled for each of a few lengths, of which the rows at hand choose one.

  Args:
    function: of rows; the shapes of what it returns do not depend on their slots.
    rows: pytree of arrays [B, slots, ...] that end with the slots of the response.
    mask: [B, R] bool, the slots that count.
    most: lengths that it is compiled for, at most.

  Returns:
    What `function` does.
  """
  slots = mask.shape[1]
  # Where no loop may have collectives in it, no branch has any either.
  rooms = stages(slots, 1 if processes.unrolled() else most)

  def branch(room):
    return lambda rows: function(jax.tree.map(lambda x: x[:, : x.shape[1] - (slots - room)], rows))

  if len(rooms) == 1:
    return function(rows)
  index = jnp.sum(jnp.max(filled(mask)) > jnp.array(rooms[:-1]))
  return jax.lax.switch(index, [branch(room) for room in rooms], rows)


def fill(tree, slots):
  """Zeros behind arrays [B, r, ...] whose response has lost its last `slots`."""
  return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, slots)] + [(0, 0)] * (x.ndim - 2)), tree)

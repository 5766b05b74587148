"""Random keys of a run: all come from its seed, and none serves two purposes.

key(seed)                      parameters of a new model
fold_in(key(seed), step)       rollout and update of a step; see types.step_keys
fold_in(key(seed), purpose)    one of those below, which are larger than any number of steps
"""

import jax

# The parameters of a new scalar head; of new adapters of the model that is trained, and of a
# critic's on the same weights; the answers of evaluators.
HEAD, ADAPTERS, CRITIC_ADAPTERS, EVALUATION = (
  int.from_bytes(name) for name in (b'head', b'lora', b'crit', b'eval')
)


def of(seed, purpose):
  """The key of one of the purposes above."""
  return jax.random.fold_in(jax.random.key(seed), purpose)

"""The random keys of a run. All are derived from its seed, and no key has two uses.

key(seed)                      parameters of a new model
fold_in(key(seed), step)       rollout and update of a step; see types.step_keys
fold_in(key(seed), purpose)    one of the purposes below, which exceed any number of steps
"""

import jax

# Initialization of a scalar head, of the trained model's adapters, and of the adapters of a critic
# on the same weights; sampling in evaluators.
HEAD, ADAPTERS, CRITIC_ADAPTERS, EVALUATION = (
  int.from_bytes(name) for name in (b'head', b'lora', b'crit', b'eval')
)


def for_purpose(seed, purpose):
  """Returns the key of one of the purposes above."""
  return jax.random.fold_in(jax.random.key(seed), purpose)

"""Potential-based shaping: rewards per token that do not change which policy is best.

A potential Phi(s) estimates how good a state is: a prompt with the first tokens of its response.
Each token is rewarded by the change of the potential,

    F_t = discount * Phi(s_{t+1}) - Phi(s_t),  Phi = 0 after the last token

The rewards of a response sum to -Phi(s_0) without a discount, which depends on the prompt alone: so
the best policy stays the best, but learns from each token instead of from the last one only. See Ng
et al. 1999, theorem 1 (https://people.eecs.berkeley.edu/~russell/papers/icml99-shaping.pdf). The
potential must be 0 at the end: otherwise the sum would depend on how the response ends (Grzes 2017,
https://www.ifaamas.org/Proceedings/aamas2017/pdfs/p565.pdf).
"""

from collections.abc import Mapping
from collections.abc import Sequence

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard


def from_potentials(potentials: Sequence[float], *, discount: float = 1.0) -> list[float]:
  """Computes the shaping reward of each token of a response; see the top of the file.

  Args:
    potentials: Phi(s_t) before each of its n tokens, in units of the reward. The first is that of
      the prompt alone.
    discount: gamma of the algorithm, in [0, 1].

  Returns:
    F_t of its n tokens.
  """
  after = [*potentials[1:], 0.0]
  return [discount * new - old for old, new in zip(potentials, after)]


def potential_based(
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  response_tokens: Sequence[Sequence[int]],
  metadata: Sequence[Mapping],
  potential: str,
  discount: float = 1.0,
) -> list[list[float]]:
  """The change of a potential with each token.

  `potential` is the name 'module:function' of a function with the arguments of a reward function.
  It returns for each response the potentials before each of its tokens. `discount` must be
  `config.rl.gamma`.
  """
  key = 'config.reward.arguments.potential'
  function = functions.load_reward(potential, key=key)
  errors.need(0 <= discount <= 1, f'discount={discount} must be in [0, 1]')
  if not prompts:
    return []
  potentials = function(prompts, responses, response_tokens=response_tokens, metadata=metadata)
  rewards = []
  for i, (values, tokens) in enumerate(zip(potentials, response_tokens, strict=True)):
    call = guard.Call(f'the potential {potential}', prompts, responses)
    values = functions.check_reward(values, call, i, (len(tokens),)).tolist()
    rewards.append(from_potentials(values, discount=discount))
  return rewards

"""PPO's presets against the implementations and the paper that they are named after; see docs/presets.md."""

import functools

import jax.numpy as jnp
import numpy as np

from rlhf_jax import experience
from rlhf_jax import types

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def make_rollout(lengths, slots, ended=None):
  """A Rollout of responses of some lengths, without prompts; all end by themselves if not said."""
  mask = np.arange(slots) < np.asarray(lengths)[:, None]
  ended = np.ones(len(lengths), bool) if ended is None else np.asarray(ended)
  return types.Rollout(tokens=jnp.zeros(mask.shape, jnp.int32), mask=jnp.asarray(mask),
                       response_mask=jnp.asarray(mask), logprobs=jnp.zeros(mask.shape), ended=ended)


def test_trlx_clips_then_updates_the_moments_then_divides():
  # Run through trlX's RunningMoments (utils/modeling.py:275-307) in the order of
  # accelerate_ppo_trainer.py:364-379. By hand, the first batch: (10, -10, 3, -4) has mean -0.25 and
  # squared deviations 225 - 4 / 16 = 224.75, so its deviation is sqrt(224.75 / 3) = 8.6554.
  rules, moments = experience.ScoreRules(scale=True, clip=10.0), jnp.zeros(3)
  for scores, expected in [([12, -20, 3, -4], [1.155343, -1.155343, 0.346603, -0.462137]),
                           ([40, 0.5, -1, 2], [1.487249, 0.074362, -0.148725, 0.297450])]:
    paid, moments = rules.apply(jnp.array(scores, jnp.float32), make_rollout([1] * 4, 2), moments)
    close(paid, expected)
  # Rewards per token are clipped one by one, and their sums are what the moments are of: the first
  # batch's, of responses of two tokens.
  dense = jnp.array([[12, 0], [-20, 0], [1, 2], [0, -4]], jnp.float32)
  paid, moments = rules.apply(dense, make_rollout([2] * 4, 2), jnp.zeros(3))
  close(jnp.sum(paid, axis=1), [1.155343, -1.155343, 0.346603, -0.462137])

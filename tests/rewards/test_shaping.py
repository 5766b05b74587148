"""Potential-based shaping: the formula, its telescoping sum, and with a score per response."""

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import shaping

NAME = 'rlhf_jax.rewards.shaping:potential_based'
TOKENS = [[5, 2, 9], [], [7], [1, 1, 4, 8, 3]]
PROMPTS, RESPONSES = list('abcd'), list('wxyz')


def rising(prompts, responses, *, response_tokens, metadata):
  """Returns the record's number plus the largest token so far."""
  return [
    [entry['number'] + max([0, *tokens[:t]]) for t in range(len(tokens))]
    for tokens, entry in zip(response_tokens, metadata)
  ]


def too_many(prompts, responses, *, response_tokens):
  return [[0.0] * (len(tokens) + 1) for tokens in response_tokens]


def shaped(**arguments):
  """Computes the rewards [4, 5] of the examples above, whose records have the numbers 1 to 4."""
  return functions.call(
    functions.load_reward(NAME, arguments=arguments),
    PROMPTS,
    RESPONSES,
    response_tokens=TOKENS,
    metadata=[{'number': i + 1} for i in range(4)],
    response_length=5,
  )


def test_by_hand():
  # Potentials 1, 6, 6 and then 0: 6 - 1, 6 - 6, 0 - 6.
  assert shaping.from_potentials([1, 6, 6]) == [5, 0, -6]
  assert shaping.from_potentials([1, 6, 6], discount=0.5) == [2, -3, -6]
  assert shaping.from_potentials([]) == []


@pytest.mark.parametrize('discount', [1.0, 0.9])
def test_discounted_rewards_sum_to_the_potential_of_the_prompt(discount):
  """No response is better than another: sum_t gamma^t F_t = -Phi(s_0)."""
  draw = np.random.default_rng(0)
  for length in range(1, 8):
    potentials = draw.normal(size=length).tolist()
    rewards = shaping.from_potentials(potentials, discount=discount)
    total = sum(discount**t * reward for t, reward in enumerate(rewards))
    assert total == pytest.approx(-potentials[0], abs=1e-12)


def test_from_a_config():
  rewards = shaped(potential=f'{__name__}:rising')
  np.testing.assert_allclose(rewards[0], [5, 0, -6, 0, 0])
  np.testing.assert_allclose(rewards[3], [1, 0, 3, 4, -12])
  np.testing.assert_allclose(rewards.sum(1), [-1, 0, -3, -4])
  np.testing.assert_allclose(
    shaped(potential=f'{__name__}:rising', discount=0.5)[0], [2, -3, -6, 0, 0]
  )


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'potential': f'{__name__}:none'}, "arguments.potential='.*:none' cannot be loaded"),
    ({'potential': f'{__name__}:rising', 'discount': 2.0}, r'discount=2.0 must be in \[0, 1\]'),
    ({'potential': f'{__name__}:too_many'}, r'the potential .*too_many returned .* example 0'),
    ({}, "missing a required .*argument: 'potential'"),
  ],
  ids=['no such function', 'discount', 'one too many', 'none'],
)
def test_mistakes(arguments, message):
  with pytest.raises(errors.UserError, match=message):
    shaped(**arguments)

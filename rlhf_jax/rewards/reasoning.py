"""Rewards of Reasoning Gym (https://github.com/open-thought/reasoning-gym), by its own checkers.

Reasoning Gym generates puzzles of a hundred families, and every family checks answers to its own.
tasks/reasoning.py writes prompts with what the checkers need.
"""

import functools
import json

from rlhf_jax import errors

try:
  import reasoning_gym
except ImportError as error:
  raise errors.UserError(
    f"Reasoning Gym needs the extra 'reasoning' ({error}): pip install 'rlhf_jax[reasoning]'"
  ) from error


def score(prompts, responses, *, metadata):
  """Returns the score of each response, from 0 to 1, by the checker of its puzzle's family.

  The columns of a prompt's record are `family`, and in JSON `settings` and `puzzle`.
  """
  del prompts
  return [
    float(
      checker(entry['family'], entry['settings'])(response.strip(), json.loads(entry['puzzle']))
    )
    for response, entry in zip(responses, metadata, strict=True)
  ]


@functools.cache
def checker(family, settings):
  """Returns a family's function (answer, puzzle) -> score; `settings` are in JSON."""
  return create(family, json.loads(settings), size=1).score_answer


def create(family, settings, *, size, seed=0):
  """Creates a data set of Reasoning Gym.

  Args:
    family: Name of the family, such as 'chain_sum'.
    settings: Dict of the family's settings.
    size: Number of puzzles.
    seed: Random seed.

  Raises:
    UserError: There is no such family, or it does not take these settings.
  """
  try:
    return reasoning_gym.create_dataset(family, **settings, size=size, seed=seed)
  except (TypeError, ValueError, AssertionError) as error:
    raise errors.UserError(f'family {family!r} of Reasoning Gym: {error}') from error

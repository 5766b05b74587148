"""The choice of the next task among those that are open to an annotator.

The functions work on plain values and draw nothing at random themselves: `uniform` hashes what a
draw belongs to, so that the same state of the store always gives the same assignment.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import itertools
import random
from typing import TypeVar

Item = TypeVar('Item')

MAX_COMBINATIONS = 10_000  # of the completions of a prompt that are looked at for a task


def order(
  groups: Iterable[tuple[str, ...]],
  *,
  selection: str,
  counts: Mapping[tuple[str, ...], int],
  ratings: Mapping[str, float],
) -> list[tuple[str, ...]]:
  """Returns the policies of open tasks in the order in which their tasks are assigned.

  'random' begins with those that were compared least, so that all pairs get equally many
  judgements; 'elo' with those of the closest ratings, where a judgement tells most about their
  order.

  Args:
    groups: Sorted names of the policies that tasks of the highest priority compare.
    selection: 'random' or 'elo'.
    counts: {policies: judgements and open leases of tasks that compare them}.
    ratings: {policy: Elo}; a policy without a rating counts as close to any other.
  """
  count = lambda names: (counts.get(names, 0), uniform('policies', names))
  if selection == 'elo':
    return sorted(groups, key=lambda names: (spread(names, ratings), *count(names)))
  return sorted(groups, key=count)


def spread(policies: Sequence[str], ratings: Mapping[str, float]) -> float:
  """Returns the difference of the highest and the lowest rating; 0 if one has no rating."""
  known = [ratings[name] for name in policies if name in ratings]
  return max(known) - min(known) if known and len(known) == len(policies) else 0.0


def take(
  samples: Sequence[tuple[str, str]], count: int, taken: dict[tuple[str, ...], int]
) -> list[tuple[str, str]] | None:
  """Takes completions for one task so that all combinations of policies are compared equally often.

  Args:
    samples: (policy, text) of the completions of a prompt.
    count: Number of completions of the task.
    taken: {sorted names of policies: number of tasks so far}, which is updated.

  Returns:
    The completions of the task; None if there are too few. Different policies are preferred to
    several completions of one.
  """
  groups = itertools.islice(itertools.combinations(samples, count), MAX_COMBINATIONS)
  names = lambda group: tuple(sorted(policy for policy, _ in group))
  best = min(
    groups, key=lambda group: (-len(set(names(group))), taken.get(names(group), 0)), default=None
  )
  if best is None:
    return None
  taken[names(best)] = taken.get(names(best), 0) + 1
  return list(best)


def uniform(*key: object) -> float:
  """Returns a number in [0, 1) that depends on the key alone, uniform over keys."""
  digest = hashlib.sha256(repr(key).encode()).digest()
  return int.from_bytes(digest[:7], 'big') / 2**56


def display_order(items: Sequence[Item], *key: object) -> list[Item]:
  """Returns the items in an order that depends on the key alone, uniform over keys."""
  return random.Random(repr(key)).sample(list(items), len(items))

"""The choice of the next task among those that are open to an annotator.

The functions work on plain values and draw nothing at random themselves: `uniform` hashes what a
draw belongs to, so that the same state of the store always gives the same assignment.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import random
from typing import TypeVar

Item = TypeVar('Item')


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A task that an annotator may get; `policies` are the sorted names of those it compares."""

  id: int
  priority: float
  policies: tuple[str, ...]


def choose(
  candidates: Sequence[Candidate],
  *,
  selection: str,
  counts: Mapping[tuple[str, ...], int],
  ratings: Mapping[str, float],
) -> int:
  """Returns the id of the task to assign next.

  Tasks of the highest priority come first. Among these, 'random' takes one of the policies that
  were compared least, so that all pairs get equally many judgements; 'elo' one whose policies have
  the closest ratings, where a judgement tells most about their order; 'disagreement' the first, as
  its priorities already are the disagreement of reward models.

  Args:
    candidates: At least one task, by decreasing priority, otherwise in random order.
    selection: 'random', 'elo' or 'disagreement'.
    counts: {policies: judgements and open leases of tasks that compare them}.
    ratings: {policy: Elo}; a policy without a rating counts as close to any other.
  """
  top = [task for task in candidates if task.priority == candidates[0].priority]
  if selection == 'disagreement':
    return top[0].id
  count = lambda task: counts.get(task.policies, 0)
  if selection == 'elo':
    return min(top, key=lambda task: (spread(task.policies, ratings), count(task))).id
  return min(top, key=count).id


def spread(policies: Sequence[str], ratings: Mapping[str, float]) -> float:
  """Returns the difference of the highest and the lowest rating; 0 if one has no rating."""
  known = [ratings[name] for name in policies if name in ratings]
  return max(known) - min(known) if known and len(known) == len(policies) else 0.0


def balanced_pairs(names: Sequence[str], count: int, *, seed: int = 0) -> list[tuple[str, str]]:
  """Returns pairs of policies to compare, each pair equally often up to one.

  Each policy comes first in as many pairs as second, up to one for each other policy.

  Args:
    names: At least two different policies.
    count: Number of pairs.
    seed: Random seed of the order.
  """
  rng = random.Random(f'pairs {seed}')
  all_pairs, result = list(itertools.combinations(names, 2)), []
  for number in itertools.count():
    if len(result) >= count:
      return result[:count]
    rng.shuffle(all_pairs)
    result += [pair if number % 2 == 0 else pair[::-1] for pair in all_pairs]


def uniform(*key: object) -> float:
  """Returns a number in [0, 1) that depends on the key alone, uniform over keys."""
  digest = hashlib.sha256(repr(key).encode()).digest()
  return int.from_bytes(digest[:7], 'big') / 2**56


def display_order(items: Sequence[Item], *key: object) -> list[Item]:
  """Returns the items in an order that depends on the key alone, uniform over keys."""
  return random.Random(repr(key)).sample(list(items), len(items))

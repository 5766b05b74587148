"""Ratings of policies for the selection 'elo', computed while annotators label."""

from collections.abc import Sequence
import threading

import sqlalchemy as sa

from rlhf_jax.feedback import database as database_lib
from rlhf_jax.feedback import elo
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import schema
from rlhf_jax.feedback import types

STALE = 1.05  # ratings are computed again when there are 5 % more judgements


class Ratings:
  """Elo ratings of the policies of projects, computed again after enough new judgements."""

  def __init__(self):
    """Starts without any."""
    self._lock = threading.Lock()  # of the attributes, not held while ratings are computed
    self._known: dict[int, tuple[int, dict[str, float]]] = {}
    self._busy: set[int] = set()  # projects whose ratings a thread computes

  def get(self, database: database_lib.Database, project: types.Project) -> dict[str, float]:
    """Returns {policy: Elo}; empty before the first battle.

    While one thread computes new ratings, the others get the old ones.
    """
    query = sa.select(sa.func.sum(schema.Task.judged)).where(
      schema.Task.project_id == project.id, schema.Task.policies != ''
    )
    with database.read() as session:
      count = int(session.scalar(query) or 0)
    with self._lock:
      before, ratings = self._known.get(project.id, (0, {}))
      if before <= count <= before * STALE or project.id in self._busy:
        return ratings
      self._busy.add(project.id)
    try:
      with database.read() as session:
        found = reading.battles(reading.judgements(session, project.id))
      ratings = rate(found)
      with self._lock:
        self._known[project.id] = count, ratings
    finally:
      with self._lock:
        self._busy.remove(project.id)
    return ratings


def rate(battles: Sequence[types.Battle]) -> dict[str, float]:
  """Returns {policy: Elo} of the largest set of policies that a chain of battles connects.

  Policies outside of it, such as a new one, have no rating.
  """
  parts: list[set[str]] = []
  for pair in dict.fromkeys(frozenset((b.first, b.second)) for b in battles):
    joined = pair.union(*(part for part in parts if part & pair))
    parts = [part for part in parts if not part & pair] + [set(joined)]
  largest = max(parts, key=len, default=set())
  matches = [
    elo.Match(b.first, b.second, b.outcome == 1, b.outcome == 0.5, b.outcome == 0)
    for b in battles
    if b.first in largest
  ]
  return {name: rating.elo for name, rating in elo.ratings(matches).items()} if matches else {}

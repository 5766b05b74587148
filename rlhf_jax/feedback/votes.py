"""Judgements as votes: how much annotators agree, with each other and with themselves.

Each kind of task gives items to vote on. Completions are in the order of the task, which annotators
do not see.

  | kind | item                      | vote                                                   |
  |------|---------------------------|--------------------------------------------------------|
  | pair | task                      | 1 for the first completion, -1 for the second, 0: tie  |
  | rank | two completions of a task | 1 if the first is ranked higher, -1 if lower, 0: tie   |
  | best | task                      | position of the best completion                        |
  | rate | a completion of a task    | rating                                                 |

A pair with a strength also has the vote strength * (1, 0 or -1). Gold questions, repeats and skips
are left out, so that all votes are about tasks that several annotators judge for the first time.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import math

import numpy as np

from rlhf_jax.feedback import agreement
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import types

KINDS = {
  'pair': 'Comparisons',
  'rank': 'Rankings, as pairs',
  'best': 'Best of several',
  'rate': 'Ratings',
}
# Levels of measurement of the votes of each kind, and the weights of Cohen's kappa.
_LEVELS = {
  'pair': (('nominal', None),),
  'strength': (('ordinal', 'linear'),),
  'rank': (('nominal', None),),
  'best': (('nominal', None),),
  'rate': (('ordinal', 'linear'), ('interval', 'quadratic')),
}


@dataclasses.dataclass(frozen=True)
class Votes:
  """Votes of one kind.

  Attributes:
    annotators: Those who voted, in the order of their ids.
    items: Keys of the items: the task's id, then the positions of completions.
    values: [items, annotators] float, NaN for a missing vote.
  """

  annotators: list[types.Annotator]
  items: list[tuple[int, ...]]
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
  """Agreement on the votes of one kind, at one level of measurement.

  Attributes:
    label: What was judged.
    level: 'nominal', 'ordinal' or 'interval'.
    items: Items with at least two votes.
    fraction: See agreement.Agreement.
    cohen: Mean of Cohen's kappa over pairs of annotators, weighted by the items that they share.
    fleiss: Fleiss' kappa.
    alpha: Krippendorff's alpha.
  """

  label: str
  level: str
  items: int
  fraction: float
  cohen: float
  fleiss: float
  alpha: float


def of(judgements: Sequence[types.Judgement], kind: str) -> Votes:
  """Returns the votes of a kind of task, or of kind 'strength': pairs with their strength.

  Args:
    judgements: Judgements that count.
    kind: 'pair', 'rank', 'best', 'rate' or 'strength'.
  """
  people, items, found = {}, {}, []
  for item in judgements:
    task = item.task
    wanted = 'pair' if kind == 'strength' else kind
    if task.kind == wanted and reading.is_ordinary(task) and not answers.skipped(item.answer):
      for key, value in _votes(task, item.answer, kind):
        people[item.annotator.id] = item.annotator
        found.append((items.setdefault((task.id, *key), len(items)), item.annotator.id, value))
  order = sorted(people)
  values = np.full((len(items), len(order)), math.nan)
  for row, annotator, value in found:
    values[row, order.index(annotator)] = value
  return Votes([people[i] for i in order], list(items), values)


def _votes(task, answer, kind):
  """Yields (positions of completions, vote) of an answer."""
  ids = [completion.id for completion in task.completions]
  if kind == 'best':
    yield (), ids.index(answer['best'])
  elif kind == 'rate':
    for i, number in enumerate(ids):
      yield (i,), answer['rating'][str(number)]
  else:
    order = answers.ranks(task.kind, ids, answer)
    size = 1 if kind != 'strength' else answer.get('strength', 0 if 'tie' in answer else None)
    for i, j in itertools.combinations(range(len(ids)), 2):
      if size is not None:  # an imported pair may have no strength
        yield (i, j) if kind == 'rank' else (), size * int(np.sign(order[j] - order[i]))


def rows(judgements: Sequence[types.Judgement]) -> list[Row]:
  """Returns the agreement on each kind of task that two annotators judged, at each level."""
  result = []
  for kind, levels in _LEVELS.items():
    votes = of(judgements, kind)
    if len(votes.annotators) < 2:
      continue
    overall = agreement.agreement(votes.values)
    if kind == 'strength' and set(np.unique(np.abs(votes.values[~np.isnan(votes.values)]))) <= {0}:
      continue  # only ties
    for level, weights in levels:
      result.append(
        Row(
          label=KINDS.get(kind, 'Comparisons, with strength'),
          level=level,
          items=overall.items,
          fraction=overall.fraction,
          cohen=_mean_cohen(votes.values, weights),
          fleiss=overall.kappa,
          alpha=agreement.krippendorff(votes.values, level=level),
        )
      )
  return [row for row in result if row.items]


def _mean_cohen(values, weights):
  """Returns the mean of Cohen's kappas over pairs of annotators, weighted by shared items."""
  given = (~np.isnan(values)).astype(float)
  kappas = agreement.pairwise(values, weights=weights)
  known = ~np.isnan(kappas)
  shared = np.where(known, given.T @ given, 0)
  total = shared.sum()
  return float((shared * np.where(known, kappas, 0)).sum() / total) if total else math.nan


def against_rest(judgements: Sequence[types.Judgement]) -> dict[int, agreement.AgainstRest]:
  """Returns {id of an annotator: agreement with the others} over all kinds of tasks.

  The fraction and the kappa are means over kinds, weighted by the items that the annotator shares
  with others; a kappa without a value is left out.
  """
  parts = {}
  for kind in KINDS:
    votes = of(judgements, kind)
    if len(votes.annotators) >= 2:
      for person, found in zip(votes.annotators, agreement.against_rest(votes.values), strict=True):
        parts.setdefault(person.id, []).append(found)
  return {
    number: _combine([part for part in found if part.items]) for number, found in parts.items()
  }


def _combine(parts):
  mean = lambda pairs: (
    sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    if pairs
    else math.nan
  )
  kappas = [(part.kappa, part.items) for part in parts if not math.isnan(part.kappa)]
  return agreement.AgainstRest(
    fraction=mean([(part.fraction, part.items) for part in parts]),
    kappa=mean(kappas),
    items=sum(part.items for part in parts),
  )


def disagreement(task: types.Task, given: Sequence[answers.Answer]) -> float:
  """Computes how much answers to a task differ, from 0 to 1; 0 for fewer than two.

  It is the mean over pairs of answers of: whether they differ ('pair', 'best'), the fraction of
  pairs of completions that they order differently ('rank'), or the mean difference of ratings / 6.

  Args:
    task: The task.
    given: Answers without skips.
  """
  kind = task.kind
  votes = [np.array([vote for _, vote in _votes(task, answer, kind)]) for answer in given]
  gaps = [np.abs(a - b) for a, b in itertools.combinations(votes, 2)]
  if not gaps:
    return 0.0
  scale = answers.RATINGS[-1] - answers.RATINGS[0]
  return float(np.mean([gap / scale if kind == 'rate' else gap > 0 for gap in gaps]))

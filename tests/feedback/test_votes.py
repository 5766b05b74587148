"""Agreement, annotators and disagreement of a small project, against numbers by hand."""

import math

import pytest

import jury
from rlhf_jax.feedback import overview
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback import votes


@pytest.fixture(scope='module')
def filled(tmp_path_factory):
  with store_lib.Store.open(tmp_path_factory.mktemp('votes') / 'jury.db') as store:
    yield store, jury.fill(store)


@pytest.fixture(scope='module')
def judgements(filled):
  store, project = filled
  return store.judgements(project)


def test_votes_of_pairs(judgements):
  table = votes.of(judgements, 'pair')
  assert [person.name for person in table.annotators] == ['Ada', 'Bo', 'Robo']
  # Task 6 has one vote; gold questions and repeats have none.
  found = {tuple(-9 if math.isnan(vote) else vote for vote in row) for row in table.values}
  assert found == {(-1, -1, -1), (-1, -1, 1), (1, -1, 1), (0, 0, 0), (-9, -1, -9)}
  strong = votes.of(judgements, 'strength')
  found = {tuple(-9 if math.isnan(vote) else vote for vote in row) for row in strong.values}
  assert found == {(-2, -4, -1), (-1, -2, 1), (3, -1, 2), (0, 0, 0), (-9, -2, -9)}


def test_votes_of_rankings_are_those_of_their_pairs(judgements):
  table = votes.of(judgements, 'rank')
  positions = {item[1:]: list(row) for item, row in zip(table.items, table.values, strict=True)}
  # A against B, A against C, B against C.
  assert positions == {(0, 1): [-1, 0, -1], (0, 2): [-1, -1, -1], (1, 2): [-1, -1, -1]}
  assert votes.of(judgements, 'rate').values.tolist() == [[6, 5, 2]]
  assert votes.of(judgements, 'best').items == []


def test_agreement_on_each_kind(judgements):
  rows = {(row.label, row.level): row for row in votes.rows(judgements)}
  pairs = rows['Comparisons', 'nominal']
  # Agreeing pairs of annotators: 1, 1/3, 1/3 and 1, mean 2/3. Votes for B, A, tie: (1 + 2/3 + 1/3)
  # / 4, (1/3 + 2/3) / 4 and 1/4, so chance = 1/4 + 1/16 + 1/16 = 3/8; kappa = (7/24) / (5/8).
  assert pairs.items == 4
  assert pairs.fraction == pytest.approx(2 / 3)
  assert pairs.fleiss == pytest.approx(7 / 15)
  # Ada and Bo: 3 of 4 agree, chance (2 * 3 + 1 * 0 + 1 * 1) / 16 = 7/16: kappa 5/9. Ada and Robo:
  # 3/4, chance (2 * 1 + 1 * 2 + 1) / 16 = 5/16: 7/11. Bo and Robo: 2/4, chance (3 * 1 + 1) / 16 =
  # 1/4: 1/3. Each pair shares 4 items.
  assert pairs.cohen == pytest.approx((5 / 9 + 7 / 11 + 1 / 3) / 3)
  # 12 votes, 6 B, 3 A, 3 ties. Disagreeing pairs of votes: 2 of 3 in two items, 8 ordered pairs / 2
  # = 4; expected 144 - 36 - 9 - 9 = 90. alpha = 1 - 11 * 4 / 90.
  assert pairs.alpha == pytest.approx(1 - 44 / 90)
  assert ('Comparisons, with strength', 'ordinal') in rows
  # Ratings 6, 5, 2 of one item: observed and expected disagreement are the same.
  assert rows['Ratings', 'interval'].alpha == pytest.approx(0)
  assert rows['Ratings', 'interval'].fraction == 0
  # Rankings: 1/3, 1, 1.
  assert rows['Rankings, as pairs', 'nominal'].fraction == pytest.approx(7 / 9)


def test_annotators(filled, judgements):
  store, _ = filled
  ada, bo, robo = overview.people(store.annotators(), judgements)
  # Ada: 6 tasks, 2 gold questions and 2 repeats answered, task 6 skipped.
  assert (ada.judged, ada.skipped, ada.flagged, ada.seconds) == (10, 1, 1, 2)
  assert (bo.judged, bo.skipped, bo.flagged, bo.seconds) == (7, 0, 1, 4)
  assert (robo.judged, robo.skipped, robo.annotator.simulated) == (6, 1, True)
  quality = ada.quality
  assert (quality.gold, quality.right, quality.repeats, quality.same) == (2, 1, 2, 1)
  # Pairs: 1, 1/2, 1/2 and 1 of the others agree with Ada. Rankings: 1/2, 1, 1. The rating: 0.
  assert ada.rest.items == 8
  assert ada.rest.fraction == pytest.approx((3 + 2.5 + 0) / 8)
  # Bo: 1, 1/2, 0, 1; 0, 1, 1; 0.
  assert bo.rest.fraction == pytest.approx((2.5 + 2 + 0) / 8)


def test_disagreement(judgements):
  found = overview.disputes(judgements)
  score = {dispute.task.prompt.text: dispute.score for dispute in found}
  # Tasks 1 and 2: two of three pairs of annotators differ. Task 4: A and B, for two of three pairs
  # of annotators, of three pairs of completions. Task 5: |6 - 5| + |6 - 2| + |5 - 2| = 8, / 3 / 6.
  assert score == pytest.approx(
    {'Question 1?': 2 / 3, 'Question 2?': 2 / 3, 'Question 5?': 8 / 18, 'Question 4?': 2 / 9}
  )
  assert [dispute.task.prompt.text[9] for dispute in found] == ['1', '2', '5', '4']
  flagged = overview.disputes(judgements, flag=jury.FLAG)
  assert [dispute.task.prompt.text[9] for dispute in flagged] == ['1', '4']
  assert overview.flags(judgements) == [jury.FLAG]


def test_progress_of_each_kind_and_round(filled):
  store, project = filled
  parts = [
    (p.round, p.kind, p.tasks, p.wanted, p.judged)
    for p in overview.progress(store.database, project)
  ]
  # Skips are no answers: task 6 has one of three.
  assert parts == [
    (0, 'pair', 4, 12, 12),
    (1, 'pair', 1, 3, 1),
    (1, 'rank', 1, 3, 3),
    (1, 'rate', 1, 3, 3),
  ]


def test_answers_in_words(judgements):
  words = {overview.describe(item.task, item.answer) for item in judgements}
  assert {'B, strength 4', 'tie', 'C > A = B', 'A: 5', 'skipped'} <= words


def test_pairs_without_a_strength_have_no_votes_on_it(tmp_path):
  """As imported ones: the annotators of 'strength' are those who gave one."""
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    project = store.add_project('p', overlap=2)
    both = [{'text': name, 'policy': name} for name in 'ab']
    store.add_tasks(project, [{'prompt': 'q', 'completions': both}])
    for name in ('Ada', 'Bo'):
      person, _ = store.add_annotator(name)
      lease = store.next_task(project, person)
      chosen = {'chosen': lease.task.completions[0].id}
      store.judge(lease, person, chosen, token=lease.token)
    given = store.judgements(project)
  assert votes.of(given, 'strength').annotators == []
  assert [(row.label, row.items, row.fraction) for row in votes.rows(given)] == [
    ('Comparisons', 1, 1.0)
  ]

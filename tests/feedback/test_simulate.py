"""Simulated annotators who use the store as people do."""

import itertools
import json

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import annotators
from rlhf_jax.feedback import simulate
from rlhf_jax.feedback import store as store_lib

# Utilities -0.2, 0.1, 1.4 and 5 of the responses of a task.
TEXTS = '-0.2 a', '0.1 b', '1.4 c', '5 d'


def gold(prompt, response):
  del prompt
  return float(response.split()[0])


def panel(**changes):
  settings = dict(count=3, temperature=0.0, label_noise=0.0, disagreement=0.0, seed=1)
  return annotators.SimulatedAnnotators(gold, **(settings | changes))


@pytest.fixture
def store(tmp_path):
  with store_lib.Store.open(tmp_path / 'feedback.db') as opened:
    yield opened


def add(store, kind, count=1, texts=TEXTS, **more):
  """Adds tasks with other prompts of a new project of overlap 2."""
  project = store.add_project(kind, overlap=2)
  completions = [{'text': text, 'policy': f'policy {i}'} for i, text in enumerate(texts)]
  rows = [{'kind': kind, 'prompt': f'prompt {i}', 'completions': completions} for i in range(count)]
  return project, store.add_tasks(project, [row | more for row in rows])


@pytest.mark.parametrize(
  'kind, texts, wanted',
  [
    ('pair', TEXTS[:2], {'tie': True}),  # 0.3 apart, less than habits.tie
    ('pair', TEXTS[1:3], {'chosen': 1, 'strength': 3}),  # 1.3 apart, at least 1
    ('pair', TEXTS[2:], {'chosen': 1, 'strength': 4}),  # 3.6 apart, at least 2
    ('rank', TEXTS, {'ranking': [[3], [2], [1], [0]]}),
    ('best', TEXTS, {'best': 3}),
    # 4 + (utility - 0.4) / 0.5, rounded: 2.8, 3.4, 6 and 13.2.
    ('rate', TEXTS, {'rating': {'0': 3, '1': 3, '2': 6, '3': 7}}),
  ],
)
def test_exact_annotators_answer_by_the_gold_score(store, kind, texts, wanted):
  project, [task] = add(store, kind, texts=texts)
  ids = [completion.id for completion in task.completions]
  habits = simulate.Habits(tie=0.5, rating_middle=0.4, rating_step=0.5)
  made = simulate.judge(store, project, panel(), habits=habits)
  assert made == {'simulated 0': 1, 'simulated 1': 1, 'simulated 2': 0}  # the overlap is 2
  for judgement in store.judgements(project):
    assert judgement.annotator.simulated
    found = judgement.answer
    for key in ('chosen', 'best'):
      if key in found:
        found = found | {key: ids.index(found[key])}
    if 'ranking' in found:
      found = {'ranking': [[ids.index(i) for i in group] for group in found['ranking']]}
    if 'rating' in found:
      found = {'rating': {str(ids.index(int(i))): value for i, value in found['rating'].items()}}
    assert found == wanted


def test_answers_depend_on_the_seed_the_annotator_and_the_texts_alone(tmp_path):
  records = []
  for name in ('one.db', 'two.db'):
    with store_lib.Store.open(tmp_path / name) as store:
      if name == 'two.db':  # other ids, and other tasks before
        add(store, 'rank', 3)
        store.add_annotator('Ada')
      project, _ = add(store, 'pair', 30, TEXTS[:2])
      noisy = panel(temperature=1.0, label_noise=(0.0, 0.2, 0.5))
      simulate.judge(store, project, noisy)
      found = [
        tuple(r[k] for k in ('prompt', 'annotator', 'chosen')) for r in store.records(project)
      ]
      records.append(found)
  assert len(records[0]) == 60
  chosen = [{(prompt, who): text for prompt, who, text in found} for found in records]
  both = chosen[0].keys() & chosen[1].keys()
  assert len(both) > 20 and all(chosen[0][key] == chosen[1][key] for key in both)
  assert len(set(chosen[0].values())) == 2
  for (prompt, who), text in chosen[0].items():
    number = int(who.removeprefix('simulated '))
    assert text == TEXTS[noisy.compare(prompt, *TEXTS[:2], number)]


def test_a_mistake_may_be_a_strong_preference(store):
  """The strength is that of what was perceived, not of the true difference, which is 1.3."""
  project, tasks = add(store, 'pair', 100, TEXTS[1:3])
  simulate.judge(store, project, panel(temperature=2.0), habits=simulate.Habits(tie=0.1))
  given = [item.answer for item in store.judgements(project)]
  better = {task.completions[1].id for task in tasks}
  right, wrong = (
    {
      answer['strength']
      for answer in given
      if 'chosen' in answer and (answer['chosen'] in better) is good
    }
    for good in (True, False)
  )
  assert right == wrong == {1, 2, 3, 4} and {'tie': True} in given


def test_repeats_tell_who_is_consistent(store):
  """An annotator who chooses at random says the same twice in half of the cases."""
  project = store.add_project('p', repeat_fraction=0.5)
  completions = [{'text': text, 'policy': text} for text in TEXTS[2:]]
  rows = [{'prompt': f'{i}', 'completions': completions, 'overlap': 2} for i in range(120)]
  store.add_tasks(project, rows)
  simulate.judge(store, project, panel(count=2, label_noise=(0.0, 0.5)))
  exact, random = (store.quality(project)[f'simulated {i}'] for i in range(2))
  assert exact.repeats == exact.same > 50
  # Five standard deviations of sqrt(n / 4).
  assert random.repeats > 50
  assert abs(random.same - random.repeats / 2) < 2.5 * np.sqrt(random.repeats)


def test_they_work_beside_people_and_continue_after_an_interruption(store):
  project, tasks = add(store, 'pair', 6, TEXTS[2:])
  ada, _ = store.add_annotator('Ada')
  for _ in range(2):
    assignment = store.next_task(project, ada)
    answer = {'chosen': assignment.shown[0].id}
    store.judge(assignment, ada, answer, token=assignment.token)
  assert sum(simulate.judge(store, project, panel(), limit=5).values()) == 5
  store.next_task(project, store.annotator(name='simulated 1'))  # then the process was killed
  assert sum(simulate.judge(store, project, panel()).values()) == 12 - 2 - 5
  judged = [(item.task.id, item.annotator.name) for item in store.judgements(project)]
  assert len(judged) == len(set(judged)) == 12
  assert sorted(task for task, _ in judged) == sorted(2 * [task.id for task in tasks])
  assert sum(simulate.judge(store, project, panel()).values()) == 0
  assert len(store.records(project, simulated=False)) == 2
  assert len(store.records(project, simulated=True)) == 10


def test_the_stage_of_a_pipeline(store, tmp_path):
  project, _ = add(store, 'pair', 4, TEXTS[2:])
  arguments = dict(
    store=str(tmp_path / 'feedback.db'),
    project='pair',
    gold=f'{__name__}:gold',
    annotator_count=2,
    annotator_temperature=0.0,
    label_noise=0.0,
    disagreement=0.0,
    seed=0,
  )
  (tmp_path / 'stage').mkdir()
  simulate.run.check(**arguments)
  simulate.run(tmp_path / 'stage', **arguments)
  found = json.loads((tmp_path / 'stage' / 'results.json').read_text())
  assert found == {'simulated': True, 'judgements': {'simulated 0': 4, 'simulated 1': 4}}
  assert all(record['chosen'] == '5 d' for record in store.records(project))
  with pytest.raises(UserError, match="no project 'other'"):
    simulate.run(tmp_path / 'stage', **(arguments | {'project': 'other'}))


def test_a_person_is_not_taken_for_a_simulated_annotator(store):
  project, _ = add(store, 'pair', 1, TEXTS[:2])
  store.add_annotator('simulated 1')
  with pytest.raises(UserError, match="a person named 'simulated 1'"):
    simulate.judge(store, project, panel())


def test_habits_are_checked():
  for changes, problem in (
    ({'tie': -1.0}, 'tie'),
    ({'strengths': (1.0, 0.5, 2.0)}, 'strengths'),
    ({'rating_step': 0.0}, 'rating_step'),
  ):
    with pytest.raises(UserError, match=problem):
      simulate.Habits(**changes)


def test_rankings_are_drawn_place_by_place_and_at_random_with_twice_the_noise():
  """Plackett-Luce: P(first, second, third) = e^u1 / (all) * e^u2 / (the others)."""
  some = panel(count=2, temperature=1.0, label_noise=(0.0, 0.25))
  texts, weights = ('0 a', '1 b', '-1 c'), np.exp([0.0, 1.0, -1.0])
  for annotator, random_share in ((0, 0.0), (1, 0.5)):
    ranked = [tuple(some.rank(f'p{i}', texts, annotator)) for i in range(3000)]
    for order in itertools.permutations(range(3)):
      first, second = weights[order[0]] / weights.sum(), weights[order[1]]
      drawn = first * second / (second + weights[order[2]])
      expected = random_share / 6 + (1 - random_share) * drawn
      # Four standard errors of 3000 draws.
      share = ranked.count(order) / 3000
      assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 3000))


def test_each_annotator_has_a_noise():
  some = panel(label_noise=(0.0, 0.2, 0.5))
  pair = ('p', '0 a', '5 b')
  assert [some.probability(*pair, k) for k in range(3)] == pytest.approx([1.0, 0.8, 0.5])
  ratings = [[some.rate(f'p{i}', '0 a', k) for i in range(1400)] for k in (0, 2)]
  assert set(ratings[0]) == {4}
  counts = np.bincount(ratings[1], minlength=8)[1:]
  # 1400 / 7 each, with four standard deviations of sqrt(1400 * 6 / 49).
  assert abs(counts - 200).max() < 4 * 13.1
  with pytest.raises(UserError, match='one number, or count=3 of them'):
    panel(label_noise=(0.1, 0.2))

"""The store of feedback: what is stored comes back, and answers have their effect on assignment."""

import contextlib
import sqlite3

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import answers
from rlhf_jax.feedback import store as store_lib


@pytest.fixture
def store(database_url):
  with store_lib.Store.open(database_url) as opened:
    yield opened


def pairs(count, *, policies=('a', 'b'), **more):
  """Returns rows of tasks for `Store.add_tasks`."""
  return [
    {
      'prompt': f'prompt {i}',
      'completions': [{'text': f'{name} {i}', 'policy': name} for name in policies],
    }
    | more
    for i in range(count)
  ]


def answer(store, project, annotator, *, best=0, **more):
  """Answers the next task by the completion at a canonical position; returns the judgement."""
  assignment = store.next_task(project, annotator)
  chosen = assignment.task.completions[best].id
  return store.judge(assignment, annotator, {'chosen': chosen} | more, token=assignment.token)


def test_a_pair_from_task_to_record(store):
  project = store.add_project('p')
  [task] = store.add_tasks(project, pairs(1, round=3))
  ada, token = store.add_annotator('Ada')
  assert store.annotator(token=token) == ada and store.annotator(name='Ada') == ada
  assignment = store.next_task(project, ada)
  assert assignment.task == task and sorted(c.text for c in assignment.shown) == ['a 0', 'b 0']
  judgement = store.judge(
    assignment,
    ada,
    {'chosen': task.completions[1].id, 'strength': 4},
    reason='shorter',
    flags=['private'],
    seconds=2.5,
    token=assignment.token,
  )
  [found] = store.judgements(project)
  assert found == judgement and found.task == task and found.annotator == ada
  assert (found.reason, found.flags, found.seconds) == ('shorter', ['private'], 2.5)
  assert found.shown == [c.id for c in assignment.shown]
  record = {'prompt': 'prompt 0', 'chosen': 'b 0', 'rejected': 'a 0', 'margin': 1.0}
  assert store.records(project) == [record | {'annotator': 'Ada', 'simulated': False}]
  [battle] = store.battles(project)
  assert (battle.first, battle.second, battle.outcome, battle.round) == ('a', 'b', 0.0, 3)
  assert (battle.first_length, battle.second_length) == (3, 3)
  assert store.next_task(project, ada) is None
  progress = store.progress(project)
  assert (progress.tasks, progress.wanted, progress.judged, progress.skipped) == (1, 1, 1, 0)
  assert progress.by_annotator == {'Ada': 1}


def test_lengths_are_in_characters(store):
  project = store.add_project('p')
  texts = {'a': '北京是中国的首都。', 'b': 'Beijing is it.'}
  completions = [{'text': text, 'policy': name} for name, text in texts.items()]
  store.add_tasks(project, [{'prompt': '?', 'completions': completions}])
  answer(store, project, store.add_annotator('Ada')[0])
  [battle] = store.battles(project)
  assert (battle.first_length, battle.second_length) == (9, 14)


def test_a_second_open_finds_everything(store, database_url):
  project = store.add_project('p', overlap=2, instructions='Be kind.', selection='elo')
  store.add_tasks(project, pairs(2))
  ada, _ = store.add_annotator('Ada', role='owner', password_hash='x')
  answer(store, project, ada)
  with store_lib.Store.open(database_url) as again:
    assert again.project('p') == project and again.add_project('p', overlap=5) == project
    assert again.annotators() == [ada]
    assert again.tasks(project) == store.tasks(project)
    assert again.judgements(project) == store.judgements(project)


@pytest.mark.parametrize(
  'kind, count, given, ranks',
  [
    ('pair', 2, {'tie': True}, [0, 0]),
    ('rank', 4, {'ranking': [[2], [0, 3], [1]]}, [1, 2, 0, 1]),
    ('best', 3, {'best': 1}, [1, 0, 1]),
    ('rate', 2, {'rating': {'0': 3, '1': 7}}, [1, 0]),
  ],
)
def test_every_kind_of_answer(store, kind, count, given, ranks):
  project = store.add_project('p')
  store.add_tasks(project, pairs(1, policies='wxyz'[:count], kind=kind))
  ada, _ = store.add_annotator('Ada')
  assignment = store.next_task(project, ada)
  ids = [c.id for c in assignment.task.completions]
  store.judge(assignment, ada, answers.renumber(given, dict(enumerate(ids))), token='t')
  [record] = store.records(project, form='rankings')
  texts = [c.text for c in assignment.task.completions]
  assert record['completions'] == texts
  wins = {(r['chosen'], r['rejected']) for r in store.records(project)}
  assert wins == {
    (texts[a], texts[b]) for a in range(count) for b in range(count) if ranks[a] < ranks[b]
  }
  results = {(b.first, b.second): b.outcome for b in store.battles(project)}
  names, expected = 'wxyz', {}
  for a in range(count):
    for b in range(a + 1, count):
      outcome = 0.5 + 0.5 * ((ranks[a] < ranks[b]) - (ranks[a] > ranks[b]))
      if kind != 'rate' and (kind != 'best' or outcome != 0.5):
        expected[names[a], names[b]] = outcome
  assert results == expected


def test_names_have_one_form(store):
  zoe, _ = store.add_annotator(' Zoe\u0308 ')
  assert zoe.name == 'Zo\u00eb' and store.annotator('Zoe\u0308') == zoe
  with pytest.raises(UserError, match='already an annotator'):
    store.add_annotator('Zo\u00eb')


@pytest.mark.parametrize(
  'change, message',
  [
    ({'gold': {'chosen': 5}}, 'must name completions by their positions, 0 to 1'),
    ({'gold': {'chosen': []}}, 'must name completions by their positions, 0 to 1'),
    ({'prompt': ['a']}, 'the prompt must be a text, or messages'),
    ({'prompt': [{'role': 'user'}]}, 'the prompt must be a text, or messages'),
  ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, change, message):
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    project = store.add_project('p')
    [row] = pairs(1)
    with pytest.raises(UserError, match=f'task 0: .*{message}'):
      store.add_tasks(project, [row | change])
    assert store.tasks(project) == []


def test_a_reader_makes_no_tables(tmp_path):
  (tmp_path / 'x.db').touch()
  with pytest.raises(UserError, match='has no tables of a feedback store'):
    store_lib.Store.open(tmp_path / 'x.db', create=False)
  with contextlib.closing(sqlite3.connect(tmp_path / 'x.db')) as connection:
    assert connection.execute('SELECT count(*) FROM sqlite_master').fetchone() == (0,)

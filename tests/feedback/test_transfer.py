"""Import and export of feedback: a round trip gives the same records."""

import collections
import itertools
import json
import re

import pytest

from rlhf_jax import errors
from rlhf_jax.data import sources
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback import transfer

BY = {'annotator': 'Ada', 'simulated': False}
MESSAGES = [{'role': 'user', 'content': 'Hi "you"\n\u2028?'}]
FILES = {
  'pairs': [
    {'prompt': 'q', 'chosen': ' a\n', 'rejected': 'b', 'margin': 2 / 3} | BY,
    {'prompt': 'q', 'chosen': 'b', 'rejected': 'c', 'margin': -1.7} | BY,
    {'prompt': 'q', 'chosen': 'b', 'rejected': 'c'} | {'annotator': 'Bot', 'simulated': True},
    {'prompt': MESSAGES, 'chosen': 'Hi\n', 'rejected': ' "No"'} | BY,
    {'prompt': 'q', 'chosen': 'b', 'rejected': 'c'} | BY,
    {'prompt': 'q', 'chosen': 'b', 'rejected': 'c'} | BY,
  ],
  'rankings': [
    {'prompt': 'q', 'completions': ['a', 'b', 'c', 'd'], 'ranks': [2, 0, 1, 0]} | BY,
    {'prompt': 'q', 'completions': ['a', 'b', 'c'], 'best': 1} | BY,
    {'prompt': 'q', 'completions': ['a', 'b'], 'ranks': [1, 0], 'margin': 0.0} | BY,
    {'prompt': MESSAGES, 'completions': ['a', 'b'], 'ranks': [0, 0]} | BY,
    {'prompt': 'q', 'completions': ['a', 'b', 'c'], 'ratings': [1.0, 7.0, 1.0]} | BY,
  ],
  'ratings': [
    {'prompt': 'q', 'completion': 'a', 'rating': 7.0} | BY,
    {'prompt': MESSAGES, 'completion': 'a', 'rating': 1.0} | BY,
  ],
}


@pytest.fixture
def store(tmp_path):
  with store_lib.Store.open(tmp_path / 'x.db') as opened:
    yield opened


@pytest.mark.parametrize('form', FILES)
def test_a_round_trip_is_exact(form, store, tmp_path):
  project = store.add_project('p')
  sources.write(tmp_path / 'in.jsonl', FILES[form])
  done = transfer.add_comparisons(store, project, str(tmp_path / 'in.jsonl'))
  assert (done.added, done.there, done.left_out) == (len(FILES[form]), 0, {})
  assert transfer.export(store, project, tmp_path / 'out.jsonl', form=form) == len(FILES[form])
  assert (tmp_path / 'out.jsonl').read_bytes() == (tmp_path / 'in.jsonl').read_bytes()
  again = transfer.add_comparisons(store, project, str(tmp_path / 'out.jsonl'))
  assert (again.added, again.there) == (0, len(FILES[form]))
  assert store.records(project, form=form) == FILES[form]
  assert {a.name: a.simulated for a in store.annotators()}['Ada'] is False
  progress = store.progress(project)
  assert progress.tasks == progress.wanted == progress.judged == len(FILES[form])
  assert store.next_task(project, store.add_annotator('Eve')[0]) is None
  later = transfer.add_comparisons(store, project, str(tmp_path / 'in.jsonl'), round=1)
  assert (later.added, later.there) == (len(FILES[form]), 0)
  assert store.records(project, form=form, round=1) == FILES[form]


def test_dialogues_in_the_format_of_hh(store, tmp_path):
  project, start = (
    store.add_project('p'),
    '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: No\n\nAssistant:',
  )
  dialogue = [*MESSAGES, {'role': 'assistant', 'content': 'ok'}]
  sources.write(
    tmp_path / 'hh.jsonl',
    [
      {'chosen': f'{start} Bye.', 'rejected': f'{start} What?'},
      {'chosen': dialogue, 'rejected': [*MESSAGES, {'role': 'assistant', 'content': 'what'}]},
      {'chosen': f'{start} Same.', 'rejected': f'{start} Same.'},
      {'prompt': 'q', 'chosen': ' ', 'rejected': 'a'},
    ],
  )
  done = transfer.add_comparisons(store, project, str(tmp_path / 'hh.jsonl'), annotator='Eve')
  by = {'annotator': 'Eve', 'simulated': False}
  assert store.records(project) == [
    {'prompt': start, 'chosen': ' Bye.', 'rejected': ' What?'} | by,
    {'prompt': MESSAGES, 'chosen': 'ok', 'rejected': 'what'} | by,
  ]
  assert done.left_out == {
    'all completions are the same': [f'{tmp_path}/hh.jsonl:3'],
    'empty completion': [f'{tmp_path}/hh.jsonl:4'],
  }


@pytest.mark.parametrize(
  'bad, message',
  [
    ({'prompt': 'q', 'chosen': 'a'}, "field 'rejected': missing"),
    ({'prompt': 'q', 'completion': 'a', 'rating': 7.5}, 'whole numbers from 1 to 7'),
    ({'prompt': 'q', 'completion': 'a', 'label': False}, 'whole numbers from 1 to 7'),
    ({'prompt': 'q', 'completions': ['a', 'b', 'c'], 'margin': 1}, 'a margin needs two'),
    ({'prompt': 'q', 'chosen': 'a\0', 'rejected': 'b'}, 'NUL'),
    ({'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'annotator': 'a\nb'}, 'is no name'),
    ({'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'annotator': 'a\0b'}, 'is no name'),
    (
      {'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'annotator': 'Ada', 'simulated': True},
      "'Ada' is simulated here, but a person in the store",
    ),
  ],
)
def test_a_bad_row_is_named_and_nothing_is_added(bad, message, store, tmp_path):
  project = store.add_project('p')
  sources.write(tmp_path / 'x.jsonl', [FILES['pairs'][0], bad])
  with pytest.raises(errors.DataError, match=f'{re.escape(str(tmp_path))}/x.jsonl:2: .*{message}'):
    transfer.add_comparisons(store, project, str(tmp_path / 'x.jsonl'))
  assert store.judgements(project) == [] and store.annotators() == []


def test_samples_become_tasks_with_every_pair_of_policies_equally_often(store, tmp_path):
  paths = {name: str(tmp_path / f'{name}.jsonl') for name in 'abcd'}
  for name, path in paths.items():
    sources.write(path, [{'prompt': f'q{i}', 'completion': f'{name}{i}'} for i in range(12)])
  tasks = transfer.add_samples(store, store.add_project('p'), paths, round=2)
  pairs = collections.Counter(tuple(c.policy for c in task.completions) for task in tasks)
  assert pairs == dict.fromkeys(itertools.combinations('abcd', 2), 2)
  assert [task.prompt.text for task in tasks] == [f'q{i}' for i in range(12)]
  assert all(c.text == f'{c.policy}{t.prompt.text[1:]}' for t in tasks for c in t.completions)
  assert {task.round for task in tasks} == {2}
  ranked = transfer.add_samples(store, store.add_project('r'), paths, kind='rank', completions=3)
  assert [len(task.completions) for task in ranked] == [3] * 12
  rated = transfer.add_samples(store, store.add_project('s'), {'a': paths['a']}, kind='rate')
  assert [task.completions[0].text for task in rated] == [f'a{i}' for i in range(12)]
  with pytest.raises(errors.UserError, match='no prompt has 2 different completions'):
    transfer.add_samples(store, store.add_project('t'), {'a': paths['a']})


def test_two_samples_of_one_policy_make_a_pair(store, tmp_path):
  records = [
    {'prompt': 'q', 'completion': 'a'},
    {'prompt': 'q', 'completion': 'a'},
    {'prompt': 'q', 'completion': 'b'},
    {'prompt': 'r', 'completion': 'c'},
  ]
  (tmp_path / 'x.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  [task] = transfer.add_samples(store, store.add_project('p'), {'sft': tmp_path / 'x.jsonl'})
  assert [(c.policy, c.text) for c in task.completions] == [('sft', 'a'), ('sft', 'b')]

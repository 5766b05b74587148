"""Who gets which task: overlap, leases, selection, gold questions, repeats, undo."""

import collections
from concurrent import futures
import threading

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import assign
from rlhf_jax.feedback import ratings
from rlhf_jax.feedback import reading
from rlhf_jax.feedback import store as store_lib


@pytest.fixture
def store(database_url):
  with store_lib.Store.open(database_url) as opened:
    yield opened


def pairs(policies, **more):
  """Returns a row of a task for each pair of policies."""
  return [
    {
      'prompt': f'prompt {i}',
      'completions': [{'text': f'{name} {i}', 'policy': name} for name in pair],
    }
    | more
    for i, pair in enumerate(policies)
  ]


def answer(store, project, annotator, **more):
  """Prefers the first completion of the next task; returns the judgement, None without a task."""
  assignment = store.next_task(project, annotator)
  if assignment is None:
    return None
  chosen = {'chosen': assignment.task.completions[0].id}
  return store.judge(assignment, annotator, chosen, token=assignment.token, **more)


def people(store, count):
  """Returns new annotators."""
  return [store.add_annotator(f'annotator {i}')[0] for i in range(count)]


def test_a_task_goes_to_as_many_annotators_as_it_wants(store):
  project = store.add_project('p', overlap=2)
  store.add_tasks(project, pairs(['ab']))
  a, b, c = people(store, 3)
  first = store.next_task(project, a)
  assert store.next_task(project, a).lease_id == first.lease_id
  assert store.next_task(project, b).task.id == first.task.id
  assert store.next_task(project, c) is None
  answer(store, project, a)
  assert store.next_task(project, a) is None and store.next_task(project, c) is None
  answer(store, project, b, seconds=3.0)
  assert store.next_task(project, c) is None
  assert store.progress(project).judged == 2


def test_a_skip_gives_the_task_to_another_annotator(store):
  project = store.add_project('p')
  store.add_tasks(project, pairs(['ab']))
  a, b = people(store, 2)
  assignment = store.next_task(project, a)
  store.judge(assignment, a, {'skip': True}, token='skip')
  assert store.next_task(project, a) is None
  assert answer(store, project, b).task.id == assignment.task.id
  progress = store.progress(project)
  assert (progress.judged, progress.skipped, progress.by_annotator) == (1, 1, {b.name: 1})
  store.undo(project, a)  # the skip is undone, but the task is taken
  assert store.next_task(project, a) is None and store.progress(project).skipped == 0


def test_a_form_whose_judgement_was_undone_is_refused(store):
  project = store.add_project('p')
  store.add_tasks(project, pairs(['ab']))
  [a] = people(store, 1)
  old = store.next_task(project, a)
  done = store.judge(old, a, {'tie': True}, token=old.token)
  assert store.undo(project, a, judgement=done.id + 1) is None
  assert store.undo(project, a, judgement=done.id).undoes == done.id
  assert store.undo(project, a, judgement=done.id) is None
  with pytest.raises(UserError, match='not assigned to you'):
    store.judge(old, a, {'tie': True}, token=old.token)
  assert answer(store, project, a).task.id == old.task.id


def test_a_skipped_task_of_one_annotator_is_not_waited_for(store):
  project = store.add_project('p')
  a, b = people(store, 2)
  for own in (a, b):
    prompt = store.add_prompt(project, own.name)
    both = [store.add_completion(prompt, text, policy=text) for text in 'xy']
    store.add_task(project, 'pair', prompt, both, annotator=own)
  progress = store.progress(project)
  assert (progress.tasks, progress.wanted) == (2, 2)
  skipped = store.next_task(project, a)
  store.judge(skipped, a, {'skip': True}, token=skipped.token)
  answer(store, project, b)
  progress = store.progress(project)
  assert (progress.tasks, progress.wanted, progress.judged, progress.skipped) == (1, 1, 1, 1)


def test_leases_expire(store):
  project = store.add_project('p', lease_seconds=10.0)
  store.add_tasks(project, pairs(['ab', 'cd']))
  a, b, c = people(store, 3)
  late = store.next_task(project, a, now=100.0)
  other = store.next_task(project, b, now=100.0)
  assert late.expires == 110.0 and store.next_task(project, c, now=109.0) is None
  chosen = {'chosen': other.task.completions[0].id}
  store.judge(other, b, chosen, token='late, but nobody else has it', now=200.0)
  assert store.next_task(project, c, now=110.0).task.id == late.task.id
  with pytest.raises(UserError, match='the time for this task was over'):
    store.judge(late, a, {'tie': True}, token='too late', now=115.0)
  assert store.next_task(project, a, now=115.0) is None
  # c leaves too, and a gets the task again.
  again = store.next_task(project, a, now=121.0)
  assert again.task.id == late.task.id
  store.judge(again, a, {'tie': True}, token=again.token, now=122.0)
  assert store.progress(project).judged == 2


def test_a_judgement_needs_a_lease_of_its_own(store):
  project = store.add_project('p')
  store.add_tasks(project, pairs(['ab', 'ab']))
  a, b = people(store, 2)
  assignment, other = store.next_task(project, a), store.next_task(project, b)
  with pytest.raises(UserError, match='not assigned to you'):
    store.judge(assignment, b, {'tie': True}, token='x')
  with pytest.raises(UserError, match='not assigned to you'):
    store.judge(12345, b, {'tie': True}, token='x')
  judgement = store.judge(assignment, a, {'tie': True}, token='x')
  assert store.judge(assignment, a, {'skip': True}, token='x') == judgement
  assert store.judge(12345, a, {'tie': True}, token='x') == judgement
  with pytest.raises(UserError, match='belongs to another annotator'):
    store.judge(other, b, {'tie': True}, token='x')
  with pytest.raises(UserError, match='not assigned to you'):
    store.judge(assignment, a, {'tie': True}, token='y')
  assert store.judgements(project, include_undone=True) == [judgement]
  store.disable(b)
  for action in (
    lambda: store.next_task(project, b),
    lambda: store.judge(other, b, {'tie': True}, token='z'),
    lambda: store.undo(project, b),
  ):
    with pytest.raises(UserError, match='is disabled'):
      action()


def test_an_undo_is_a_row_and_the_task_comes_back(store):
  project = store.add_project('p')
  store.add_tasks(project, pairs(['ab', 'ab', 'ab']))
  a, b = people(store, 2)
  first, second = answer(store, project, a), answer(store, project, a)
  third = store.next_task(project, a)
  for undone in (second, first):
    undo = store.undo(project, a)
    assert (undo.undoes, undo.task.id, undo.answer) == (undone.id, undone.task.id, {'undo': True})
    assert store.next_task(project, a).task.id == undone.task.id
    assert store.next_task(project, b) is None
  assert store.undo(project, a) is None and store.undo(project, b) is None
  assert store.judgements(project) == [] and store.progress(project).judged == 0
  done = [answer(store, project, a) for _ in range(3)]
  assert [j.task.id for j in done] == [first.task.id, second.task.id, third.task.id]
  rows = store.judgements(project, include_undone=True)
  assert [j.id for j in rows if j.undone] == [first.id, second.id] and len(rows) == 7
  assert store.undo(store.add_project('other'), a) is None
  assert store.judgements(project) == done


def test_every_pair_of_policies_is_judged_equally_often(store):
  project = store.add_project('p')
  store.add_tasks(project, pairs(['ab'] * 40 + ['ac'] * 4 + ['bc'] * 8))
  [a] = people(store, 1)
  counts = collections.Counter(b.first + b.second for b in _battles(store, project, a, 12))
  assert counts == {'ab': 4, 'ac': 4, 'bc': 4}


def test_a_rare_pair_is_found_among_many_tasks(store):
  """There are more tasks of the other pair than one looks at for a choice."""
  project = store.add_project('p')
  store.add_tasks(project, pairs(['ab'] * 200 + ['ac'] * 3))
  [a] = people(store, 1)
  counts = collections.Counter(b.first + b.second for b in _battles(store, project, a, 6))
  assert counts == {'ab': 3, 'ac': 3}


def _battles(store, project, annotator, count):
  for _ in range(count):
    answer(store, project, annotator)
  return store.battles(project)


def test_high_priority_comes_first(store):
  project = store.add_project('p', selection='disagreement')
  rows = pairs(['ab'] * 6)
  for row, priority in zip(rows, (0.1, 0.9, 0.5, 0.7, 0.3, 0.2), strict=True):
    row['priority'] = priority
  store.add_tasks(project, rows)
  [a] = people(store, 1)
  order = [answer(store, project, a).task.prompt.text for _ in rows]
  assert order == [f'prompt {i}' for i in (1, 3, 2, 4, 5, 0)]


def test_policies_of_close_ratings_are_compared_first(store):
  """a beats b and c, which are even and were compared most: they are compared next all the same."""
  project = store.add_project('p', selection='elo')
  store.add_tasks(project, pairs(['ab'] * 5 + ['ac'] * 5, priority=1.0))
  [a] = people(store, 1)
  for _ in range(10):
    answer(store, project, a)
  store.add_tasks(project, pairs(['bc'] * 8, priority=1.0))
  for _ in range(8):
    tie = store.next_task(project, a)
    store.judge(tie, a, {'tie': True}, token=tie.token)
  # Policies that nothing connects with these have no rating, and take none from them.
  store.add_tasks(project, pairs(['xy'], priority=1.0))
  answer(store, project, a)
  store.add_tasks(project, pairs(['ab', 'ac', 'bc', 'ab', 'ac', 'bc']))
  for _ in range(2):
    assert [c.policy for c in answer(store, project, a).task.completions] == ['b', 'c']


def test_orders_of_policies():
  groups = [('a', 'b'), ('a', 'c'), ('c', 'new')]
  ratings = {'a': 1000.0, 'b': 1300.0, 'c': 900.0}
  order = lambda groups, selection, counts: assign.order(
    groups, selection=selection, counts=counts, ratings=ratings
  )
  counts = {('a', 'b'): 2, ('a', 'c'): 1}
  assert order(groups, 'random', counts) == [('c', 'new'), ('a', 'c'), ('a', 'b')]
  # A policy without a rating is close to any other; then 100 points, then 300.
  assert order(groups, 'elo', {('c', 'new'): 9}) == [('c', 'new'), ('a', 'c'), ('a', 'b')]
  assert assign.spread(('a', 'b', 'c'), ratings) == 400.0


def test_others_get_old_ratings_while_new_ones_are_computed(store, monkeypatch):
  project = store.add_project('p')
  store.add_tasks(project, pairs(['ab', 'ab']))
  [a] = people(store, 1)
  answer(store, project, a)
  known = ratings.Ratings()
  old = known.get(store.database, project)
  answer(store, project, a)
  inside, proceed, read = threading.Event(), threading.Event(), reading.judgements

  def slow(*arguments):
    inside.set()
    assert proceed.wait(60)
    return read(*arguments)

  monkeypatch.setattr(reading, 'judgements', slow)
  with futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(known.get, store.database, project)
    assert inside.wait(60)
    second = pool.submit(known.get, store.database, project)
    try:
      assert second.result(10) == old
    finally:
      proceed.set()
    assert first.result(60)['a'] > old['a']


def test_the_order_displayed_favours_no_completion():
  first = collections.Counter(assign.display_order('abc', task, 7)[0] for task in range(3000))
  assert all(abs(count - 1000) < 4 * 26 for count in first.values())  # sd sqrt(3000 2/9) = 26
  assert assign.display_order('abc', 1, 2) == assign.display_order('abc', 1, 2)


def test_gold_questions_and_repeats(store):
  """Their shares are those of the settings; the right answer of a gold question is its first."""
  project = store.add_project('p', gold_fraction=0.25, repeat_fraction=0.25)
  store.add_tasks(project, pairs(['ab'] * 24))
  store.add_tasks(project, pairs(['xy'] * 30, gold={'chosen': 0}))
  a, b = people(store, 2)
  kinds, seen = [], {}
  while (assignment := store.next_task(project, a)) is not None:
    task, ids = assignment.task, [c.id for c in assignment.task.completions]
    kinds.append('gold' if task.gold else 'repeat' if task.repeats_task_id else 'ordinary')
    position = 0  # the answer, except in every second repeat
    if kinds[-1] == 'repeat':
      before, position = seen[task.repeats_task_id], kinds.count('repeat') % 2
      assert ids == before.completions and len(kinds) - before.number > 5
      assert task.repeats_task_id not in [k for k, v in seen.items() if v.repeated]
      seen[task.repeats_task_id] = before._replace(repeated=True)
    else:
      assert task.id not in seen
    seen[task.id] = Seen(ids, len(kinds), False)
    store.judge(assignment, a, {'chosen': ids[position]}, token=assignment.token)
  counts = collections.Counter(kinds)
  # Of about 48 assignments a quarter each; three standard deviations of the binomial are 9.
  assert counts['ordinary'] == 24 and 3 <= counts['gold'] <= 21 and 3 <= counts['repeat'] <= 21
  quality = store.quality(project)[a.name]
  assert (quality.gold, quality.right) == (counts['gold'], counts['gold'])
  assert (quality.repeats, quality.same) == (counts['repeat'], counts['repeat'] // 2)
  assert len(store.records(project)) == len(store.battles(project)) == 24
  assert store.progress(project).judged == store.progress(project).wanted == 24
  project = store.add_project('q', gold_fraction=1.0)
  store.add_tasks(project, pairs(['ab']))
  [gold] = store.add_tasks(project, pairs(['xy'], gold={'chosen': 0}))
  for person in (a, b):  # any number of annotators get it
    assignment = store.next_task(project, person)
    assert assignment.task.id == gold.id
    store.judge(assignment, person, {'chosen': gold.completions[1].id}, token=assignment.token)
  assert [store.quality(project)[p.name].right for p in (a, b)] == [0, 0]
  x, y = gold.completions
  store.add_task(project, 'pair', gold.prompt, [x, y], gold={'tie': True}, annotator=a)
  assert store.next_task(project, a).task.annotator_id == a.id
  assert store.next_task(project, b).task.gold is None  # this one is of a alone


Seen = collections.namedtuple('Seen', 'completions number repeated')


def test_turns_of_a_dialogue_belong_to_its_annotator(store):
  project = store.add_project('p')
  a, b = people(store, 2)
  dialogue = store_lib.accounts.add_dialogue(store.database, project, a, 'red_team')
  messages = [{'role': 'user', 'content': 'Hi'}]
  prompt = store.add_prompt(project, 'Hi', messages, dialogue)
  assert store.add_prompt(project, 'Hi', messages, dialogue) == prompt
  assert store.add_prompt(project, 'Hi', messages).id != prompt.id
  replies = [store.add_completion(prompt, text, policy=text) for text in 'xy']
  task = store.add_task(project, 'pair', prompt, replies, annotator=a)
  assert store.next_task(project, a) is None and store.next_task(project, b) is None
  with pytest.raises(UserError, match='does not belong'):
    store.lease(project, task, b)
  assignment = store.lease(project, task, a)
  assert store.lease(project, task, a).lease_id == assignment.lease_id
  store.judge(assignment, a, {'chosen': replies[1].id}, token=assignment.token)
  assert store.undo(project, a) is None
  with pytest.raises(UserError, match='has been answered'):
    store.lease(project, task, a)
  [record] = store.records(project)
  assert record['prompt'] == messages and record['chosen'] == 'y'
  store_lib.accounts.close_dialogue(store.database, dialogue)
  [found] = store_lib.accounts.dialogues(store.database, project, a)
  assert found.mode == 'red_team' and found.closed is not None

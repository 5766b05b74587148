"""Tasks of a round are added once, whatever is killed; waiting ends when people have answered."""

import collections
import threading

import pytest

from rlhf_jax import errors
from rlhf_jax.feedback import rounds
from rlhf_jax.feedback import store as store_lib
import tiny


class Killed(BaseException):
  """Stands for the death of the process."""


@pytest.fixture(scope='module')
def policies(world, tmp_path_factory):
  folder = tmp_path_factory.mktemp('policies')
  tiny.write_model(folder / 'round_1', tiny.LLAMA)
  tiny.write_tokenizer(folder / 'round_1')
  return ('sft', str(world / 'model')), ('round_1', str(folder / 'round_1'))


@pytest.fixture
def url(tmp_path):
  return str(tmp_path / 'feedback.db')


def arguments(world, url, policies, **changes):
  return {
    'store': url,
    'project': 'online',
    'policies': policies,
    'prompts': str(world / 'prompts.jsonl'),
    'count': 8,  # the sampler compiles for 4, 8, 12 or 16 prompts in all tests
    'responses': 2,
    'newest': 1,
    'max_new_tokens': 5,
    'temperature': 1.0,
    'seed': 3,
  } | changes


def tasks_of(url, project='online', round=None):
  with store_lib.Store.open(url) as store:
    return store.tasks(store.project(project), round=round)


def texts(tasks):
  return [[task.prompt.text, *(c.text for c in task.completions)] for task in tasks]


def test_comparisons_of_two_policies(world, url, policies):
  rounds.collect(None, round=2, **arguments(world, url, policies))
  tasks = tasks_of(url)
  assert {(task.kind, task.round, task.overlap) for task in tasks} == {('pair', 2, 1)}
  counts = collections.Counter(tuple(c.policy for c in task.completions) for task in tasks)
  assert counts == {('round_1', 'sft'): 8}
  folders = dict(policies)
  for task in tasks:
    first, second = task.completions
    assert (first.checkpoint, second.checkpoint) == (
      folders[first.policy],
      folders[second.policy],
    )
    assert first.text != second.text and first.sampling['temperature'] == 1.0


def test_respondents_by_hand():
  assert rounds.respondents(['a', 'b'], 2, 2, 1) == [['b', 'a'], ['b', 'a']]
  assert rounds.respondents(['a', 'b', 'c'], 3, 3, 2) == [list('cca'), list('ccb'), list('cca')]
  assert rounds.respondents(['a', 'b', 'c'], 2, 3, 1) == [list('cab'), list('cab')]
  assert rounds.respondents(['a'], 1, 4, 3) == [['a'] * 4]


def test_several_responses_are_ranked(world, url, policies):
  rounds.collect(None, round=1, **arguments(world, url, policies, count=4, responses=3, newest=2))
  names = [[c.policy for c in task.completions] for task in tasks_of(url)]
  wanted = [['round_1', 'round_1', 'sft']]
  assert names and all(row in wanted for row in names)  # one with an empty response is left out
  assert {task.kind for task in tasks_of(url)} == {'rank'}
  assert all(len(set(row)) == 4 for row in texts(tasks_of(url)))  # no response twice


def test_a_round_is_asked_once_and_rounds_differ(world, url, policies):
  ask = lambda number: rounds.collect(None, round=number, **arguments(world, url, policies[:1]))
  ask(1)
  first = tasks_of(url)
  ask(2)
  both = tasks_of(url)
  for number in (1, 2, 1):
    ask(number)
  assert tasks_of(url) == both and both[: len(first)] == first
  assert 6 <= len(first) <= 8  # without those that have an empty response
  assert not {row[1] for row in texts(first)} & {row[1] for row in texts(both[len(first) :])}


def test_killed_while_it_samples_and_after_it_committed(
  world, url, policies, monkeypatch, tmp_path
):
  whole = str(tmp_path / 'whole.db')
  rounds.collect(None, round=1, **arguments(world, whole, policies))
  with monkeypatch.context() as patch:
    kill_at(patch, rounds.Sampler, 'completions', call=2)
    with pytest.raises(Killed):
      rounds.collect(None, round=1, **arguments(world, url, policies))
  assert tasks_of(url) == []
  with monkeypatch.context() as patch:
    kill_at(patch, rounds, 'print', call=1)
    with pytest.raises(Killed):
      rounds.collect(None, round=1, **arguments(world, url, policies))
  rounds.collect(None, round=1, **arguments(world, url, policies))
  assert texts(tasks_of(url)) == texts(tasks_of(whole)) != []


def kill_at(patch, owner, name, call):
  """Makes one call of a function raise Killed."""
  function, calls = getattr(owner, name, print), [0]

  def dying(*args, **kwargs):
    calls[0] += 1
    if calls[0] == call:
      raise Killed
    return function(*args, **kwargs)

  patch.setattr(owner, name, dying, raising=False)


def test_comparisons_of_another_run_are_refused(world, url, policies):
  rounds.collect(None, round=1, **arguments(world, url, policies[:1]))
  with pytest.raises(errors.UserError, match="project 'online' has comparisons of policy 'sft' in"):
    rounds.collect(None, round=1, **arguments(world, url, (('sft', policies[1][1]),)))


def test_evaluation_has_pairs_of_each_policy_and_rankings_of_all(world, url, policies):
  settings = arguments(world, url, policies, project='evaluation')
  del settings['newest']
  for _ in range(2):
    rounds.evaluate(None, rounds=1, rankings=4, **settings)
  pairs = tasks_of(url, 'evaluation', round=1)
  rankings = tasks_of(url, 'evaluation', round=2)
  assert [[c.policy for c in task.completions] for task in pairs] == [['sft', 'sft']] * len(pairs)
  assert [[c.policy for c in task.completions] for task in rankings] == [['sft', 'round_1']] * len(
    rankings
  )
  assert {task.kind for task in rankings} == {'rank'}
  assert 6 <= len(pairs) <= 8 and 3 <= len(rankings) <= 4
  assert len(tasks_of(url, 'evaluation')) == len(rankings) + len(pairs)


def choose_first(store, project, annotator):
  """Lets an annotator choose the first completion of the next task; returns the task or None."""
  assignment = store.next_task(project, annotator)
  if assignment is not None:
    answer = {'chosen': assignment.task.completions[0].id}
    store.judge(assignment, annotator, answer, token=assignment.token)
  return assignment and assignment.task


def test_waiting_ends_when_every_task_is_answered_or_skipped(world, url, policies, monkeypatch):
  rounds.collect(None, round=1, **arguments(world, url, policies[:1], count=2))
  rounds.collect(None, round=2, **arguments(world, url, policies))
  monkeypatch.setattr(rounds, 'POLL_SECONDS', 0.01)
  with store_lib.Store.open(url) as store:
    project = store.project('online')
    person, _ = store.add_annotator('ann')
    waiting = threading.Thread(
      target=rounds.wait, args=(None,), kwargs={'store': url, 'project': 'online', 'round': 1}
    )
    done, wanted = rounds.answered(store, project, 1)
    assert (done, wanted) == (0, len(tasks_of(url, round=1)))
    waiting.start()
    others = 0
    while rounds.answered(store, project, 1)[0] < wanted - 1:  # the store is free meanwhile
      others += choose_first(store, project, person).round == 2
    undone = store.undo(project, person)
    assert undone is not None
    assert rounds.answered(store, project, None)[0] == others + wanted - 2
    assert waiting.is_alive()
    while (assignment := store.next_task(project, person)) is not None:
      store.judge(assignment, person, {'skip': True}, token=assignment.token)
    waiting.join(timeout=30)
    assert not waiting.is_alive() and rounds.answered(store, project, 1) == (wanted, wanted)


def test_more_skips_of_a_task_than_it_wants_answers_stand_for_no_other_task(url):
  with store_lib.Store.open(url) as store:
    project = store.add_project('online')
    texts = [{'text': name, 'policy': name} for name in 'ab']
    store.add_tasks(project, [{'prompt': prompt, 'completions': texts} for prompt in 'qr'])
    skipped = []
    for name in ('ann', 'ben'):
      person, _ = store.add_annotator(name)
      assignment = store.next_task(project, person)
      store.judge(assignment, person, {'skip': True}, token=assignment.token)
      skipped.append(assignment.task.id)
    assert len(set(skipped)) == 1 and rounds.answered(store, project, None) == (1, 2)

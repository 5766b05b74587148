"""A store of feedback as the data of a run, which reads the same judgements when it resumes."""

import json

import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import sources
from rlhf_jax.feedback import source
from rlhf_jax.feedback import store as store_lib
import runs
import tiny


def label(store, project, records):
  """Adds comparisons whose first completion is preferred, and one judgement of each."""
  annotator = store.annotator('Ada') or store.add_annotator('Ada')[0]
  completions = lambda record: [
    {'text': record[key], 'policy': key} for key in ('chosen', 'rejected')
  ]
  store.add_tasks(
    project, [{'prompt': r['prompt'], 'completions': completions(r)} for r in records]
  )
  for _ in records:
    assignment = store.next_task(project, annotator)
    chosen = assignment.task.completions[0].id
    store.judge(assignment, annotator, {'chosen': chosen}, token=assignment.token)


def some(start, count):
  """Returns comparisons of the tiny world."""
  return [
    {'prompt': tiny.text(i, 2), 'chosen': tiny.text(i % 20, 3), 'rejected': tiny.text(30 + i, 4)}
    for i in range(start, start + count)
  ]


class Stopped(Exception):
  """Raised by the test inside the loop."""


def test_a_run_reads_the_same_judgements_when_it_resumes(world, tmp_path, monkeypatch):
  """It ends like a run on a file that was written before the first start."""
  path = f'feedback:{tmp_path}/x.db#p'
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    project = store.add_project('p')
    label(store, project, some(0, 40))
    records = store.records(project)
    sources.write(tmp_path / 'file.jsonl', records)
  config = tiny.reward_model(world)
  config.checkpoint_every = 2
  config.data.path = str(tmp_path / 'file.jsonl')
  loop.run(config, tmp_path / 'whole')

  config.data.path = path
  create = reward_model.create

  def stopping(config, mesh):
    learner, state = create(config, mesh)
    next_batch = learner.next_batch

    def stop(state, **rest):
      if int(state.step) == 3:
        raise Stopped
      return next_batch(state, **rest)

    learner.next_batch = stop
    return learner, state

  with monkeypatch.context() as patch:
    patch.setattr(reward_model, 'create', stopping)
    with pytest.raises(Stopped):
      loop.run(config, tmp_path / 'stopped')
  pin = json.loads((tmp_path / 'stopped' / 'feedback.json').read_text())[path]
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    assert pin == {'until': 40, 'fingerprint': store.fingerprint(project)}
    label(store, project, some(40, 10))
    store.undo(project, store.annotator('Ada'))
    assert len(store.records(project)) == 49
  loop.run(config, tmp_path / 'stopped')
  runs.assert_same_run(tmp_path / 'stopped', tmp_path / 'whole')
  recorded = json.loads((tmp_path / 'stopped' / 'config.json').read_text())
  assert recorded['data']['path'] == path


def test_options_and_places(tmp_path):
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    project = store.add_project('two words')
    label(store, project, some(0, 3))
    store.undo(project, store.annotator('Ada'))
    label(store, project, some(2, 1))
    last = store.last(project)
    store.add_project('empty')
  read = lambda options: sources.read(f'feedback:{tmp_path}/x.db#two words{options}')
  found = read('')
  assert [r.where.rpartition(':')[2] for r in found] == [
    'judgement 1',
    'judgement 2',
    f'judgement {last}',
  ]
  assert found[0].fields['annotator'] == 'Ada'
  assert len(read('?until=2')) == 2 and len(read('?until=3')) == 3  # 4 undoes 3
  assert len(read('?simulated=false&round=0')) == 3
  assert 'completions' in read('?form=rankings')[0].fields
  for options, message in (
    ('?simulated=true', 'the data set is empty'),
    ('?round=1', 'the data set is empty'),
    ('?form=x', "form='x' must be one of"),
    ('?round=one', 'round=one must be a whole number'),
    ('?simulated=1', 'must be true or false'),
    ('?rounds=1', "no option 'rounds'"),
  ):
    with pytest.raises(errors.UserError, match=message):
      read(options)
  for path, message in (
    (f'feedback:{tmp_path}/x.db', 'name a store and a project'),
    (f'feedback:{tmp_path}/y.db#p', 'there is no such file'),
    (f'feedback:{tmp_path}/x.db#three', "its projects: 'two words', 'empty'"),
    (f'feedback:{tmp_path}/x.db#empty', 'the data set is empty'),
  ):
    with pytest.raises(errors.UserError, match=message):
      sources.read(path)
  assert not (tmp_path / 'y.db').exists()


def test_a_run_refuses_a_store_that_lost_judgements(world, tmp_path):
  config = tiny.reward_model(world)
  config.data.path = f'feedback:{tmp_path}/x.db#p'
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    label(store, store.add_project('p'), some(0, 3))
  pins = source.pins(config, tmp_path)
  source.write(tmp_path, pins)
  assert source.pinned(config, pins).data.path == f'{config.data.path}?until=3'
  (tmp_path / 'x.db').unlink()
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    label(store, store.add_project('p'), some(5, 3))
  with pytest.raises(errors.UserError, match='up to 3 are not those with which the run'):
    source.pins(config, tmp_path)


def test_numbers_of_a_path():
  assert source.parse('feedback:x.db#p?round=07').options == {'round': 7}
  for wrong in ('٣', '²', '-1', '', '9' * 5000):
    with pytest.raises(errors.UserError, match='must be a whole number'):
      source.parse(f'feedback:x.db#p?round={wrong}')

"""A workdir belongs to one config: another one is named key by key, and stops."""

import functools
import json
import os
import shutil

import pytest

from rlhf_jax import checkpoint
from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import metrics
from rlhf_jax import train
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import sft
import tiny


def content(folder):
  """{path: (bytes, time of change)} of all files."""
  return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
          for path in sorted(folder.rglob('*')) if path.is_file()}


def changed(config, changes):
  other = config.copy_and_resolve_references()
  with other.unlocked(), other.ignore_type():
    other.update_from_flattened_dict(changes)
  return other


@pytest.fixture(scope='module')
def data(world, tmp_path_factory):
  """A copy of the data that may be changed."""
  folder = tmp_path_factory.mktemp('data')
  shutil.copy(world / 'completions.jsonl', folder)
  return folder / 'completions.jsonl'


@pytest.fixture(scope='module')
def begun(world, data, tmp_path_factory):
  """A run that was stopped after 4 of 6 steps."""
  config = tiny.sft(world)
  config.data.path = str(data)
  config.data.kind = 'completion'
  config.optim.schedule = 'linear'
  config.steps, config.checkpoint_every = 4, 2
  folder = tmp_path_factory.mktemp('begun') / 'run'
  train.run(config, folder)
  shutil.rmtree(folder / 'model')
  return changed(config, {'steps': 6}), folder


@pytest.fixture
def copied(begun, tmp_path):
  config, folder = begun
  shutil.copytree(folder, tmp_path / 'run')
  return config, tmp_path / 'run'


def test_changes_are_named_in_order_with_both_values():
  before = {'a': 1, 'b': {'c': [1, 2], 'd': None, 'gone': 0}, 'e': True, 'same': {'x': 1.0, 'y': None}}
  after = {'same': {'x': 1, 'z': None}, 'b': {'c': [1, 3], 'd': 'x', 'new': 5}, 'a': 1, 'e': 1}
  assert [str(change) for change in identity.changes(before, after)] == [
      'config.b.c: [1, 2] -> [1, 3]', "config.b.d: None -> 'x'", 'config.b.new: (absent) -> 5',
      'config.b.gone: 0 -> (absent)', 'config.e: True -> 1']


@pytest.mark.parametrize('name', identity.MAY_CHANGE)
def test_keys_that_may_change_are_keys(name):
  *blocks, last = name.split('.')
  assert any(last in functools.reduce(lambda block, part: block.get(part, {}), blocks, config)
             for config in (ppo.config(), sft.config()))


@pytest.mark.parametrize('changes, listed', [
    ({'optim.learning_rate': 0.5}, 'config.optim.learning_rate: 0.003 -> 0.5'),
    ({'seed': 9}, 'config.seed: 0 -> 9'),
    ({'batch_size': 8, 'optim.clip_norm': 2.0}, 'config.batch_size: 16 -> 8; config.optim.clip_norm: None -> 2.0'),
])
@pytest.mark.parametrize('finished', [False, True])
def test_another_config_is_named_and_changes_nothing(changes, listed, finished, copied):
  config, folder = copied
  if finished:
    (folder / 'model').mkdir()
    config = changed(config, {'steps': 4})
  before = content(folder)
  with pytest.raises(errors.UserError) as caught:
    train.run(changed(config, changes), folder)
  message = str(caught.value)
  state = 'is finished' if finished else 'was started'
  for part in (f'{folder} {state} with another config: ', *listed.split('; '), '--fork=NEWDIR', 'Nothing was changed'):
    assert part in message, message
  assert content(folder) == before


def test_keys_that_may_change_are_said_and_written_down(copied, capfd):
  config, folder = copied
  kept = changed(config, {'log_every': 2, 'checkpoint_minutes': 1.0, 'evals.held_out.every': 3})
  train.run(kept, folder)
  out = capfd.readouterr().out
  for line in ('config.steps: 4 -> 6; from here on the learning rate follows the new length', 'config.log_every: 1 -> 2', 'config.checkpoint_minutes: 10.0 -> 1.0'):
    assert f'{folder}: {line}\n' in out
  assert f'{folder}/model: 6 steps, ' in out and 'loss ' in out.splitlines()[-1]
  assert identity.read(folder) == identity.plain(kept)
  starts = [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]
  assert [start['step'] for start in starts] == [0, 4]
  assert starts[1]['changed']['steps'] == [4, 6] and starts[1]['pid'] == os.getpid()
  assert starts[1].keys() >= {'time', 'host', 'version', 'commit', 'overridden', 'inputs'}


def test_data_may_move_but_not_change(copied, data, tmp_path):
  config, folder = copied
  moved = tmp_path / 'moved.jsonl'
  shutil.copy(data, moved)
  allowed = identity.check(changed(config, {'data.path': str(moved)}), folder)
  assert {change.key for change in allowed} == {'data.path', 'steps'}
  lines = moved.read_text().splitlines()
  moved.write_text('\n'.join(lines[1:]))
  with pytest.raises(errors.UserError, match=f'config.data.path: .*{data.name}. -> .*moved.jsonl'):
    identity.check(changed(config, {'data.path': str(moved)}), folder)
  kept = data.read_bytes()
  try:
    data.write_text('\n'.join(lines[1:]))
    with pytest.raises(errors.UserError, match='config.data.path=.* have changed since the run'):
      train.run(config, folder)
  finally:
    data.write_bytes(kept)
  identity.check(config, folder)


def test_fewer_steps_than_were_taken_are_refused(copied):
  config, folder = copied
  before = content(folder)
  with pytest.raises(errors.UserError, match=r'config.steps=3, which is 3 steps, but the checkpoint in .* is after step 4'):
    train.run(changed(config, {'steps': 3}), folder)
  assert content(folder) == before


def test_a_finished_run_says_so(copied, capfd):
  config, folder = copied
  (folder / 'model').mkdir()
  assert train.run(changed(config, {'steps': 4}), folder) == folder / 'model'
  assert f'; model {folder}/model; to repeat it delete {folder}' in capfd.readouterr().out
  with pytest.raises(errors.UserError, match='is finished with another config: config.steps: 4 -> 6'):
    train.run(config, folder)


def test_a_fork_starts_from_the_newest_checkpoint(copied, tmp_path):
  config, folder = copied
  before = content(folder)
  other = changed(config, {'optim.learning_rate': 1e-4, 'steps': 5})
  train.run(other, tmp_path / 'new', fork_of=folder)
  assert content(folder) == before
  assert {record['step'] for record in metrics.read(tmp_path / 'new')} == {4}
  origin = {'workdir': str(folder), 'step': 4}
  assert identity.read(tmp_path / 'new') == identity.plain(other) | {'forked_from': origin}
  shutil.rmtree(tmp_path / 'new' / 'model')
  train.run(other, tmp_path / 'new')  # resumes without --fork, and with it
  train.run(other, tmp_path / 'new', fork_of=folder)
  assert identity.read(tmp_path / 'new')['forked_from'] == origin
  with pytest.raises(errors.UserError, match='--fork=.* holds another run: name a new folder'):
    train.run(other, folder, fork_of=tmp_path / 'new')
  with pytest.raises(errors.UserError, match='has no checkpoint for --fork='):
    train.run(other, tmp_path / 'third', fork_of=tmp_path)
  assert not (tmp_path / 'third').exists()


def test_a_run_that_never_took_a_step_is_nobodys(world, tmp_path):
  config = tiny.sft(world)
  (tmp_path / 'metrics.jsonl').write_text('')
  identity.start(config, tmp_path, changed=[], step=0)
  assert identity.check(changed(config, {'seed': 5}), tmp_path) == []


def test_reading_a_run_leaves_its_damaged_checkpoints(copied):
  config, folder = copied
  for file in (folder / 'checkpoints' / '4').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  before = content(folder)
  learner, state = train.build.load('sft').create(config, train.sharding.make_mesh(dict(config.mesh)))
  with checkpoint.Checkpoints(folder) as checkpoints:
    step, _ = checkpoints.restore(state, learner.iterators)
  assert step == 2 and content(folder) == before

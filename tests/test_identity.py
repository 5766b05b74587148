"""A workdir belongs to one config: another config is refused, with all keys that differ."""

import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import loop
from rlhf_jax import metrics
from rlhf_jax import sharding
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import dpo
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import sft
import tiny


def content(folder):
  """Returns {path: (bytes, time of change)} of all files."""
  return {
    str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def changed(config, changes):
  other = config.copy_and_resolve_references()
  with other.unlocked(), other.ignore_type():
    other.update_from_flattened_dict(changes)
  return other


def check(config, folder):
  """Returns the changes with which a run in a folder may resume."""
  return identity.check(config, folder, build.defaults('sft'))


@pytest.fixture(scope='module')
def data(world, tmp_path_factory):
  """Returns a copy of the data that the test may change."""
  folder = tmp_path_factory.mktemp('data')
  shutil.copy(world / 'completions.jsonl', folder)
  return folder / 'completions.jsonl'


@pytest.fixture(scope='module')
def begun(world, data, tmp_path_factory):
  """Returns a run that was stopped after 4 of 6 steps."""
  config = tiny.sft(world)
  config.data.path = str(data)
  config.data.kind = 'completion'
  config.optim.schedule = 'linear'
  config.steps, config.checkpoint_every = 4, 2
  folder = tmp_path_factory.mktemp('begun') / 'run'
  loop.run(config, folder)
  shutil.rmtree(folder / 'model')
  return changed(config, {'steps': 6}), folder


@pytest.fixture
def copied(begun, tmp_path):
  config, folder = begun
  shutil.copytree(folder, tmp_path / 'run')
  return config, tmp_path / 'run'


def test_changes_are_named_in_order_with_both_values():
  before = {
    'a': 1,
    'b': {'c': [1, 2], 'd': None, 'gone': 0},
    'e': True,
    'same': {'x': 1.0, 'y': None},
  }
  after = {'same': {'x': 1, 'z': None}, 'b': {'c': [1, 3], 'd': 'x', 'new': 5}, 'a': 1, 'e': 1}
  assert [str(change) for change in identity.changes(before, after)] == [
    'config.b.c: [1, 2] -> [1, 3]',
    "config.b.d: None -> 'x'",
    'config.b.new: (absent) -> 5',
    'config.b.gone: 0 -> (absent)',
    'config.e: True -> 1',
  ]


@pytest.mark.parametrize('name', identity.MAY_CHANGE)
def test_keys_that_may_change_are_keys(name):
  *blocks, last = name.split('.')
  assert any(
    last in functools.reduce(lambda block, part: block.get(part, {}), blocks, config)
    for config in (dpo.config(), ppo.config(), sft.config())
  )


def test_parts_of_a_reward_may_change_as_the_reward_may():
  for key in ('attempts', 'timeout', 'url', 'workers'):
    assert identity.may_change(f'reward.{key}') and identity.may_change(f'reward.parts.a.{key}')
  for key in ('function', 'weight', 'arguments.x'):
    assert not identity.may_change(f'reward.parts.a.{key}')
  assert not identity.may_change('reward.parts.a')


@pytest.mark.parametrize(
  'changes, listed',
  [
    ({'optim.learning_rate': 0.5}, 'config.optim.learning_rate: 0.003 -> 0.5'),
    ({'seed': 9}, 'config.seed: 0 -> 9'),
    (
      {'batch_size': 8, 'optim.clip_norm': 2.0},
      'config.batch_size: 16 -> 8; config.optim.clip_norm: None -> 2.0',
    ),
  ],
)
@pytest.mark.parametrize('finished', [False, True])
def test_another_config_is_named_and_changes_nothing(changes, listed, finished, copied):
  config, folder = copied
  if finished:
    (folder / 'model').mkdir()
    config = changed(config, {'steps': 4})
  before = content(folder)
  with pytest.raises(errors.UserError) as caught:
    loop.run(changed(config, changes), folder)
  message = str(caught.value)
  state = 'is finished' if finished else 'was started'
  for part in (
    f'{folder} {state} with another config: ',
    *listed.split('; '),
    '--fork=NEWDIR',
    'The run was not changed',
  ):
    assert part in message, message
  assert content(folder) == before


def test_allowed_changes_are_reported_and_recorded(copied, capfd):
  config, folder = copied
  kept = changed(config, {'log_every': 2, 'checkpoint_minutes': 1.0, 'evals.held_out.every': 3})
  loop.run(kept, folder)
  out = capfd.readouterr().out
  for line in (
    'config.steps: 4 -> 6; from now on the learning-rate schedule has the new length',
    'config.log_every: 1 -> 2',
    'config.checkpoint_minutes: 10.0 -> 1.0',
  ):
    assert f'{folder}: {line}\n' in out
  assert f'{folder}/model: 6 steps, ' in out and 'loss ' in out.splitlines()[-1]
  assert identity.read(folder) == identity.to_plain_dict(kept)
  starts = [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]
  assert [start['step'] for start in starts] == [0, 4]
  assert starts[1]['changed']['steps'] == [4, 6] and starts[1]['pid'] == os.getpid()
  assert starts[1].keys() >= {'time', 'host', 'version', 'commit', 'overridden', 'inputs'}


def test_a_key_that_the_version_before_did_not_have_counts_as_its_default(copied):
  config, folder = copied
  recorded = identity.read(folder)
  del recorded['optim']['warmup_from'], recorded['evals']['held_out']
  (folder / 'config.json').write_text(json.dumps(recorded))
  assert 'evals.held_out' in {change.key for change in check(config, folder)}
  with pytest.raises(
    errors.UserError, match='another config: config.optim.warmup_from: 0.0 -> 0.5'
  ):
    check(changed(config, {'optim.warmup_from': 0.5, 'optim.warmup_steps': 2}), folder)
  loop.run(config, folder)  # resumes


def test_data_may_move_but_not_change(copied, data, tmp_path):
  config, folder = copied
  moved = tmp_path / 'moved.jsonl'
  shutil.copy(data, moved)
  allowed = check(changed(config, {'data.path': str(moved)}), folder)
  assert {change.key for change in allowed} == {'data.path', 'steps'}
  lines = moved.read_text().splitlines()
  moved.write_text('\n'.join(lines[1:]))
  with pytest.raises(errors.UserError, match=f'config.data.path: .*{data.name}. -> .*moved.jsonl'):
    check(changed(config, {'data.path': str(moved)}), folder)
  kept = data.read_bytes()
  try:
    data.write_text('\n'.join(lines[1:]))
    with pytest.raises(errors.UserError, match='config.data.path=.* have changed since the run'):
      loop.run(config, folder)
  finally:
    data.write_bytes(kept)
  check(config, folder)


@pytest.mark.parametrize('key', ['context', 'teacher'])
def test_the_context_and_the_teacher_may_not_change(key, world, tmp_path):
  """A context that is a text, even a long one, is no file."""
  config = tiny.distillation(world)
  teacher, context = tmp_path / 'teacher', tmp_path / 'context.txt'
  shutil.copytree(config.distillation.teacher, teacher)
  context.write_text('w3 w5 ')
  config.distillation.update({'teacher': str(teacher), 'context': str(context)})
  defaults = build.defaults('distillation')
  identity.record_start(config, tmp_path, changed=[], step=0)
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  assert identity.check(config, tmp_path, defaults) == []
  tiny.write_model(teacher, tiny.LLAMA) if key == 'teacher' else context.write_text('w3 w6 ')
  with pytest.raises(errors.UserError, match=f'^config.distillation.{key}=.*contents have changed'):
    identity.check(config, tmp_path, defaults)
  text = {'distillation': {'teacher': None, 'context': 'w1 ' * 10_000}}
  assert identity.input_keys(text) == {}


def test_fewer_steps_than_were_taken_are_refused(copied):
  config, folder = copied
  before = content(folder)
  with pytest.raises(
    errors.UserError,
    match=r'config.steps=3, which is 3 steps, but the checkpoint in .* is after step 4',
  ):
    loop.run(changed(config, {'steps': 3}), folder)
  assert content(folder) == before


def test_a_finished_run_says_so(copied, capfd):
  config, folder = copied
  (folder / 'model').mkdir()
  assert loop.run(changed(config, {'steps': 4}), folder) == folder / 'model'
  assert f'; model {folder}/model; to repeat it delete {folder}' in capfd.readouterr().out
  with pytest.raises(
    errors.UserError, match='is finished with another config: config.steps: 4 -> 6'
  ):
    loop.run(config, folder)


def test_a_fork_starts_from_the_newest_checkpoint(copied, tmp_path):
  config, folder = copied
  before = content(folder)
  other = changed(config, {'optim.learning_rate': 1e-4, 'steps': 5})
  loop.run(other, tmp_path / 'new', fork_of=folder)
  assert content(folder) == before
  assert {record['step'] for record in metrics.read(tmp_path / 'new')} == {4}
  origin = {'workdir': str(folder), 'step': 4}
  assert identity.read(tmp_path / 'new') == identity.to_plain_dict(other) | {'forked_from': origin}
  # A fork killed before its first checkpoint restarts from its source, also without --fork.
  expected = (tmp_path / 'new' / 'model' / 'model.safetensors').read_bytes()
  shutil.rmtree(tmp_path / 'new' / 'model')
  shutil.rmtree(tmp_path / 'new' / 'checkpoints')
  loop.run(other, tmp_path / 'new')
  assert (tmp_path / 'new' / 'model' / 'model.safetensors').read_bytes() == expected
  shutil.rmtree(tmp_path / 'new' / 'model')
  shutil.move(folder, tmp_path / 'away')  # the fork no longer needs the other folder
  loop.run(other, tmp_path / 'new')
  assert identity.read(tmp_path / 'new')['forked_from'] == origin
  assert [start['step'] for start in starts(tmp_path / 'new')] == [4, 4, 5]


def starts(folder):
  return [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]


def test_a_fork_that_cannot_start_leaves_no_folder(copied, tmp_path):
  config, folder = copied
  (tmp_path / 'other').mkdir()
  for changes, source, message in (
    ({}, tmp_path / 'other', 'has no checkpoint for --fork='),
    ({'model.path': str(tmp_path)}, folder, 'which belong to another model: config.model.path: '),
    (
      {'steps': 4},
      folder,
      'is after step 4, and the config asks for 4 steps in total: set config.steps above 4',
    ),
  ):
    with pytest.raises(errors.UserError, match=message):
      loop.run(changed(config, changes), tmp_path / 'new', fork_of=source)
    assert not (tmp_path / 'new' / 'config.json').exists()
  loop.run(config, tmp_path / 'new', fork_of=folder)
  with pytest.raises(errors.UserError, match='--fork=.* holds another run: name a new folder'):
    loop.run(config, tmp_path / 'new', fork_of=tmp_path / 'other')


def test_a_fork_follows_its_config(world, tmp_path):
  """The config overrides the KL coefficient and the random key of the checkpoint."""
  config = tiny.ppo(world)
  config.steps = 1
  loop.run(config, tmp_path / 'old')
  other = changed(config, {'rl.kl_coef': 5.0, 'seed': 9, 'steps': 2})
  loop.run(other, tmp_path / 'new', fork_of=tmp_path / 'old')
  assert metrics.read(tmp_path / 'new')[-1]['objective/kl_coef'] == 5.0
  again = changed(config, {'rl.kl_coef': 5.0, 'steps': 2})
  loop.run(again, tmp_path / 'again', fork_of=tmp_path / 'old')
  kl, same_seed = (metrics.read(tmp_path / name)[-1]['objective/kl'] for name in ('new', 'again'))
  assert kl != same_seed


def test_a_fork_with_another_seed_draws_from_its_keys(begun):
  """Weights and moments are still those of the other run."""
  config, folder = begun
  for seed in (config.seed, 9):
    other = changed(config, {'seed': seed})
    learner, state = sft.create(other, sharding.make_mesh(dict(other.mesh)))
    start = jax.device_get(state.params)
    step, state = loop.fork(other, state, learner, folder)
    assert step == state.step == 4
    np.testing.assert_array_equal(*map(jax.random.key_data, (state.key, jax.random.key(seed))))
    assert (
      min(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.params))
      )
      > 0
    )


def test_the_inputs_of_a_run_are_those_of_its_last_first_step(begun, data, tmp_path):
  config = changed(begun[0], {'steps': 2})
  other = tmp_path / 'other.jsonl'
  other.write_text('\n'.join(data.read_text().splitlines()[:30]))
  for path in (data, other):  # the first start is killed before its first checkpoint
    loop.run(changed(config, {'data.path': str(path)}), tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'model')
    if path == data:
      shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  assert check(changed(config, {'data.path': str(other)}), tmp_path / 'run') == []
  with pytest.raises(errors.UserError, match='config.data.path: '):
    check(config, tmp_path / 'run')


def test_only_the_model_of_a_runs_folder_counts(tmp_path):
  (tmp_path / 'model').mkdir()
  (tmp_path / 'config.json').write_text('{"algorithm": "sft"}')
  (tmp_path / 'model' / 'config.json').write_text('{"model_type": "llama"}')
  before = identity.fingerprint(str(tmp_path))
  (tmp_path / 'metrics.jsonl').write_text('{}')
  (tmp_path / 'model' / '.cache').write_text('')
  assert identity.fingerprint(str(tmp_path)) == before
  (tmp_path / 'model' / 'model.safetensors').write_text('x')
  assert identity.fingerprint(str(tmp_path)) != before


def test_changed_user_code_is_reported(copied, tmp_path, monkeypatch, capfd):
  monkeypatch.syspath_prepend(tmp_path)
  module = tmp_path / 'my_evaluator.py'
  module.write_text('def make(context):\n  return lambda state: {"x": 1}\n')
  config, folder = copied
  config = changed(config, {'steps': 5})
  with config.unlocked():
    config.evals.mine = {'function': 'my_evaluator:make'}
  loop.run(config, folder)
  shutil.rmtree(folder / 'model')
  module.write_text('def make(context):\n  return lambda state: {"x": 2}\n')
  loop.run(config, folder)
  assert (
    f'{folder}: the file of config.evals.mine.function has changed since the last start'
    in capfd.readouterr().out
  )


def test_a_run_that_never_took_a_step_is_nobodys(world, tmp_path):
  config = tiny.sft(world)
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0}\n')
  identity.record_start(config, tmp_path, changed=[], step=0)
  assert check(changed(config, {'seed': 5}), tmp_path) == []


def test_reading_a_run_leaves_its_damaged_checkpoints(copied):
  config, folder = copied
  for file in (folder / 'checkpoints' / '4').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  before = content(folder)
  learner, state = loop.build.load('sft').create(config, loop.sharding.make_mesh(dict(config.mesh)))
  with checkpoint.Checkpoints(folder) as checkpoints:
    step, _ = checkpoints.restore(state, learner.iterators)
  assert step == 2 and content(folder) == before

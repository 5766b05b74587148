"""Stages run in order, once, in their folders; mistakes in any stage are found at the start."""

import json
import shutil

import ml_collections
import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import pipeline
import tiny

RAN = []


def note(folder, *, text, paths, seed):
  """A stage that writes its arguments."""
  RAN.append(folder.name)
  if text == 'fail':
    raise errors.UserError('this stage fails')
  (folder / 'note.json').write_text(json.dumps([text, paths, seed]))


def unseeded(folder, *, text):
  """A stage without a seed."""
  RAN.append(folder.name)
  (folder / 'note.json').write_text(text)


def checked(folder, *, text):
  """A stage with its own check."""


def check(*, text):
  errors.need(text != 'bad', f'{text=} is not allowed')


checked.check = check


@pytest.fixture(autouse=True)
def ran():
  RAN.clear()
  return RAN


def make_config(world=''):
  """Returns three stages of functions, and a training stage that is not in `stages`."""
  config = ml_collections.ConfigDict(
    {
      'seed': 5,
      'stages': ('first', 'second', 'third'),
      'data': {'path': 'x'},
      'first': {
        'function': 'test_pipeline:note',
        'text': 'a',
        'paths': ('$workdir/x',),
        'seed': None,
      },
      'second': {
        'function': 'test_pipeline:note',
        'text': 'from $workdir/first',
        'seed': 7,
        'paths': (('name', '$workdir/first/note.json'), ('other', 'y')),
      },
      'third': {'function': 'test_pipeline:unseeded', 'text': '$workdir'},
    }
  )
  config.pretrain = tiny.sft(world)
  config.pretrain.seed = None
  return config


def written(folder):
  return json.loads((folder / 'note.json').read_text())


def test_placeholders_and_seeds(tmp_path, ran):
  pipeline.run(make_config(), tmp_path)
  assert ran == ['first', 'second', 'third']
  assert written(tmp_path / 'first') == ['a', [f'{tmp_path}/x'], 5]
  assert written(tmp_path / 'second') == [
    f'from {tmp_path}/first',
    [['name', f'{tmp_path}/first/note.json'], ['other', 'y']],
    7,
  ]
  assert (tmp_path / 'third' / 'note.json').read_text() == str(tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 5


def test_resolve_leaves_the_config_as_it_was(tmp_path):
  config = make_config()
  stage = pipeline.resolve(config.first, tmp_path, 5)
  assert stage.seed == 5 and stage.paths == (f'{tmp_path}/x',) and stage.is_locked
  assert config.first.seed is None and config.first.paths == ('$workdir/x',)


def test_a_finished_stage_is_not_run_again_until_its_folder_is_deleted(tmp_path, ran):
  config = make_config()
  pipeline.run(config, tmp_path)
  pipeline.run(config, tmp_path)
  assert ran == ['first', 'second', 'third']
  shutil.rmtree(tmp_path / 'second')
  pipeline.run(config, tmp_path)
  assert ran == ['first', 'second', 'third', 'second']


def test_stages_can_be_picked(tmp_path, ran):
  config = make_config()
  config.stages = ('third,first',)  # from --config.stages=third,first
  pipeline.run(config, tmp_path)
  assert ran == ['third', 'first']


def test_a_stage_that_fails_leaves_the_finished_ones(tmp_path, ran):
  config = make_config()
  config.second.text = 'fail'
  with pytest.raises(errors.UserError, match='this stage fails'):
    pipeline.run(config, tmp_path)
  before = (tmp_path / 'first' / 'note.json').stat()
  assert (tmp_path / 'first' / pipeline.DONE).exists()
  assert not (tmp_path / 'second' / pipeline.DONE).exists()
  assert not (tmp_path / 'third').exists()
  config.second.text = 'mended'
  pipeline.run(config, tmp_path)
  assert ran == ['first', 'second', 'second', 'third']
  assert (tmp_path / 'first' / 'note.json').stat() == before


def test_a_failing_module_of_a_stage_is_reported_with_its_line(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'broken_stage.py').write_text('x = 1\ny = x / 0\n')
  config = make_config()
  config.third.function = 'broken_stage:run'
  with pytest.raises(
    errors.UserError, match='stage third: importing broken_stage raised ZeroDivisionError.*py:2'
  ):
    pipeline.run(config, tmp_path / 'run')


def test_another_config_of_a_finished_stage_stops_and_changes_nothing(tmp_path, ran):
  config = make_config()
  config.stages = ('first', 'second')
  pipeline.run(config, tmp_path)
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  for changes, listed in (
    ({'first.text': 'b'}, "config.first.text: 'a' -> 'b'"),
    ({'seed': 6}, 'config.seed: 5 -> 6'),
  ):
    other = make_config()
    other.update_from_flattened_dict(changes)
    with pytest.raises(
      errors.UserError, match=f'{listed}. Name another --workdir; to repeat a stage, delete'
    ):
      pipeline.run(other, tmp_path)
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
  assert ran == ['first', 'second']


def test_keys_that_the_version_before_did_not_have_count_as_their_defaults(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, 'run', lambda stage, folder: None)
  config = make_config('$workdir')
  config.stages = ('pretrain',)
  pipeline.run(config, tmp_path / 'old')
  recorded = json.loads((tmp_path / 'old' / 'config.json').read_text())
  del recorded['pretrain']['optim']['warmup_from']
  (tmp_path / 'old' / 'config.json').write_text(json.dumps(recorded))
  pipeline.run(config, tmp_path / 'old')
  pipeline.run(config, tmp_path / 'new', fork_of=tmp_path / 'old')
  assert (tmp_path / 'new' / 'pretrain' / pipeline.DONE).exists()
  config.pretrain.optim.warmup_from = 0.5
  with pytest.raises(errors.UserError, match='config.pretrain.optim.warmup_from: 0.0 -> 0.5'):
    pipeline.run(config, tmp_path / 'old')


def test_a_stage_that_has_not_begun_may_change(tmp_path, ran, capsys):
  config = make_config()
  config.stages = ('first',)
  pipeline.run(config, tmp_path)
  other = make_config()
  other.second.text = 'other'
  pipeline.run(other, tmp_path)
  assert ran == ['first', 'second', 'third']
  assert (
    f"{tmp_path}: config.second.text: 'from $workdir/first' -> 'other'" in capsys.readouterr().out
  )
  settings = json.loads((tmp_path / 'config.json').read_text())
  assert settings['second']['text'] == 'other' and settings['stages'] == [
    'first',
    'second',
    'third',
  ]
  starts = [json.loads(line) for line in (tmp_path / 'runs.jsonl').read_text().splitlines()]
  assert [list(start['changed']) for start in starts] == [[], ['second.text']]


def test_a_finished_stage_after_one_that_runs_again_is_reported_as_older(tmp_path, ran, capsys):
  pipeline.run(make_config(), tmp_path)
  shutil.rmtree(tmp_path / 'second')
  pipeline.run(make_config(), tmp_path)
  out = capsys.readouterr().out
  assert '[3/3] third: finished on ' in out and '; it was finished before second ran' in out
  assert out.count('was finished before') == 1


def test_the_stages_of_all_starts_are_logged(tmp_path, ran):
  for stages, logged in (
    (('second',), ['second']),
    (('first,second', 'third'), ['first', 'second', 'third']),
    (('third',), ['first', 'second', 'third']),
  ):
    config = make_config()
    config.stages = stages
    pipeline.run(config, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['stages'] == logged
  assert ran == ['second', 'first', 'third']


def test_a_fork_that_was_killed_while_it_took_stages_over_goes_on(tmp_path, ran, monkeypatch):
  pipeline.run(make_config(), tmp_path / 'old')
  copy = pipeline.workdir_lib.copy

  def killed(source, target):
    if source.name == 'second':
      (target.parent / '.second.copy').mkdir()
      raise KeyboardInterrupt
    copy(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(pipeline.workdir_lib, 'copy', killed)
    with pytest.raises(KeyboardInterrupt):
      pipeline.run(make_config(), tmp_path / 'new', fork_of=tmp_path / 'old')
  ran.clear()
  pipeline.run(make_config(), tmp_path / 'new', fork_of=tmp_path / 'old')
  assert ran == [] and written(tmp_path / 'new' / 'second') == written(tmp_path / 'old' / 'second')
  assert not list((tmp_path / 'new').glob('.*'))


def test_a_fork_copies_the_finished_stages_up_to_the_first_that_differs(tmp_path, ran, capsys):
  pipeline.run(make_config(), tmp_path / 'old')
  ran.clear()
  other = make_config()
  other.second.text = 'other'
  pipeline.run(other, tmp_path / 'new', fork_of=tmp_path / 'old')
  assert ran == ['second', 'third']
  assert written(tmp_path / 'new' / 'first') == written(tmp_path / 'old' / 'first')
  assert (tmp_path / 'new' / 'third' / 'note.json').read_text() == f'{tmp_path}/new'
  assert json.loads((tmp_path / 'new' / 'config.json').read_text())['forked_from'] == {
    'workdir': f'{tmp_path}/old',
    'stages': ['first'],
  }
  pipeline.run(other, tmp_path / 'new', fork_of=tmp_path / 'old')
  pipeline.run(other, tmp_path / 'new')
  assert ran == ['second', 'third']
  assert '[1/3] first: finished on ' in capsys.readouterr().out
  with pytest.raises(errors.UserError, match='holds another run: name a new folder'):
    pipeline.run(make_config(), tmp_path / 'old', fork_of=tmp_path / 'new')
  with pytest.raises(errors.UserError, match='is not the folder of a pipeline'):
    pipeline.run(make_config(), tmp_path / 'third', fork_of=tmp_path / 'nothing')


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'stages': ('first', 'nothing')},
      r"config.stages='first,nothing' names \['nothing'\]: the stages of this config are first, "
      'pretrain, second, third',
    ),
    ({'stages': ('seed',)}, r"names \['seed'\]: the stages of this config are first, "),
    ({'stages': ('data',)}, r"names \['data'\]: the stages of this config are first, "),
    ({'stages': ()}, 'names no stage: the stages of this config are first, '),
    (
      {'third.function': 'no_such_module:note'},
      "stage third: config.third.function='no_such_module:note' cannot be loaded.*"
      "'package.module:name'",
    ),
    (
      {'third.function': 'test_pipeline:no_such_function'},
      "config.third.function='test_pipeline:no_such_function' cannot be loaded",
    ),
    (
      {'third.function': 'test_pipeline:note'},
      'stage third: test_pipeline:note cannot be called with the keys of config.third .missing a',
    ),
    (
      {'third.function': 'test_pipeline:checked', 'third.text': 'bad'},
      "stage third: text='bad' is not allowed",
    ),
    (
      {'stages': ('first', 'pretrain'), 'pretrain.batch_size': 5, 'pretrain.microbatch_size': 2},
      'stage pretrain: config',
    ),
  ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first_runs(
  changes, message, tmp_path, ran
):
  config = make_config()
  pipeline.run(config, tmp_path / 'old')
  ran.clear()
  before = sorted(path for path in (tmp_path / 'old').rglob('*'))
  settings = (tmp_path / 'old' / 'config.json').read_bytes()
  with config.ignore_type():
    for key, value in changes.items():
      config.update_from_flattened_dict({key: value})
  for workdir in (tmp_path / 'old', tmp_path / 'new'):
    with pytest.raises(errors.UserError, match=message):
      pipeline.run(config, workdir)
  assert ran == [] and not (tmp_path / 'new').exists()
  assert sorted(path for path in (tmp_path / 'old').rglob('*')) == before
  assert (tmp_path / 'old' / 'config.json').read_bytes() == settings


def test_a_stage_of_training_runs_in_its_folder_with_the_pipelines_seed(tmp_path, monkeypatch):
  config = make_config('$workdir')
  config.stages = ('pretrain',)
  calls = []
  monkeypatch.setattr(loop, 'run', lambda stage, folder: calls.append((stage, folder)))
  pipeline.run(config, tmp_path)
  ((stage, folder),) = calls
  assert folder == tmp_path / 'pretrain' and stage.seed == 5 and stage.is_locked
  assert stage.data.path == f'{tmp_path}/texts.jsonl'
  assert (folder / pipeline.DONE).exists()


def test_a_finished_stage_may_not_become_longer_and_an_unfinished_one_may(tmp_path, monkeypatch):
  """A longer one would not run again, and later stages would use the shorter result."""
  lengths = []
  monkeypatch.setattr(loop, 'run', lambda stage, folder: lengths.append(stage.steps))
  config = make_config('$workdir')
  config.stages = ('pretrain',)
  pipeline.run(config, tmp_path)
  config.pretrain.steps += 1
  with pytest.raises(errors.UserError, match='config.pretrain.steps: 4 -> 5'):
    pipeline.run(config, tmp_path)
  (tmp_path / 'pretrain' / pipeline.DONE).unlink()
  (tmp_path / 'pretrain' / 'checkpoints' / '3').mkdir(parents=True)
  pipeline.run(config, tmp_path)
  assert lengths == [4, 5]

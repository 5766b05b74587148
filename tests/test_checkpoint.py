"""Checkpoints that are intact, damaged, incomplete, or of another run."""

import gc
import shutil
import threading

import grain
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from rlhf_jax import checkpoint
from rlhf_jax import checksums
from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import sharding
from rlhf_jax import types
import tiny

# Orbax does not finish its other reads if one fails.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning', 'ignore::RuntimeWarning'
)


@pytest.fixture(autouse=True)
def collect():
  """Collects garbage now, because unfinished reads warn when they are collected."""
  yield
  gc.collect()


DAMAGE = {
  'truncated': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  'emptied': lambda path: path.write_bytes(b''),
  'missing': lambda path: path.unlink(),
}


def make_state(step, width=4):
  """Returns a TrainState all of whose parts depend on the step."""
  draw = np.random.default_rng(step)
  params = {
    'policy': {
      'a': jnp.asarray(draw.normal(size=(8, width)), jnp.float32),
      'b': jnp.asarray(draw.normal(size=3), jnp.float32),
    }
  }
  moments = jax.tree.map(lambda x: x + step, optax.adam(1e-3).init(params['policy']))
  return types.TrainState(
    step=jnp.int32(step),
    key=jax.random.key(step),
    params=params,
    opt_state={'policy': moments},
    extra={'kl_coef': jnp.float32(0.1 * step), 'reward_moments': jnp.full(3, step, jnp.float32)},
  )


def make_iterator(step=0):
  """Returns an iterator over batches of shuffled numbers, after `step` batches."""
  data = grain.MapDataset.source(range(100)).seed(1).shuffle().repeat().batch(4)
  iterator = iter(data.to_iter_dataset())
  for _ in range(step):
    next(iterator)
  return iterator


def restore(folder, width=4):
  """Opens the folder, restores and closes; checks that state and iterator are of the given step."""
  checkpoints = checkpoint.Checkpoints(folder, keep=3)
  iterator = make_iterator()
  step, state = checkpoints.restore(make_state(9, width), {'data': iterator})
  checkpoints.close()
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  expected = make_state(step, width)
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(plain(a), plain(b))
  np.testing.assert_array_equal(next(iterator), next(make_iterator(step)))
  return step


def save(folder, steps, width=4):
  """Writes checkpoints of some steps; returns the folder."""
  checkpoints, iterator = checkpoint.Checkpoints(folder, keep=3), make_iterator()
  for step in steps:
    next(iterator)
    checkpoints.save(step, make_state(step, width), {'data': iterator})
  checkpoints.close()
  return folder


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Returns checkpoints of steps 1 to 3, of which other tests damage copies."""
  return save(tmp_path_factory.mktemp('saved'), (1, 2, 3))


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
  """Returns checkpoints of steps 1 and 2, with arrays too large for Orbax's own checksums."""
  return save(tmp_path_factory.mktemp('wide'), (1, 2), width=512)


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved / 'checkpoints', tmp_path / 'checkpoints')
  return tmp_path


def names(folder):
  return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def test_the_newest_checkpoint_is_restored_completely(copy):
  assert restore(copy) == 3
  assert names(copy) == ['1', '2', '3']


def test_a_new_folder_gives_the_state_itself(tmp_path):
  checkpoints, state = checkpoint.Checkpoints(tmp_path, keep=1), make_state(4)
  step, found = checkpoints.restore(state, {})
  checkpoints.close()
  assert step == 0 and found is state and checkpoints.latest_step() is None


@pytest.mark.parametrize(
  'damage',
  [
    'truncated',
    pytest.param('emptied', marks=pytest.mark.slow),
    pytest.param('missing', marks=pytest.mark.slow),
  ],
)
def test_any_damaged_file_gives_the_newest_or_the_one_before(saved, tmp_path, damage):
  """Some files are redundant; the restored state is exactly that of one of the checkpoints."""
  newest = saved / 'checkpoints' / '3'
  files = sorted(path.relative_to(newest) for path in newest.rglob('*') if path.is_file())
  steps = {}
  for number, file in enumerate(files):
    folder = tmp_path / str(number)
    shutil.copytree(saved / 'checkpoints', folder / 'checkpoints')
    DAMAGE[damage](folder / 'checkpoints' / '3' / file)
    steps[str(file)] = restore(folder)
    assert names(folder) == (
      ['1', '2', '3'] if steps[str(file)] == 3 else ['1', '2', 'unreadable-3']
    )
  assert set(steps.values()) == {2, 3}
  assert steps['state/manifest.ocdbt'] == 2
  assert steps['iterators/metadata'] == 2


def flip(path, place, bit):
  """Flips one bit of a file, in the byte at a fraction of its length."""
  data = bytearray(path.read_bytes())
  data[int(place * len(data))] ^= 1 << bit
  path.write_bytes(data)


def array_file(folder, step):
  """Returns the file of a checkpoint's large arrays."""
  return max(
    (folder / 'checkpoints' / str(step) / 'state').rglob('*'), key=lambda path: path.stat().st_size
  )


def test_a_flipped_bit_in_an_array_is_found(wide, tmp_path, caplog):
  for bit, place in enumerate((0.1, 0.5, 0.9)):
    folder = tmp_path / str(bit)
    shutil.copytree(wide / 'checkpoints', folder / 'checkpoints')
    flip(array_file(folder, 2), place, bit)
    assert restore(folder, width=512) == 1
    assert names(folder) == ['1', 'unreadable-2']
  assert 'is damaged: the checksum of params/policy/a differs; trying the one before' in caplog.text


@pytest.mark.slow
def test_300_flipped_bits_over_all_files_change_nothing(wide, tmp_path):
  """Half are in files drawn by size, half in each file in turn; some bytes are redundant."""
  newest, draw = wide / 'checkpoints' / '2', np.random.default_rng(1)
  files = sorted(path.relative_to(newest) for path in newest.rglob('*') if path.is_file())
  ends = np.cumsum([(newest / file).stat().st_size for file in files])
  expected = [make_state(step, 512).params['policy']['a'] for step in (1, 2)]
  for number in range(300):
    drawn = np.searchsorted(ends, draw.integers(ends[-1]), 'right')
    folder = tmp_path / str(number)
    shutil.copytree(wide / 'checkpoints', folder / 'checkpoints')
    flip(
      folder / 'checkpoints' / '2' / files[drawn if number % 2 else number % len(files)],
      draw.random(),
      draw.integers(8),
    )
    params = checkpoint.load_newest(folder, 'policy')[1]  # succeeds even if iterators are damaged
    assert any(np.array_equal(params['a'], sound) for sound in expected)
    assert restore(folder, width=512) in (1, 2)
    shutil.rmtree(folder)


def test_parameters_alone_are_checked_too(wide, tmp_path, caplog):
  shutil.copytree(wide / 'checkpoints', tmp_path / 'checkpoints')
  path = array_file(tmp_path, 2)
  path.write_bytes(path.read_bytes().translate(bytes(range(255, -1, -1))))
  np.testing.assert_array_equal(
    checkpoint.load_newest(tmp_path, 'policy')[1]['a'], make_state(1, 512).params['policy']['a']
  )
  assert 'checkpoint 2 in ' in caplog.text and 'trying the one before' in caplog.text
  shutil.rmtree(tmp_path / 'checkpoints' / '1')
  with pytest.raises(
    errors.UserError,
    match=r'none of the checkpoints \[2\] in .* is intact: 2 .*Restore one from a copy',
  ):
    checkpoint.load_newest(tmp_path, 'policy')


def with_nan(step):
  state = make_state(step)
  state.params['policy']['b'] = state.params['policy']['b'].at[1].set(jnp.nan)
  return state


def test_parameters_that_are_not_finite_are_never_saved(copy):
  with checkpoint.Checkpoints(copy, keep=3) as checkpoints:
    with pytest.raises(
      errors.UserError, match='params/policy/b not finite after step 4, which is not saved. Lower'
    ):
      checkpoints.save(4, with_nan(4), {'data': make_iterator()})
  assert names(copy) == ['1', '2', '3'] and restore(copy) == 3


def test_a_checkpoint_with_nan_gives_the_one_before(copy, monkeypatch, caplog):
  """Such a checkpoint may be from an earlier version."""
  checksum = checksums.of
  with monkeypatch.context() as patched:
    patched.setattr(checksums, 'of', lambda array: (checksum(array)[0], True))
    with checkpoint.Checkpoints(copy, keep=3) as checkpoints:
      checkpoints.save(4, with_nan(4), {'data': make_iterator(4)})
  assert restore(copy) == 3
  assert names(copy) == ['2', '3', 'unreadable-4']
  warning = next(r.getMessage() for r in caplog.records if 'NaN' in r.getMessage())
  assert warning.endswith(
    'has values of params/policy/b that are NaN or infinite; trying the one before'
  )
  for step in '23':
    shutil.rmtree(copy / 'checkpoints' / step)
  (copy / 'checkpoints' / 'unreadable-4').rename(copy / 'checkpoints' / '4')
  with pytest.raises(
    errors.UserError, match='is intact: 4 has values of params/policy/b that are NaN'
  ) as raised:
    restore(copy)
  assert 'learning_rate' not in str(raised.value)


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_read(copy, caplog):
  shutil.rmtree(copy / 'checkpoints' / '3' / 'checksums')
  assert restore(copy) == 3
  assert 'has no checksums: an earlier version wrote it' in caplog.text


def test_iterators_are_checked(copy):
  """A damaged position that can be read but is another one."""
  path = copy / 'checkpoints' / '3' / 'iterators' / 'metadata'
  text = path.read_text()
  assert '3' in text
  path.write_text(text.replace('3', '7'))
  assert restore(copy) == 2


@pytest.mark.parametrize('key', ['arrays', 'iterators'])
def test_checksums_that_are_damaged_themselves_give_the_one_before(copy, key):
  path = copy / 'checkpoints' / '3' / 'checksums' / 'metadata'
  text = path.read_text()
  assert f'"{key}"' in text
  path.write_text(text.replace(f'"{key}"', f'"{key[:-1]}x"'))
  assert restore(copy) == 2


@pytest.mark.parametrize('damage', DAMAGE)
def test_the_warning_names_the_checkpoint(copy, caplog, damage):
  DAMAGE[damage](copy / 'checkpoints' / '3' / 'state' / 'manifest.ocdbt')
  assert restore(copy) == 2
  warning = next(r.getMessage() for r in caplog.records if 'cannot be read' in r.getMessage())
  assert warning.startswith('checkpoint 3 in ') and warning.endswith('trying the one before')
  assert len(warning) < 500


def test_steps_put_aside_are_written_again_and_may_break_again(copy):
  for _ in range(3):
    DAMAGE['emptied'](copy / 'checkpoints' / '3' / 'state' / 'manifest.ocdbt')
    checkpoints, iterator = checkpoint.Checkpoints(copy, keep=3), make_iterator()
    step, _ = checkpoints.restore(make_state(9), {'data': iterator})
    assert step == 2
    next(iterator)
    checkpoints.save(3, make_state(3), {'data': iterator})
    checkpoints.close()
    assert restore(copy) == 3
  assert names(copy) == ['1', '2', '3', 'unreadable-3', 'unreadable-3-1', 'unreadable-3-2']


def test_half_written_checkpoints_are_ignored(copy):
  """A killed process leaves files whose names no finished checkpoint has."""
  checkpoints = copy / 'checkpoints'
  shutil.copytree(checkpoints / '3', checkpoints / '4.orbax-checkpoint-tmp')
  DAMAGE['emptied'](checkpoints / '4.orbax-checkpoint-tmp' / 'state' / 'manifest.ocdbt')
  assert restore(copy) == 3
  opened, iterator = checkpoint.Checkpoints(copy, keep=3), make_iterator(4)
  opened.save(4, make_state(4), {'data': iterator})
  opened.close()
  assert restore(copy) == 4


def test_nothing_readable_is_an_error_and_nothing_is_lost(copy):
  for step in '123':
    DAMAGE['truncated'](copy / 'checkpoints' / step / 'state' / 'manifest.ocdbt')
  with pytest.raises(errors.UserError, match=r'\[3, 2, 1\].*another --workdir.*nothing'):
    restore(copy)
  assert names(copy) == ['1', '2', '3']


def test_iterators_stay_where_they_were_if_nothing_is_readable(copy):
  """The state and the position of one iterator are intact, but the other's is missing."""
  iterators = {'data': make_iterator(), 'other': make_iterator()}
  with checkpoint.Checkpoints(copy, keep=3) as checkpoints:
    with pytest.raises(errors.UserError, match='nothing'):
      checkpoints.restore(make_state(9), iterators)
  for iterator in iterators.values():
    np.testing.assert_array_equal(next(iterator), next(make_iterator()))


class Place(dict):
  """An iterator's state that changes when `moved` is set, for a thread that writes it."""

  moved = threading.Event()

  def items(self):
    if threading.current_thread() is not threading.main_thread():
      self.moved.wait(10)
    return super().items()


class Counting:
  """An iterator that returns its own state and not a copy, as Grain's may."""

  def __init__(self):
    self.state = Place(number=0)

  def __next__(self):
    self.state['number'] += 1

  def get_state(self):
    return self.state

  def set_state(self, state):
    self.state = state


class Unfit:
  """An iterator that cannot resume from its saved position with this config."""

  def get_state(self):
    return {'number': 0}

  def set_state(self, state):
    raise errors.UserError('set config.batch_size to 8')


def test_data_that_cannot_resume_with_this_config_are_named_as_the_reason(tmp_path, caplog):
  """The checkpoint is intact, so it is not renamed, and the message is about the data."""
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, make_state(1), {'data': Unfit()})
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError, match='^set config.batch_size to 8$'):
      checkpoints.restore(make_state(0), {'data': Unfit()})
  assert (tmp_path / 'checkpoints' / '1').is_dir() and 'trying the one before' not in caplog.text


def test_a_saved_position_does_not_change_with_later_batches(tmp_path):
  iterator, found = Counting(), Counting()
  next(iterator)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, make_state(1), {'data': iterator})
    next(iterator)
    Place.moved.set()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore(make_state(9), {'data': found})
  assert found.state == {'number': 1}


def test_a_saved_state_does_not_see_the_steps_that_follow(tmp_path):
  """The write continues in the background while the next step reuses the donated buffers."""
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  big = jax.random.normal(jax.random.key(0), (1 << 21,))
  state = make_state(1).replace(params={'policy': {'a': big}})
  expected = np.array(big)
  step = jax.jit(
    lambda s: s.replace(params=jax.tree.map(lambda x: 2 * x + 1, s.params)), donate_argnums=0
  )
  checkpoints.save(1, state, {})
  for _ in range(5):
    state = step(state)
  checkpoints.close()
  found = checkpoint.load_newest(tmp_path, 'policy')[1]
  np.testing.assert_array_equal(found['a'], expected)


@pytest.mark.parametrize('before, after', [(8, 1), (1, 8), (8, 8)])
def test_arrays_come_back_where_the_new_run_wants_them(before, after, tmp_path):
  """A run may resume with another number of devices."""

  def place(state, count):
    mesh = sharding.make_mesh({'fsdp': count}, devices=jax.devices()[:count])
    split = {'policy': {'a': NamedSharding(mesh, P('fsdp')), 'b': sharding.replicated(mesh)}}
    rest = jax.device_put(state, sharding.replicated(mesh))
    return rest.replace(params=jax.device_put(state.params, split))

  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  checkpoints.save(5, place(make_state(5), before), {})
  checkpoints.close()
  wanted = place(make_state(9), after)
  where = jax.tree.map(lambda x: x.sharding, wanted)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  step, found = checkpoints.restore(wanted, {})
  checkpoints.close()
  assert step == 5 and jax.tree.map(lambda x: x.sharding, found) == where
  np.testing.assert_array_equal(found.params['policy']['a'], make_state(5).params['policy']['a'])
  assert found.params['policy']['a'].addressable_shards[0].data.shape == (8 // after, 4)


def test_params_without_a_checkpoint(tmp_path):
  with pytest.raises(errors.UserError, match='there is no checkpoint in'):
    checkpoint.load_newest(tmp_path, 'policy')


def content(folder):
  """Returns the bytes of all files by name."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize(
  'change',
  [
    {'model.init.hidden_size': 24, 'model.init.num_attention_heads': 2},
    {'model.init.num_hidden_layers': 1},
  ],
  ids=['width', 'depth'],
)
def test_a_config_of_another_model_loses_nothing(change, unfinished, tmp_path):
  """The run is refused before any file changes, and can be resumed afterwards."""
  config, folder = unfinished
  workdir = tmp_path / 'run'
  shutil.copytree(folder, workdir)
  before = content(workdir)
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict(change)
  with pytest.raises(errors.UserError, match='another --workdir'):
    loop.run(other, workdir)
  assert content(workdir) == before
  assert (loop.run(config, workdir) / 'model.safetensors').exists()


def test_optimizer_settings_may_change_in_a_fork(unfinished, tmp_path):
  config, folder = unfinished
  other = config.copy_and_resolve_references()
  other.optim.update({'learning_rate': 1e-4, 'weight_decay': 0.1, 'clip_norm': 1.0})
  other.steps = 5
  loop.run(other, tmp_path / 'run', fork_of=folder)
  assert names(tmp_path / 'run') == ['4', '5']


@pytest.mark.parametrize(
  'change',
  [
    {'model.init.hidden_size': 24, 'model.init.num_attention_heads': 2},
    {'model.init.num_hidden_layers': 1},
  ],
  ids=['width', 'depth'],
)
def test_a_fork_with_another_model_is_refused(change, unfinished, tmp_path):
  config, folder = unfinished
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict(change)
  with pytest.raises(
    errors.UserError,
    match='--fork starts from the weights in .*, which belong to another model: config',
  ):
    loop.run(other, tmp_path / 'run', fork_of=folder)
  assert not (tmp_path / 'run').exists()


def test_a_fork_with_another_optimizer_starts_it_anew(unfinished, tmp_path, capfd):
  config, folder = unfinished
  other = config.copy_and_resolve_references()
  other.optim.update({'ema': 0.5, 'name': 'tf_adam'})
  other.steps = 6
  loop.run(other, tmp_path / 'run', fork_of=folder)
  assert 'the optimizer state and the learning-rate schedule start anew' in capfd.readouterr().out
  kept, found = (checkpoint.load_newest(path, 'policy')[1] for path in (folder, tmp_path / 'run'))
  moved = max(
    float(abs(a - b).max()) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(found))
  )
  assert 0 < moved < 10 * other.optim.learning_rate  # from the old weights


@pytest.fixture(scope='module')
def unfinished(world, tmp_path_factory):
  """Returns a run with two checkpoints that has not exported its model."""
  config = tiny.sft(world)
  config.model.path = ''
  config.model.init = tiny.LLAMA
  config.tokenizer = f'{world}/tokenizer'
  config.checkpoint_every = 2
  folder = tmp_path_factory.mktemp('unfinished') / 'run'
  shutil.rmtree(loop.run(config, folder))
  return config, folder

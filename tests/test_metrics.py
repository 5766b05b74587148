"""The files that a run writes, and their contents after a kill and a resume."""

import json
import math
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
import tqdm

from rlhf_jax import metrics
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError


def write(workdir, steps, **options):
  writer = metrics.Writer(workdir, **options)
  for step in steps:
    writer.write(step, {'loss': step / 10})
    writer.samples(step, [{'text': f'sample of {step}'}])
  writer.close()


def events(workdir):
  """Returns the events of every TensorBoard file, in the order of writing."""
  found = []
  for path in sorted((workdir / 'tensorboard').iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data, i = path.read_bytes(), 0
    while i < len(data):
      size = int.from_bytes(data[i : i + 8], 'little')
      found.append(event_pb2.Event.FromString(data[i + 12 : i + 12 + size]))
      i += 12 + size + 4
  return found


def test_round_trip(tmp_path):
  writer = metrics.Writer(tmp_path / 'new' / 'run')
  writer.write(np.int64(3), {'loss': np.float32(0.5), 'kl': 2})
  assert metrics.read(tmp_path / 'new' / 'run') == [{'step': 3, 'loss': 0.5, 'kl': 2.0}]
  writer.close()
  writer.close()


def test_no_file_is_no_records(tmp_path):
  assert metrics.read(tmp_path) == [] and metrics.read_samples(tmp_path) == []


def test_values_that_are_not_finite_are_null(tmp_path):
  with_holes = {'a': math.nan, 'b': math.inf, 'c': 1.0}
  writer = metrics.Writer(tmp_path)
  writer.write(0, with_holes)
  writer.samples(0, [{'text': 'é', 'scores': {'gold': np.float32('nan'), 'proxy': (1, math.nan)}}])
  writer.close()
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line) == {'step': 0, 'a': None, 'b': None, 'c': 1.0}
  assert 'NaN' not in line
  (record,) = metrics.read(tmp_path)
  assert math.isnan(record['a']) and math.isnan(record['b'])
  (sample,) = metrics.read_samples(tmp_path)
  assert sample == {'step': 0, 'text': 'é', 'scores': {'gold': None, 'proxy': [1, None]}}


def test_every_line_is_there_before_close(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(0, {'loss': 1.0})
  assert len(metrics.read(tmp_path)) == 1
  writer.close()


def test_resuming_drops_lines_that_will_be_written_again(tmp_path):
  write(tmp_path, range(10))
  write(tmp_path, range(6, 12), resume_step=6)
  assert [record['step'] for record in metrics.read(tmp_path)] == list(range(12))
  assert [sample['step'] for sample in metrics.read_samples(tmp_path)] == list(range(12))
  assert list(tmp_path.glob('*.tmp')) == []


def test_a_killed_and_resumed_run_leaves_the_same_bytes(tmp_path):
  write(tmp_path / 'whole', range(10))
  write(tmp_path / 'killed', range(7))
  for name in ('metrics.jsonl', 'samples.jsonl'):
    path = tmp_path / 'killed' / name
    path.write_bytes(path.read_bytes()[:-9])  # the last line is incomplete
  assert len(metrics.read(tmp_path / 'killed')) == 6
  write(tmp_path / 'killed', range(4, 10), resume_step=4)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    whole, killed = tmp_path / 'whole' / name, tmp_path / 'killed' / name
    assert whole.read_bytes() == killed.read_bytes()


def test_a_fresh_start_in_an_old_folder_is_fresh(tmp_path):
  write(tmp_path, range(5))
  write(tmp_path, range(2))
  assert len(metrics.read(tmp_path)) == 2


def test_tensorboard_gets_the_scalars_and_the_purge(tmp_path):
  write(tmp_path, range(3))
  write(tmp_path, range(2, 4), resume_step=2)
  found = events(tmp_path)
  scalars = [(e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == 'loss']
  assert [step for step, _ in scalars] == [0, 1, 2, 2, 3]
  assert scalars[-1][1] == pytest.approx(0.3)
  # A session that starts at step 2 makes TensorBoard drop the first run's step 2.
  starts = [e.step for e in found if e.HasField('session_log') and e.session_log.status == 1]
  assert starts[-1] == 2


def test_a_broken_line_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0}\n{"loss": 1}\n{"step": 2}\n')
  with pytest.raises(DataError, match=r'metrics\.jsonl:2: .*"step"'):
    metrics.read(tmp_path)


def test_wandb_keeps_its_run(tmp_path, monkeypatch):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((values, step))

    def finish(self):
      calls.append('finished')

  def init(**options):
    calls.append(options)
    return Run()

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  for start in (0, 1):
    writer = metrics.Writer(
      tmp_path, resume_step=start, wandb_project='p', config={'learning_rate': 1}
    )
    writer.write(start, {'loss': 1.0, 'bad': math.nan})
    writer.close()
  first, log, finished, second, *_ = calls
  assert first['project'] == 'p' and first['config'] == {'learning_rate': 1}
  assert log == ({'loss': 1.0}, 0) and finished == 'finished'
  assert first['id'] == second['id'] and second['resume'] == 'allow'


def test_missing_wandb_gives_the_command_to_install_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(
    UserError, match="wandb_project='p' needs the package wandb: pip install wandb;"
  ):
    metrics.Writer(tmp_path, wandb_project='p')


def test_the_seconds_of_a_step_are_those_since_the_last_logged_one(tmp_path, monkeypatch):
  """The host does not wait for other steps; their time is included at the next logged step."""
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
  with metrics.Writer(tmp_path) as writer:
    log = metrics.StepLog(writer, tqdm.tqdm(disable=True))
    for step, (seconds, written) in enumerate(
      ((9.0, True), (0.1, False), (0.1, False), (5.8, True), (2.0, True))
    ):
      now[0] += seconds
      log.add(step, {}, {}, written=written)
    log.flush()
  assert [
    (record['step'], round(record['seconds/step'], 6)) for record in metrics.read(tmp_path)
  ] == [(0, 9.0), (3, 2.0), (4, 2.0)]

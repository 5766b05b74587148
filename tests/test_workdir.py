"""Locks on folders, and the files that a killed run leaves behind."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import workdir as workdir_lib
import tiny

HOLD = """
import sys, time
from rlhf_jax import errors, workdir
try:
  with workdir.lock(sys.argv[1]):
    print('held', flush=True)
    time.sleep(float(sys.argv[2]))
except errors.UserError as error:
  print(error, flush=True)
"""


def hold(folder, seconds):
  return subprocess.Popen(
    [sys.executable, '-c', HOLD, folder, str(seconds)], stdout=subprocess.PIPE, text=True
  )


@pytest.mark.parametrize(
  'workdir, message',
  [
    ('', '--workdir is empty'),
    (' ', '--workdir is empty'),
    ('gs://bucket/run', '--workdir=gs://bucket/run is a URL: .* Mount the bucket'),
    ('{tmp}/file', '--workdir=.*/file cannot be written .*: name a folder that can'),
    ('{tmp}/file/run', 'cannot be written'),
    ('/proc/run', '--workdir=/proc/run cannot be written'),
    ('{tmp}/papers', 'is not the folder of a run, and holds draft.tex: name a new'),
    ('{world}/model', 'is not the folder of a run, and holds config.json, model.safetensors'),
  ],
)
def test_an_unusable_folder_is_reported_before_anything_is_loaded(
  workdir, message, world, tmp_path, monkeypatch
):
  (tmp_path / 'file').write_text('x')
  (tmp_path / 'papers').mkdir()
  (tmp_path / 'papers' / 'draft.tex').write_text('x')
  monkeypatch.setattr(loop.sharding, 'make_mesh', lambda *_: pytest.fail('loaded'))
  monkeypatch.setattr(loop.build, 'validate', lambda *_: None)
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(errors.UserError, match=message):
    loop.run(tiny.sft(world), workdir.format(tmp=tmp_path, world=world))
  assert sorted(tmp_path.rglob('*')) == before


def test_one_of_two_processes_holds_a_folder(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('')
  started = [hold(tmp_path, 3) for _ in range(2)]
  said = sorted(process.communicate(timeout=60)[0] for process in started)
  holder = next(
    process for process in started if process.pid and f'process {process.pid} on ' in said[0]
  )
  assert said[1] == 'held\n' and holder in started
  assert (
    f'{tmp_path} is in use by process {holder.pid} on ' in said[0]
    and 'name another --workdir' in said[0]
  )
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_a_dead_holder_is_taken_over(tmp_path):
  dead = hold(tmp_path, 60)
  assert dead.stdout.readline() == 'held\n'
  dead.send_signal(signal.SIGKILL)  # a zombie until `wait`
  with workdir_lib.lock(tmp_path):
    assert json.loads((tmp_path / 'lock').read_text())['pid'] == os.getpid()
  dead.wait()
  assert not tmp_path.exists()  # the folder was otherwise empty


@pytest.mark.parametrize('beats', [True, False])
def test_a_holder_on_another_host_lives_while_it_beats(beats, tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, 'DEAD_SECONDS', 4)
  (tmp_path / 'lock').write_text(json.dumps({'host': 'elsewhere', 'pid': 1, 'time': 'noon'}))
  ended = threading.Event()

  def touch():
    while not ended.wait(0.5):
      os.utime(tmp_path / 'lock')

  thread = threading.Thread(target=touch)
  if beats:
    thread.start()
  try:
    refused = pytest.raises(errors.UserError, match='in use by process 1 on elsewhere since noon')
    with refused if beats else contextlib.nullcontext():
      with workdir_lib.lock(tmp_path):
        pass
  finally:
    ended.set()
    if beats:
      thread.join()


def test_a_living_holder_beats(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, 'HEARTBEAT_SECONDS', 0.05)
  with workdir_lib.lock(tmp_path):
    first = (tmp_path / 'lock').stat().st_mtime_ns
    end = time.monotonic() + 10
    while (tmp_path / 'lock').stat().st_mtime_ns == first:
      assert time.monotonic() < end
      time.sleep(0.05)


def test_incomplete_files_of_a_killed_run_are_removed(world, tmp_path):
  config = tiny.sft(world)
  config.steps = 1
  for name in (
    f'.model.{"0a1b" * 8}/shard-00000',
    'checkpoints/7.orbax-checkpoint-tmp/state/x',
    'config.json.tmp',
    'metrics.jsonl',
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  umask = os.umask(0o027)
  try:
    loop.run(config, tmp_path)
  finally:
    os.umask(umask)
  assert not [
    path for path in tmp_path.rglob('*') if 'tmp' in path.name or path.name.startswith('.')
  ]
  modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / 'model').iterdir()}
  assert modes == {0o640} and stat.S_IMODE((tmp_path / 'model').stat().st_mode) == 0o750


def test_the_next_start_removes_the_files_of_a_killed_export(tmp_path):
  killed = subprocess.run(
    [
      sys.executable,
      '-c',
      """
import os, sys
from rlhf_jax.models import hf_files
with hf_files.atomic_folder(sys.argv[1]) as model, hf_files.atomic_folder(sys.argv[2]) as adapter:
  (model / 'config.json').touch()
  os._exit(9)
""",
      tmp_path / 'model',
      tmp_path / 'adapter',
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert killed.returncode == 9, killed.stderr
  assert sorted(path.name.split('.')[1] for path in tmp_path.iterdir()) == ['adapter', 'model']
  workdir_lib.remove_leftovers(tmp_path)
  assert not list(tmp_path.iterdir())

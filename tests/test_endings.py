"""If a run ends early, its process exits with a non-zero status and one line on the cause."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax import errors

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds, including a minute for the start


def lose_checkpoints(context):
  """An evaluator that creates a file where Orbax makes its folders."""
  del context
  folder = pathlib.Path(os.environ['RUN_FOLDER']) / 'checkpoints'

  def evaluate(state):
    if folder.is_dir():
      time.sleep(2)  # until the last one is complete
      shutil.rmtree(folder)
      folder.write_text('')
    return {}

  return evaluate


def start(world, folder, *options, stage='sft', evaluator=''):
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'rlhf_jax.main',
      f'--config=tests/tiny.py:stage={stage},world={world},evaluator={evaluator}',
      f'--workdir={folder}',
      '--config.steps=9',
      *options,
    ],
    cwd=ROOT,
    text=True,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '',
      'PYTHONPATH': f'{ROOT}/tests',
      'RUN_FOLDER': f'{folder}',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def last_line(process, status):
  """Returns the last line of a process that has ended with a status."""
  _, said = process.communicate(timeout=LIMIT)
  assert process.returncode == status, said
  return said.splitlines()[-1]


def test_a_signal_while_loading_ends_in_one_line(world, tmp_path):
  process = start(world, tmp_path / 'run')
  while not (tmp_path / 'run' / 'lock').exists():
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  assert last_line(process, 143).startswith('stopped by SIGTERM')


def test_a_checkpoint_that_cannot_be_written_ends_the_run(world, tmp_path):
  process = start(world, tmp_path / 'run', evaluator='test_endings:lose_checkpoints')
  assert last_line(process, 1).startswith('error: Not a directory (')


@pytest.mark.parametrize(
  'error, said',
  [
    (
      OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/runs/x'),
      'No space left on device (/runs/x): free some space; the same command resumes from the last '
      'checkpoint',
    ),
    (
      ValueError(
        'RESOURCE_EXHAUSTED: Failed to open: "/runs/x/state": No space left on device '
        '[os_error_code=28]'
      ),
      'No space left on device (/runs/x/state): free some space; the same command resumes',
    ),
    (
      PermissionError(errno.EACCES, os.strerror(errno.EACCES), '/runs/x'),
      'Permission denied (/runs/x): change its',
    ),
    (ValueError('shapes differ'), None),
  ],
)
def test_disk_errors_give_one_line(error, said):
  try:
    try:
      raise error
    except Exception as caught:
      raise RuntimeError('in a thread') from caught
  except RuntimeError as outer:
    found = errors.explain_disk_error(outer)
  assert found is said if said is None else found.startswith(said)

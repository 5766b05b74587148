"""With the TPU's compiler: the whole command on small shapes. Skipped without libtpu."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('libtpu')

COMMAND = [sys.executable, '-m', 'rlhf_jax.plan', '--config=configs/ppo_llama3_8b.py:debug', '--effort=-1']


def run(*arguments, cache):
  env = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  return subprocess.run(COMMAND + list(arguments), capture_output=True, text=True, check=False, timeout=600,
                        cwd=pathlib.Path(__file__).resolve().parents[2],
                        env=env | {'XDG_CACHE_HOME': str(cache), 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'COLUMNS': '200'})


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def test_a_plan_and_its_report(cache, tmp_path):
  done = run('--topology=v5e:2x2', f'--report={tmp_path}/plan.md', cache=cache)
  assert done.returncode == 0, done.stderr
  for part in ('master weights', 'most at once', 'rollout', 'scoring', 'update', 'all-reduce', '4 chips of v5e'):
    assert part in done.stdout
  assert done.stdout.count('does not fit') == 0
  text = (tmp_path / 'plan.md').read_text()
  assert '## configs/ppo_llama3_8b.py:debug on v5e:2x2' in text and '--topology=v5e:2x2' in text
  assert len(list((cache / 'rlhf_jax').rglob('*.json'))) == 3  # programs, not compiled again


def test_a_search(cache):
  done = run('--topology=v5e:2x2', '--search', '--confirm=1', cache=cache)
  assert done.returncode == 0, done.stderr
  assert 'the fastest of' in done.stdout and 'compiled' in done.stdout


def test_mistakes_are_said_in_one_line(cache):
  for arguments, message in ((['--topology=v5e:3x7'], 'choose another --topology'),
                             (['--topology=v5x:2x2'], 'has to be CHIP:AxB'),
                             (['--topology=v5e:2x2', '--config.mesh.tensor=3'], 'config.mesh')):
    done = run(*arguments, cache=cache)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr

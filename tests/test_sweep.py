"""`rlhf sweep`: runs each run once, resumes after a kill, and writes the comparison."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax import errors
from rlhf_jax import sweep

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """
import ml_collections


def get_config(arg=None):
  config = ml_collections.ConfigDict({'seed': 0, 'stages': ('work',)})
  config.work = ml_collections.ConfigDict(
    {'function': 'sweep_stage:work', 'text': arg or '', 'log': LOG, 'seed': None}
  )
  return config


def get_hyper(h):
  return h.product([h.sweep(':name', NAMES), h.sweep('seed', range(2))])
"""
# A stage without JAX. It writes what a run of three steps would have written.
STAGE = """
import os
import time


def work(folder, *, text, log, seed):
  with open(log, 'a') as file:
    file.write(f'{text} {seed}\\n')
  time.sleep(float(os.environ.get('STAGE_SECONDS', 0)))
  if 'bad' in text:
    raise SystemExit('this run is bad')
  (folder / 'model').mkdir(exist_ok=True)
"""


def write(folder, names):
  """Writes a config with a sweep of `names` x 2 seeds; returns its path and the log of its runs."""
  log = folder / 'log.txt'
  (folder / 'sweep_stage.py').write_text(STAGE)
  path = folder / 'my_sweep.py'
  path.write_text(CONFIG.replace('LOG', repr(str(log))).replace('NAMES', repr(names)))
  return path, log


def test_the_commands_of_a_sweep(tmp_path):
  path, _ = write(tmp_path, ('a', 'b'))
  runs = sweep.read(f'{path}:x=1')
  assert list(runs) == ['name=a-seed=0', 'name=a-seed=1', 'name=b-seed=0', 'name=b-seed=1']
  words = sweep.options(f'{path}:x=1', runs['name=b-seed=1'], '/out', ['--config.steps=3'])
  assert words == [
    f'--config={path}:x=1,name=b',
    '--workdir=/out',
    '--config.seed=1',
    '--config.steps=3',
  ]


def test_every_form_of_an_option_reaches_the_runs(tmp_path):
  """Negative numbers after a space, and both forms of a flag without a value."""
  path = tmp_path / 'config.py'
  path.write_text(
    'from rlhf_jax.algorithms import ppo\n\n\ndef get_config(arg=None):\n  return ppo.config()\n'
    "\n\ndef get_hyper(h):\n  return h.sweep('seed', range(1))\n"
  )
  given = '--config.rl.missing_eos_value -2 --noconfig.rl.whiten_rewards --config.rl.scale_scores'
  words = [sys.executable, '-m', 'rlhf_jax.sweep', f'--config={path}', '--workdir=out']
  printed = subprocess.run(
    [*words, *given.split(), '--commands'], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  assert printed == (f'rlhf run --config={path} --workdir=out/seed=0 --config.seed=0 {given}\n')


def test_a_dict_sets_keys_of_a_block_and_replaces_an_open_block():
  settings = {'rl': {'kl_coef': 0.3, 'gamma': 1.0}, 'ppo.reward': {'arguments': {'column': 'x'}}}
  assert sweep.options('c', settings, '/out')[2:] == [
    '--config.rl.kl_coef=0.3',
    '--config.rl.gamma=1.0',
    "--config.ppo.reward.arguments={'column': 'x'}",
  ]


@pytest.mark.parametrize(
  'hyper, message',
  [
    ('', 'my_sweep.py:1: defines no get_hyper'),
    ("h.sweep('sead', range(2))", "run sead=0: config has no key 'sead'. Did you mean 'seed'"),
    ("h.sweep('seed', ('x',))", "run seed=x: config.seed='x' must be"),
    ('3', r'my_sweep.py:13: get_hyper\(h\) must return a list of dicts'),
    ("h.swep('seed', 1)", 'my_sweep.py:14: AttributeError: .*swep'),
  ],
)
def test_a_mistake_is_found_before_the_first_run(tmp_path, hyper, message):
  path, log = write(tmp_path, ('a',))
  text = path.read_text()
  text = text[: text.index('def get_hyper')]
  path.write_text(text + (f'def get_hyper(h):\n  return {hyper}\n' if hyper else ''))
  with pytest.raises(errors.UserError, match=message):
    sweep.run(str(path), tmp_path / 'out')
  assert not log.exists()


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
  """The second call repeats only the failed run."""
  path, log = write(tmp_path, ('bad', 'good'))
  text = path.read_text().replace("h.sweep('seed', range(2))", "h.sweep('seed', (5,))")
  path.write_text(text)
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), str(ROOT)]))
  assert sweep.run(str(path), tmp_path / 'out') == 1
  assert log.read_text() == 'name=bad 5\nname=good 5\n'
  assert 'error: name=bad-seed=5 failed' in capfd.readouterr().err
  assert sweep.finished(tmp_path / 'out' / 'name=good-seed=5')
  assert not sweep.finished(tmp_path / 'out' / 'name=bad-seed=5')
  (tmp_path / 'sweep_stage.py').write_text(STAGE.replace("'bad' in text", 'False'))
  assert sweep.run(str(path), tmp_path / 'out') == 0
  assert log.read_text().splitlines()[2:] == ['name=bad 5']
  assert 'name=good-seed=5: finished' in capfd.readouterr().out


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_before_the_run_handles_signals_stops_the_sweep(
  name, tmp_path, monkeypatch, capfd
):
  path, log = write(tmp_path, ('a',))
  program = (
    f'import os, signal, sys; open({str(log)!r}, "a").write(sys.argv[3] + chr(10)); '
    f'signal.signal(signal.{name}, signal.SIG_DFL); os.kill(os.getpid(), signal.{name})'
  )
  monkeypatch.setattr(sweep, 'PROGRAM', (sys.executable, '-c', program))
  assert sweep.run(str(path), tmp_path / 'out') == 128 + signal.Signals[name]
  assert log.read_text() == '--config.seed=0\n'
  assert f'stopped by {name}: the same command resumes' in capfd.readouterr().err


def start(path, workdir, folder, seconds=0.0):
  """Starts the sweep in its own process group."""
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join([str(folder), str(ROOT)]),
    'STAGE_SECONDS': str(seconds),
  }
  words = [sys.executable, '-m', 'rlhf_jax.sweep', f'--config={path}', f'--workdir={workdir}']
  return subprocess.Popen(
    words,
    cwd=folder,
    env=environment,
    start_new_session=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(log, lines):
  """Waits until the log has that many lines."""
  for _ in range(1200):
    if log.exists() and len(log.read_text().splitlines()) >= lines:
      return
    time.sleep(0.1)
  raise AssertionError(f'{log} has fewer than {lines} lines after two minutes')


@pytest.mark.slow
def test_a_sweep_that_was_killed_continues_and_repeats_nothing(tmp_path):
  """kill -9 in the third of four runs: only this one starts again."""
  path, log = write(tmp_path, ('a', 'b'))
  killed = start(path, tmp_path / 'out', tmp_path, seconds=5)
  wait_for(log, 3)
  os.killpg(killed.pid, signal.SIGKILL)
  killed.communicate()
  resumed = start(path, tmp_path / 'out', tmp_path)
  output = resumed.communicate(timeout=300)[0]
  assert resumed.returncode == 0, output
  runs = ['name=a 0', 'name=a 1', 'name=b 0', 'name=b 0', 'name=b 1']
  assert log.read_text().splitlines() == runs


@pytest.mark.slow
def test_sigterm_stops_the_run_and_the_sweep(tmp_path):
  path, log = write(tmp_path, ('a',))
  stopped = start(path, tmp_path / 'out', tmp_path, seconds=60)
  wait_for(log, 1)
  os.kill(stopped.pid, signal.SIGTERM)
  output = stopped.communicate(timeout=60)[0]
  assert stopped.returncode == 128 + signal.SIGTERM and 'the same command resumes' in output
  assert log.read_text() == 'name=a 0\n'


@pytest.mark.slow
def test_a_sweep_of_training_runs_writes_the_comparison(world, tmp_path):
  """Two learning rates x two seeds of PPO on the tiny world."""
  path = tmp_path / 'tiny_sweep.py'
  path.write_text(
    'import tiny\n\n\ndef get_config(arg=None):\n'
    f'  config = tiny.ppo({str(world)!r})\n  config.steps = 2\n  return config\n\n\n'
    "def get_hyper(h):\n  rates = h.sweep('optim.learning_rate', (1e-3, 1e-2))\n"
    "  return h.product([rates, h.sweep('seed', range(2))])\n"
  )
  run = start(path, tmp_path / 'out', ROOT / 'tests')
  output = run.communicate(timeout=600)[0]
  assert run.returncode == 0, output
  result = json.loads((tmp_path / 'out' / 'comparison.json').read_text())
  assert {name: row['runs'] for name, row in result['groups'].items()} == {'0.001': 2, '0.01': 2}
  assert result['budget'] == 32 and (tmp_path / 'out' / 'comparison.html').exists()

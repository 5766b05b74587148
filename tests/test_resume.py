"""A run that was stopped, killed or damaged ends exactly like an uninterrupted one."""

import json
import os
import random
import signal

import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import reward_model
from rlhf_jax.algorithms import sft
import runs
import tiny

STOPS = 10


class Stopped(Exception):
  """Raised by the tests inside the loop."""


def small(name, world):
  """Eight steps with a checkpoint after every third, and all the state a run can have."""
  if name == 'ppo':
    config = tiny.ppo(world)
    tiny.mix_in_pretraining(config, world)
    config.rl.update({'scale_scores': True, 'kl_controller': 'adaptive', 'kl_horizon': 100.0})
    config.samples_every = 2
  elif name == 'reward_model':
    config = tiny.reward_model(world)
    config.preference.normalize = 'gain_bias'
  else:
    config = tiny.sft(world)
    config.data.held_out = 0.1
  config.optim.update({'schedule': 'linear', 'warmup_steps': 2})
  config.steps, config.checkpoint_every = 8, 3
  config.evals.update(tiny.evals(world) if name == 'ppo' else {'held_out': {'every': 2}})
  return config


def stop_after(monkeypatch, module, steps):
  """Makes the next run raise before its train step number `steps`."""
  create = module.create

  def stopping(config, mesh):
    learner, state = create(config, mesh)
    next_batch = learner.next_batch

    def stop(state, **rest):
      if int(state.step) == steps:
        raise Stopped
      return next_batch(state, **rest)

    learner.next_batch = stop
    return learner, state

  monkeypatch.setattr(module, 'create', stopping)


@pytest.mark.parametrize('module, stops', [(ppo, (4, 7)), (reward_model, (1, 5))])
def test_stopped_runs_end_like_uninterrupted_ones(module, stops, world, tmp_path, monkeypatch):
  config = small(module.__name__.split('.')[-1], world)
  loop.run(config, tmp_path / 'whole')
  for step in stops:
    with monkeypatch.context() as patch:
      stop_after(patch, module, step)
      with pytest.raises(Stopped):
        loop.run(config, tmp_path / 'stopped')
    assert not (tmp_path / 'stopped' / 'model').exists()
  loop.run(config, tmp_path / 'stopped')
  runs.assert_same_run(tmp_path / 'stopped', tmp_path / 'whole')
  before = (tmp_path / 'whole' / 'metrics.jsonl').read_bytes()
  loop.run(config, tmp_path / 'whole')  # a finished run does not change
  assert (tmp_path / 'whole' / 'metrics.jsonl').read_bytes() == before


@pytest.mark.parametrize('module, stops', [(ppo, (1, 4)), (reward_model, (7,)), (sft, (2,))])
def test_a_signal_saves_the_step_it_comes_in(module, stops, world, tmp_path, monkeypatch):
  """By default no checkpoint is due before the end."""
  config = small(module.__name__.rpartition('.')[2], world)
  config.checkpoint_every = None
  loop.run(config, tmp_path / 'whole')
  numbers = {step: number for step, number in zip(stops, (signal.SIGTERM, signal.SIGINT))}
  create = module.create

  def signalling(config, mesh):
    learner, state = create(config, mesh)
    next_batch = learner.next_batch

    def batch(state, **rest):
      if int(state.step) in numbers:
        os.kill(os.getpid(), numbers.pop(int(state.step)))
      return next_batch(state, **rest)

    learner.next_batch = batch
    return learner, state

  monkeypatch.setattr(module, 'create', signalling)
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  for step, number in list(numbers.items()):
    with pytest.raises(
      errors.Interrupted,
      match=f'stopped by {number.name} after step {step + 1}, '
      'which is saved in .*: the same command resumes',
    ) as caught:
      loop.run(config, tmp_path / 'stopped')
    assert caught.value.status == 128 + number
  loop.run(config, tmp_path / 'stopped')
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
  assert [start['step'] for start in starts(tmp_path / 'stopped')] == [
    0,
    *(step + 1 for step in stops),
  ]
  runs.assert_same_run(tmp_path / 'stopped', tmp_path / 'whole')


def starts(workdir):
  """Returns the lines of runs.jsonl."""
  return [json.loads(line) for line in (workdir / 'runs.jsonl').read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['ppo', 'sft', 'reward_model'])
def test_ten_stops(stage, world, tmp_path):
  """With default settings, SIGTERM at any moment repeats at most the step in progress."""
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  config = f'tests/tiny.py:stage={stage},world={world}'
  options = ['--config.checkpoint_every=None', f'--config.steps={150 if stage == "ppo" else 600}']
  assert runs.start(config, whole, *options).wait() == 0, (tmp_path / 'whole.log').read_text()
  draw, done = random.Random(stage), []
  for _ in range(STOPS):
    process = runs.start(config, stopped, *options)
    code = runs.kill_after(
      process, stopped, draw.randint(1, 9), draw.uniform(0.0, 0.3), signal.SIGTERM
    )
    assert code == 128 + signal.SIGTERM, (tmp_path / 'stopped.log').read_text()
    done.append(runs.metrics(stopped)[-1]['step'] + 1)
  assert runs.start(config, stopped, *options).wait() == 0, (tmp_path / 'stopped.log').read_text()
  assert [start['step'] for start in starts(stopped)] == [0, *done]
  runs.assert_same_run(stopped, whole)

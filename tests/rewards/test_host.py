"""Runs with rewards from worker processes: a failure costs no finished step."""

import math
import sys

import jax
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.algorithms import effects
from rlhf_jax.data import formats
from rlhf_jax.data import tokenizers
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import host
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import pool
from rlhf_jax.rewards import scorers
import tiny

# A module that imports no JAX, so that workers start fast. FOLDER gets a file for each call.
SOURCE = """
import os, pathlib
FOLDER = pathlib.Path(os.environ['FOLDER_FOR_TEST_HOST'])

def good_words(prompts, responses):
  (FOLDER / str(len(list(FOLDER.iterdir())))).touch()
  words = [int(word[1:]) for word in responses[0].split() if word[1:].isdigit()]
  return [sum(word < 30 for word in words) / max(len(words), 1)]

def fails_in_the_third_batch(prompts, responses):
  if (FOLDER / 'broken').exists() and len(list(FOLDER.iterdir())) > 2 * 16:
    raise ValueError('no reward')
  return good_words(prompts, responses)

def fails_for_one_in_five(prompts, responses, *, metadata):
  if metadata[0]['number'] % 5 == 0:
    raise ValueError('no reward')
  return good_words(prompts, responses)
"""


def config(world, function, **reward):
  config = tiny.ppo(world)
  config.reward.update({'function': function, 'workers': 1} | reward)
  config.update({'log_every': 1, 'samples_every': 1, 'checkpoint_every': 100})
  return config


@pytest.fixture
def calls(tmp_path, monkeypatch):
  """Returns the folder of the functions above, whose module can be imported."""
  (tmp_path / 'mine_for_test_host.py').write_text(SOURCE)
  (tmp_path / 'calls').mkdir()
  monkeypatch.setenv('FOLDER_FOR_TEST_HOST', str(tmp_path / 'calls'))
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'mine_for_test_host', raising=False)
  return tmp_path / 'calls'


def records(workdir):
  return [record for record in metrics_lib.read(workdir) if 'objective/scores' in record]


@pytest.mark.parametrize('staleness', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_failing_reward_loses_no_step_and_the_run_resumes_as_if_it_had_not(
  staleness, world, calls, tmp_path
):
  """The third batch fails before any checkpoint; the run then equals one without a failure."""
  run = config(world, 'mine_for_test_host:fails_in_the_third_batch')
  run.sampling.staleness = staleness
  (calls / 'broken').touch()
  with pytest.raises(errors.UserError, match='raised ValueError: no reward.* example 0, prompt'):
    loop.run(run, tmp_path / 'a')
  assert [int(path.name) for path in (tmp_path / 'a' / 'checkpoints').iterdir()] == [2]
  (calls / 'broken').unlink()
  loop.run(run, tmp_path / 'a')
  run.reward.update({'function': 'tiny:good_words', 'workers': 0})
  loop.run(run, tmp_path / 'b')
  for name in ('objective/scores', 'objective/kl', 'policy/loss'):
    a, b = ([record[name] for record in records(tmp_path / run)] for run in 'ab')
    assert len(a) == 4 and a == b, name


def test_failures_are_skipped_and_counted(world, calls, tmp_path):
  run = config(world, 'mine_for_test_host:fails_for_one_in_five', on_error='skip')
  loop.run(run, tmp_path / 'run')
  for record in records(tmp_path / 'run'):
    assert record['reward/failed'] * 16 == record['objective/skipped']
    assert math.isfinite(record['objective/scores'])
  assert sum(record['objective/skipped'] for record in records(tmp_path / 'run')) > 0
  samples = metrics_lib.read_samples(tmp_path / 'run')
  assert all((one['score'] is None) == (one['parts']['failed'] == 1) for one in samples)


class FakePool:
  """Scores responses of 3 tokens per token by the number of their prompt; fails below 0."""

  def score(self, prompts, responses, *, response_tokens, metadata, response_length):
    numbers = np.array(list(map(float, prompts)), np.float32)
    failed = numbers < 0
    scores = np.where(failed, np.float32(np.nan), numbers)
    per_token = np.repeat(scores[:, None], response_length, axis=1)
    return (scores if failed.all() else per_token), failed


def test_failures_of_all_examples_of_a_process_or_batch_do_not_change_the_shape(world, monkeypatch):
  """Two processes with two examples each, and then a batch in which all examples fail."""
  halves = lambda call, count: np.concatenate([call(np.arange(2)), call(np.arange(2, 4))])
  monkeypatch.setattr(processes, 'map_over_processes', halves)
  mesh, tokenizer = (
    sharding.make_mesh({}, devices=jax.devices()[:1]),
    tokenizers.load(f'{world}/model'),
  )
  rollout = learned.rollout_of([[1]] * 4, [[2, 3, 4]] * 4, (1, 3), 0)
  examples = lambda *numbers: [formats.Prompt(str(number), {}) for number in numbers]
  nan = [np.nan] * 3
  make = lambda how: host.pool_scorer(FakePool(), tokenizer, mesh, on_error=pool.OnError(how))
  score = make('skip')
  found = score(rollout, examples(-1, -1, 5, -1))
  np.testing.assert_array_equal(found.total, [nan, nan, [5.0] * 3, nan])
  np.testing.assert_array_equal(found.parts['failed'], [1, 1, 0, 1])
  np.testing.assert_array_equal(score(rollout, examples(-1, -1, -1, -1)).total, [nan] * 4)
  with pytest.raises(errors.UserError, match='needs one reward per response'):
    make('score')(rollout, examples(-1, -1, 5, 5))


WRONG = {
  'negative': ({'workers': -1}, 'config.reward.workers=-1 must be 0 or more'),
  'no time': ({'workers': 1, 'example_timeout': 0.0}, 'example_timeout=0.0 must be positive'),
  'unknown': ({'workers': 1, 'on_error': 'zero'}, "on_error='zero' must be one of stop, skip"),
  'no workers': ({'on_error': 'skip'}, "on_error='skip' needs a config.reward.function and "),
  'no tries': ({'attempts': 0}, 'config.reward.attempts=0 must be 1 or more'),
  'in memory': (
    {'function': f'{functions.IN_MEMORY}mine', 'workers': 2},
    'workers=2 needs a function that worker processes can import, but mine is in the main script',
  ),
  'no address': (
    {'function': None, 'url': 'localhost:80'},
    "config.reward.url='localhost:80' must be an address such as 'http://localhost:8000'",
  ),
}


@pytest.mark.parametrize('changes, message', WRONG.values(), ids=WRONG)
def test_a_wrong_key_is_found_before_the_run(changes, message):
  reward = scorers.config()
  reward.function = 'tiny:good_words'
  reward.update(changes)
  with pytest.raises(errors.UserError, match=message):
    scorers.validate(reward)


def test_settings_without_effect():
  run = tiny.ppo('world')
  run.reward.update({'example_timeout': 3.0, 'attempts': 2})
  lines = [line for line in effects.warnings(run, tiny.ppo_lib.config()) if 'config.reward' in line]
  assert len(lines) == 2, lines
  assert 'config.reward.example_timeout=3.0 has no effect with config.reward.workers=0' in lines[0]
  assert 'config.reward.attempts=2 has no effect with config.reward.url=None' in lines[1]

"""The loop: what it writes and when, the effect of seeds, and independence of rollouts."""

import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import loop
from rlhf_jax import policy as policy_lib
from rlhf_jax import sharding
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup
from rlhf_jax.models import hf
import tiny


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(world, tmp_path_factory):
  """Returns a run of five steps, logged every 2, evaluated every 3, with two checkpoints kept."""
  config = tiny.sft(world, 'completion')
  config.data.held_out = 0.2
  config.update({'steps': 5, 'log_every': 2, 'checkpoint_every': 1})
  config.evals.held_out.every = 3
  folder = tmp_path_factory.mktemp('finished') / 'run'
  assert loop.run(config, folder) == folder / 'model'
  return config, folder


def test_metrics_are_written_when_they_are_due(finished):
  """At the first, every second and the last step; held-out metrics on separate lines."""
  lines = records(finished[1] / 'metrics.jsonl')
  assert [line['step'] for line in lines if 'loss' in line] == [0, 1, 3, 4]
  assert [line['step'] for line in lines if 'held_out/loss' in line] == [2, 4]
  assert [line['step'] for line in lines] == [0, 1, 2, 3, 4, 4]
  for line in lines[:1] + lines[3:5]:
    assert line['seconds/step'] > 0 and line['seconds/update'] > 0
    assert line['tokens_per_second/update'] == line['tokens'] / line['seconds/update']


def test_a_folder_records_its_config_and_starts(finished, world):
  config, folder = finished
  assert json.loads((folder / 'config.json').read_text()) == json.loads(config.to_json())
  base = json.loads((folder / 'base_config.json').read_text())
  assert base == json.loads(build.load(config.algorithm).config().to_json())
  assert json.loads((folder / 'model.json').read_text())['name'] == 'policy'
  assert {'tokenizer.json', 'tokenizer_config.json'} <= {
    path.name for path in (folder / 'tokenizer').iterdir()
  }
  assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == ['4', '5']


def test_a_finished_run_is_left_alone(finished):
  config, folder = finished
  before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
  assert loop.run(config, folder) == folder / 'model'
  assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before


def test_an_unfinished_run_can_be_read(finished, tmp_path):
  """Its newest checkpoint holds the parameters of the export."""
  shutil.copytree(finished[1], tmp_path / 'run')
  _, exported = hf.load(tmp_path / 'run' / 'model')
  shutil.rmtree(tmp_path / 'run' / 'model')
  policy = policy_lib.TextPolicy.load(tmp_path / 'run')
  assert jax.tree.structure(policy.params) == jax.tree.structure(exported)
  for a, b in zip(jax.tree.leaves(policy.params), jax.tree.leaves(exported)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('epochs, steps', [(1.0, 3), (0.5, 2), (2.4, 7), (0.01, 1)])
def test_epochs_are_passes_over_the_rows(world, epochs, steps):
  config = tiny.sft(world)
  config.steps, config.data.epochs = None, epochs
  assert setup.train_steps(config, examples=48) == steps


@pytest.fixture(scope='module')
def still(world, tmp_path_factory):
  """Runs PPO with a learning rate of 0 on a single prompt; returns the samples of each step."""
  folder = tmp_path_factory.mktemp('still')
  tiny.write_jsonl(folder / 'one.jsonl', [{'prompt': 'w5 w6', 'number': 0}])

  def run(seed):
    config = tiny.ppo(world)
    config.data.path = f'{folder}/one.jsonl'
    config.seed, config.steps, config.samples_every = seed, 2, 1
    config.optim.learning_rate, config.critic.kind, config.rl.epochs = 0.0, 'trunk', 1
    workdir = folder / str(len(list(folder.iterdir())))
    loop.run(config, workdir)
    responses = [line['response'] for line in records(workdir / 'samples.jsonl')]
    assert len(responses) == 32
    return responses[:16], responses[16:], records(workdir / 'metrics.jsonl')

  return run


def test_seeds_and_steps_determine_the_samples(still):
  first, second, metrics = still(0)
  assert first != second  # two rollouts of a run
  assert len(set(first)) > 8  # responses of a batch
  assert still(0)[:2] == (first, second)
  assert still(1)[0] != first
  assert [line['step'] for line in metrics] == [0, 1]


def test_raw_responses_are_scored_as_they_are_read(world, monkeypatch):
  """Sampling continues past the EOS; the reward function reads the text before it."""
  config = tiny.ppo(world, 'openai2019')
  config.sampling.max_new_tokens = 24
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  seen = {}

  def reward(prompts, responses, *, response_tokens, metadata):
    seen.update(responses=responses, tokens=response_tokens)
    return [float(len(tokens)) for tokens in response_tokens]

  monkeypatch.setattr(tiny, 'good_words', reward)
  with jax.set_mesh(mesh):
    learner, state = ppo.create(config, mesh)
    (_, rollout, scores, _), _ = learner.next_batch(state, timed=False)
  assert np.asarray(rollout.response_mask).all()
  lengths = []
  for row in np.asarray(rollout.tokens)[:, -24:].tolist():
    lengths.append(row.index(tiny.EOS) + 1 if tiny.EOS in row else 24)
  assert min(lengths) < 24
  assert list(map(len, seen['tokens'])) == lengths == np.asarray(scores).tolist()
  assert len(learner.samples({})) == 16


@pytest.mark.parametrize('part', ['adapters', 'top layers'])
def test_a_checkpoint_of_a_part_is_read_with_the_rest(part, world, tmp_path):
  config = tiny.sft(world, 'completion')
  config.steps = 2
  if part == 'adapters':
    config.model.lora.targets = (('attention/', 2, 4.0),)
  else:
    config.model.unfrozen_layers = 1
  loop.run(config, tmp_path / 'run')
  exported = policy_lib.TextPolicy.load(tmp_path / 'run').params
  (tmp_path / 'run' / 'model').rename(tmp_path / 'model')
  found = policy_lib.TextPolicy.load(tmp_path / 'run').params
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, exported)
  _, before = hf.load(world / 'model')
  moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), found, before)
  assert moved['blocks']['attention']['query']['kernel'] and not moved['embed']['embedding']

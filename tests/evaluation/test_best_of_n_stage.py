"""The best-of-n stage: which responses it selects, the scores and the curve that it writes."""

import itertools
import json

import numpy as np
import pytest

from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import pipeline
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.evaluation import best_of_n_stage
from rlhf_jax.evaluation import reward_models
from rlhf_jax.rewards import scorers
import tiny

N, PROMPTS = 4, 40


def arguments(world, **changes):
  """Arguments of a run with the reward function of tiny.py."""
  reward = scorers.config()
  reward.function = 'tiny:good_words'
  return {
    'policy': f'{world}/model',
    'prompts': f'{world}/prompts.jsonl',
    'reward': reward.to_dict(),
    'samples': N,
    'keep': 1,
    'min_score': None,
    'max_new_tokens': 5,
    'temperature': 1.0,
    'seed': 0,
  } | changes


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def folder(world, tmp_path_factory):
  """Folder of a run with a reward of one part."""
  folder = tmp_path_factory.mktemp('best')
  reward = {'parts': {'good': {'weight': 1.0, 'function': 'tiny:good_words'}}}
  best_of_n_stage.run(folder, **arguments(world, reward=reward))
  return folder


def test_the_best_response_to_each_prompt_is_selected(folder):
  samples, best = lines(folder / 'samples.jsonl'), lines(folder / 'best.jsonl')
  assert len(samples) == PROMPTS * N
  expected = []
  for i in range(PROMPTS):
    group = [s for s in samples[N * i : N * i + N] if s['completion'].strip()]
    assert len({s['prompt'] for s in group}) == 1
    expected.append(max(group, key=lambda s: s['score']))
  assert best == [{key: s[key] for key in ('prompt', 'completion', 'score')} for s in expected]
  assert all(s['parts'] == {'good': s['score']} for s in samples)
  metadata = [{'number': 0}] * len(samples)
  scores = tiny.good_words(
    [], [s['completion'] for s in samples], response_tokens=None, metadata=metadata
  )
  np.testing.assert_allclose([s['score'] for s in samples], scores, rtol=1e-6)


def test_the_curve_is_the_mean_over_all_subsets(folder):
  scores = [s['score'] for s in lines(folder / 'samples.jsonl')]
  results = json.loads((folder / 'results.json').read_text())
  assert (results['prompts'], results['responses'], results['selected']) == (40, 160, 40)
  for point in results['curve']:
    groups = np.reshape(scores, (PROMPTS, N))
    best = [[max(x) for x in itertools.combinations(row, point['n'])] for row in groups]
    assert point['proxy'] == pytest.approx(np.mean(best))
  assert [point['n'] for point in results['curve']] == [1, 2, 4]


def nan_for_some(prompts, responses):
  """NaN for responses of an even number of characters."""
  return [float(len(text)) if len(text) % 2 else float('nan') for text in responses]


def test_skipped_responses_are_not_selected_and_the_files_are_json(world, tmp_path):
  name = f'{__name__}:nan_for_some'
  reward = {'parts': {'length': {'function': name}}, 'on_nan': 'skip'}
  best_of_n_stage.run(tmp_path, **arguments(world, reward=reward))

  def strict(path):
    refuse = lambda constant: pytest.fail(f'{constant} is not JSON')
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]

  assert all(len(one['completion']) % 2 for one in strict(tmp_path / 'best.jsonl'))
  skipped = [one for one in strict(tmp_path / 'samples.jsonl') if one['score'] is None]
  assert skipped and all(one['parts'] == {'length': None} for one in skipped)


def test_sft_reads_the_selected_responses(folder):
  examples, report = formats.completions(sources.read(str(folder / 'best.jsonl')))
  assert len(examples) == PROMPTS and not report.left_out


def test_scores_of_a_reward_model_in_batches_and_the_parts_of_a_sum(world, monkeypatch):
  """In batches of 100 responses, the last of which has 60."""
  policy = policy_lib.TextPolicy.load(world / 'model')
  examples = policy.read_examples(world / 'prompts.jsonl')
  prompts = [example.prompt for example in examples]
  drawn = policy.sample(prompts, 0, max_new_tokens=5, samples=N)
  learned = reward_models.RewardModel.load(world / 'reward').score_samples(drawn, policy.tokenizer)
  good = tiny.good_words(
    [], drawn.responses, response_tokens=None, metadata=[{'number': 0}] * len(drawn)
  )
  monkeypatch.setattr(policy_lib, 'BATCH_SIZE', 100)
  block = scorers.config()
  block.parts = {
    'good': {'weight': 2.0, 'function': 'tiny:good_words'},
    'learned': {'weight': 1.0, 'model': f'{world}/reward'},
  }
  repeated = [example for example in examples for _ in range(N)]
  scores, parts = best_of_n_stage.score(policy, drawn.rollout, repeated, block)
  np.testing.assert_allclose(parts['good'], 2 * np.array(good), rtol=1e-5)
  np.testing.assert_allclose(parts['learned'], learned, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(scores, 2 * np.array(good) + learned, rtol=1e-5, atol=1e-5)


def test_the_base_config_works_on_any_policy_prompts_and_reward(world, tmp_path):
  config = config_files.read(config_files.find('best_of_n'), 'debug,n=2')
  config.sample.update({'policy': f'{world}/model', 'prompts': f'{world}/prompts.jsonl'})
  config.sample.reward.function = 'tiny:good_words'
  pipeline.run(config, tmp_path / 'run')
  assert len(lines(tmp_path / 'run' / 'sample' / 'best.jsonl')) == PROMPTS
  assert len(lines(tmp_path / 'run' / 'sample' / 'samples.jsonl')) == 2 * PROMPTS


@pytest.mark.parametrize('arg', ['', 'debug'])
def test_the_stages_of_expert_iteration_can_run(arg, tmp_path):
  config = config_files.read(config_files.find('expert_iteration'), arg)
  assert config.sft_3.model.path == config.sft_1.model.path == '$workdir/pretrain/model'
  assert config.sample_3.policy == '$workdir/sft_2' and config.sample_1.policy.endswith('model')
  for name in pipeline.stage_names(config):
    pipeline.check(name, pipeline.resolve(config[name], tmp_path, 0))


def test_select_by_hand():
  scores = np.array([[1.0, 3.0, 3.0, 2.0], [np.nan, 0.5, 9.0, 0.1], [0.0, 0.1, 0.2, 0.3]])
  texts = [['a', 'b', 'b', 'c'], ['d', 'e', ' ', 'f'], ['g', 'h', 'i', 'j']]
  select = lambda **rest: best_of_n_stage.select(scores, texts, **rest)
  assert select(keep=1) == [1, 5, 11]
  assert select(keep=3) == [1, 3, 0, 5, 7, 11, 10, 9]
  assert select(keep=3, min_score=0.5) == [1, 3, 0, 5]


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'policy': ''}, 'policy is empty'),
    ({'prompts': ''}, 'prompts is empty'),
    ({'keep': 5}, 'keep=5 must be from 1 to samples=4'),
    ({'temperature': 0.0}, 'temperature=0.0 must be positive'),
    ({'reward': {}}, 'set exactly one of reward.model'),
  ],
)
def test_wrong_arguments_are_found_before_the_first_stage(changes, message, world):
  with pytest.raises(errors.UserError, match=message):
    best_of_n_stage.run.check(**arguments(world, **changes))


def test_an_empty_selection_is_an_error(world, tmp_path):
  with pytest.raises(
    errors.UserError, match=r'scores at least min_score=2.0 \(the best scores 1\)'
  ):
    best_of_n_stage.run(tmp_path, **arguments(world, min_score=2.0))

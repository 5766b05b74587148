"""The best-of-n stage: which responses it selects, the scores and the curve that it writes."""

import itertools
import json

import numpy as np
import pytest

from rlhf_jax import errors
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
  """Folder of a run with a function."""
  folder = tmp_path_factory.mktemp('best')
  best_of_n_stage.run(folder, **arguments(world))
  return folder


def test_the_best_response_to_each_prompt_is_selected(folder):
  samples, best = lines(folder / 'samples.jsonl'), lines(folder / 'best.jsonl')
  assert len(samples) == PROMPTS * N
  expected = []
  for i in range(PROMPTS):
    group = [s for s in samples[N * i : N * i + N] if s['completion'].strip()]
    assert len({s['prompt'] for s in group}) == 1
    expected.append(max(group, key=lambda s: s['score']))
  assert best == expected
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


def test_sft_reads_the_selected_responses(folder):
  examples, report = formats.completions(sources.read(str(folder / 'best.jsonl')))
  assert len(examples) == PROMPTS and not report.left_out


def test_a_reward_model_and_the_parts_of_a_sum(world, tmp_path, monkeypatch):
  """In batches of 7 responses, the last one of which is smaller."""
  monkeypatch.setattr(policy_lib, 'BATCH_SIZE', 7)
  reward = {
    'parts': {
      'good': {'weight': 2.0, 'function': 'tiny:good_words'},
      'learned': {'weight': 1.0, 'model': f'{world}/reward'},
    }
  }
  best_of_n_stage.run(tmp_path, **arguments(world, reward=reward, samples=2))
  samples = lines(tmp_path / 'samples.jsonl')
  model = reward_models.RewardModel.load(world / 'reward')
  policy = policy_lib.TextPolicy.load(world / 'model')
  drawn = policy.sample(
    policy.read_prompts(world / 'prompts.jsonl'), 0, max_new_tokens=5, samples=2
  )
  learned = model.score_samples(drawn, policy.tokenizer)
  for sample, text, score in zip(samples, drawn.responses, learned, strict=True):
    assert sample['completion'] == text
    assert sample['parts']['learned'] == pytest.approx(score, abs=1e-5)
    assert sample['score'] == pytest.approx(sum(sample['parts'].values()), abs=1e-5)


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

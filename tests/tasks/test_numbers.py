"""RL4LMs' toy tasks: rewards against RL4LMs' own, texts, tokenizer, all stages at debug size."""

import json
import pathlib

import numpy as np
import pytest

from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import pipeline
from rlhf_jax.algorithms import build
from rlhf_jax.data import tokenizers
from rlhf_jax.rewards import functions
from rlhf_jax.tasks import numbers

CONFIG = config_files.find('numbers_and_dates')
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'rl4lms.npz')


@pytest.mark.parametrize('task', ['increasing_numbers', 'dates'])
def test_rewards_of_rl4lms(task):
  texts = GOLDEN['toys/texts'].tolist()
  expected = GOLDEN[f'toys/{task}']
  assert len(texts) == 243 and 0.1 < expected.mean() < 0.9
  function = functions.load_reward(f'rlhf_jax.tasks.numbers:{task}')
  scores = function([''] * len(texts), texts, response_tokens=None, metadata=None)
  np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
  'text, score',
  [
    ('', 0.0),
    ('5', 1 / 10),
    ('1 apples 2 boxes 1 5', 2 / 10),  # the run 1, 2 ends before 1
    ('1 2 2 3', 2 / 10),  # equal numbers do not increase
    ('1 2 3 4 5 6 7 8 9 10 11 apples', 11 / 12),
    (' '.join(map(str, range(20))), 1.0),
  ],
)
def test_increasing_numbers_by_hand(text, score):
  assert numbers.increasing_numbers([''], [text]) == [pytest.approx(score)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('numbers')
  numbers.write(folder, count=600, seed=3)
  return folder


@pytest.fixture(scope='module')
def texts(folder):
  lines = (folder / 'texts.jsonl').read_text().splitlines()
  return [json.loads(line)['text'] for line in lines]


def test_a_third_of_the_lists_increase_and_some_sentences_have_dates(texts):
  lists = [[int(word) for word in text.split()] for text in texts[1::2]]
  assert all(5 <= len(row) <= 20 and 0 <= min(row) and max(row) < 101 for row in lists)
  rising = np.mean([row == sorted(set(row)) for row in lists])
  falling = np.mean([row[::-1] == sorted(set(row)) for row in lists])
  # 300 lists: standard error 0.027.
  assert rising == pytest.approx(1 / 3, abs=0.1) and falling == pytest.approx(1 / 3, abs=0.1)
  dated = np.mean(numbers.dates(None, texts[::2]))
  assert dated == pytest.approx(0.35, abs=0.1) and not any(numbers.dates(None, texts[1::2]))


def test_both_tasks_fit_into_their_new_tokens(folder, texts):
  """A list of 20 numbers has 20 tokens; a sentence with a date fits into 30."""
  tokenizer = tokenizers.load(folder / 'tokenizer')
  assert tokenizers.encode(tokenizer, [''])[0].tolist() == [tokenizer.bos_token_id]
  tokens = tokenizer.tokenize('he sold 7 eggs on 2014-03-12.')
  assert tokens == ['he', ' sold', ' 7', ' eggs', ' on', ' 20', '14', '-', '03', '-', '12', '.']
  for text in texts:
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    assert tokenizer.decode(ids) == text and tokenizer.pad_token_id not in ids
    assert len(ids) == len(text.split()) or len(ids) < 30


@pytest.mark.parametrize(
  'name, presets', [('numbers_and_dates', []), ('random_walks', ['reinforce_plus_plus'])]
)
def test_the_sweep_has_every_on_policy_algorithm(name, presets):
  runs = config_files.read_hyper(config_files.find(name))
  blocks = {name: set(build.load(name).config()) for name in build.names()}
  on_policy = [name for name in blocks if {'sampling', 'reward'} <= blocks[name]]
  assert sorted({run[':algorithm'] for run in runs}) == sorted(on_policy + presets)


def test_an_unknown_task_is_an_error():
  with pytest.raises(
    errors.UserError, match="task='sums' must be one of increasing_numbers, dates"
  ):
    config_files.read(CONFIG, 'task=sums')


@pytest.mark.slow
def test_all_stages_run_at_debug_size(tmp_path):
  config = config_files.read(CONFIG, 'debug,task=dates,algorithm=nlpo')
  pipeline.run(config, tmp_path)
  last = metrics_lib.read(tmp_path / 'nlpo')[-1]
  assert 0 < last['policy/masked_share'] < 1
  assert (tmp_path / 'report.html').exists()

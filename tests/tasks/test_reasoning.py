"""Reasoning Gym: its own checkers behind our reward, prompts without leaks, and all stages."""

import json
import random

import pytest

reasoning_gym = pytest.importorskip('reasoning_gym')
from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import pipeline
from rlhf_jax.data import tokenizers
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import pool
from rlhf_jax.rewards import reasoning
from rlhf_jax.tasks import reasoning as task

CONFIG = config_files.find('puzzles')
FAMILIES = config_files.read(CONFIG, None).world.families.to_dict()
# Without an answer that a library function finds, with a checker of its own, and harder ones.
OTHERS = {
  'puzzle24': {},
  'number_sorting': {},
  'countdown': {},
  'sudoku': {},
  'basic_arithmetic': {},
}


def rows(path):
  return [json.loads(line) for line in path.read_text().split('\n') if line]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('reasoning')
  task.write(folder, families=FAMILIES, count=40, test_count=20, seed=3)
  return folder


def test_rewards_are_those_of_the_data_set(tmp_path):
  """Right, half right, empty and random answers of easy and other families."""
  rng = random.Random(0)
  for family, settings in {**FAMILIES, **OTHERS}.items():
    dataset = reasoning_gym.create_dataset(family, size=6, seed=5, **settings)
    for puzzle in dataset:
      answer = str(puzzle['answer'])
      responses = [
        answer,
        answer[::-1],
        f'{answer} or 7',
        '',
        str(rng.randrange(100)),
        f' {answer}\n',
      ]
      record = task.record(family, settings, puzzle)
      scores = reasoning.score(None, responses, metadata=[record] * len(responses))
      expected = [dataset.score_answer(response.strip(), puzzle) for response in responses]
      assert scores == expected, (family, puzzle)
      assert scores[0] == scores[-1] == dataset.score_answer(puzzle['answer'], puzzle)


def test_worked_examples_are_right_and_test_questions_are_new(folder):
  prompts, shown = rows(folder / 'prompts.jsonl'), rows(folder / 'demonstrations.jsonl')
  test = rows(folder / 'test_prompts.jsonl')
  assert len(prompts) == len(shown) == 120 and len(test) == 60
  assert [record['prompt'] for record in prompts] == [record['prompt'] for record in shown]
  completions = [record['completion'] for record in shown]
  assert reasoning.score(None, completions, metadata=prompts) == [1.0] * 120
  everything = [record['prompt'] for record in prompts + test]
  assert len(set(everything)) == 180
  by_family = [rows(folder / f'test_prompts_{family}.jsonl') for family in FAMILIES]
  assert [record for records in by_family for record in records] == test


def test_the_tokenizer_gives_back_every_text_and_reads_digits_and_rare_words_by_character(folder):
  tokenizer = tokenizers.load(folder / 'tokenizer')
  for record in rows(folder / 'test_prompts.jsonl') + rows(folder / 'demonstrations.jsonl'):
    for text in (record['prompt'], record.get('completion', '')):
      ids = tokenizer(text, add_special_tokens=False)['input_ids']
      assert tokenizer.decode(ids) == text and tokenizer.pad_token_id not in ids
  tokens = tokenizer.tokenize(
    'State the final answer to the following arithmetic problem: 58 + 6 =\n'
  )
  assert tokens[:3] == ['State', ' the', ' final']
  assert tokens[-9:] == [*' 58 + 6 =\n'][-9:]
  assert tokenizer.tokenize('theme')[:2] == ['t', 'h']


def test_too_few_questions_and_unknown_families_are_errors():
  with pytest.raises(
    errors.UserError, match="'chain_sum' .* has only about .* different questions"
  ):
    one_digit = {'min_terms': 2, 'max_terms': 2, 'min_digits': 1, 'max_digits': 1}
    task.draw('chain_sum', one_digit, 300, 0)
  with pytest.raises(errors.UserError, match="family 'sums' of Reasoning Gym: .*not registered"):
    task.draw('sums', {}, 3, 0)
  with pytest.raises(errors.UserError, match="family 'chain_sum' of Reasoning Gym: .*digits"):
    task.draw('chain_sum', {'digits': 3}, 3, 0)


def test_it_runs_in_workers(folder):
  metadata = rows(folder / 'test_prompts.jsonl')[:4]
  responses = [json.loads(record['puzzle'])['answer'] for record in metadata]
  scores, _ = pool.Pool('rlhf_jax.rewards.reasoning:score', 1).score(
    [record['prompt'] for record in metadata],
    responses[:3] + ['no'],
    response_tokens=[[1]] * 4,
    metadata=metadata,
    response_length=1,
  )
  assert scores[:3].tolist() == [1.0] * 3 and scores[3] < 1
  assert functions.load_reward('rlhf_jax.rewards.reasoning:score')


@pytest.mark.slow
def test_all_stages_run_at_debug_size(tmp_path):
  pipeline.run(config_files.read(CONFIG, 'debug'), tmp_path)
  last = metrics_lib.read(tmp_path / 'grpo')[-1]
  assert {f'{family}/score' for family in FAMILIES} <= set(last)
  assert (tmp_path / 'report.html').exists()

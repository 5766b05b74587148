"""Generated posts and their summaries, a user's own posts, and the stages at debug size."""

import json

import numpy as np
import pytest

from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import pipeline
from rlhf_jax.data import tokenizers
from rlhf_jax.tasks import summaries

CONFIG = config_files.find('summarize')


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('summaries')
  summaries.write(folder, count=200, test_count=20, vocab_size=512, seed=3)
  return folder


def title(record):
  """Returns the thing in the title of a post."""
  return record['prompt'].splitlines()[0].removeprefix('TITLE: the ')


@pytest.mark.parametrize('name, count', [('prompts', 200), ('test_prompts', 20)])
def test_a_reference_is_the_sentence_about_the_title(folder, name, count):
  records = rows(folder / f'{name}.jsonl')
  assert len(records) == count
  for record in records:
    first, post, last = record['prompt'].splitlines()
    assert first == f'TITLE: the {title(record)}' and last == 'TL;DR:'
    sentence = record['completion'].removeprefix(' ')
    assert post.startswith('POST: ') and sentence in post and post.count('.') == 4
    assert sentence.startswith(f'the {title(record)} ') and len(sentence.split()) == 5


def test_half_of_the_demonstrations_and_every_rejected_summary_are_about_something_else(folder):
  shown, pairs = rows(folder / 'demonstrations.jsonl'), rows(folder / 'comparisons.jsonl')
  right = np.mean([title(record) in record['completion'] for record in shown])
  assert right == pytest.approx(0.5, abs=0.15)  # standard error 0.035
  for pair in pairs:
    assert title(pair) in pair['chosen'] and title(pair) not in pair['rejected']
    assert pair['rejected'].strip() in pair['prompt']


def test_the_lengths_of_the_config_fit(folder):
  config = config_files.read(CONFIG, None)
  tokenizer = tokenizers.load(folder / 'tokenizer')
  for record in rows(folder / 'prompts.jsonl'):
    assert len(tokenizer(record['prompt'])['input_ids']) <= config.grpo.data.max_prompt_length
    ids = tokenizer(record['completion'], add_special_tokens=False)['input_ids']
    assert len(ids) < config.grpo.sampling.max_new_tokens


def test_own_posts_get_the_ending_and_are_split(tmp_path):
  lines = [{'prompt': f'post {i}', 'reference': f'summary {i} '} for i in range(8)]
  lines += [{'prompt': 'post 8 TL;DR:', 'reference': ' summary 8'}]
  path = tmp_path / 'posts.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  summaries.convert(tmp_path, path=str(path), test_count=3, seed=0)
  train, test = (rows(tmp_path / f'{name}.jsonl') for name in ('prompts', 'test_prompts'))
  assert len(test) == 3 and rows(tmp_path / 'demonstrations.jsonl') == train
  expected = [(f'post {i}\nTL;DR:', f' summary {i}') for i in range(8)]
  expected += [('post 8 TL;DR:', ' summary 8')]
  assert sorted((r['prompt'], r['completion']) for r in train + test) == sorted(expected)


def test_mistakes_in_own_posts_name_the_line(tmp_path):
  path = tmp_path / 'posts.jsonl'
  path.write_text('{"prompt": "a", "reference": "b"}\n{"prompt": "a", "summary": "b"}\n')
  with pytest.raises(errors.UserError, match=r"posts.jsonl:2: has no text 'reference'"):
    summaries.convert(tmp_path, path=str(path), test_count=1, seed=0)
  path.write_text('{"prompt": "a", "reference": "b"}\n')
  with pytest.raises(errors.UserError, match='has 1 records, but 1 are for the test'):
    summaries.convert(tmp_path, path=str(path), test_count=1, seed=0)


@pytest.mark.parametrize(
  'arg, message',
  [
    ('reward=bleu', "reward='bleu' must be one of rouge, model"),
    ('data=posts.jsonl', 'data and model must be set together'),
    ('data=posts.jsonl,model=m,reward=model', 'works with the generated posts only'),
  ],
)
def test_wrong_arguments(arg, message):
  with pytest.raises(errors.UserError, match=message):
    config_files.read(CONFIG, arg)


@pytest.mark.slow
@pytest.mark.parametrize('reward', ['rouge', 'model'])
def test_all_stages_run_at_debug_size(reward, tmp_path):
  pytest.importorskip('rouge_score')
  pipeline.run(config_files.read(CONFIG, f'debug,reward={reward}'), tmp_path)
  results = json.loads((tmp_path / 'evaluate' / 'results.json').read_text())
  assert 0 <= results['stages'][-1]['gold'] <= 1

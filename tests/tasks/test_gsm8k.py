"""GSM8K: its checker on hand-labelled answers, and its stages on two made-up problems."""

import json

import jax
import pytest

from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import pipeline
from rlhf_jax.data import sources
from rlhf_jax.models import hf
from rlhf_jax.rewards import functions
from rlhf_jax.tasks import gsm8k
import tiny

OURS = [
  {
    'question': 'Ann has 3 bags of 4 nuts. She eats 2 nuts. How many are left?',
    'answer': 'The bags hold 3 * 4 = <<3*4=12>>12 nuts.\n'
    'She has 12 - 2 = <<12-2=10>>10 left.\n#### 10',
  },
  {
    'question': 'A boat costs $1,500 and is sold for twice as much. What is the price?',
    'answer': 'It is 2 * 1500 = $<<2*1500=3000>>3000.\n#### 3,000',
  },
]
ANSWERS = {
  'right': (' It is 3.\n#### 3000', 1.0),
  'with a comma': ('#### 3,000', 1.0),
  'in dollars': ('#### $3000', 1.0),
  'with cents': ('#### 3000.00', 1.0),
  'a full stop': ('#### 3000.', 1.0),
  'wrong': ('#### 300', 0.0),
  'negative': ('#### -3000', 0.0),
  'without the mark': ('The answer is 3000.', 0.0),
  'without a number': ('#### three thousand', 0.0),
  'no number': ('#### 3.0.0', 0.0),
  'the first of two counts': ('#### 1\n#### 3000', 0.0),
  'empty': ('', 0.0),
}


def test_the_checker_is_a_reward_function():
  texts = [text for text, _ in ANSWERS.values()]
  scores = functions.call(
    functions.load_reward('rlhf_jax.tasks.gsm8k:correct'),
    [''] * len(texts),
    texts,
    response_tokens=[[]] * len(texts),
    metadata=[{'answer': '3000'}] * len(texts),
    response_length=3,
  )
  assert dict(zip(ANSWERS, scores.tolist())) == {
    name: score for name, (_, score) in ANSWERS.items()
  }


@pytest.fixture
def data(tmp_path):
  """Returns a folder with our problems in the files of GSM8K."""
  (tmp_path / 'problems').mkdir()
  for split in ('train', 'test'):
    sources.write(tmp_path / 'problems' / f'{split}.jsonl', OURS * 8)
  return tmp_path / 'problems'


def rows(path):
  return [json.loads(line) for line in path.read_text().split('\n') if line]


def test_prompts_and_demonstrations(data, tmp_path):
  gsm8k.write(tmp_path, path=str(data))
  prompt = 'Question: Ann has 3 bags of 4 nuts. She eats 2 nuts. How many are left?\nAnswer:'
  assert rows(tmp_path / 'prompts.jsonl')[0] == {'prompt': prompt, 'answer': '10'}
  assert rows(tmp_path / 'test_prompts.jsonl')[1]['answer'] == '3000'
  assert rows(tmp_path / 'demonstrations.jsonl')[0] == {
    'prompt': prompt,
    'completion': ' The bags hold 3 * 4 = 12 nuts.\nShe has 12 - 2 = 10 left.\n#### 10',
  }
  (data / 'train.jsonl').write_text('{"question": "Why?", "answer": "Because."}\n')
  with pytest.raises(
    errors.UserError, match='train.jsonl: the answer of record 1 has no line ####'
  ):
    gsm8k.write(tmp_path, path=str(data))


def test_the_real_answers_are_all_right(shared, tmp_path):
  folder = shared / 'data' / 'gsm8k'
  if not folder.is_dir():
    pytest.skip('no GSM8K in ../shared/data')
  gsm8k.write(tmp_path, path=str(folder))
  prompts, shown = rows(tmp_path / 'prompts.jsonl'), rows(tmp_path / 'demonstrations.jsonl')
  assert len(prompts) == len(shown) == 7473 and len(rows(tmp_path / 'test_prompts.jsonl')) == 1319
  responses = [record['completion'] for record in shown]
  assert not any('<<' in response for response in responses)
  assert sum(gsm8k.correct(None, responses, metadata=prompts)) == 7473


@pytest.mark.slow
def test_all_stages_run_at_debug_size(data, tmp_path):
  model = models.create(tiny.LLAMA | {'max_position_embeddings': 256})
  tokenizer = tiny.write_tokenizer(tmp_path / 'model')
  hf.save(tmp_path / 'model', model, model.init(jax.random.key(7)), tokenizer=tokenizer)
  config = config_files.read(
    config_files.find('gsm8k'), f'debug,data={data},model={tmp_path / "model"}'
  )
  pipeline.run(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'report.html').exists()

"""Labels of a policy's own responses: which are shown, and which is picked."""

import json

import jax
import pytest

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.feedback import annotators
from rlhf_jax.feedback import collect

END = 'w5'


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def words(prompt, response):
  del prompt
  return float(len(response.split()))


def run(folder, world, **changes):
  settings = dict(
    policy=str(world / 'model'),
    prompts=str(world / 'prompts.jsonl'),
    pairs=12,
    held_out=6,
    max_new_tokens=4,
    temperature=1.0,
    gold=f'{__name__}:words',
    annotator_count=2,
    annotator_temperature=0.5,
    label_noise=0.0,
    disagreement=0.0,
    seed=0,
  )
  collect.run(folder, **(settings | changes))


@pytest.mark.parametrize('distinct', [40, 4])
def test_held_out_comparisons_are_of_other_prompts(distinct, world, tmp_path):
  asked = [record['prompt'] for record in rows(world / 'prompts.jsonl')][:distinct]
  sources.write(tmp_path / 'prompts.jsonl', [{'prompt': asked[i % distinct]} for i in range(40)])
  run(tmp_path, world, prompts=str(tmp_path / 'prompts.jsonl'))
  train, test = rows(tmp_path / 'comparisons.jsonl'), rows(tmp_path / 'held_out.jsonl')
  known, new = ({record['prompt'] for record in part} for part in (train, test))
  assert not known & new and len(train) > 6 and 1 < len(test) <= 6
  assert len(known | new) == 4 if distinct == 4 else len(known) == len(train)


def test_prompts_are_split_in_their_order_and_share():
  assert collect.split_prompts(list('abcdef'), 4, 2) == [list('abcd'), list('ef')]
  assert collect.split_prompts(list('abcdef'), 2, 1) == [list('ab'), list('e')]
  assert collect.split_prompts(list('aab'), 4, 2) == [list('aaaa'), list('bb')]
  assert collect.split_prompts(list('abcabc'), 6, 3) == [list('abab') + list('ab'), list('ccc')]
  assert collect.split_prompts(list('abc'), 90, 1) == [list('ab') * 45, ['c']]
  assert collect.split_prompts(['a'], 2, 0) == [['a', 'a'], []]
  assert collect.split_prompts(['a'], 0, 2) == [[], ['a', 'a']]
  with pytest.raises(
    errors.UserError, match='pairs=1 and held_out=1 need different prompts, but there is only one'
  ):
    collect.split_prompts(['a', 'a'], 1, 1)


def best_of(folder, world, **changes):
  settings = dict(
    policy=str(world / 'model'),
    prompts=str(world / 'prompts.jsonl'),
    count=20,
    held_out=3,
    completions=2,
    samples=24,
    max_new_tokens=12,
    temperature=1.0,
    truncate_at=END,
    truncate_after=2,
    gold=f'{__name__}:words',
    gold_path='',
    annotator_count=2,
    annotator_temperature=0.0,
    label_noise=0.0,
    disagreement=0.0,
    seed=0,
  )
  collect.best_of(folder, **(settings | changes))


def test_the_best_of_the_responses_that_end(world, tmp_path):
  best_of(tmp_path, world)
  labels, held_out = rows(tmp_path / 'labels.jsonl'), rows(tmp_path / 'held_out.jsonl')
  asked = [record['prompt'] for record in rows(world / 'prompts.jsonl')][:20]
  order = [asked.index(record['prompt']) for record in held_out + labels]
  assert order == sorted(set(order)) and len(labels) > 3 and 1 <= len(held_out) <= 3
  for record in labels + held_out:
    assert record['simulated'] and record['annotator'] in (0, 1) and len(record['completions']) == 2
    for text in record['completions']:  # texts contain no special tokens
      assert 1 <= len(text.split()) <= 12 and text.split()[-1] == END
    lengths = [len(text.split()) for text in record['completions']]
    assert lengths[record['best']] == max(lengths)
  samples = rows(tmp_path / 'samples.jsonl')
  assert len(samples) == 20  # with or without an end
  assert any(record['completion'].split()[-1] != END for record in samples)


def test_held_out_labels_are_of_other_prompts(world, tmp_path):
  asked = [record['prompt'] for record in rows(world / 'prompts.jsonl')][:5]
  sources.write(tmp_path / 'prompts.jsonl', [{'prompt': asked[i % 5]} for i in range(20)])
  best_of(tmp_path, world, prompts=str(tmp_path / 'prompts.jsonl'))
  known, new = (
    {record['prompt'] for record in rows(tmp_path / name)}
    for name in ('labels.jsonl', 'held_out.jsonl')
  )
  assert known and new and not known & new


def test_labels_are_comparisons(world, tmp_path):
  best_of(tmp_path, world)
  examples, _ = formats.comparisons(sources.read(str(tmp_path / 'labels.jsonl')))
  for example, record in zip(examples, rows(tmp_path / 'labels.jsonl'), strict=True):
    assert example.ranks == tuple(int(i != record['best']) for i in range(2))


def test_too_few_answers_that_end(world, tmp_path):
  with pytest.raises(
    errors.UserError, match='of 20 prompts only 0 have 24 responses of 24 that end'
  ):
    best_of(tmp_path, world, completions=24)


def test_one_annotator_agrees_with_nobody(world, tmp_path):
  run(tmp_path, world, annotator_count=1)
  assert rows(tmp_path / 'agreement.json') == [{'fraction': None, 'kappa': None, 'simulated': True}]
  labels = rows(tmp_path / 'comparisons.jsonl') + rows(tmp_path / 'held_out.jsonl')
  assert labels and all(record['annotator'] == 0 for record in labels)


def test_the_record_of_agreement():
  panel = annotators.SimulatedAnnotators(
    words, count=3, temperature=0.0, label_noise=0.0, disagreement=0.0
  )
  # All prefer the longer response: kappa is 1 with both labels, and undefined with one.
  both = collect.agreement(panel, [('p', 'a', 'b c'), ('p', 'b c', 'a')])
  assert both == {'fraction': 1.0, 'kappa': 1.0, 'simulated': True}
  assert collect.agreement(panel, [('p', 'a', 'b c')]) == both | {'kappa': None}


def test_scores_are_normalized_on_the_first_response_to_each_prompt(world, tmp_path):
  best_of(tmp_path, world)
  prompts = [record['prompt'] for record in rows(world / 'prompts.jsonl')][:20]
  answers = policy_lib.TextPolicy.load(world / 'model').sample(
    prompts, jax.random.key(0), samples=24, max_new_tokens=12, truncate_at=END, truncate_after=2
  )
  first = [answers.responses[24 * i] for i in range(20)]
  assert rows(tmp_path / 'samples.jsonl') == [
    {'prompt': prompt, 'completion': text} for prompt, text in zip(prompts, first) if text.strip()
  ]

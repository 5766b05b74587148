"""Labels of rules: of the right texts, held out by prompt, flipped at random."""

import json

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.feedback import rules
from rlhf_jax.tasks import reviews


def short(prompts, responses):
  """1 for a response of at most 2 words."""
  assert len(prompts) == len(responses)
  return [len(response.split()) <= 2 for response in responses]


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize('noise', [0.0, 0.25])
def test_labels_are_the_rules(noise, world, tmp_path):
  rules.run(
    tmp_path,
    policy=str(world / 'model'),
    prompts=str(world / 'prompts.jsonl'),
    count=200,
    held_out=40,
    rules={'short': f'{__name__}:short'},
    max_new_tokens=4,
    temperature=1.0,
    label_noise=noise,
    seed=0,
  )
  train, test = records(tmp_path / 'short.jsonl'), records(tmp_path / 'short_held_out.jsonl')
  assert 150 < len(train) <= 200 and 25 < len(test) <= 40
  assert not {r['prompt'] for r in train} & {r['prompt'] for r in test}
  wrong = [r['rating'] != float(len(r['completion'].split()) <= 2) for r in train + test]
  # With noise 0.25 the standard error is sqrt(0.25 * 0.75 / 200) = 0.03.
  assert np.mean(wrong) == pytest.approx(noise, abs=0.1 if noise else 0)
  assert {r['rating'] for r in train} == {0.0, 1.0} and all(r['simulated'] for r in train)


def test_a_rule_that_takes_other_arguments_is_found_before_the_run():
  with pytest.raises(errors.UserError, match=r'rules.x=.*f\(prompts, responses\)'):
    rules.check(rules={'x': 'tiny:get_config'})
  with pytest.raises(errors.UserError, match='rules.x'):
    rules.check(rules={'x': 'tiny:no_such_rule'})
  rules.check(rules={'x': f'{__name__}:short'}, count=3)


def test_rules_of_reviews_by_hand():
  prompt = 'Review of the kettle:'
  good = ' it heats fast and wipes clean.'
  assert reviews.on_topic([prompt], [good]) == [1]
  # A kettle does not drive; a review of another product names it.
  assert reviews.on_topic([prompt] * 2, [' the sofa is good.', ' nothing is named here.']) == [0, 1]
  ideal = reviews.ideal(20, seed=0)
  prompts = [record['prompt'] for record in ideal]
  responses = [record['completion'] for record in ideal]
  assert reviews.well_formed(prompts, responses) == [1] * 20 == reviews.on_topic(prompts, responses)
  # The same sentence twice has form 0 the second time; the mean is a half.
  twice = [2 * response.split('.')[0] + '.' for response in responses]
  assert sum(reviews.well_formed(prompts, twice)) == 0
  assert -1 <= reviews.sentiment(prompt, good) <= 1

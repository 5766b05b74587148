"""Judges: their kinds, their results, and mistakes in them."""

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax import types
from rlhf_jax.data import shapes
from rlhf_jax.evaluation import judges

HERE = __name__


def samples(responses, prompts=None):
  """Returns Samples of responses whose token ids are the lengths of their words."""
  rows = [[len(word) for word in response.split()] for response in responses]
  tokens, mask = np.zeros((len(rows), 4), np.int32), np.zeros((len(rows), 4), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  prompts = prompts or ['p'] * len(rows)
  return policy_lib.Samples(prompts, responses, types.Rollout(tokens, mask, mask, None))


def single(prompt, response):
  return len(prompt) + len(response)


def batch(prompts, responses, *, response_tokens, metadata):
  return [sum(row) + entry['bonus'] for row, entry in zip(response_tokens, metadata)]


def per_token(prompts, responses, *, response_tokens, metadata):
  return [[1.0] * len(row) for row in response_tokens]


def plural(prompts, responses):
  return [len(response) for response in responses]


def longer(prompts, responses_a, responses_b):
  return [np.sign(len(a) - len(b)) for a, b in zip(responses_a, responses_b)]


def first_is_better(prompts, responses_a, responses_b, metadata):
  return [0.5 + entry['bonus'] / 2 for entry in metadata]


def too_sure(prompts, responses_a, responses_b):
  return [3.0 for _ in prompts]


def of_nothing():
  return 0


@pytest.mark.parametrize(
  'name, expected',
  [
    ('single', [3, 5]),  # 'p' and 'ab', 'p' and 'a bc'
    ('batch', [2 + 10, 3 + 20]),
    ('per_token', [1, 2]),
    ('plural', [2, 4]),
  ],
)
def test_scores(name, expected):
  judge = judges.load(f'{HERE}:{name}')
  scores = judge.score(samples(['ab', 'a bc']), [{'bonus': 10}, {'bonus': 20}], None)
  assert scores.tolist() == expected and judge.prefer is None
  assert (judge.score_text is not None) == (name == 'single')


def test_a_function_may_be_passed_itself():
  judge = judges.load(lambda prompt, response: 2.0)
  assert judge.score(samples(['a']), [{}], None).tolist() == [2.0]
  assert judges.load(judge) is judge


def test_pairs_are_shown_in_both_orders():
  a, b = samples(['abc', 'a', 'x']), samples(['ab', 'abc', 'y'])
  assert judges.load(f'{HERE}:longer').prefer(a, b, [{}] * 3).tolist() == [1, -1, 0]
  # A judge that always prefers the first position prefers neither response.
  biased = judges.load(f'{HERE}:first_is_better')
  assert biased.prefer(a, b, [{'bonus': 1}, {'bonus': 0}, {'bonus': 1}]).tolist() == [0, 0, 0]


def test_exact_match_ignores_white_space_at_the_ends():
  judge = judges.load('exact_match:answer')
  found = judge.score(samples([' 4\n', '4 5', '5']), [{'answer': x} for x in ('4', '45', 5)], None)
  assert found.tolist() == [1, 0, 1]
  judge.check_examples([shapes.Prompt('p', {'answer': 1})])
  with pytest.raises(
    errors.UserError, match="record 2 of the prompts has no column 'answer'. Its other.* are anser"
  ):
    judge.check_examples([shapes.Prompt('p', {'answer': 1}), shapes.Prompt('p', {'anser': 1})])


@pytest.mark.parametrize(
  'judge, message',
  [
    (f'{HERE}:missing', "judge='.*:missing' cannot be loaded"),
    ('no_such_module:f', "judge='no_such_module:f' cannot be loaded"),
    (f'{HERE}:of_nothing', r"judge='.*:of_nothing' takes \(\): it must be one of f\(prompt, resp"),
    (f'{HERE}:HERE', "judge='.*:HERE' is of type str: it must be a function"),
    ('reviews.gold_score', "judge='reviews.gold_score' names neither a function nor a folder"),
    ('exact_match:', "judge='exact_match:' names no column. Set judge to module:function, "),
  ],
)
def test_mistakes_are_found_before_anything_runs(judge, message):
  for function in (judges.check, judges.load):
    with pytest.raises(errors.UserError, match=message):
      function(judge)


def test_the_folder_of_a_reward_model_must_exist_when_it_is_loaded(tmp_path):
  judges.check(f'{tmp_path}/reward/model')  # an earlier stage may write it
  with pytest.raises(errors.UserError, match='gold=.*there is no such folder'):
    judges.load(f'{tmp_path}/reward/model', key='gold')


def test_a_preference_must_lie_between_minus_one_and_one():
  judge = judges.load(f'{HERE}:too_sure')
  with pytest.raises(errors.UserError, match='too_sure returned 3 for example 0.* from -1 '):
    judge.prefer(samples(['a']), samples(['b']), [{}])


def maker(path):
  """Returns a score that depends on data."""
  return lambda prompt, response: float(len(path))


def test_a_report_describes_the_judge():
  assert judges.load(f'{HERE}:maker', path='data').description == (
    f'{HERE}:maker: Returns a score that depends on data.'
  )
  assert judges.load(f'{HERE}:single').description == f'{HERE}:single'

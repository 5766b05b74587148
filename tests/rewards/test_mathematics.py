"""Answers in mathematics: equality, and answers that never finish in worker processes."""

import pytest

pytest.importorskip('math_verify')
from rlhf_jax import errors
from rlhf_jax.evaluation import evaluators
from rlhf_jax.rewards import mathematics
from rlhf_jax.rewards import pool
from rlhf_jax.rewards import scorers

RIGHT = [
  ('72', 'Natalia sold 48/2 = 24 clips. The answer is 72.'),
  ('72', '#### 72'),
  ('72', 'First 70, then \\boxed{72}'),
  ('1,000', 'It costs $1000'),
  ('\\frac{1}{2}', 'The answer is 0.5'),
  ('0.5', 'so it is $\\frac{2}{4}$'),
  ('x^2 + 2x + 1', 'Hence $(x+1)^2$.'),
  ('\\{1, 2\\}', '\\boxed{\\{2, 1\\}}'),
  ('10\\%', 'about 10%'),
  ('the answer is $\\sqrt{8}$', 'It is $2\\sqrt{2}$'),
  (72, '72'),
]
WRONG = [
  ('72', 'The answer is 71.'),
  ('72', 'I do not know.'),
  ('72', ''),
  ('72', '\\boxed{72} is wrong, it is \\boxed{27}'),
  ('\\frac{1}{2}', '0.51'),
  ('x^2 + 2x + 1', '$(x-1)^2$'),
]


@pytest.mark.parametrize('reference, response', RIGHT)
def test_right_answers(reference, response):
  assert mathematics.correct(['p'], [response], metadata=[{'answer': reference}]) == [1.0]


@pytest.mark.parametrize('reference, response', WRONG)
def test_wrong_answers(reference, response):
  assert mathematics.correct(['p'], [response], metadata=[{'answer': reference}]) == [0.0]


def test_a_reference_without_an_expression_is_an_error():
  with pytest.raises(errors.UserError, match="column 'answer' of a prompt holds '', which is no"):
    mathematics.equals('', '72')


def test_it_needs_workers():
  reward = scorers.config()
  reward.function = 'rlhf_jax.rewards.mathematics:correct'
  with pytest.raises(errors.UserError, match='can hang .* set config.reward.workers to 1 or more'):
    scorers.validate(reward)
  reward.workers = 1
  scorers.validate(reward)
  with pytest.raises(errors.UserError, match="can hang .* kind 'prompts', whose reward can have w"):
    evaluators.load_metric({'function': reward.function}, 'metrics.correct')


def test_workers_survive_answers_that_take_forever():
  """A power of 370 million digits, which no signal interrupts, and an expansion, which one does."""
  responses = ['$9^{9^{9}}$', 'The answer is 72.', '$(x+1)^{100000}$', '\\boxed{72}']
  workers = pool.Pool(
    'rlhf_jax.rewards.mathematics:correct',
    1,
    example_timeout=2.0,
    on_error=pool.OnError('score', 0.0),
  )
  scores, failed = workers.score(
    ['p'] * 4,
    responses,
    response_tokens=[[1]] * 4,
    metadata=[{'answer': '72'}] * 4,
    response_length=1,
  )
  assert scores.tolist() == [0.0, 1.0, 0.0, 1.0]
  assert failed.tolist() == [True, False, True, False]

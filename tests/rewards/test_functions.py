"""What reward functions may return, and the messages about invalid results."""

import functools

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import scorers

PROMPTS, RESPONSES = ['one', 'two', 'three'], ['a b', 'c', 'd e f']
TOKENS = [[5, 6], [7], [8, 9, 10]]
METADATA = [{'number': i} for i in range(3)]
NAN, INFINITY = float('nan'), float('inf')


def call(function, response_length=4):
  return functions.call(
    function,
    PROMPTS,
    RESPONSES,
    response_tokens=TOKENS,
    metadata=METADATA,
    response_length=response_length,
  )


def returning(value):
  def my_reward(prompts, responses, *, response_tokens, metadata):
    del prompts, responses, response_tokens, metadata
    return value

  return my_reward


def test_the_function_gets_texts_tokens_and_metadata():
  def reward(prompts, responses, *, response_tokens, metadata):
    assert (prompts, responses) == (PROMPTS, RESPONSES)
    assert (response_tokens, metadata) == (TOKENS, METADATA)
    return [len(r) + m['number'] for r, m in zip(responses, metadata)]

  scores = call(reward)
  assert scores.dtype == np.float32 and scores.tolist() == [3.0, 2.0, 7.0]


@pytest.mark.parametrize(
  'value',
  [
    [1, 2.5, 1],
    (1, 2.5, 1),
    np.array([1, 2.5, 1]),
    [np.float64(1), np.float32(2.5), 1],
    [np.array(1.0), np.array(2.5), np.array(1.0)],
  ],
  ids=str,
)
def test_one_number_each_in_any_form(value):
  scores = call(returning(value))
  assert scores.dtype == np.float32 and scores.tolist() == [1.0, 2.5, 1.0]


@pytest.mark.parametrize('kind', [list, tuple, np.array])
def test_rewards_per_token_are_padded_with_zeros(kind):
  scores = call(returning([kind([1.0, 2.0]), kind([3.0]), kind([4.0, 5.0, 6.0])]))
  assert scores.dtype == np.float32
  assert scores.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 0]]


def test_an_empty_first_response_among_rewards_per_token():
  scores = functions.call(
    returning([[], [3.0]]),
    PROMPTS[:2],
    ['', 'c'],
    response_tokens=[[], [7]],
    metadata=METADATA[:2],
    response_length=2,
  )
  assert scores.tolist() == [[0, 0], [3, 0]]


WRONG = {
  'too few': ([1.0, 2.0], ['my_reward returned 2 rewards for 3 responses', 'one for each']),
  'too many': ([1.0] * 4, ['returned 4 rewards for 3 responses']),
  'none': ([], ['returned 0 rewards for 3 responses']),
  'NaN': (
    [1.0, NAN, 2.0],
    ['returned nan for example 1', "prompt 'two'", "response 'c'", 'finite'],
  ),
  'infinity': ([1.0, 2.0, -INFINITY], ['returned -inf for example 2', "'d e f'", 'finite']),
  'NaN at a token': (
    [[1.0, NAN], [2.0], [1.0] * 3],
    ['[1.0, nan] for example 0', "prompt 'one'", 'finite'],
  ),
  'a text': (
    [1.0, 'good', 2.0],
    ["my_reward returned 'good' for example 1, prompt 'two', response 'c'"],
  ),
  'nothing': ([None, 1.0, 2.0], ["returned None for example 0, prompt 'one'", 'finite']),
  'the text of a number': (
    [1.0, '1.5', 2.0],
    [
      "returned '1.5' for example 1, prompt 'two'",
      "'1.5' is a str",
      'a number, such as float(...)',
    ],
  ),
  'a boolean': ([1.0, 2.0, True], ['returned True for example 2', 'True is a bool']),
  'a boolean of NumPy': (np.array([True, False, True]), ['for example 0', 'is a bool']),
  'a boolean at a token': ([[1.0, 2.0], [True], [1.0] * 3], ['[True] for example 1', 'is a bool']),
  'a text at a token': ([[1.0, '2'], [3.0], [1.0] * 3], ["'2' is a str", 'for example 0']),
  'no list': (None, ['my_reward returned None for 3 responses', 'one for each']),
  'one text': ('abc', ["returned 'abc' for 3 responses"]),
  'one number': (1.5, ['returned 1.5 for 3 responses']),
  'a token too few': (
    [[1.0, 2.0], [3.0], [4.0, 5.0]],
    ['for example 2', 'shape (3,)', '(here 3 tokens)'],
  ),
  'padded to the slots': (np.zeros((3, 4)), ['for example 0', 'shape (2,)']),
  'both kinds': ([1.0, [3.0], 2.0], ['[3.0] for example 1', 'shape ()', 'or for all examples']),
  'both kinds, tokens first': ([[1.0, 2.0], 3.0, [1.0] * 3], ['3.0 for example 1', '(1,)']),
  'nested': ([[1.0, [2.0]], [3.0], [1.0] * 3], ['[1.0, [2.0]] for example 0', '(2,)']),
  'columns': (np.zeros((3, 1, 1)), ['for example 0', 'shape ()']),
}


@pytest.mark.parametrize('value, parts', WRONG.values(), ids=WRONG)
def test_a_wrong_answer_names_function_example_and_remedy(value, parts):
  with pytest.raises(errors.UserError) as caught:
    call(returning(value))
  for part in ['my_reward', *parts]:
    assert part in str(caught.value)
  assert str(caught.value).endswith('. Once it is fixed, the same command resumes.')


@pytest.mark.parametrize('error', [KeyError('number'), ZeroDivisionError('division by zero')])
def test_an_exception_comes_with_the_call_that_raised_it(error):
  def fragile(prompts, responses, **_):
    raise error

  with pytest.raises(errors.UserError) as caught:
    call(fragile)
  for part in [
    'fragile raised',
    type(error).__name__,
    str(error),
    "'one'",
    "'a b'",
    '. Once it is fixed, the same command resumes.',
  ]:
    assert part in str(caught.value)
  assert caught.value.__cause__ is error


def test_a_function_with_wrong_parameters_is_refused():
  with pytest.raises(errors.UserError, match='raised TypeError.*response_tokens'):
    call(lambda prompts, responses: [1.0] * 3)


def test_load_by_name(tmp_path, monkeypatch):
  assert functions.load('tiny:good_words').__name__ == 'good_words'
  (tmp_path / 'reward_of_mine_for_loading.py').write_text('def score(*a, **k):\n  return [3]\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('sys.path', list(functions.sys.path))
  assert functions.load('reward_of_mine_for_loading:score')() == [3]


@pytest.mark.parametrize(
  'name, cause',
  [
    ('no_such_module_here:f', "No module named 'no_such_module_here'"),
    ('tiny:no_such_function', 'no_such_function'),
    ('tiny', 'tiny'),
    (':f', "':f'"),
    ('..x:f', 'not a module name'),
  ],
)
def test_functions_that_cannot_be_loaded(name, cause):
  with pytest.raises(errors.UserError) as caught:
    functions.load(name)
  message = str(caught.value)
  for part in [f'config.reward.function={name!r}', cause, "'package.module:function'"]:
    assert part in message


BROKEN = {
  'misspelt': (
    'x = 1\ndef f(:\n',
    'raised SyntaxError: invalid syntax, at FILE:2: `def f(:`. --verbosity=1',
  ),
  'null': ('x = 1\0\n', 'raised SyntaxError: source code string cannot contain null bytes'),
  'divides': (
    'x = 1 / 0\n',
    'raised ZeroDivisionError: division by zero, at FILE:1 in <module>: `x = 1 / 0`',
  ),
  'misses': (
    '\nimport no_such_module\n',
    "raised ModuleNotFoundError: No module named 'no_such_module', at FILE:2",
  ),
  'exits': (
    'import sys\nsys.exit(0)\n',
    'called sys.exit(0), at FILE:2 in <module>: `sys.exit(0)`',
  ),
  'hangs': (
    'import time\ntime.sleep(60)\n',
    'did not return within 0.2 seconds, at FILE:2 in <module>: '
    '`time.sleep(60)`. Make it faster, or raise config.reward.timeout',
  ),
  'waits': (
    'import sleeper_of_rewards\n',
    'did not return within 0.2 seconds, at FILE:1 in <module>: `import '
    'sleeper_of_rewards`; then sleeper_of_rewards.py:3 in <module>: `time.sleep(60)`',
  ),
}


@pytest.mark.parametrize('how', BROKEN)
def test_a_failing_module_is_reported_before_anything_is_loaded(how, tmp_path, monkeypatch):
  text, message = BROKEN[how]
  (tmp_path / f'broken_{how}.py').write_text(text)
  (tmp_path / 'sleeper_of_rewards.py').write_text('import time\n\ntime.sleep(60)\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('sys.path', list(functions.sys.path))
  reward = scorers.config()
  reward.function, reward.timeout = f'broken_{how}:f', 0.2
  with pytest.raises(errors.UserError) as caught:
    scorers.validate(reward)
  assert str(caught.value).startswith(
    f"config.reward.function='broken_{how}:f': importing broken_{how} "
    + message.replace('FILE', f'broken_{how}.py')
  ), caught.value
  assert '\n' not in str(caught.value)


def decorated(function):
  """A decorator that keeps the name and the signature of a reward function."""

  @functools.wraps(function)
  def reward_fn(*args, **kwargs):
    return [2 * score for score in function(*args, **kwargs)]

  reward_fn.attribute = 'kept'
  return reward_fn


@decorated
def times(prompts, responses, *, factor):
  return [factor * len(response) for response in responses]


def test_arguments_of_a_decorated_function():
  function = functions.load_reward(f'{__name__}:times', arguments={'factor': 3})
  assert function.attribute == 'kept' and function.__name__ == 'times'
  assert call(function).tolist() == [18, 6, 30]
  with pytest.raises(errors.UserError, match="missing a required .*argument: 'factor'"):
    functions.load_reward(f'{__name__}:times')

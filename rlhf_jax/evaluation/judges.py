"""Judges, which decide which of two responses to a prompt is better.

On the command line and in configs a judge is one of

    module:function       a Python function, in one of the three forms below
    exact_match:COLUMN    1 if the response equals that column of the prompt's record, else 0
    FOLDER                a reward model
    http://HOST:PORT      a server that scores responses, with the protocol of rewards/client.py
    feedback:URL#PROJECT  people, by their judgements in a feedback store; see people.py

A function has one of these forms, which are told apart by their parameters:

    f(prompt, response) -> number
    f(prompts, responses, *, response_tokens, metadata) -> n numbers
    f(prompts, responses_a, responses_b, *, metadata) -> n numbers from -1 to 1

The first scores one response at a time. The second scores a batch, as reward functions do; see
rewards/functions.py. `response_tokens` and `metadata` are optional; if a function takes neither,
its second parameter must have a plural name, such as `responses`. The third compares two responses:
it returns 1 if the first is better, -1 if the second is better, 0 for a tie, or 2 p - 1 for a
probability p that the first is better. `metadata` is optional. The function judges each pair in
both orders and the results are averaged, because judges may favour a position (Zheng et al. 2023,
https://arxiv.org/abs/2306.05685).

Letters: n responses.
"""

from collections.abc import Callable
import dataclasses
import functools
import inspect
import pathlib
import re

import numpy as np

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax.evaluation import people
from rlhf_jax.evaluation import reward_models
from rlhf_jax.feedback import source
from rlhf_jax.rewards import client
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard
from rlhf_jax.rewards import text

EXACT_MATCH = 'exact_match'
FORMS = (
  'f(prompt, response), f(prompts, responses, *, response_tokens, metadata), or for pairs '
  'f(prompts, responses_a, responses_b, *, metadata)'
)
LIMIT = functions.Limit(functions.TIMEOUT, '')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
  """A judge of responses. Exactly one of `score`, `prefer` and `outcomes` is set.

  Attributes:
    name: Name for tables and messages.
    score: Function (Samples, metadata, tokenizer) -> [n] scores.
    prefer: Function (Samples of a, Samples of b, metadata) -> [n] preferences from -1 (b is better)
      to 1 (a is better).
    outcomes: Function {policy: Samples} -> {(first, second): [n] float, 1 if the first policy won,
      0.5 for a tie, 0 if it lost}.
    score_text: Function (prompt, response) -> score if the judge scores one response at a time;
      else None.
    column: Column of the prompts' records that the judge reads; '' for none.
    doc: One line that describes the scores; '' if the function has no docstring.
  """

  name: str
  score: Callable[..., np.ndarray] | None = None
  prefer: Callable[..., np.ndarray] | None = None
  outcomes: Callable[..., dict[tuple[str, str], np.ndarray]] | None = None
  score_text: Callable[[str, str], float] | None = None
  column: str = ''
  doc: str = ''

  @property
  def description(self):
    """The judge's name and the description of its scores, for reports."""
    return f'{self.name}: {self.doc}' if self.doc else self.name

  def check_examples(self, examples):
    """Raises UserError if the record of a prompt lacks the judge's column."""
    for number, example in enumerate(examples, 1):
      if self.column and self.column not in example.metadata:
        raise errors.UserError(
          f'judge {self.name}: record {number} of the prompts has no column {self.column!r}. Its '
          f'other columns are {", ".join(example.metadata) or "none"}.'
        )


def load(judge, *, key='judge', path=''):
  """Creates a Judge from a string, a function or a reward model.

  Args:
    judge: A string as described at the top of the file, a Python function, a
      reward_models.RewardModel, or a Judge.
    key: Name of the option or config key, for messages.
    path: Path of data. If set, the function that `module:function` names is called with it and
      returns the function of the judge.

  Raises:
    UserError: If there is no such judge, or the function has none of the three forms.
  """
  if isinstance(judge, Judge):
    return judge
  if isinstance(judge, reward_models.RewardModel):
    return of_reward_model(judge, 'reward model')
  if callable(judge):
    return of_function(judge, getattr(judge, '__name__', 'judge'), key)
  check(judge, key=key, path=path)
  if is_server(judge):
    scorer = of_function(client.reward(judge, key=key), judge, key)
    return dataclasses.replace(scorer, doc='The score of a server.')
  if judge.startswith(source.SCHEME):
    outcomes = functools.partial(people.outcomes, judge)
    return Judge(name=judge, outcomes=outcomes, doc='The judgements of people.')
  kind, _, name = judge.partition(':')
  if kind == EXACT_MATCH:
    return exact_match(name)
  if names_function(judge):
    loaded = of_function(functions.load_or_build(judge, path, key=key), judge, key)
    if loaded.doc or not path:
      return loaded
    return dataclasses.replace(loaded, doc=_first_line(functions.load(judge, key=key)))
  if not pathlib.Path(judge).is_dir():
    raise errors.UserError(f'{key}={judge!r}: there is no such folder. {_remedy(key)}')
  return of_reward_model(reward_models.RewardModel.load(judge), judge)


def check(judge, *, key='judge', path=''):
  """Checks a judge before the first stage of a pipeline runs.

  The folder of a reward model need not exist yet, because a stage may write it.

  Args:
    judge: String as described at the top of the file.
    key: Name of the option or config key, for messages.
    path: See `load`.

  Raises:
    UserError: If the string names no judge, or a function that cannot be loaded or has none of the
      forms.
  """
  kind, colon, name = judge.partition(':')
  if is_server(judge):
    client.validate(judge, key)
  elif judge.startswith(source.SCHEME):
    source.parse(judge)
  elif kind == EXACT_MATCH and colon:
    errors.need(name, f'{key}={judge!r} names no column. {_remedy(key)}')
  elif names_function(judge):
    function = functions.load(judge, key=key)
    if path:
      functions.check_builder_signature(function, f'{key}={judge!r} with a {key}_path')
    else:
      form_of(function, f'{key}={judge!r}')
  else:
    folder = '/' in judge or pathlib.Path(judge).is_dir()
    errors.need(folder, f'{key}={judge!r} names neither a function nor a folder. {_remedy(key)}')


def is_server(text):
  """Returns whether a text is the address of a server."""
  return text.startswith(('http://', 'https://'))


def names_function(text):
  """Returns whether a text has the form module:function."""
  return re.fullmatch(r'[\w.]+:\w+', text) is not None


def _remedy(key):
  return (
    f'Set {key} to module:function, {EXACT_MATCH}:COLUMN, http://HOST:PORT, feedback:URL#PROJECT '
    'or the folder of a reward model (./NAME for one in the working directory).'
  )


def of_reward_model(scorer, name):
  """Creates the Judge that prefers the higher score of a reward model.

  Args:
    scorer: reward_models.RewardModel.
    name: Name for messages.
  """
  return Judge(
    name=name,
    score=lambda samples, metadata, tokenizer: scorer.score_samples(samples, tokenizer),
    doc='The score of a reward model.',
  )


def exact_match(column):
  """Creates the Judge that gives 1 if the response equals a column of the prompt's record, else 0.

  See rewards.text.exact_match.
  """

  def score(samples, metadata, tokenizer):
    del tokenizer
    prompts, responses = samples.prompts, samples.responses
    return np.array(text.exact_match(prompts, responses, metadata=metadata, column=column))

  return Judge(
    name=f'{EXACT_MATCH}:{column}',
    score=score,
    column=column,
    doc=f'1 if the response equals {column} of the record, else 0.',
  )


def of_function(function, name, key='judge'):
  """Creates the Judge of a Python function in one of the forms at the top of the file.

  Args:
    function: A callable.
    name: Name for messages.
    key: Name of the option or config key, for messages.

  Raises:
    UserError: If the function has none of the three forms.
  """
  form, keywords = form_of(function, f'{key}={name!r}')
  doc = _first_line(function)
  if form == 'pairs':
    return Judge(name=name, prefer=_pairwise(function, name, keywords), doc=doc)
  if form == 'batch':
    return Judge(name=name, score=_batched(function, keywords), doc=doc)
  gold_fn = functions.guarded_gold(function, f'the {key} {name}')

  def score(samples, metadata, tokenizer):
    del metadata, tokenizer
    return np.array([gold_fn(*pair) for pair in zip(samples.prompts, samples.responses)])

  return Judge(name=name, score=score, score_text=gold_fn, doc=doc)


def _first_line(function):
  """Returns the first line of a function's docstring; '' if it has none."""
  return (inspect.getdoc(function) or '').partition('\n')[0]


def form_of(function, named):
  """Returns the form of a function, and the keywords that it takes.

  Args:
    function: Loaded object.
    named: Its key and name, for messages.

  Returns:
    'single', 'batch' or 'pairs', and a tuple of keywords.

  Raises:
    UserError: If it is not a function or has none of the three forms.
  """
  if not callable(function):
    raise errors.UserError(
      f'{named} is of type {type(function).__name__}: it must be a function, {FORMS}'
    )
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return 'single', ()  # written in C, with an unknown signature
  for keywords in (('response_tokens', 'metadata'), ('metadata',), ('response_tokens',)):
    if _takes(signature, 2, keywords):
      return 'batch', keywords
  if _takes(signature, 2, ()):
    names = list(signature.parameters)
    return 'batch' if len(names) > 1 and names[1].endswith('s') else 'single', ()
  for keywords in (('metadata',), ()):
    if _takes(signature, 3, keywords):
      return 'pairs', keywords
  raise errors.UserError(f'{named} takes {signature}: it must be one of {FORMS}')


def _takes(signature, positional, keywords):
  try:
    signature.bind(*[None] * positional, **dict.fromkeys(keywords))
  except TypeError:
    return False
  return True


def _batched(function, keywords):
  """Returns `Judge.score` for a function of batches. Scores per token are summed."""

  @functools.wraps(function)
  def reward_fn(prompts, responses, **data):
    return function(prompts, responses, **{name: data[name] for name in keywords})

  def score(samples, metadata, tokenizer):
    del tokenizer
    tokens, scores = samples.response_tokens, []
    for part in _batches(len(samples.prompts)):
      values = functions.call(
        reward_fn,
        samples.prompts[part],
        samples.responses[part],
        response_tokens=tokens[part],
        metadata=metadata[part],
        response_length=samples.rollout.response_mask.shape[1],
        limit=LIMIT,
      )
      scores.append(values.sum(axis=1) if values.ndim == 2 else values)
    return np.concatenate(scores)

  return score


def _pairwise(function, name, keywords):
  """Returns `Judge.prefer` for a function of pairs, averaged over both orders."""

  def one_order(prompts, a, b, metadata):
    call = guard.Call(f'the judge {name}', prompts, a, functions.TIMEOUT)
    data = {'metadata': metadata} if keywords else {}
    values = guard.run(lambda: list(function(prompts, a, b, **data)), call)
    errors.need(
      len(values) == len(prompts),
      f'{call.what} returned {len(values)} numbers for {len(prompts)} pairs: it must return one '
      'for each',
    )
    values = [float(functions.check_reward(value, call, i, ())) for i, value in enumerate(values)]
    outside = [i for i, value in enumerate(values) if abs(value) > 1]
    if outside:
      raise errors.UserError(
        f'{call.what} returned {values[outside[0]]:g} for '
        f'{guard.describe_example(outside[0], call)}: a preference must be from -1 (the second '
        'response is better) to 1 (the first is better)'
      )
    return np.array(values)

  def prefer(first, second, metadata):
    values = []
    for part in _batches(len(first.prompts)):
      prompts, a, b = first.prompts[part], first.responses[part], second.responses[part]
      forward = one_order(prompts, a, b, metadata[part])
      backward = one_order(prompts, b, a, metadata[part])
      values.append((forward - backward) / 2)
    return np.concatenate(values)

  return prefer


def _batches(count):
  return [slice(i, i + policy_lib.BATCH_SIZE) for i in range(0, count, policy_lib.BATCH_SIZE)]

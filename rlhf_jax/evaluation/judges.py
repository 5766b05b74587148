"""Judges: they decide which of two responses to a prompt is better.

On the command line and in configs a judge is one of

    module:function       a Python function, in one of the three forms below
    exact_match:COLUMN    1 if the response equals that column of the prompt's record, else 0
    FOLDER                a reward model

A function has one of these forms, which its parameters tell apart:

    f(prompt, response) -> number
    f(prompts, responses, *, response_tokens, metadata) -> n numbers
    f(prompts, responses_a, responses_b, *, metadata) -> n numbers from -1 to 1

The first scores one response at a time. The second scores a batch, as reward functions do; see
rewards/functions.py. It may leave out `response_tokens` or `metadata`; without both, its second
parameter must have a plural name, such as `responses`. The third compares two responses: 1 if the
first is better, -1 if the second is, 0 for a tie; for a probability p that the first is better
return 2 p - 1. `metadata` may be left out. Each pair is shown in both orders and the two answers
are averaged, since judges may favour a position (Zheng et al. 2023,
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
from rlhf_jax.evaluation import reward_models
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard

EXACT_MATCH = 'exact_match'
FORMS = (
  'f(prompt, response), f(prompts, responses, *, response_tokens, metadata), or for pairs '
  'f(prompts, responses_a, responses_b, *, metadata)'
)
LIMIT = functions.Limit(functions.TIMEOUT, '')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
  """A judge of responses; exactly one of `score` and `prefer` is set.

  Attributes:
    name: for tables and messages.
    score: (Samples, metadata, tokenizer) -> [n] scores.
    prefer: (Samples of a, Samples of b, metadata) -> [n] from -1 (b is better) to 1 (a is better).
    score_text: (prompt, response) -> score, if the judge reads one text at a time; else None.
    column: of the prompts' records, which the judge reads; '' for none.
    doc: what its scores are, in one line; '' if the function has no docstring.
  """

  name: str
  score: Callable[..., np.ndarray] | None = None
  prefer: Callable[..., np.ndarray] | None = None
  score_text: Callable[[str, str], float] | None = None
  column: str = ''
  doc: str = ''

  @property
  def described(self):
    """The judge's name and what its scores are, for reports."""
    return f'{self.name}: {self.doc}' if self.doc else self.name

  def check_examples(self, examples):
    """Raises UserError if a prompt's record lacks the judge's column."""
    for number, example in enumerate(examples, 1):
      if self.column and self.column not in example.metadata:
        raise errors.UserError(
          f'judge {self.name}: record {number} of the prompts has no column {self.column!r}. Its '
          f'other columns are {", ".join(example.metadata) or "none"}.'
        )


def load(judge, *, key='judge', path=''):
  """The Judge that a text names, or that a function or a reward model is.

  Args:
    judge: a text, see the top of the file; a Python function; a reward_models.RewardModel; or a Judge.
    key: name of the option or config key, for messages.
    path: data that `module:function` makes the judge from; '' if it is the judge itself.

  Raises:
    UserError: there is no such judge, or the function has none of the forms.
  """
  if isinstance(judge, Judge):
    return judge
  if isinstance(judge, reward_models.RewardModel):
    return of_reward_model(judge, 'reward model')
  if callable(judge):
    return of_function(judge, getattr(judge, '__name__', 'judge'), key)
  check(judge, key=key, path=path)
  kind, _, name = judge.partition(':')
  if kind == EXACT_MATCH:
    return exact_match(name)
  if names_function(judge):
    loaded = of_function(functions.load_or_build(judge, path, key=key), judge, key)
    if loaded.doc or not path:
      return loaded
    return dataclasses.replace(loaded, doc=_first_line(functions.load(judge, key=key)))
  if not pathlib.Path(judge).is_dir():
    raise errors.UserError(f'{key}={judge!r}: there is no such folder. {_kinds(key)}')
  return of_reward_model(reward_models.RewardModel.load(judge), judge)


def check(judge, *, key='judge', path=''):
  """Checks a judge before anything runs, as far as that is possible.

  The folder of a reward model may not exist yet: an earlier stage may write it.

  Args:
    judge: text; see the top of the file.
    key: name of the option or config key, for messages.
    path: see `load`.

  Raises:
    UserError: the text names no judge, or a function that cannot be loaded or has none of the
      forms.
  """
  kind, colon, name = judge.partition(':')
  if kind == EXACT_MATCH and colon:
    errors.need(name, f'{key}={judge!r} names no column. {_kinds(key)}')
  elif names_function(judge):
    function = functions.load(judge, key=key)
    if path:
      functions.check_builder_signature(function, f'{key}={judge!r} with a {key}_path')
    else:
      form_of(function, f'{key}={judge!r}')
  else:
    folder = '/' in judge or pathlib.Path(judge).is_dir()
    errors.need(folder, f'{key}={judge!r} names neither a function nor a folder. {_kinds(key)}')


def names_function(text):
  """Returns whether a text has the form module:function."""
  return re.fullmatch(r'[\w.]+:\w+', text) is not None


def _kinds(key):
  return (
    f'Set {key} to module:function, {EXACT_MATCH}:COLUMN or the folder of a reward model (./NAME '
    'for one in the working directory).'
  )


def of_reward_model(scorer, name):
  """The Judge that prefers the higher score of a reward model.

  Args:
    scorer: reward_models.RewardModel.
    name: for messages.
  """
  return Judge(
    name=name,
    score=lambda samples, metadata, tokenizer: scorer.score_samples(samples, tokenizer),
    doc='The score of a reward model.',
  )


def exact_match(column):
  """The Judge that gives 1 to a response that equals a column of the prompt's record, else 0.

  White space at both ends does not count.
  """

  def score(samples, metadata, tokenizer):
    del tokenizer
    pairs = zip(samples.responses, metadata)
    return np.array([float(text.strip() == str(entry[column]).strip()) for text, entry in pairs])

  return Judge(
    name=f'{EXACT_MATCH}:{column}',
    score=score,
    column=column,
    doc=f'1 if the response equals {column} of the record, else 0.',
  )


def of_function(function, name, key='judge'):
  """The Judge of a Python function in one of the forms at the top of the file.

  Args:
    function: a callable.
    name: for messages.
    key: name of the option or config key, for messages.

  Raises:
    UserError: it has none of the forms.
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
  """The first line of a function's docstring; '' if it has none."""
  return (inspect.getdoc(function) or '').partition('\n')[0]


def form_of(function, named):
  """Which form a function has.

  Args:
    function: what was loaded.
    named: its key and name, for messages.

  Returns:
    'single', 'batch' or 'pairs', and the keywords that it takes.

  Raises:
    UserError: it has none.
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
  """Scores of a function over batches, summed over tokens if they are per token."""

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
  """Preferences of a function over pairs, the mean of both orders."""

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
        f'{guard.describe_example(outside[0], call)}: a preference must be from -1 (the second response is better) to 1 (the first is)'
      )
    return np.array(values)

  def prefer(first, second, metadata):
    values = []
    for part in _batches(len(first.prompts)):
      prompts, a, b = first.prompts[part], first.responses[part], second.responses[part]
      there = one_order(prompts, a, b, metadata[part])
      back = one_order(prompts, b, a, metadata[part])
      values.append((there - back) / 2)
    return np.concatenate(values)

  return prefer


def _batches(count):
  return [slice(i, i + policy_lib.BATCH) for i in range(0, count, policy_lib.BATCH)]

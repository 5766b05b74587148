"""Scorers, what makes them from `config.reward`, and what combines them.

A Scorer is a function (Rollout, examples) -> scores [B], or rewards per token [B, R], float32. One
that combines others returns types.Scores, which also holds what the total was made of.

Letters: B batch, R response length, M members of an ensemble.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections.config_dict import placeholder

from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.config import need
from rlhf_jax.config_keys import check_keys
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import learned
from rlhf_jax.rollout import actor

Scorer = Callable[..., types.ScoreArray | types.Scores]
ENSEMBLES = ('mean', 'min', 'variance')
ON_NAN = ('stop', 'skip')
SOURCES = ('model', 'models', 'function')


def config():
  """Keys of `config.reward`. Those above `parts` are also the keys of a part."""
  return ml_collections.ConfigDict(
    {
      'model': placeholder(str),  # folder of a reward model
      'models': (),  # or folders of an ensemble of reward models
      'function': placeholder(str),  # or a Python function 'package.module:function'
      'timeout': functions.TIMEOUT,  # seconds that the function may take per batch; None: no limit
      'max_length': placeholder(int),  # tokens of a model with its own tokenizer; None: its context
      'ensemble': 'mean',  # 'mean', 'min' (worst case) or 'variance': mean - coef * variance
      'ensemble_coef': 1.0,  # coef of 'variance'
      'parts': {},  # or {name: {'weight': 1.0, keys from above}}: a weighted sum
      'on_nan': 'stop',  # responses whose reward is NaN: 'stop' the run, or 'skip' and count them
    }
  )


def validate(config_reward, key='config.reward'):
  """Checks `config.reward`, or another block of its keys.

  Raises:
    UserError: names the key, the value and the remedy.
  """
  check_keys(config_reward, config(), key, whole=False)
  validate_source(config_reward, key, SOURCES + ('parts',))
  need(
    config_reward.get('on_nan', 'stop') in ON_NAN,
    f'{key}.on_nan={config_reward.get("on_nan")!r} must be one of {", ".join(ON_NAN)}',
  )
  of_part = config()
  del of_part['parts'], of_part['on_nan']
  of_part.weight = 1.0
  for name, part in (config_reward.get('parts') or {}).items():
    part_key = f'{key}.parts.{name}'
    need(
      isinstance(part, ml_collections.ConfigDict),
      f"{part_key}={part!r} must be a dict, such as {{'weight': 1.0, 'model': 'FOLDER'}}",
    )
    check_keys(part, of_part, part_key, whole=False)
    validate_source(part, part_key, SOURCES)


def validate_source(block, key, sources):
  """The part of `validate` about one source of scores; a function is loaded.

  Args:
    block: `config.reward`, or one of its parts.
    key: its dotted name.
    sources: keys of which exactly one must be set.
  """
  present = [name for name in sources if block.get(name)]
  *names, last = [f'{key}.{name}' for name in sources]
  need(
    len(present) == 1,
    f'set exactly one of {", ".join(names)} and {last} (now {", ".join(present) or "none"})',
  )
  models, how = block.get('models') or (), block.get('ensemble', 'mean')
  need(
    not models or isinstance(models, (tuple, list)) and len(models) > 1,
    f"{key}.models={models!r} must name two folders or more, such as ('a', 'b')",
  )
  need(how in ENSEMBLES, f'{key}.ensemble={how!r} must be one of {", ".join(ENSEMBLES)}')
  timeout = block.get('timeout', functions.TIMEOUT)
  need(timeout is None or timeout > 0, f'{key}.timeout={timeout} must be positive, or None')
  coef, length = block.get('ensemble_coef', 1.0), block.get('max_length')
  need(coef >= 0, f'{key}.ensemble_coef={coef} must be 0 or positive')
  need(length is None or length > 0, f'{key}.max_length={length} must be positive, or None')
  if block.get('function'):
    load_function(block, key)


def load_function(block, key, *, allow_nan=False):
  """The reward function of a block that has one, and the functions.Limit of its calls."""
  limit = functions.Limit(block.get('timeout', functions.TIMEOUT), f'{key}.timeout', allow_nan)
  return functions.load_reward(block.function, key=f'{key}.function', limit=limit), limit


def make(config_reward, tokenizer, mesh, *, load, check, key='config.reward', allow_nan=False):
  """The scorer of `config.reward`.

  Args:
    config_reward: from `config`, or one of its parts.
    tokenizer: the policy's.
    mesh: device mesh.
    load: keywords of hf.load_reward: how a reward model computes.
    check: called with a Model that reads the policy's tokens; raises UserError if it cannot.
    key: dotted name of `config_reward`.
    allow_nan: whether functions may return NaN, whatever `on_nan` says.

  Returns:
    Scorer, and (Model, params) of the first reward model that a critic can start from: its
    tokenizer is the policy's, and its head reads the states of single tokens. None if there is none.
  """
  c = config_reward
  allow_nan = allow_nan or skips_nan(c)
  if c.get('parts'):
    scorers = {
      name: make(
        part,
        tokenizer,
        mesh,
        load=load,
        check=check,
        key=f'{key}.parts.{name}',
        allow_nan=allow_nan,
      )
      for name, part in c.parts.items()
    }
    scorer = weighted(
      {name: (c.parts[name].get('weight', 1.0), scorer) for name, (scorer, _) in scorers.items()}
    )
    return scorer, first_start(scorers.values())
  if c.get('function'):
    function, limit = load_function(c, key, allow_nan=allow_nan)
    return function_scorer(function, tokenizer, mesh, limit=limit), None
  load_member = functools.partial(
    model_scorer,
    tokenizer=tokenizer,
    mesh=mesh,
    max_length=c.get('max_length'),
    load=load,
    check=check,
  )
  scorers = [load_member(path) for path in c.get('models') or (c.model,)]
  if len(scorers) == 1:
    return scorers[0]
  scorer = ensemble(
    [scorer for scorer, _ in scorers], c.get('ensemble', 'mean'), coef=c.get('ensemble_coef', 1.0)
  )
  return scorer, first_start(scorers)


def skips_nan(config_reward):
  """Whether responses whose reward is NaN are skipped."""
  return config_reward.get('on_nan', 'stop') == 'skip'


def first_start(pairs):
  """The first (Model, params) in pairs of a scorer and (Model, params) or None; else None."""
  return next((start for _, start in pairs if start is not None), None)


def model_scorer(path, tokenizer, mesh, *, max_length, load, check):
  """A reward model's scores, on tokens if it shares the policy's tokenizer.

  Args:
    path: folder of the reward model.
    max_length: tokens of an example in its own tokenizer; None for its context.
    tokenizer, mesh, load, check: see `make`.

  Returns:
    See `make`.
  """
  model, params = hf.load_reward(path, mesh=mesh, **load)
  own = tokenizers.load(path)
  tokenizers.fit(own, model)
  if learned.same_tokenizer(own, tokenizer):
    check(model)
    score = learned.of_tokens(model, params)
    return lambda rollout, examples: score(rollout), (
      model,
      params,
    ) if model.has_token_states else None
  apply = learned.of_texts(model, params, own, max_length=max_length or model.max_length, mesh=mesh)

  def score_texts(rollout, examples):
    responses, ids = actor.texts_of(rollout, tokenizer)
    scores = apply(
      [example.prompt for example in examples], responses, learned.with_eos(ids, tokenizer)
    )
    return sharding.put_rows(scores, mesh)

  return score_texts, None


def function_scorer(function, tokenizer, mesh, *, limit=functions.Limit()):
  """Scores of a Python function; with several processes each calls it with its part of the batch.

  Args:
    function: see functions.py.
    tokenizer: the policy's.
    mesh: device mesh.
    limit: functions.Limit of a call.

  Returns:
    Scorer.
  """

  def score(rollout, examples):
    responses, ids = actor.texts_of(rollout, tokenizer)

    def call(rows):
      return functions.call(
        function,
        [examples[i].prompt for i in rows],
        [responses[i] for i in rows],
        response_tokens=[ids[i] for i in rows],
        metadata=[examples[i].metadata for i in rows],
        response_length=rollout.response_mask.shape[1],
        limit=limit,
      )

    return sharding.put_rows(processes.map_over_processes(call, len(examples)), mesh)

  return score


def weighted(parts: Mapping[str, tuple[float, Scorer]]) -> Scorer:
  """The weighted sum of scorers: sum_i weight_i * score_i.

  Args:
    parts: {name: (weight, Scorer)}. All score responses [B], or all score tokens [B, R].

  Returns:
    Scorer of types.Scores. Each part is multiplied by its weight, so that they add up to the total.
    It raises UserError if some parts score responses and others tokens.
  """
  weights = {name: float(weight) for name, (weight, _) in parts.items()}

  def score(rollout, examples):
    scores = {
      name: types.Scores.of(scorer(rollout, examples)) for name, (_, scorer) in parts.items()
    }
    check_alike(scores)
    return _weighted(scores, weights, rollout.response_mask)

  return score


def ensemble(scorers: Sequence[Scorer], how: str, *, coef: float = 0.0) -> Scorer:
  """One score from several reward models.

  'mean' is the mean of the members, 'min' the worst case, 'variance' mean - coef * variance, with
  variance = sum_i (score_i - mean)^2 / M. See Coste et al. 2023, section 3
  (https://arxiv.org/abs/2310.02743).

  Args:
    scorers: M Scorers. All score responses [B], or all score tokens [B, R].
    how: one of ENSEMBLES.
    coef: lambda of 'variance', in 1 / score.

  Returns:
    Scorer of types.Scores, whose parts are the members' own scores, 'member_0' and so on. It raises
    UserError if some members score responses and others tokens.
  """

  def score(rollout, examples):
    made = {
      f'member_{i}': types.Scores.of(member(rollout, examples)) for i, member in enumerate(scorers)
    }
    check_alike(made)
    return _ensemble(made, rollout.response_mask, coef, how=how)

  return score


def check_alike(members: Mapping[str, types.Scores]) -> None:
  """Raises UserError if some of {name: Scores} score responses and others tokens."""
  by_token = [name for name, scores in members.items() if scores.total.ndim == 2]
  if by_token and len(by_token) < len(members):
    others = [name for name in members if name not in by_token]
    raise errors.UserError(
      f'the rewards {", ".join(by_token)} score tokens, and {", ".join(others)} whole responses: '
      'rewards that are combined must all score tokens, or all score responses'
    )


@jax.jit
def _weighted(made, weights, response_mask):
  total = sum(weights[name] * scores.total for name, scores in made.items())
  parts = {}
  for name, scores in made.items():
    parts |= _named(name, scores, response_mask, weights[name])
  return types.Scores(total, parts)


@functools.partial(jax.jit, static_argnames=('how',))
def _ensemble(made, response_mask, coef, *, how):
  members = jnp.stack([scores.total for scores in made.values()])
  total = jnp.min(members, axis=0) if how == 'min' else jnp.mean(members, axis=0)
  if how == 'variance':
    total -= coef * jnp.var(members, axis=0)
  parts = {}
  for name, scores in made.items():
    parts |= _named(name, scores, response_mask, 1.0)
  return types.Scores(total, parts)


def _named(name, scores, response_mask, weight):
  """{name: [B] weighted score}, and under `name/` what it was made of."""
  total = scores.total
  if total.ndim == 2:
    total = jnp.sum(jnp.where(response_mask, total, 0.0), axis=1)
  return {name: weight * total} | {f'{name}/{inner}': part for inner, part in scores.parts.items()}

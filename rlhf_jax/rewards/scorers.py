"""Scorers: their config keys, how they are made from a config, and how they are combined.

A Scorer is a function (Rollout, examples) -> scores [B], or rewards per token [B, R], float32. A
Scorer that combines others returns types.Scores, which also holds the parts of the total.

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
from rlhf_jax import lengths
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.config import need
from rlhf_jax.config_keys import check_keys
from rlhf_jax.data import tokenizers
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import client
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import host
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import pool
from rlhf_jax.rollout import actor

Scorer = Callable[..., types.ScoreArray | types.Scores]
ENSEMBLES = ('mean', 'min', 'variance')
ON_NAN = ('stop', 'skip')
SOURCES = ('model', 'models', 'function', 'url')


def config():
  """Returns the keys of `config.reward`. A part has `weight` and the keys above `parts`."""
  return ml_collections.ConfigDict(
    {
      'model': placeholder(str),  # folder of a reward model
      'models': (),  # or folders of an ensemble of reward models
      'function': placeholder(str),  # or a Python function 'package.module:function'
      'arguments': {},  # keyword arguments of the function, such as {'column': 'summary'}
      'url': placeholder(str),  # or the address of a reward server, 'http://HOST:PORT'
      'timeout': functions.TIMEOUT,  # seconds that these two may take per batch; None: no limit
      'workers': 0,  # processes that score examples in parallel; 0: the function gets whole batches
      'example_timeout': pool.TIMEOUT,  # seconds that a worker may take per example; None: no limit
      'on_error': 'stop',  # examples that a worker fails on: 'stop' the run, 'skip' or 'score' them
      'error_score': 0.0,  # score of such an example if on_error='score'
      'request_size': placeholder(int),  # responses per request to the server; None: all
      'request_timeout': client.TIMEOUT,  # seconds that a request may take
      'attempts': client.ATTEMPTS,  # tries of a request if the server is busy, fails or is down
      'max_length': placeholder(int),  # most tokens in a model's own tokenizer; None: its context
      'ensemble': 'mean',  # 'mean', 'min' (worst case), or 'variance': mean - coef * variance
      'ensemble_coef': 1.0,  # coef of 'variance'
      'parts': {},  # or {name: {'weight': 1.0, keys from above}}: a weighted sum
      'on_nan': 'stop',  # responses whose reward is NaN: 'stop' the run, or 'skip' and count them
    }
  )


def validate(config_reward, key='config.reward'):
  """Validates `config.reward` or another block with the same keys.

  Args:
    config_reward: The block.
    key: Its dotted name.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  check_keys(config_reward, config(), key, require_all=False)
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
    check_keys(part, of_part, part_key, require_all=False)
    validate_source(part, part_key, SOURCES)


def validate_source(block, key, sources):
  """Validates one source of scores, and loads it if it is a function; see `validate`.

  Args:
    block: `config.reward`, or one of its parts.
    key: Its dotted name.
    sources: Keys of which exactly one must be set.
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
    f"{key}.models={models!r} must name two or more folders, such as ('a', 'b')",
  )
  need(how in ENSEMBLES, f'{key}.ensemble={how!r} must be one of {", ".join(ENSEMBLES)}')
  coef, length = block.get('ensemble_coef', 1.0), block.get('max_length')
  need(coef >= 0, f'{key}.ensemble_coef={coef} must be 0 or positive')
  need(length is None or length > 0, f'{key}.max_length={length} must be positive, or None')
  need(
    not block.get('arguments') or block.get('function'),
    f'{key}.arguments needs {key}.function, whose arguments they are: set it, or remove them',
  )
  host.validate(block, key)


def make(config_reward, tokenizer, mesh, *, load, check, key='config.reward', allow_nan=False):
  """Creates the scorer of `config.reward`.

  Args:
    config_reward: Block with the keys of `config`, or one of its parts.
    tokenizer: Tokenizer of the policy.
    mesh: Device mesh.
    load: Keyword arguments of hf.load_reward.
    check: Function of a Model that reads the policy's tokens, which raises UserError if their
      sequences are too long for it.
    key: Dotted name of `config_reward`.
    allow_nan: Whether functions may return NaN even if `on_nan` is 'stop'.

  Returns:
    Scorer, and (Model, params) of the first reward model that a critic can start from, or None:
    one that shares the policy's tokenizer and has hidden states per token.
  """
  c = config_reward
  allow_nan = allow_nan or c.get('on_nan', 'stop') == 'skip'
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
    return scorer, first_model(scorers.values())
  if c.get('function') or c.get('url'):
    return host.make(c, tokenizer, mesh, key=key, allow_nan=allow_nan), None
  how, coef = c.get('ensemble', 'mean'), c.get('ensemble_coef', 1.0)
  load_member = functools.partial(
    model_scorer,
    tokenizer=tokenizer,
    mesh=mesh,
    max_length=c.get('max_length'),
    load=load,
    check=check,
    of_heads=functools.partial(_of_heads, coef=coef, how=how),
  )
  scorers = [load_member(path) for path in c.get('models') or (c.model,)]
  if len(scorers) == 1:
    return scorers[0]
  return ensemble([scorer for scorer, _ in scorers], how, coef=coef), first_model(scorers)


def skips_nan(config_reward):
  """Returns whether responses whose reward is NaN are skipped, by `on_nan` or by `on_error`."""
  blocks = [config_reward, *(config_reward.get('parts') or {}).values()]
  return config_reward.get('on_nan', 'stop') == 'skip' or any(
    block.get('on_error', 'stop') == 'skip' for block in blocks
  )


def first_model(pairs):
  """Returns the first model in pairs (scorer, model or None), or None; see `make`."""
  return next((model for _, model in pairs if model is not None), None)


def model_scorer(path, tokenizer, mesh, *, max_length, load, check, of_heads):
  """Creates the scorer of a reward model, which reads tokens if it shares the policy's tokenizer.

  Args:
    path: Folder of the reward model.
    tokenizer: Tokenizer of the policy.
    mesh: Device mesh.
    max_length: Tokens of an example in the model's own tokenizer; None for the model's context.
    load: See `make`.
    check: See `make`.
    of_heads: Function (scores [B, M] of the model's heads, Rollout) -> types.Scores.

  Returns:
    The results of `make`. A critic can start from the mean of several heads.
  """
  model, params = hf.load_reward(path, mesh=mesh, **load)
  combine = of_heads if heads.count(params['head']) > 1 else lambda scores, rollout: scores
  own = tokenizers.load(path)
  tokenizers.fit(own, model)
  if learned.same_tokenizer(own, tokenizer):
    check(model)
    score = learned.of_tokens(model, params)
    critic_params = params | {'head': heads.mean(params['head'])}
    critic = (model, critic_params) if model.has_token_states else None
    return lambda rollout, examples: combine(score(rollout), rollout), critic
  apply = learned.of_texts(model, params, own, max_length=max_length or model.max_length, mesh=mesh)

  def score_texts(rollout, examples):
    responses, ids = actor.texts_of(rollout, tokenizer)
    scores = apply(
      [example.prompt for example in examples], responses, learned.with_eos(ids, tokenizer)
    )
    return combine(sharding.put_rows(scores, mesh), rollout)

  return score_texts, None


def weighted(parts: Mapping[str, tuple[float, Scorer]]) -> Scorer:
  """Returns the weighted sum of scorers, sum_i weight_i * score_i.

  If some parts score tokens, the scores of responses are added to the rewards of the last tokens.

  Args:
    parts: {name: (weight, Scorer)}.

  Returns:
    Scorer that returns types.Scores, whose parts are multiplied by their weights, so they add up to
    the total.
  """
  weights = {name: float(weight) for name, (weight, _) in parts.items()}

  def score(rollout, examples):
    scores = {
      name: types.Scores.of(scorer(rollout, examples)) for name, (_, scorer) in parts.items()
    }
    return _weighted(scores, weights, rollout.response_mask)

  return score


def ensemble(scorers: Sequence[Scorer], how: str, *, coef: float = 0.0) -> Scorer:
  """Returns a scorer that combines several reward models.

  'mean' is the mean of the members, 'min' their minimum, and 'variance' is mean - coef * variance,
  with variance = sum_i (score_i - mean)^2 / M. See Coste et al. 2023, section 3
  (https://arxiv.org/abs/2310.02743).

  Args:
    scorers: M Scorers. All must score responses [B], or all tokens [B, R].
    how: One of ENSEMBLES.
    coef: Coefficient of 'variance', in 1 / score.

  Returns:
    Scorer that returns types.Scores, whose parts 'member_0' and so on are the members' scores. It
    raises UserError if some members score responses and others tokens.
  """

  def score(rollout, examples):
    scores = {
      f'member_{i}': types.Scores.of(member(rollout, examples)) for i, member in enumerate(scorers)
    }
    check_same_kind(scores)
    return _ensemble(scores, rollout.response_mask, coef, how=how)

  return score


def check_same_kind(members: Mapping[str, types.Scores]) -> None:
  """Raises UserError if some of the members score responses and others tokens."""
  by_token = [name for name, scores in members.items() if scores.total.ndim == 2]
  if by_token and len(by_token) < len(members):
    others = [name for name in members if name not in by_token]
    raise errors.UserError(
      f'rewards cannot be combined: {", ".join(by_token)} score tokens, but {", ".join(others)} '
      'score responses; all must score tokens, or all responses'
    )


@jax.jit
def _weighted(members, weights, response_mask):
  totals = {name: scores.total for name, scores in members.items()}
  if any(total.ndim == 2 for total in totals.values()):
    last = lengths.used_lengths(response_mask)[:, None] - 1
    is_last = jnp.arange(response_mask.shape[1])[None] == last
    at_last = lambda total: jnp.where(is_last, total[:, None], 0.0)
    totals = {name: x if x.ndim == 2 else at_last(x) for name, x in totals.items()}
  total = sum(weights[name] * total for name, total in totals.items())
  parts = {}
  for name, scores in members.items():
    parts |= _parts(name, scores, response_mask, weights[name])
  return types.Scores(total, parts)


@functools.partial(jax.jit, static_argnames=('how',))
def _ensemble(members, response_mask, coef, *, how):
  totals = jnp.stack([scores.total for scores in members.values()])
  total = jnp.min(totals, axis=0) if how == 'min' else jnp.mean(totals, axis=0)
  if how == 'variance':
    total -= coef * jnp.var(totals, axis=0)
  parts = {}
  for name, scores in members.items():
    parts |= _parts(name, scores, response_mask, 1.0)
  return types.Scores(total, parts)


def _of_heads(scores, rollout, coef, *, how):
  """Combines the scores [B, M] of a reward model's heads; see `ensemble`."""
  members = {f'head_{i}': types.Scores(scores[:, i]) for i in range(scores.shape[1])}
  return _ensemble(members, rollout.response_mask, coef, how=how)


def _parts(name, scores, response_mask, weight):
  """Returns a member's score as {name: weighted score [B]}, and its parts as {name/PART: [B]}."""
  total = scores.total
  if total.ndim == 2:
    total = jnp.sum(jnp.where(response_mask, total, 0.0), axis=1)
  return {name: weight * total} | {f'{name}/{inner}': part for inner, part in scores.parts.items()}

"""Scorers: (Rollout, examples) -> [B] or [B, R] float32.

Letters: B batch, R response length.
"""

from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import learned
from rlhf_jax.rollout import actor


def make(config_reward, tokenizer, mesh, *, load, check):
  """The scorer of `config.reward`.

  Args:
    config_reward: `config.reward` of an on-policy algorithm.
    tokenizer: the policy's.
    mesh: device mesh.
    load: keywords of hf.load_reward: how a reward model computes.
    check: called with a Model that reads the policy's tokens; raises UserError if it cannot.

  Returns:
    Scorer, and (Model, params) of a reward model that a critic can start from: its tokenizer is the
    policy's, and its head reads the states of single tokens. Else None.
  """
  if config_reward.function:
    return function_scorer(functions.load(config_reward.function), tokenizer, mesh), None
  return model_scorer(config_reward.model, tokenizer, mesh, max_length=config_reward.max_length,
                      load=load, check=check)


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
    by_token = hasattr(model, 'response_states') and not getattr(model.config, 'pooled', False)
    return lambda rollout, examples: score(rollout), (model, params) if by_token else None
  apply = learned.of_texts(model, params, own, max_length=max_length or model.max_length, mesh=mesh)

  def score_texts(rollout, examples):
    responses, ids = actor.texts_of(rollout, tokenizer)
    ended = [bool(row) and row[-1] == tokenizer.eos_token_id for row in ids]
    scores = apply([example.prompt for example in examples], responses, ended)
    return sharding.put_rows(scores, mesh)

  return score_texts, None


def function_scorer(function, tokenizer, mesh):
  """Scores of a Python function; with several processes each calls it with its part of the batch.

  Args:
    function: see functions.py.
    tokenizer: the policy's.
    mesh: device mesh.

  Returns:
    Scorer.
  """
  def score(rollout, examples):
    responses, ids = actor.texts_of(rollout, tokenizer)

    def call(rows):
      return functions.call(
          function, [examples[i].prompt for i in rows], [responses[i] for i in rows],
          response_tokens=[ids[i] for i in rows], metadata=[examples[i].metadata for i in rows],
          slots=rollout.response_mask.shape[1])

    return sharding.put_rows(processes.share_out(call, len(examples)), mesh)

  return score

"""What on-policy algorithms need before their train step: reference, critic, prompts, rollouts, scores.

Letters: B batch, P prompt length, R response length.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import setup
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.models import trainable
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import learned
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import engine
from rlhf_jax.rollout import sampling as sampling_lib


def make_sampling(config_sampling, tokenizer, *, ignore_eos=False):
  """Sampling of `config.sampling` with the tokenizer's EOS and padding."""
  return sampling_lib.Sampling(
      max_new_tokens=config_sampling.max_new_tokens,
      temperature=config_sampling.temperature, top_k=config_sampling.top_k,
      top_p=config_sampling.top_p, eos_id=tokenizer.eos_token_id,
      pad_id=tokenizer.pad_token_id, ignore_eos=ignore_eos)


def check_length(config, model):
  """Raises UserError where a prompt and its response exceed a model's context."""
  prompt, response = config.data.max_prompt_length, config.sampling.max_new_tokens
  if model.encoder_decoder:
    setup.check_length(prompt, model, 'data.max_prompt_length')
    setup.check_length(response, model, 'sampling.max_new_tokens')
  else:
    setup.check_length(prompt + response, model,
                       'data.max_prompt_length + config.sampling.max_new_tokens')


def texts_of(rollout, tokenizer):
  """The responses of a rollout.

  Args:
    rollout: Rollout.
    tokenizer: the policy's.

  Returns:
    List of texts without special tokens, and list of token id lists with them.
  """
  mask = processes.host(rollout.response_mask)
  tokens = processes.host(rollout.tokens)[:, -mask.shape[1]:]
  ids = [row[keep].tolist() for row, keep in zip(tokens, mask)]
  return tokenizers.decode_continuation(tokenizer, ids), ids


def load_reference(config, mesh, model, trained):
  """Parameters of the frozen reference that the policy's frozen ones do not have.

  Args:
    config: see `config.ppo()`.
    mesh: device mesh.
    model: the policy's Model.
    trained: its trained parameters as they start.

  Returns:
    All parameters of `config.reference`; else a copy of what the policy trains, and nothing
    where it trains adapters.

  Raises:
    UserError: `config.reference` is another architecture than the policy, as whose parameters it
      is used.
  """
  if not config.reference:
    return {} if model.lora is not None else jax.tree.map(jnp.copy, trained)
  other, params = hf.load(config.reference, mesh=mesh, param_dtype=config.model.param_dtype,
                          **setup.model_settings(config.model))
  theirs, ours = other.config.to_hf(), model.config.to_hf()
  differ = [f'{name} ({theirs.get(name)} and {ours.get(name)})' for name in sorted(theirs | ours)
            if theirs.get(name) != ours.get(name) and not name.endswith('token_id')]
  if differ:
    raise errors.UserError(
        f'config.reference={config.reference!r} differs from the policy in {", ".join(differ)}: '
        'name a model of the same architecture')
  return params


def make_critic(config, tokenizer, mesh, model, trained, shared, scored):
  """The critic `config.critic` asks for.

  Args:
    config: see `config.ppo()`.
    tokenizer: the policy's.
    mesh: device mesh.
    model: the policy's Model.
    trained: its trained parameters.
    shared: its other parameters.
    scored: (Model, params) of the reward model, or None.

  Returns:
    Model, or None for a head on the policy's hidden states, and trained params.
  """
  kind = config.critic.kind
  if kind == 'trunk':
    return None, {'head': setup.new_head(model, mesh, config.seed, 'zero')}
  if kind == 'adapters':
    adapters = trainable.new_adapters(model, shared, seed=config.seed + 1)
    return model, {'backbone': setup.place(adapters, model, mesh),
                   'head': setup.new_head(model, mesh, config.seed, 'zero')}
  if config.critic.path:
    config_model = config.model.copy_and_resolve_references()
    config_model.path = config.critic.path
    critic, params = setup.load_scalar(
        config_model, tokenizer, mesh, config.seed, head_scale='zero')
    check_length(config, critic)
    return critic, params
  if scored is not None:
    return scored[0], jax.tree.map(jnp.copy, scored[1])
  policy = jax.tree.map(jnp.copy, trainable.whole(model, trained, shared))
  return dataclasses.replace(model, lora=None), {
      'backbone': policy, 'head': setup.new_head(model, mesh, config.seed, 'zero')}


def reward_model_scorer(config, tokenizer, mesh):
  """Scores of `config.reward.model`, on tokens if it shares the policy's tokenizer.

  Returns:
    (rollout, examples) -> scores [B] float32, and (Model, params) where a critic can start from
    it: its tokenizer is the policy's, and its head reads the states of single tokens. Else None.
  """
  settings = setup.model_settings(config.model)
  model, params = hf.load_reward(config.reward.model, mesh=mesh, param_dtype=config.model.param_dtype, **settings)
  own = tokenizers.load(config.reward.model)
  setup.fit_tokenizer(own, model)
  if learned.same_tokenizer(own, tokenizer):
    check_length(config, model)
    score = learned.of_tokens(model, params)
    by_token = hasattr(model, 'response_states') and not getattr(model.config, 'pooled', False)
    return lambda rollout, examples: score(rollout), (model, params) if by_token else None
  apply = learned.of_texts(
      model, params, own, max_length=config.reward.max_length or model.max_length, mesh=mesh)

  def score_texts(rollout, examples):
    responses, ids = texts_of(rollout, tokenizer)
    ended = [bool(row) and row[-1] == tokenizer.eos_token_id for row in ids]
    scores = apply([example.prompt for example in examples], responses, ended)
    return sharding.put_rows(scores, mesh)

  return score_texts, None


def function_scorer(config, tokenizer, mesh):
  """Scores of `config.reward.function`: (rollout, examples) -> [B] or [B, R] float32.

  With several processes each calls it with its part of the batch.
  """
  function = functions.load(config.reward.function)

  def score(rollout, examples):
    responses, ids = texts_of(rollout, tokenizer)

    def call(rows):
      return functions.call(
          function, [examples[i].prompt for i in rows], [responses[i] for i in rows],
          response_tokens=[ids[i] for i in rows], metadata=[examples[i].metadata for i in rows],
          slots=rollout.response_mask.shape[1])

    return sharding.put_rows(processes.share_out(call, len(examples)), mesh)

  return score


def jit_generate(model, sampling, *, rows, gather):
  """`decode.generate` or `engine.generate` of (params, prompts, key), jitted; their tokens are the same.

  Args:
    model: the policy's Model.
    sampling: Sampling.
    rows: of the engine; every data shard has its part of them, and a queue of its own. 0 for the
      plain loop over all prompts.
    gather: whether every device holds what it else gathers over 'fsdp' for each token: its part
      of the weights along 'tensor', whole. With the engine it always does.

  Raises:
    UserError: when called, with `rows`: there are several data shards, and the model's heads do not divide
      over 'tensor'; or 'tensor' is above 1 on CPU devices of several processes.
  """
  def generate(params, prompts, key):
    params = sharding.gathered(params, model.rules, 'fsdp') if gather or rows else params
    if not rows:
      return decode.generate(params, prompts, key, model=model, sampling=sampling)
    shards, tensor = sharding.shards()
    # Parts of heads would go from device to device inside the loops: as in `engine`, where tokens are drawn.
    if shards > 1 and (model.config.heads % tensor or model.config.kv_heads % tensor):
      raise errors.UserError(
          f'config.sampling.rows={rows} on {shards} data shards: the {model.config.heads} attention heads and '
          f'{model.config.kv_heads} of keys and values have to divide over the {tensor} parts of config.mesh.tensor; '
          'choose another mesh, or set config.sampling.rows to 0')

    if tensor > 1 and processes.unrolled():
      raise errors.UserError(
          f'config.sampling.rows={rows} with {tensor} parts of config.mesh.tensor: between CPU devices of several '
          'processes loops of unknown length cannot have collectives in them; set config.sampling.rows to 0')

    def refill(whole, prompts, shard):
      params, key = whole
      return engine.generate(params, prompts, key, model=model, sampling=sampling, rows=rows // shards,
                             first=shard * prompts.tokens.shape[0])

    return sharding.each_shard(refill, (params, key), prompts)
  return jax.jit(generate)


class Actor:
  """Draws prompts, samples responses from the current policy and scores them."""

  def __init__(self, config, tokenizer, model, shared, score, mesh):
    """Reads the prompts.

    Args:
      config: see `config.ppo()`.
      tokenizer: the policy's.
      model: the policy's Model.
      shared: its parameters that are not trained.
      score: (rollout, examples) -> scores.
      mesh: device mesh.

    Raises:
      UserError: prompts are missing or do not fit the model's context.
    """
    check_length(config, model)
    self.examples = setup.read_examples(config.data, formats.prompts, tokenizer)
    self.iterator, self.rows = pipelines.prompt_iterator(
        self.examples, tokenizer, batch_size=config.batch_size,
        max_prompt_length=config.data.max_prompt_length, seed=config.seed,
        on_long=config.data.on_long)
    self.sampling = make_sampling(
        config.sampling, tokenizer, ignore_eos=config.ppo.response == 'raw')
    self._tokenizer, self._shared, self._score, self._mesh = tokenizer, shared, score, mesh
    self.generate = jit_generate(model, self.sampling, rows=config.sampling.rows,
                                 gather=config.sampling.gather_weights)
    self._truncate = jax.jit(decode.truncate, static_argnums=(1, 2))
    self._last = None

  def __call__(self, state, *, timed):
    """One batch of experience.

    Args:
      state: TrainState with params['policy'].
      timed: whether to wait for the device in order to time the two parts.

    Returns:
      Rollout, scores ([B] or [B, R] float32) and host-side metrics.
    """
    prompts, index = next(self.iterator)
    examples = [self.examples[i] for i in np.asarray(index)]
    started = time.perf_counter()
    rollout = self.generate(
        trainable.join(self._shared, state.params['policy']),
        sharding.put_rows(prompts, self._mesh), types.step_keys(state)[0])
    if timed:
      jax.block_until_ready(rollout)
    sampled = time.perf_counter()
    seen = rollout
    if self.sampling.ignore_eos:
      seen, _ = self._truncate(rollout, self.sampling.eos_id, self.sampling.pad_id)
    scores = self._score(seen, examples)
    self._last = examples, seen, scores
    if not timed:
      return rollout, scores, {}
    jax.block_until_ready(scores)
    tokens = int(np.sum(processes.host(rollout.response_mask)))
    return rollout, scores, {
        'seconds/rollout': sampled - started, 'seconds/scoring': time.perf_counter() - sampled,
        'tokens_per_second/rollout': tokens / (sampled - started)}

  def samples(self):
    """The last batch as dicts with prompt, response and score."""
    examples, rollout, scores = self._last
    responses, _ = texts_of(rollout, self._tokenizer)
    scores = processes.host(scores)
    return [{'prompt': example.prompt, 'response': response, 'score': float(np.sum(score))}
            for example, response, score in zip(examples, responses, scores)]

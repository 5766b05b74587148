"""Evaluators: functions (state) -> metrics that run in the loop, or alone (evaluate.py).

    loss       the algorithm's loss on held-out data
    prompts    responses to held-out prompts: scores, KL from the initial policy, lengths
    win_rate   how often the policy's response scores higher than the initial policy's
    text       statistics of the texts of responses, and metrics of all of them together

`config.evals` names them; see config.evaluator. All evaluations use the same random keys for
sampling, so two evaluations differ only in the policy.

Letters: n prompts, B batch, R response length.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree
import ml_collections
from ml_collections.config_dict import placeholder
import numpy as np
import transformers

from rlhf_jax import config as config_lib
from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import forward
from rlhf_jax import intervals
from rlhf_jax import keys
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import winrate
from rlhf_jax.models import base
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import guard
from rlhf_jax.rewards import scorers
from rlhf_jax.rewards import text_statistics
from rlhf_jax.rollout import actor
from rlhf_jax.rollout import guided
from rlhf_jax.rollout import sampler
from rlhf_jax.rollout import sampling as sampling_lib
from rlhf_jax.rollout import stops

Evaluator = Callable[[types.TrainState], dict[str, float]]
# Keys of a metric of kind 'text'.
METRIC = ml_collections.ConfigDict({'function': placeholder(str), 'arguments': {}})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """What an algorithm provides to its evaluators.

  Attributes:
    model: Model that is trained.
    tokenizer: Tokenizer of the model.
    mesh: Device mesh.
    seed: Random seed of the responses.
    load: Keyword arguments of hf.load_reward: how a reward model computes, such as its dtype.
    policy: Function (state) -> all parameters of the policy; None for an algorithm without a
      policy.
    start: Function () -> all parameters of the initial policy, in arrays that are never donated. It
      may be called only while evaluators are created.
    loss: Function (path of a data set, or None for the run's held-out data) -> (state) -> metrics.
      It returns None if there are no such data. None for an algorithm without a held-out loss.
    sampling: The run's sampling settings, keys of config.SAMPLING.
    guided_model: Function (beta) -> guided.GuidedModel that samples with sampling.beta; None for an
      algorithm without Q functions.
    q_functions: Function (state) -> its parameters besides the policy's.
  """

  model: base.Base
  tokenizer: transformers.PreTrainedTokenizerFast
  mesh: jax.sharding.Mesh
  seed: int
  load: Mapping[str, Any]
  policy: Callable[[types.TrainState], PyTree] | None = None
  start: Callable[[], PyTree] | None = None
  loss: Callable[[str | None], Evaluator | None] | None = None
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  guided_model: Callable[[float], guided.GuidedModel] | None = None
  q_functions: Callable[[types.TrainState], PyTree] | None = None


def validate(evals):
  """Checks the rewards and functions of `config.evals`. config.validate checks the other keys.

  Raises:
    UserError: If a reward or a function cannot be used; names the key.
  """
  for name, block in evals.items():
    block = config_lib.evaluator(name, block)
    if 'reward' in block:
      scorers.validate(block.reward, f'config.evals.{name}.reward')
    if block.kind == 'function':
      load_user(block, f'config.evals.{name}.function')
    for metric in block.get('metrics', {}):
      load_metric(block.metrics[metric], f'config.evals.{name}.metrics.{metric}')


def make(evals, context):
  """Creates the evaluators of `config.evals`.

  Args:
    evals: See config.evaluator.
    context: Context.

  Returns:
    {name: (state) -> metrics}, without losses that have no data.

  Raises:
    UserError: If data or functions are missing, or the algorithm lacks what an evaluator needs;
      names the evaluator.
  """
  makers = {'loss': loss, 'prompts': prompts, 'win_rate': win_rate, 'text': text, 'function': user}
  evaluators = {}
  for name, block in evals.items():
    block = config_lib.evaluator(name, block)
    try:
      evaluators[name] = makers[block.kind](block, context)
    except errors.UserError as error:
      raise errors.UserError(f'config.evals.{name}: {error}') from error
  return {name: evaluate for name, evaluate in evaluators.items() if evaluate is not None}


def loss(block, context):
  """Creates the evaluator of the algorithm's loss and other metrics on held-out data."""
  config_lib.need(
    context.loss,
    "kind='loss' needs an algorithm with a held-out loss: sft, reward_model or ilql; use another "
    'kind',
  )
  return context.loss(block.path)


def prompts(block, context):
  """Creates the evaluator of responses: scores, KL from the initial policy, lengths, EOS rate.

      kl = mean over prompts of log pi(y|x) - log pi_start(y|x), nats per sequence

  Both log-probabilities are at the sampling temperature, or at 1 if that is 0. There is no KL if Q
  functions guide the sampler (sampling.beta), because the responses are then not those of pi.

  Args:
    block: See config.evaluator.
    context: Context.

  Returns:
    (state) -> {'score', 'score_se': its standard error, 'kl', 'length': in tokens, 'eos_rate':
    fraction of responses that the length limit did not cut off}.
  """
  responses = ResponseSampler(block, context)
  score = scorer(block, context, responses)
  temperature = responses.sampling.temperature or 1.0
  start = None if responses.beta else context.start()
  logprobs = lambda params, rollout: processes.to_host(
    forward.response_logprobs(params, rollout, temperature, model=context.model)
  )

  def measure(params, rollout, examples):
    kl = {} if start is None else {'kl': logprobs(params, rollout) - logprobs(start, rollout)}
    return kl | {
      'score': score(rollout, examples),
      'length': processes.to_host(rollout.response_mask).sum(1),
      'eos_rate': responses.ended(rollout),
    }

  def evaluate(state):
    measures = responses.each(context.policy(state), measure, state)
    scores = measures.pop('score')
    valid = scored(block, scores)
    metrics = {name: float(np.mean(values)) for name, values in measures.items()}
    if not valid.any():
      return metrics
    return metrics | {
      'score': float(np.mean(scores[valid])),
      'score_se': intervals.standard_error(
        scores[valid], [prompt for prompt, keep in zip(responses.prompts, valid) if keep]
      ),
    }

  return evaluate


def win_rate(block, context):
  """Creates the evaluator of how often the policy's response beats the initial policy's.

  Args:
    block: See config.evaluator.
    context: Context.

  Returns:
    (state) -> {'rate', 'low' and 'high': its 95 % interval, 'draws': fraction of draws}.
  """
  responses = ResponseSampler(block, context)
  score = scorer(block, context, responses)
  scores = lambda params, state=None: responses.each(
    params, lambda params, rollout, examples: {'score': score(rollout, examples)}, state
  )['score']
  baseline = scores(context.start())

  def evaluate(state):
    new = scores(context.policy(state), state)
    valid = scored(block, new + baseline)
    if not valid.any():
      return {}
    result = winrate.win_rate(
      new[valid],
      baseline[valid],
      prompts=[prompt for prompt, keep in zip(responses.prompts, valid) if keep],
    )
    return {
      'rate': result.rate,
      'low': result.low,
      'high': result.high,
      'draws': result.draws / int(valid.sum()),
    }

  return evaluate


def text(block, context):
  """Creates the evaluator of the texts of responses.

  Args:
    block: See config.evaluator. Each of its `metrics` is a reward function, which is called once
      for all responses; its scores are averaged, and scores per token summed before.
    context: Context.

  Returns:
    (state) -> the text_statistics, and 'metrics/NAME' of each of `block.metrics`.
  """
  responses = ResponseSampler(block, context)
  load = lambda name: load_metric(block.metrics[name], f'metrics.{name}')
  metrics = {name: load(name) for name in block.metrics}

  def measure(params, rollout, examples):
    del params
    texts, tokens = actor.texts_of(rollout, context.tokenizer)
    columns = {
      'prompt': [example.prompt for example in examples],
      'response': texts,
      'tokens': tokens,
      'metadata': [example.metadata for example in examples],
    }
    return {name: as_objects(values) for name, values in columns.items()}

  def evaluate(state):
    columns = {
      name: list(values)
      for name, values in responses.each(context.policy(state), measure, state).items()
    }
    results = text_statistics.statistics(columns['response'])
    for name, function in metrics.items():
      scores = functions.call(
        function,
        columns['prompt'],
        columns['response'],
        response_tokens=columns['tokens'],
        metadata=columns['metadata'],
        response_length=responses.sampling.max_new_tokens,
        limit=functions.Limit(None, ''),
      )
      results[f'metrics/{name}'] = float(scores.sum() / len(scores))
    return results

  return evaluate


def as_objects(values):
  """Returns a list as a one-dimensional NumPy array of objects, even if it holds lists."""
  array = np.empty(len(values), object)
  array[:] = values
  return array


def load_metric(block, key):
  """Loads a function of `evals.NAME.metrics`; `key` is its config key, for messages."""
  block = ml_collections.ConfigDict(block)
  config_keys.check_keys(block, METRIC, key, require_all=False)
  config_lib.need(block.get('function'), f"{key}.function is empty: set it to 'module:function'")
  arguments = block.get('arguments', ml_collections.ConfigDict()).to_dict()
  function = functions.load_reward(block.function, key=f'{key}.function', arguments=arguments)
  config_lib.need(
    not getattr(function, 'needs_workers', False),
    f'{key}.function={block.function!r} can hang in a way that only ends with its process: use an '
    "evaluator of kind 'prompts', whose reward can have workers",
  )
  return function


def user(block, context):
  """Creates the evaluator that a user's function returns for the context."""
  make_one = load_user(block, 'function')
  call = guard.Call(f'the evaluator {block.function}')
  evaluate = guard.run(lambda: make_one(context), call)
  functions.check_signature(evaluate, f'what function={block.function!r} returned', 'f(state)', 1)
  return lambda state: guard.run(lambda: evaluate(state), call)


def load_user(block, key):
  """Loads and checks the function of a user's evaluator; `key` is its config key, for messages."""
  function = functions.load(block.function, key=key)
  functions.check_signature(function, f'{key}={block.function!r}', 'f(context)', 1)
  return function


def scorer(block, context, responses):
  """Creates a function (Rollout, examples) -> scores [B], NumPy float32.

  Scores per token are summed over the response.
  """
  score, _ = scorers.make(
    block.reward,
    context.tokenizer,
    context.mesh,
    load=context.load,
    key='reward',
    check=lambda model: check_length(model, responses.length, responses.sampling.max_new_tokens),
  )

  def apply(rollout, examples):
    scores = processes.to_host(types.Scores.of(score(rollout, examples)).total)
    return scores.sum(axis=1) if scores.ndim == 2 else scores

  return apply


def scored(block, scores):
  """Returns the mask [n], bool, of scores that count: without NaNs if `reward.on_nan='skip'`."""
  return ~(np.isnan(scores) & scorers.skips_nan(block.reward))


class ResponseSampler:
  """Samples responses to the same prompts with the same random keys each time.

  Attributes:
    length: Number of tokens of the longest prompt.
    sampling: Sampling.
    beta: Weight of the Q functions that guide the sampler; 0 for none.
    prompts: Texts of the prompts, by which intervals are clustered.
  """

  def __init__(self, block, context):
    """Reads the prompts.

    Args:
      block: See config.evaluator.
      context: Context.

    Raises:
      UserError: If the prompts cannot be read or do not fit the model, or there is no policy.
    """
    config_lib.need(context.policy, f'kind={block.kind!r} needs an algorithm that trains a policy')
    self._mesh, self._seed, tokenizer = context.mesh, context.seed, context.tokenizer
    columns = dict(pair.split('=') for pair in (block.columns or '').split(',') if pair)
    records = sources.read(block.path, split=block.split or '', columns=columns)
    self._examples = formats.prompts(records, tokenizer=tokenizer)[0][: block.count]
    self.prompts = [example.prompt for example in self._examples]
    self.length = max(map(len, tokenizers.encode(tokenizer, self.prompts)))
    self.beta = block.sampling.get('beta', 0.0)
    config_lib.need(
      not self.beta or context.guided_model,
      f'sampling.beta={self.beta} needs an algorithm with Q functions (ilql); set it to 0',
    )
    self.sampling, self._cut = make_sampling(block.sampling, context)
    check_length(context.model, self.length, self.sampling.max_new_tokens)
    # All batches have the same size, which is divisible by the number of data shards.
    shards = sharding.shards()[0]
    size = -(-min(block.batch_size, len(self._examples)) // shards) * shards
    self._batches = pipelines.prompt_batches(
      self._examples, tokenizer, batch_size=size, max_prompt_length=self.length
    )
    self._sample = sampler.make(context.model, self.sampling)
    if self.beta:
      self._q_functions = context.q_functions
      self._sample_guided = sampler.make(context.guided_model(self.beta), self.sampling)

  def each(self, params, measure, state=None):
    """Samples all responses and measures them.

    Args:
      params: All parameters of the policy.
      measure: Function (params, Rollout of B responses, their B examples) -> {name: B values}.
      state: TrainState whose Q functions guide the sampler if `beta` is not 0; None for no guide.

    Returns:
      {name: NumPy array of n values}, in the order of the prompts.
    """
    key = keys.for_purpose(self._seed, keys.EVALUATION)
    sample, sampled, parts = self._sample, params, []
    if self.beta and state is not None:
      sample, sampled = self._sample_guided, {'policy': params} | self._q_functions(state)
    for number, ((batch, index), valid) in enumerate(self._batches):
      rollout = sample(
        sampled, sharding.put_rows(batch, self._mesh), jax.random.fold_in(key, number)
      )
      rollout = self._cut(rollout) if self._cut else rollout
      measured = measure(params, rollout, [self._examples[i] for i in index])
      parts.append({name: np.asarray(values)[valid] for name, values in measured.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def ended(self, rollout):
    """Returns which responses the length limit did not cut off, [B] NumPy bool."""
    return processes.to_host(
      sampling_lib.ended(rollout, self.sampling) if rollout.ended is None else rollout.ended
    )


def make_sampling(settings, context):
  """Creates the Sampling of an evaluator, and a function that truncates responses afterwards.

  Args:
    settings: Keys of config.SAMPLING. Missing keys have the run's values, or the defaults.
    context: Context.

  Returns:
    Sampling, and a function Rollout -> Rollout or None.
  """
  known = {name: context.sampling[name] for name in config_lib.SAMPLING if name in context.sampling}
  settings = config_lib.SAMPLING | known | dict(settings)
  strings, tokenizer = tuple(settings.pop('stop')), context.tokenizer
  text, after = settings.pop('truncate_at'), settings.pop('truncate_after')
  del settings['beta']
  settings['top_k'] = settings['top_k'] or 0
  sampling = stops.sampling_of(tokenizer, stop=strings, ignore_eos=text is not None, **settings)
  if text is None:
    return sampling, actor.stop_at(strings, tokenizer, sampling, context.mesh)
  token = stops.single_token(tokenizer, text, name='sampling.truncate_at')

  @jax.jit
  def truncate(rollout):
    rollout, ended = stops.truncate(rollout, tokens=(token,), after=after, pad_id=sampling.pad_id)
    return rollout.replace(ended=ended)

  return sampling, truncate


def check_length(model, prompt, response):
  """Raises UserError if a prompt and a response, in tokens, exceed the model's context."""
  length = max(prompt, response) if model.encoder_decoder else prompt + response
  config_lib.need(
    length <= model.max_length,
    f'prompts of up to {prompt} tokens and {response} new ones exceed the context of '
    f'{model.max_length} tokens: shorten the prompts, or lower sampling.max_new_tokens',
  )

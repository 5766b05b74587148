"""What on-policy algorithms share: their keys and checks, the wiring of their models, and their Learner.

Letters: B batch, n responses of a prompt, P prompt length, R response length.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections.config_dict import placeholder

from rlhf_jax import advantages
from rlhf_jax import config as config_lib
from rlhf_jax import errors
from rlhf_jax import experience
from rlhf_jax import forward as forward_lib
from rlhf_jax import learner
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import hf
from rlhf_jax.models import trainable
from rlhf_jax.rewards import scorers
from rlhf_jax.rollout import actor as actor_lib
from rlhf_jax.rollout import sampler
from rlhf_jax.rollout import sampling as sampling_lib
from rlhf_jax.rollout import stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Static choices of an on-policy train step. Those with a default are the keys of `config.rl`.

  Attributes:
    microbatch_size: sequences of one forward and backward pass; 0 for the whole minibatch.
    temperature: the one sampled with; logits of policy and reference are divided by it.
    samples: n, responses to each prompt.
    max_new_tokens: R.
    end_tokens: token ids that end a response; () for none.
    end_after: the first position at which they do.
    epochs: passes over each rollout.
    minibatches: optimizer steps a pass; must divide the batch.
    length_buckets: see update.Schedule.
    kl_coef: coefficient of the KL penalty; what it starts with where it adapts.
    kl_estimator: 'k1', 'k2', 'k3', 'abs' or 'full' (over the vocabulary); see advantages.kl_estimate.
    kl_in: 'reward' (Ziegler et al.) or 'loss' (GRPO).
    clip_low: policy clip below 1.
    clip_high: policy clip above 1.
    dual_clip: bound on the loss of negative advantages, in advantages; None for none.
    entropy_coef: weight of the entropy bonus.
    ptx_coef: weight of the language-modelling loss on pretraining examples (PPO-ptx).
    response: 'truncated' trains on what stands before the EOS; 'raw' on all R tokens, which
      are sampled past the EOS (lm-human-preferences). The reward sees the truncated text.
    missing_eos: 'none', 'replace' or 'subtract'; see advantages.apply_missing_eos.
    missing_eos_value: the constant of that rule.
    scale_scores: divide scores by their running standard deviation (trlX).
    clip_scores: bound on |score| after scaling; None for none.
    behaviour: old log-probabilities from the training 'forward' pass or from the 'sampler'.
  """
  microbatch_size: int
  temperature: float
  samples: int
  max_new_tokens: int
  end_tokens: tuple
  end_after: int
  epochs: int = 4
  minibatches: int = 1
  length_buckets: int = 4
  kl_coef: float = 0.05
  kl_estimator: str = 'k1'
  kl_in: str = 'reward'
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float | None = None
  entropy_coef: float = 0.0
  ptx_coef: float = 0.0
  response: str = 'truncated'
  missing_eos: str = 'none'
  missing_eos_value: float = -1.0
  scale_scores: bool = False
  clip_scores: float | None = None
  behaviour: str = 'forward'

  @property
  def schedule(self):
    """update.Schedule."""
    return update.Schedule(self.epochs, self.minibatches, self.microbatch_size, self.length_buckets)

  @property
  def clips(self):
    """Keywords of losses.clipped_policy_loss."""
    return {'clip_low': self.clip_low, 'clip_high': self.clip_high, 'dual_clip': self.dual_clip}

  @property
  def rules(self):
    """experience.ScoreRules."""
    return experience.ScoreRules(
        end_tokens=self.end_tokens, end_after=self.end_after, scale=self.scale_scores, clip=self.clip_scores,
        missing_eos=self.missing_eos, missing_eos_value=self.missing_eos_value)

  @classmethod
  def of(cls, config, end_tokens, end_after=0):
    """The settings of a config, with the tokens that end a response and the first position of them."""
    return cls(microbatch_size=config.microbatch_size or 0, temperature=config.sampling.temperature,
               samples=config.sampling.samples, max_new_tokens=config.sampling.max_new_tokens,
               end_tokens=end_tokens, end_after=end_after, **config.rl)


def config(algorithm, settings):
  """Keys of an on-policy algorithm.

  Args:
    algorithm: its name.
    settings: its class of settings, `Settings` or a subclass.

  Returns:
    ConfigDict.
  """
  found = config_lib.common(algorithm)
  found.batch_size = 64
  found.optim.learning_rate = 1e-5
  data = config_lib.data() | {
      'kind': 'prompt',
      'epochs': placeholder(float),     # passes over the prompts; or set steps
      'max_prompt_length': 64,
      'on_long': 'error',       # a prompt beyond that: 'error', 'truncate_left' or 'drop'
  }
  del data['max_length']
  found.data = ml_collections.ConfigDict(data)
  found.reference = placeholder(str)    # folder; None: the policy as it starts
  found.reward = scorers.config()
  found.sampling = ml_collections.ConfigDict({
      'max_new_tokens': 32, 'temperature': 1.0, 'top_k': placeholder(int), 'top_p': 1.0,
      'min_new_tokens': 0,      # before these no token ends a response
      'stop': (),               # strings that end a response
      'truncate_at': placeholder(str),  # with rl.response 'raw': the token that ends the text; None: the EOS
      'truncate_after': 0,      # the first position at which it does
      'samples': 1,             # responses to each prompt; must divide batch_size
      'max_concurrent': placeholder(int),   # responses sampled at a time, by continuous batching; None: all
      'gather_weights': False,  # over 'fsdp' once a rollout, not once a token; with max_concurrent always
  })
  found.ptx = ml_collections.ConfigDict(config_lib.data() | {
      'batch_size': placeholder(int),   # pretraining examples an iteration, shared out over minibatches
  })
  found.rl = ml_collections.ConfigDict({
      f.name: placeholder(float) if f.default is None else f.default
      for f in dataclasses.fields(settings) if f.default is not dataclasses.MISSING})
  return found


def validate(config, device_count):
  """Checks the keys that on-policy algorithms share.

  Args:
    config: from `config`.
    device_count: devices of all processes.

  Raises:
    UserError: names the key, the value and the remedy.
  """
  need, one_of, divides = config_lib.need, config_lib.one_of, config_lib.divides
  rl, sampling, ptx = config.rl, config.sampling, config.ptx
  one_of(config, 'data.kind', ('prompt',))
  one_of(config, 'data.on_long', ('error', 'truncate_left', 'drop'))
  one_of(config, 'rl.kl_estimator', advantages.KL_ESTIMATORS)
  one_of(config, 'rl.kl_in', ('reward', 'loss'))
  one_of(config, 'rl.response', ('truncated', 'raw'))
  one_of(config, 'rl.missing_eos', advantages.MISSING_EOS)
  one_of(config, 'rl.behaviour', ('forward', 'sampler'))
  need(0 <= rl.clip_low <= 1, f'config.rl.clip_low={rl.clip_low} must be in [0, 1]')
  need(rl.dual_clip is None or rl.dual_clip > 1,
       f'config.rl.dual_clip={rl.dual_clip} must be above 1, or None')
  config_lib.optional_positive(rl, 'rl.', ('clip_scores',))
  for key in ('epochs', 'minibatches', 'length_buckets'):
    need(rl[key] > 0, f'config.rl.{key}={rl[key]} must be positive')
  divides(rl.minibatches, config.batch_size, 'rl.minibatches', 'batch_size')
  divides(config.microbatch_size, config.batch_size // rl.minibatches,
          'microbatch_size', 'batch_size / config.rl.minibatches')
  scorers.validate(config.reward)
  need(sampling.temperature > 0,
       f'config.sampling.temperature={sampling.temperature} must be positive: greedy samples '
       'teach nothing')
  need(sampling.max_new_tokens > 0,
       f'config.sampling.max_new_tokens={sampling.max_new_tokens} must be positive')
  config_lib.optional_positive(sampling, 'sampling.', ('top_k', 'max_concurrent'))
  need(0 < sampling.top_p <= 1, f'config.sampling.top_p={sampling.top_p} must be in (0, 1]')
  need(0 <= sampling.min_new_tokens <= sampling.max_new_tokens,
       f'config.sampling.min_new_tokens={sampling.min_new_tokens} must be from 0 to '
       f'config.sampling.max_new_tokens={sampling.max_new_tokens}')
  need(sampling.truncate_at is None or rl.response == 'raw',
       f"config.sampling.truncate_at={sampling.truncate_at!r} needs config.rl.response='raw': "
       'sampling goes past the token')
  need(not (sampling.stop and rl.response == 'raw'),
       f"config.sampling.stop={sampling.stop} needs config.rl.response='truncated'")
  need(sampling.samples > 0, f'config.sampling.samples={sampling.samples} must be positive')
  divides(sampling.samples, config.batch_size, 'sampling.samples', 'batch_size')
  config_lib.divides_over_shards(
      config, device_count, 'batch_size / config.sampling.samples', config.batch_size // sampling.samples)
  if sampling.max_concurrent:
    need(sampling.max_concurrent < config.batch_size,
         f'config.sampling.max_concurrent={sampling.max_concurrent} must be less than '
         f'config.batch_size={config.batch_size}, or None to sample all at once')
    config_lib.divides_over_shards(
        config, device_count, 'sampling.max_concurrent', sampling.max_concurrent)
  need(not (rl.kl_estimator == 'full' and rl.kl_in == 'loss'),
       "config.rl.kl_estimator='full' works with config.rl.kl_in='reward' only")
  need(config.model.unfrozen_layers is None or not config.reference,
       f'config.reference={config.reference!r}: with config.model.unfrozen_layers='
       f'{config.model.unfrozen_layers} the reference shares the layers below with the policy; '
       'leave it at None, or set unfrozen_layers to None')
  need((rl.ptx_coef > 0) == bool(ptx.batch_size),
       f'config.rl.ptx_coef={rl.ptx_coef} and config.ptx.batch_size='
       f'{ptx.batch_size}: set both to mix in pretraining, or neither')
  if ptx.batch_size:
    config_lib.validate_data(ptx, 'ptx')
    one_of(config, 'ptx.kind', sft.KINDS)
    divides(rl.minibatches, ptx.batch_size, 'rl.minibatches', 'ptx.batch_size')
    config_lib.divides_over_shards(config, device_count, 'ptx.batch_size', ptx.batch_size)
  need(not (rl.missing_eos == 'subtract' and rl.missing_eos_value < 0),
       "config.rl.missing_eos='subtract' takes missing_eos_value off the score: a negative "
       'one would be a reward for never ending')


def make_sampling(config, tokenizer):
  """Sampling of a config with the tokenizer's EOS and padding.

  Raises:
    UserError: `config.sampling.truncate_at` is not one token.
  """
  c = config.sampling
  single = stops.single_tokens(tokenizer, c.stop) if c.stop and not c.min_new_tokens else {}
  return sampling_lib.Sampling(
      max_new_tokens=c.max_new_tokens, min_new_tokens=c.min_new_tokens, temperature=c.temperature,
      top_k=c.top_k or 0, top_p=c.top_p, eos_id=tokenizer.eos_token_id,
      stop_tokens=tuple(single.values()), pad_id=tokenizer.pad_token_id,
      ignore_eos=config.rl.response == 'raw')


def end_tokens(config, tokenizer):
  """Token ids that end a response, and the position from which on they do.

  Raises:
    UserError: `config.sampling.truncate_at` is not one token.
  """
  text = config.sampling.truncate_at
  if text is None:
    return make_sampling(config, tokenizer).ends, 0
  found = stops.single_tokens(tokenizer, (text,))
  if text not in found:
    raise errors.UserError(
        f'config.sampling.truncate_at={text!r} must be one token of the tokenizer; use '
        'config.sampling.stop for longer strings')
  return (found[text],), config.sampling.truncate_after


def check_length(config, model):
  """Raises UserError where a prompt and its response exceed a model's context."""
  prompt, response = config.data.max_prompt_length, config.sampling.max_new_tokens
  if model.encoder_decoder:
    setup.check_length(prompt, model, 'data.max_prompt_length')
    setup.check_length(response, model, 'sampling.max_new_tokens')
  else:
    setup.check_length(prompt + response, model,
                       'data.max_prompt_length + config.sampling.max_new_tokens')


def validate_critic(config):
  """Checks the keys of `config.critic`.

  Raises:
    UserError: see `validate`.
  """
  need, critic = config_lib.need, config.critic
  config_lib.one_of(config, 'critic.kind', ('separate', 'trunk', 'adapters'))
  need(critic.kind == 'separate' or not critic.path,
       f'config.critic.kind={critic.kind!r} sits on the policy: it cannot start from '
       f"config.critic.path={critic.path!r}; use 'separate' or leave the path at None")
  need(critic.kind != 'adapters' or len(config.model.lora.targets) > 0 or config.model.lora.path,
       "config.critic.kind='adapters' needs config.model.lora.targets, which it has too")


class Wiring(NamedTuple):
  """The models of a run and how they are trained; arrays, or shapes where it is traced.

  Attributes:
    models: forward.Models.
    params: {'policy': trained parameters, 'critic': ... where there is one}.
    frozen: see forward.Forward.
    optimizers: {name of params: optax optimizer}.
  """
  models: forward_lib.Models
  params: dict
  frozen: dict
  optimizers: dict


def wire(config, mesh, base, *, reference=True, critic=None, steps):
  """Puts policy, reference and critic together as a config says.

  Args:
    config: of a run.
    mesh: where parameters go.
    base: (Model, all its parameters) of the policy as it starts.
    reference: all parameters of `config.reference`; True for the policy as it starts; False for no
      reference.
    critic: (Model, params {'backbone', 'head'}) that a separate critic starts from; None for the
      policy's backbone with a new head. Without effect where the config has no critic.
    steps: train steps of the run.

  Returns:
    Wiring.
  """
  model, policy, shared = setup.divide(config, *base, mesh)
  frozen, models, params = {'shared': shared}, forward_lib.Models(model), {'policy': policy}
  if reference is True:
    frozen['reference'] = {} if model.lora is not None else jax.tree.map(jnp.copy, policy)
  elif reference is not False:
    frozen['reference'] = reference
  updates = steps * config.rl.epochs * config.rl.minibatches
  optimizers = {'policy': setup.make_optimizer(config.optim, updates)}
  if 'critic' in config:
    critic_model, params['critic'] = make_critic(config, mesh, model, policy, shared, critic)
    models = models._replace(critic=critic_model, critic_shared=config.critic.kind == 'adapters')
    optimizers['critic'] = setup.make_optimizer(
        config.optim, updates, learning_rate=config.critic.learning_rate, exported=False)
  return Wiring(models, params, frozen, optimizers)


def make_critic(config, mesh, model, trained, shared, start):
  """The critic `config.critic` asks for.

  Args:
    config: of a run.
    mesh: device mesh.
    model: the policy's Model.
    trained: its trained parameters.
    shared: its other parameters.
    start: see `critic` of `wire`.

  Returns:
    Model, or None for a head on the policy's hidden states, and trained params.
  """
  head = lambda: setup.new_head(model, mesh, config.seed, 'zero')
  if config.critic.kind == 'trunk':
    return None, {'head': head()}
  if config.critic.kind == 'adapters':
    adapters = trainable.new_adapters(model, shared, seed=config.seed + 1)
    return model, {'backbone': setup.place(adapters, model, mesh), 'head': head()}
  if start is not None:
    return start[0], jax.tree.map(jnp.copy, start[1])
  policy = jax.tree.map(jnp.copy, trainable.whole(model, trained, shared))
  return dataclasses.replace(model, lora=None), {'backbone': policy, 'head': head()}


def load_reference(config, mesh, model):
  """All parameters of `config.reference`; True where that is None.

  Raises:
    UserError: it is another architecture than the policy, as whose parameters it is used.
  """
  if not config.reference:
    return True
  other, params = hf.load(config.reference, mesh=mesh, **setup.load_settings(config.model))
  theirs, ours = other.config.to_hf(), model.config.to_hf()
  differ = [f'{name} ({theirs.get(name)} and {ours.get(name)})' for name in sorted(theirs | ours)
            if theirs.get(name) != ours.get(name) and not name.endswith('token_id')]
  if differ:
    raise errors.UserError(
        f'config.reference={config.reference!r} differs from the policy in {", ".join(differ)}: '
        'name a model of the same architecture')
  return params


def load_critic(config, tokenizer, mesh, scored):
  """(Model, params) that the critic starts from: `config.critic.path`, or else the reward model."""
  if not config.critic.path:
    return scored
  config_model = config.model.copy_and_resolve_references()
  config_model.path = config.critic.path
  critic, params = setup.load_scalar(config_model, tokenizer, mesh, config.seed, head_scale='zero')
  check_length(config, critic)
  return critic, params


def first_extra(settings):
  """TrainState.extra of an on-policy algorithm: the KL coefficient, and the moments of the scores."""
  return {'kl_coef': jnp.float32(settings.kl_coef), 'reward_moments': jnp.zeros(3)}


def read_prompts(config, tokenizer, model):
  """The prompts of a config: list of formats.Prompt, the iterator over them, and their number.

  Raises:
    UserError: prompts are missing or do not fit the model's context.
  """
  check_length(config, model)
  examples = setup.read_examples(config.data, formats.prompts, tokenizer)
  return examples, *pipelines.prompt_iterator(
      examples, tokenizer, batch_size=config.batch_size // config.sampling.samples,
      max_prompt_length=config.data.max_prompt_length, seed=config.seed,
      on_long=config.data.on_long)


def make_actor(config, tokenizer, model, examples, iterator, score, mesh):
  """The Actor of a config.

  Args:
    config: of a run.
    tokenizer: the policy's.
    model: the policy's Model.
    examples, iterator: see `read_prompts`.
    score: scorer.
    mesh: device mesh.
  """
  sampling = make_sampling(config, tokenizer)
  tokens, after = end_tokens(config, tokenizer)
  truncate = jax.jit(lambda rollout: stops.truncate(
      rollout, tokens=tokens, after=after, pad_id=sampling.pad_id)[0])
  sample = sampler.make(model, sampling, samples=config.sampling.samples,
                        max_concurrent=config.sampling.max_concurrent or 0,
                        gather=config.sampling.gather_weights)
  return actor_lib.Actor(
      examples, iterator, sample, score, mesh, samples=config.sampling.samples,
      cut=actor_lib.stop_at(config.sampling.stop, tokenizer, sampling, mesh),
      read=truncate if config.rl.response == 'raw' else None)


def train_step(objective, state, frozen, rollout, scores, ptx, *, models, optimizers, settings):
  """One iteration after the rollout. To be jitted with `state` donated.

  Args:
    objective: (state, rollout, scores, *, settings) -> update.Objective: all that is an algorithm's own.
    state: TrainState with params and opt_state {'policy': ..., 'critic': ... where there is one}, and
      extra {'kl_coef': scalar, 'reward_moments': [3]}, float32, and the algorithm's own.
    frozen: see forward.Forward.
    rollout: Rollout of B responses, sampled from `state.params['policy']`.
    scores: [B] float32, or [B, R] for rewards per token.
    ptx: LMBatch or Pairs whose examples are shared out over the minibatches, or None.
    models: forward.Models.
    optimizers: {name of params: optax optimizer}.
    settings: Settings.

  Returns:
    The next TrainState and metrics, scalars.
  """
  models = models.reaching(rollout.tokens.shape[1])
  forward = forward_lib.Forward(
      models, frozen, settings.temperature, full_kl=settings.kl_estimator == 'full')
  goal = objective(state, rollout, scores, settings=settings)
  if ptx is not None:
    goal = goal._replace(extra_batch=ptx, extra_gradients=functools.partial(
        sft.ptx_gradients, frozen=frozen['shared'], model=models.policy, coef=settings.ptx_coef))
  return update.run(state, rollout, forward=forward, objective=goal, optimizers=optimizers,
                    schedule=settings.schedule)


def create(config, mesh, settings, train_step, *, reference=True, extra=first_extra):
  """The learner of an on-policy algorithm.

  Args:
    config: of a run.
    mesh: device mesh.
    settings: its class of settings.
    train_step: the function of this name with an objective, or of its arguments without.
    reference: whether there is one.
    extra: settings -> the first TrainState.extra.

  Returns:
    learner.Learner and the first TrainState.

  Raises:
    UserError: data, models and config do not fit together.
  """
  tokenizer = setup.load_tokenizer(config)
  base = setup.load_policy(config.model, tokenizer, mesh, config.seed)
  score, scored = scorers.make(
      config.reward, tokenizer, mesh, load=setup.load_settings(config.model),
      check=functools.partial(check_length, config))
  examples, prompts, count = read_prompts(config, tokenizer, base[0])
  steps = setup.train_steps(config, count * config.sampling.samples)
  models, params, frozen, optimizers = wire(
      config, mesh, base, steps=steps, reference=reference and load_reference(config, mesh, base[0]),
      critic=load_critic(config, tokenizer, mesh, scored) if 'critic' in config else None)
  model, settings = models.policy, settings.of(config, *end_tokens(config, tokenizer))
  actor = make_actor(config, tokenizer, model, examples, prompts, score, mesh)
  state = setup.new_state(
      config.seed, params, optimizers, mesh, model.rules, extra=extra(settings))
  step = setup.jit_step(functools.partial(
      train_step, models=models, optimizers=optimizers, settings=settings), state)
  iterators = {'prompts': prompts}
  if config.ptx.batch_size:
    iterators['ptx'] = sft.ptx_iterator(config, tokenizer, model)

  def next_batch(state, *, timed):
    policy = trainable.join(frozen['shared'], state.params['policy'])
    rollout, scores, metrics = actor(policy, types.step_keys(state)[0], timed=timed)
    ptx = sharding.put_rows(next(iterators['ptx']), mesh) if 'ptx' in iterators else None
    return (frozen, rollout, scores, ptx), metrics

  context = setup.policy_context(
      config, model, tokenizer, mesh, frozen['shared'],
      functools.partial(start_of, config, model, params['policy'], frozen))
  return learner.Learner(
      steps=steps, iterators=iterators, next_batch=next_batch, train_step=step,
      export=setup.policy_exporter(model, tokenizer, frozen['shared']),
      describe=setup.describer(model, 'policy', tokenizer),
      evaluators=evaluators.make(config.evals, context),
      samples=lambda: actor.samples(tokenizer)), state


def start_of(config, model, policy, frozen):
  """The policy's trained parameters before the first step: the reference's where it is the same."""
  if 'reference' in frozen and not config.reference and model.lora is None:
    return frozen['reference']
  return jax.tree.map(jnp.copy, policy)

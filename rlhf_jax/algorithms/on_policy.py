"""The train step and the learner that on-policy algorithms share.

Letters: B batch, R response length.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import experience as experience_lib
from rlhf_jax import forward as forward_lib
from rlhf_jax import learner
from rlhf_jax import losses
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import on_policy_warnings
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms import wiring
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import trainable
from rlhf_jax.rewards import scorers
from rlhf_jax.rollout import actor as actor_lib
from rlhf_jax.rollout import resampling
from rlhf_jax.rollout import sampler
from rlhf_jax.rollout import stops


def train_step(objective, state, frozen, rollout, scores, ptx, *, models, optimizers, settings):
  """Updates the models on one scored rollout. Jit it with `state` donated.

  Args:
    objective: Function (state, rollout, scores, *, settings) -> update.Objective, the only part
      that is specific to an algorithm.
    state: TrainState with params and opt_state {'policy': ..., 'critic': ... if there is one}, and
      extra {'kl_coef': scalar, 'reward_moments': [3]} float32, plus any entries of the algorithm.
    frozen: Parameters that are not trained; see forward.Forward.
    rollout: Rollout of B responses, sampled from `state.params['policy']`.
    scores: [B] float32, or [B, R] for rewards per token.
    ptx: LMBatch or Pairs of pretraining examples, split over the minibatches, or None.
    models: forward.Models.
    optimizers: {name of params: optax optimizer}.
    settings: Settings.

  Returns:
    The next TrainState and metrics: scalars, and [B] arrays named samples/NAME.
  """
  models = models.with_max_length(rollout.tokens.shape[1])
  forward = forward_lib.Forward(
    models, frozen, settings.temperature, full_kl=settings.kl_estimator == 'full'
  )
  goal = objective(state, rollout, scores, settings=settings)
  if settings.importance_cap:
    goal = weigh_by_importance(goal, rollout, cap=settings.importance_cap)
  if ptx is not None:
    goal = goal._replace(
      extra_batch=ptx,
      extra_gradients=functools.partial(
        sft.ptx_gradients, frozen=frozen['policy'], model=models.policy, coef=settings.ptx_coef
      ),
    )
  return update.run(
    state,
    rollout,
    forward=forward,
    objective=goal,
    optimizers=optimizers,
    schedule=settings.schedule,
  )


def objective_of(prepare, loss):
  """Returns the `objective` of `train_step` for an algorithm that is these two functions.

  Args:
    prepare: Function (outputs, fixed, *, state, rollout, scores, settings); see update.Objective.
    loss: Function (outputs, experience, counts, *, settings); see update.Objective.
  """

  def of_rollout(state, rollout, scores, *, settings):
    given = dict(state=state, rollout=rollout, scores=scores, settings=settings)
    return update.Objective(
      functools.partial(prepare, **given),
      rollout.response_mask,
      functools.partial(loss, settings=settings),
    )

  return of_rollout


def kl_penalty(experience, fixed, estimator):
  """Returns the KL of each token [B, R] from the reference, before the update.

  Args:
    experience: Experience with `ref_logprobs`.
    fixed: forward.Fixed.
    estimator: One of advantages.KL_ESTIMATORS.
  """
  if estimator == 'full':
    return fixed.full_kl
  return adv.kl_estimate(experience.unmasked_logprobs, experience.ref_logprobs, estimator)


def total_loss(policy, outputs, experience, counts, normalize, settings):
  """Sums a policy loss, the entropy bonus and the KL penalty of a microbatch.

  Args:
    policy: Policy loss, whether the clip decides it, and importance ratio, each [B, R] float32; see
      losses.clipped_policy_loss.
    outputs: forward.Outputs of the current policy.
    experience: Experience of the microbatch.
    counts: update.Counts of the minibatch.
    normalize: How tokens are weighted; see losses.token_weights.
    settings: on_policy_config.Settings; its `kl_coef` is constant.

  Returns:
    Scalar loss, and metrics that are summed over microbatches.
  """
  mask = experience.response_mask
  weights = losses.token_weights(
    mask,
    counts.tokens,
    counts.sequences,
    normalize=normalize,
    max_length=settings.max_new_tokens,
  )
  mean = lambda x: adv.masked_sum(weights * x, mask)
  by_token = lambda x: adv.masked_sum(x, mask) / counts.tokens
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  policy, clipped, ratio = policy
  total = policy_loss = mean(policy)
  if settings.entropy_coef:  # JAX would differentiate the entropy even if multiplied by 0.
    total -= settings.entropy_coef * mean(outputs.entropy)
  if settings.kl_in == 'loss' and settings.kl_coef:
    total += settings.kl_coef * mean(
      adv.kl_estimate(logprobs, experience.ref_logprobs, settings.kl_estimator)
    )
  return total, {
    'policy/loss': policy_loss,
    'policy/ratio': by_token(ratio),
    'policy/approxkl': 0.5 * by_token(jnp.square(logprobs - experience.logprobs)),
    'policy/clipfrac': by_token(clipped),
    'policy/entropy_per_token': by_token(outputs.entropy),
  }


def weigh_by_importance(goal, rollout, *, cap):
  """Multiplies the policy loss of each token by its truncated importance weight.

  All policy losses here scale with the advantages, even if they are clipped, because the weights
  are positive. So the weights multiply the advantages, after any whitening. As in verl, KL
  penalty, entropy and value loss have no weights.

  Args:
    goal: update.Objective.
    rollout: Rollout, with the log-probabilities of the policy that sampled it.
    cap: See advantages.importance_weights.

  Returns:
    update.Objective.
  """

  def prepare(outputs, fixed):
    experience, extra, metrics = goal.prepare(outputs, fixed)
    mask = experience.response_mask
    sampler_logprobs = jnp.where(mask, rollout.logprobs, experience.logprobs)
    weights = adv.importance_weights(experience.logprobs, sampler_logprobs, cap=cap)
    metrics |= {
      'policy/importance_weight': adv.masked_mean(weights, mask),
      'policy/importance_capped': adv.masked_mean(weights >= cap, mask),
    }
    return experience.replace(importance=weights), extra, metrics

  def loss(outputs, experience, counts):
    weighted = experience.replace(advantages=experience.advantages * experience.importance)
    return goal.loss(outputs, weighted, counts)

  return goal._replace(prepare=prepare, loss=loss)


def read_prompts(config, tokenizer, model):
  """Reads the prompts of a config.

  Returns:
    List of formats.Prompt, the iterator over batches of them, and the number of prompts per epoch.

  Raises:
    UserError: There are no prompts, or they do not fit the model's context.
  """
  on_policy_config.check_length(config, model)
  examples = setup.read_examples(config.data, formats.prompts, tokenizer)
  return examples, *pipelines.prompt_iterator(
    examples,
    tokenizer,
    batch_size=config.batch_size // config.sampling.samples,
    max_prompt_length=config.data.max_prompt_length,
    seed=config.seed,
    on_long=config.data.on_long,
  )


def make_actor(config, tokenizer, model, examples, iterator, score, mesh):
  """Creates the Actor of a run.

  Args:
    config: Config of the run.
    tokenizer: Tokenizer of the policy.
    model: Model of the policy.
    examples: List of formats.Prompt.
    iterator: Iterator over batches of prompts; see `read_prompts`.
    score: Scorer.
    mesh: Device mesh.
  """
  sampling = on_policy_config.make_sampling(config, tokenizer)
  tokens, after = on_policy_config.end_tokens(config, tokenizer)
  truncate = jax.jit(
    lambda rollout: stops.truncate(rollout, tokens=tokens, after=after, pad_id=sampling.pad_id)[0]
  )
  sample = sampler.make(
    model,
    sampling,
    samples=config.sampling.samples,
    max_concurrent=config.sampling.max_concurrent or 0,
    gather=config.sampling.gather_weights,
  )
  return actor_lib.Actor(
    examples,
    iterator,
    sample,
    score,
    mesh,
    samples=config.sampling.samples,
    truncate=actor_lib.stop_at(config.sampling.stop, tokenizer, sampling, mesh),
    for_scoring=truncate if config.rl.response == 'raw' else None,
    as_prompted=functools.partial(
      pipelines.truncate_prompts,
      tokenizer=tokenizer,
      max_prompt_length=config.data.max_prompt_length,
    )
    if config.data.on_long == 'truncate_left'
    else None,
  )


def batch_maker(config, mesh, frozen, actor, iterators, settings):
  """Returns `Learner.next_batch` of an on-policy algorithm: it samples and scores a batch.

  Args:
    config: Config of the run.
    mesh: Device mesh.
    frozen: Parameters that are not trained; see forward.Forward.
    actor: Actor of the run.
    iterators: Learner.iterators; 'ptx', if there is one, gives the pretraining examples.
    settings: on_policy_config.Settings.
  """
  act = actor
  if settings.resampling:
    act = functools.partial(resampling.sample, actor, resampling=settings.resampling)
  skip = jax.jit(functools.partial(experience_lib.skip_nan, rules=settings.rules))

  def next_batch(state, *, timed):
    policy = trainable.merge(frozen['policy'], state.params['policy'])
    if 'masking_policy' in state.extra:
      masking = trainable.merge(frozen['policy'], state.extra['masking_policy'])
      policy = {'policy': policy, 'masking': masking}
    rollout_key = lambda step: types.step_keys(state.replace(step=step))[0]
    next_key = rollout_key(state.step + 1) if config.sampling.staleness else None
    with actor.undone_on_error():
      rollout, scores, metrics = act(
        policy, rollout_key(state.step), timed=timed, next_key=next_key
      )
    if scorers.skips_nan(config.reward):
      rollout, skipped = skip(rollout, scores)
      metrics |= {'objective/skipped': int(processes.to_host(skipped))} if timed else {}
    ptx = sharding.put_rows(next(iterators['ptx']), mesh) if 'ptx' in iterators else None
    return (frozen, rollout, scores, ptx), metrics

  return next_batch


def create(
  config,
  mesh,
  settings,
  train_step,
  *,
  reference=True,
  extra=wiring.first_extra,
  policy_optimizer=None,
  mask=None,
):
  """Creates the learner of an on-policy algorithm.

  Args:
    config: Config of the run.
    mesh: Device mesh.
    settings: Class of the algorithm's settings.
    train_step: Function with the arguments of `train_step` above except `objective`.
    reference: Whether the algorithm uses a reference policy.
    extra: Function from settings to the initial TrainState.extra.
    mask: Function (model, settings, tokenizer) -> masking.MaskedModel to sample with, whose masking
      policy is TrainState.extra['masking_policy'], at first the policy; None for no mask.
    policy_optimizer: Optax optimizer of the policy; None for that of `config.optim`.

  Returns:
    learner.Learner and the initial TrainState.

  Raises:
    UserError: The data, the models and the config do not fit together.
  """
  tokenizer = setup.load_tokenizer(config)
  base = setup.load_policy(config.model, tokenizer, mesh, config.seed)
  score, reward_model = scorers.make(
    config.reward,
    tokenizer,
    mesh,
    load=setup.load_settings(config.model),
    check=functools.partial(on_policy_config.check_length, config),
  )
  examples, prompts, count = read_prompts(config, tokenizer, base[0])
  steps = setup.train_steps(config, count * config.sampling.samples)
  models, params, frozen, optimizers = wiring.wire(
    config,
    mesh,
    base,
    steps=steps,
    reference=reference and wiring.load_reference(config, mesh, base[0]),
    critic=wiring.load_critic(config, tokenizer, mesh, reward_model)
    if 'critic' in config
    else None,
    policy_optimizer=policy_optimizer,
  )
  model = models.policy
  settings = settings.of(config, *on_policy_config.end_tokens(config, tokenizer))
  sampled = mask(model, settings, tokenizer) if mask else model
  actor = make_actor(config, tokenizer, sampled, examples, prompts, score, mesh)
  extra = extra(settings)
  if mask:
    extra |= {'masking_policy': jax.tree.map(jnp.copy, params['policy'])}
  state = setup.new_state(config.seed, params, optimizers, mesh, model.rules, extra=extra)
  step = setup.jit_step(train_step, state, models=models, optimizers=optimizers, settings=settings)
  iterators = {'prompts': prompts}
  if config.ptx.batch_size:
    iterators['ptx'] = sft.ptx_iterator(config, tokenizer, model)
  if config.sampling.staleness:
    iterators[learner.SAMPLED_AHEAD] = actor

  context = setup.policy_context(
    config,
    model,
    tokenizer,
    mesh,
    frozen['policy'],
    params['policy'],
    # A reference that is the initial policy has arrays of its own, so that no copy is needed.
    start=None if config.reference else frozen.get('reference'),
  )
  return learner.Learner(
    steps=steps,
    iterators=iterators,
    next_batch=batch_maker(config, mesh, frozen, actor, iterators, settings),
    train_step=step,
    export=setup.policy_exporter(model, tokenizer, frozen['policy']),
    describe=setup.describer(model, 'policy', tokenizer),
    evaluators=evaluators.make(config.evals, context),
    samples=functools.partial(actor.samples, tokenizer),
    warnings=on_policy_warnings.make(config),
    set_by={'kl_coef': ('rl.kl_coef', 'rl.kl_controller')},
  ), state

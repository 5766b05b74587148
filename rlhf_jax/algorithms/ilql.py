"""Implicit language Q-learning: value functions from rewarded data, which guide the sampler.

See Snell et al. 2022 (https://arxiv.org/abs/2206.11871) and Kostrikov et al. 2021
(https://arxiv.org/abs/2110.06169). Heads V, Q1 and Q2 read hidden states; target heads follow Q1
and Q2. With Q^ the smaller target at the action a, the loss is the mean over actions of

    |tau - 1[Q^ < V]| (Q^ - V)^2                          V, an expectile of Q^
    + sum_i (r + gamma V(s') - Q_i(a))^2                  Q
    + cql_coef sum_i CE(Q_i, a)                           conservatism: other actions have lower Q
    + awac_coef exp(awac_beta (Q^ - V)) CE(logits, a)     policy

where CE(x, a) = logsumexp(x) - x_a. Nothing is sampled while learning. The sampler draws from
log pi + beta (Q^ - V); see rollout/guided.py.

The defaults are those of trlX (https://github.com/CarperAI/trlx). Differences: trlX updates the
targets at the end of an epoch whose last step is a multiple of `steps_for_target_q_sync`, here
every `target_every` steps. LMRL-Gym's heads have a hidden layer of width D, start at a constant,
and sample from the online Qs; ours are trlX's, 2 D wide, and sample from the targets. Sea-Snell's
clip of the sampler's advantages does not exist here.

The loss is in implicit_q.py.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlhf_jax import config as config_lib
from rlhf_jax import implicit_q
from rlhf_jax import keys
from rlhf_jax import learner
from rlhf_jax import sharding
from rlhf_jax import update
from rlhf_jax.algorithms import setup
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import heads
from rlhf_jax.models import q_functions
from rlhf_jax.models import trainable
from rlhf_jax.rewards import labels
from rlhf_jax.rewards import scorers
from rlhf_jax.rollout import guided

_SEPARATE = {'ilql.separate_critic': True, 'ilql.target_backbone': True, 'ilql.standardize': False}
PRESETS = {
  # https://github.com/Sea-Snell/Implicit-Language-Q-Learning, config/wordle/train_iql.yaml. Samples
  # with beta 16; 16 batches of 64 per optimizer step.
  'sea_snell': _SEPARATE
  | {
    'ilql.cql_coef': 1e-4,
    'ilql.awac_mean': 'token',
    'ilql.target_alpha': 0.005,
    'ilql.target_every': 1,
    'optim.learning_rate': 1e-5,
    'optim.b2': 0.999,
    'optim.weight_decay': 0.0,
    'batch_size': 1024,
    'microbatch_size': 64,
  },
  # https://github.com/abdulhaim/LMRL-Gym, llm_rl_scripts/wordle/ilql/train_ilql_gpt2.py. Samples
  # with beta 32 from the initial policy, which is not trained.
  'lmrl_gym': _SEPARATE
  | {
    'ilql.td_coef': 0.5,
    'ilql.cql_coef': 0.01,
    'ilql.awac_coef': 0.0,
    'ilql.target_alpha': 0.005,
    'ilql.target_every': 1,
    'optim.learning_rate': 3e-5,
    'optim.weight_decay': 0.0,
    'batch_size': 32,
  },
}


def config(preset=''):
  """Returns the default config of ILQL, changed by a preset."""
  defaults = config_lib.common('ilql')
  defaults.data.kind = 'episode'
  defaults.evals = config_lib.held_out()
  defaults.batch_size = 128
  defaults.optim.update({'learning_rate': 5e-5, 'b2': 0.95, 'weight_decay': 1e-6})
  defaults.reward = scorers.config()
  defaults.ilql = ml_collections.ConfigDict(
    {
      'gamma': 0.99,  # discount per action, that is, per token of the assistant
      'tau': 0.7,  # expectile of V: 0.5 is the mean of Q, near 1 its maximum over actions
      'td_coef': 1.0,  # weight of the squared errors of V and Q; LMRL-Gym: 0.5
      'cql_coef': 0.1,  # weight of the cross-entropy of each Q head
      'awac_coef': 1.0,  # weight of the policy loss; 0 does not train the policy
      'awac_beta': 0.0,  # the policy loss is weighted by exp(awac_beta (Q - V))
      'awac_mean': 'action',  # divisor of the policy loss: 'action's, or all 'token's (Sea-Snell)
      'target_alpha': 0.001,  # fraction by which the targets move to Q1 and Q2
      'target_every': 5,  # train steps between moves of the targets
      'separate_critic': False,  # V and Q have a backbone of their own, not the policy's
      'target_backbone': False,  # the targets have a backbone, which follows that of Q
      'standardize': True,  # returns get mean 0 and standard deviation 1 over the data set
      'pack': False,  # several episodes per row; batch_size counts rows
    }
  )
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates the keys that are specific to ILQL.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  del device_count
  need, c = config_lib.need, config.ilql
  config_lib.one_of(config, 'data.kind', ('episode',))
  config_lib.one_of(config, 'ilql.awac_mean', ('action', 'token'))
  config_lib.divides(config.microbatch_size, config.batch_size, 'microbatch_size', 'batch_size')
  need(0 <= c.gamma <= 1, f'config.ilql.gamma={c.gamma} must be in [0, 1]')
  need(0 < c.tau < 1, f'config.ilql.tau={c.tau} must be in (0, 1)')
  need(0 < c.target_alpha <= 1, f'config.ilql.target_alpha={c.target_alpha} must be in (0, 1]')
  need(c.target_every > 0, f'config.ilql.target_every={c.target_every} must be positive')
  for key in ('td_coef', 'cql_coef', 'awac_coef', 'awac_beta'):
    need(c[key] >= 0, f'config.ilql.{key}={c[key]} must be 0 or positive')
  need(
    config.optim.ema is None or c.separate_critic,
    f'config.optim.ema={config.optim.ema} must be None: V and Q read the states of the policy, and '
    'would not fit those of its average; or set config.ilql.separate_critic to True',
  )
  if labels.has_source(config.reward):
    scorers.validate(config.reward)
  else:
    defaults = scorers.config()
    others = [name for name in defaults if name not in (*scorers.SOURCES, 'parts')]
    changed = [name for name in others if config.reward[name] != defaults[name]]
    need(
      not changed,
      f'config.reward has keys ({", ".join(changed)}) but no model, function or url: set one of '
      'these to reward the data, or none of the keys to use the rewards of the records',
    )


def train_step(state, frozen, batch, *, model, optimizers, settings, microbatch_size):
  """Takes one optimizer step and moves the targets. Jit it with `state` donated.

  Args:
    state: TrainState with params {'policy', 'critic'} and extra {'target'}; see implicit_q.outputs.
    frozen: Parameters that are not trained, of every backbone.
    batch: Episodes.
    model: Model.
    optimizers: {'policy', 'critic': optax optimizer}.
    settings: implicit_q.Settings.
    microbatch_size: Rows per forward and backward pass; 0 for all.

  Returns:
    The next TrainState and metrics.
  """
  divisors = [jnp.maximum(count, 1) for count in implicit_q.counts(batch)]
  target = state.extra['target']

  def loss_fn(params, rows):
    found = implicit_q.outputs(params, target, frozen, rows, model=model, settings=settings)
    return implicit_q.means(implicit_q.loss_sums(found, rows, settings), *divisors, settings)

  state, metrics = update.step(
    state, loss_fn, batch, optimizers=optimizers, microbatch_size=microbatch_size
  )
  due = state.step % settings.target_every == 0
  rate = jnp.where(due, settings.target_alpha, 0.0)
  target = implicit_q.move_targets(target, state.params, rate)
  metrics |= {'tokens': jnp.sum(batch.mask), 'fill': jnp.mean(batch.segments > 0)}
  return state.replace(extra=state.extra | {'target': target}), metrics


def new_params(config, model, policy, mesh):
  """Returns the trained parameters, with new heads, before the first step.

  Args:
    config: Config of the run.
    model: Model.
    policy: Trained parameters of the policy.
    mesh: Device mesh.
  """
  sizes = dict(zip(implicit_q.HEADS, (1, model.vocab_size, model.vocab_size)))
  random = jax.random.split(keys.for_purpose(config.seed, keys.HEAD), len(sizes))
  critic = {
    name: heads.init_mlp(key, model.width, size) for key, (name, size) in zip(random, sizes.items())
  }
  critic = jax.tree.map(lambda x: x.astype(config.model.param_dtype), critic)
  critic = setup.place(critic, model, mesh)
  if config.ilql.separate_critic:
    critic['backbone'] = jax.tree.map(jnp.copy, policy)
  return {'policy': policy, 'critic': critic}


def q_functions_of(state, merge):
  """Returns the parameters of guided.GuidedModel besides the policy's: the targets.

  Args:
    state: TrainState.
    merge: Function from the trained parameters of a backbone to all of them.
  """
  target, critic = state.extra['target'], state.params['critic']
  found = {name: target[name] for name in ('q1', 'q2')}
  backbone = target.get('backbone', critic.get('backbone'))
  return found if backbone is None else found | {'backbone': merge(backbone)}


def held_out_loss(batches, frozen, *, model, settings, mesh):
  """Returns an evaluator of the loss and its parts on held-out data, with the run's targets.

  Args:
    batches: Result of pipelines.episode_batches.
    frozen: Parameters that are not trained.
    model: Model.
    settings: implicit_q.Settings.
    mesh: Device mesh.

  Returns:
    Function from a TrainState to metrics, or None if there are no batches.
  """

  @jax.jit
  def sums(params, target, frozen, batch):
    found = implicit_q.outputs(params, target, frozen, batch, model=model, settings=settings)
    return implicit_q.loss_sums(found, batch, settings), implicit_q.counts(batch)

  def evaluate(state):
    params = {name: setup.averaged(state, name) for name in state.params}
    parts = [
      jax.device_get(sums(params, state.extra['target'], frozen, sharding.put_rows(batch, mesh)))
      for batch, _ in batches
    ]
    totals, (actions, tokens) = jax.tree.map(lambda *x: np.sum(x), *parts)
    _, metrics = implicit_q.means(totals, max(actions, 1), max(tokens, 1), settings)
    names = {
      'loss': 'loss',
      'v_loss': 'v/loss',
      'q_loss': 'q/loss',
      'cql_loss': 'q/cql_loss',
      'awac_loss': 'policy/awac_loss',
    }
    return {name: float(metrics[key]) for name, key in names.items() if key in metrics}

  return evaluate if batches else None


def read_episodes(config, tokenizer, mesh):
  """Returns training and held-out episodes with rewards, and a reader of other data sets.

  If `config.reward` has a source, it rewards the episodes; see labels.label.
  """
  convert, reward = formats.episodes, lambda examples: examples
  if labels.has_source(config.reward):
    convert = formats.unrewarded_episodes
    reward = functools.partial(
      labels.label,
      config_reward=config.reward,
      tokenizer=tokenizer,
      mesh=mesh,
      batch_size=config.batch_size,
      load=setup.load_settings(config.model),
    )
  read = lambda path: reward(setup.read_examples(config.data, convert, tokenizer, path=path))
  return *map(reward, setup.hold_out(config, convert, tokenizer)), read


def return_moments(examples):
  """Returns mean and standard deviation (n - 1) of the returns of episodes; 1 if that is 0."""
  returns = [sum(example.rewards) for example in examples]
  std = float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0
  return float(np.mean(returns)), std + float(np.finfo(np.float64).eps) if std else 1.0


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'ilql'`.

  Args:
    config: Config of the run.
    mesh: Device mesh.

  Returns:
    learner.Learner and the initial TrainState.

  Raises:
    UserError: The data or the model does not fit the config.
  """
  tokenizer = setup.load_tokenizer(config)
  model, params = setup.load_policy(config.model, tokenizer, mesh, config.seed)
  setup.check_length(config.data.max_length, model, 'data.max_length')
  config_lib.need(
    not (config.ilql.pack and model.encoder_decoder),
    f'config.ilql.pack: an encoder-decoder model ({model.family}) cannot pack episodes; set it to '
    'False',
  )
  model, policy, frozen = setup.split_trainable(config, model, params, mesh)
  settings = setup.settings(implicit_q.Settings, config.ilql)
  examples, held_out, read = read_episodes(config, tokenizer, mesh)
  mean, std = return_moments(examples) if config.ilql.standardize else (0.0, 1.0)
  of_data = pipelines.EpisodeSettings(
    max_length=config.data.max_length,
    pack=config.ilql.pack,
    pairs=model.encoder_decoder,
    mean=mean,
    std=std,
  )
  iterator, rows = pipelines.episode_iterator(
    examples, tokenizer, of_data, batch_size=config.batch_size, seed=config.seed
  )
  steps = setup.train_steps(config, rows)
  params = new_params(config, model, policy, mesh)
  optimizers = {
    # A policy without a loss stays as it is, even with weight decay.
    'policy': setup.make_optimizer(
      config.optim, steps, learning_rate=None if settings.awac_coef else 0.0
    ),
    'critic': setup.make_optimizer(config.optim, steps, exported=False),
  }
  as_float = lambda x: jnp.array(x, jnp.float32, copy=True)
  target = jax.tree.map(as_float, implicit_q.target_of(params, config.ilql.target_backbone))
  extra = {'target': target}
  state = setup.new_state(config.seed, params, optimizers, mesh, model.rules, extra=extra)
  step = setup.jit_step(
    train_step,
    state,
    model=model,
    optimizers=optimizers,
    settings=settings,
    microbatch_size=config.microbatch_size or 0,
  )

  def loss(path):
    batches = pipelines.episode_batches(
      read(path) if path else held_out, tokenizer, of_data, batch_size=config.batch_size
    )
    return held_out_loss(batches, frozen, model=model, settings=settings, mesh=mesh)

  separate = config.ilql.separate_critic or config.ilql.target_backbone
  context = setup.policy_context(
    config,
    model,
    tokenizer,
    mesh,
    frozen,
    policy,
    loss=loss,
    guided_model=lambda beta: guided.GuidedModel(model, beta, separate),
    q_functions=lambda state: q_functions_of(
      state, lambda backbone: trainable.merge(frozen, backbone)
    ),
  )
  files = lambda state: q_functions.files(
    q_functions_of(state, lambda backbone: trainable.merge_lora(model, backbone, frozen))
  )
  return learner.Learner(
    steps=steps,
    iterators={'data': iterator},
    next_batch=lambda state, *, timed: ((frozen, sharding.put_rows(next(iterator), mesh)), {}),
    train_step=step,
    export=setup.policy_exporter(model, tokenizer, frozen, files),
    describe=setup.describer(model, 'policy', tokenizer),
    evaluators=evaluators.make(config.evals, context),
  ), state

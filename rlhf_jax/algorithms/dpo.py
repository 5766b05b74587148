"""Direct preference optimization and its relatives: learning from comparisons without sampling.

`dpo.loss` selects the loss; `losses` has each as a function, with its source:

    'sigmoid'  DPO; conservative DPO with label smoothing; ODPO with margins of the data
    'robust'   DPO on labels of which a known fraction is wrong
    'hinge'    SLiC, normalized by the reference
    'ipo'      identity preference optimization
    'kto'      Kahneman-Tversky optimization, on completions with a label instead of pairs
    'orpo'     odds-ratio preference optimization: an SFT loss and a term of pairs, no reference
    'simpo'    simple preference optimization: mean log-probabilities, no reference

    loss = mean over examples of (the loss above) + sft_coef * (-mean log pi of the chosen tokens)

The log-probabilities of the reference are computed once, before training; see reference_logprobs.

Differences from TRL 1.12: the SFT term is a mean over sequences (Pang et al. 2024, eq. 3,
https://arxiv.org/abs/2404.19733); TRL's is a mean over tokens, and in ORPO over those of the prompt
too. The log-ratios of 'ipo' are divided by lengths only if `dpo.length_normalize` is set, which the
preset does. In KTO each prompt has one completion of another prompt, always the same, so that its
reference log-probability is known; we shuffle the data, where TRL must keep its order.

Letters: B rows of a batch, L lanes, M examples of a row, n positions with a loss.
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections.config_dict import placeholder
import numpy as np

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import learner
from rlhf_jax import losses
from rlhf_jax import optim
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import reference_logprobs
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms import wiring
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import preferences
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import trainable
from rlhf_jax.rewards import calibration

WITHOUT_REFERENCE = ('orpo', 'simpo')
LOSSES = (*losses.DPO_LOSSES, 'kto', *WITHOUT_REFERENCE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Static settings of a train step; see `config` for the keys."""

  loss: str = 'sigmoid'
  beta: float = 0.1
  label_smoothing: float = 0.0
  length_normalize: bool = False
  sft_coef: float = 0.0
  margin_coef: float = 0.0
  gamma: float = 1.0
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0


PRESETS = {
  'cdpo': {'dpo.label_smoothing': 0.1},
  'robust': {'dpo.loss': 'robust', 'dpo.label_smoothing': 0.1},
  'hinge': {'dpo.loss': 'hinge'},
  'ipo': {'dpo.loss': 'ipo', 'dpo.length_normalize': True},
  # Ethayarajh et al. 2024: 2 to 10 times DPO's learning rate.
  'kto': {'dpo.loss': 'kto', 'optim.learning_rate': 5e-6},
  # Hong et al. 2024: lambda 0.1.
  'orpo': {'dpo.loss': 'orpo', 'dpo.sft_coef': 1.0, 'optim.learning_rate': 8e-6},
  # Meng et al. 2024: beta from 2, and gamma about half of it.
  'simpo': {'dpo.loss': 'simpo', 'dpo.beta': 2.0, 'dpo.gamma': 1.0},
  # Pang et al. 2024, iterative reasoning preference optimization: alpha 1.
  'rpo': {'dpo.sft_coef': 1.0},
  # Lambert et al. 2024, Tulu 3 (https://arxiv.org/abs/2411.15124).
  'tulu3': {'dpo.length_normalize': True, 'dpo.beta': 5.0, 'optim.learning_rate': 5e-7},
}


def config(preset=''):
  """Returns the default config of preference optimization, changed by a preset."""
  defaults = config_lib.common('dpo')
  defaults.data.kind = 'comparison'
  defaults.evals = config_lib.held_out()
  defaults.optim.learning_rate = 1e-6
  defaults.reference = placeholder(str)  # folder of the reference; None: the initial policy
  defaults.dpo = ml_collections.ConfigDict(
    {
      'loss': 'sigmoid',  # 'sigmoid' (DPO), 'robust', 'hinge', 'ipo', 'kto', 'orpo' or 'simpo'
      'beta': 0.1,  # strength of the KL penalty; scale of simpo's rewards, weight of orpo's term
      'label_smoothing': 0.0,  # probability that a label is wrong (sigmoid, robust, simpo)
      'length_normalize': False,  # divide log-ratios by the length of the completion
      'sft_coef': 0.0,  # weight of -log p of the chosen completions, a mean over tokens
      'margin_coef': 0.0,  # weight of the margins of the data (sigmoid)
      'gamma': 1.0,  # margin of the rewards (simpo)
      'desirable_weight': 1.0,  # weight of desirable completions (kto)
      'undesirable_weight': 1.0,  # weight of undesirable completions (kto)
      'pack': False,  # several examples per row; batch_size counts rows
      'reference_logprobs': placeholder(str),  # folder to keep them in; None: that of the run
    }
  )
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates the keys that are specific to preference optimization.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  del device_count
  need, dpo = config_lib.need, config.dpo
  config_lib.one_of(config, 'data.kind', ('comparison',))
  config_lib.one_of(config, 'dpo.loss', LOSSES)
  config_lib.divides(config.microbatch_size, config.batch_size, 'microbatch_size', 'batch_size')
  need(dpo.beta > 0, f'config.dpo.beta={dpo.beta} must be positive')
  need(
    0 <= dpo.label_smoothing < 0.5,
    f'config.dpo.label_smoothing={dpo.label_smoothing} must be in [0, 0.5)',
  )
  for key in ('sft_coef', 'margin_coef', 'gamma', 'desirable_weight', 'undesirable_weight'):
    need(dpo[key] >= 0, f'config.dpo.{key}={dpo[key]} must be 0 or positive')
  need(
    dpo.loss != 'orpo' or dpo.sft_coef > 0,
    "config.dpo.loss='orpo' is a term beside an SFT loss: set config.dpo.sft_coef to 1.0, or use "
    'the preset orpo',
  )
  need(
    config.model.unfrozen_layers is None or not config.reference,
    f'config.reference={config.reference!r}: with config.model.unfrozen_layers='
    f'{config.model.unfrozen_layers} the reference is the initial policy; set either to None',
  )


def completion_logprobs(params, frozen, batch, *, model):
  """Sums the log-probabilities of the tokens of each completion.

  Args:
    params: Trained parameters of `model`.
    frozen: Parameters of `model` that are not trained.
    batch: Preferences with L lanes.
    model: Model.

  Returns:
    Log-probabilities [B, L, M] in nats and numbers of tokens [B, L, M], at least 1, both float32.
  """
  flat = jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), batch.sequences)
  nll, mask = sft.token_losses(params, frozen, flat, model=model)
  segments = 1 if isinstance(flat, types.Pairs) else flat.segments[:, 1:]
  width = batch.present.shape[1]
  numbers = jnp.arange(1, width + 1)[None, None, :]
  own = jnp.where(mask, segments, 0)[:, :, None] == numbers  # [B L, n, M]
  logprobs = -jnp.sum(jnp.where(own, nll[:, :, None], 0.0), axis=1)
  lengths = jnp.maximum(jnp.sum(own, axis=1), 1).astype(jnp.float32)
  shape = (len(batch.present), -1, width)
  return logprobs.reshape(shape), lengths.reshape(shape)


def compared_values(logprobs, lengths, batch, settings):
  """Returns what the loss compares: log-ratios to the reference, or mean log-probabilities.

  Args:
    logprobs, lengths: [B, L, M] results of `completion_logprobs`.
    batch: Preferences.
    settings: Settings.

  Returns:
    [B, L, M] float32. Times beta these are the implicit rewards.
  """
  if settings.loss in WITHOUT_REFERENCE:
    return logprobs / lengths
  ratios = logprobs - batch.ref_logprobs
  by_length = settings.length_normalize and settings.loss != 'kto'
  return ratios / lengths if by_length else ratios


def example_losses(values, batch, settings, kl):
  """Computes the loss of each example, without the SFT term.

  Args:
    values: [B, L, M] results of `compared_values`.
    batch: Preferences.
    settings: Settings.
    kl: Reference point of KTO, a scalar; None for other losses.

  Returns:
    [B, M] float32.
  """
  flat, beta = lambda x: x.reshape(-1), settings.beta
  first = flat(values[:, 0])
  if settings.loss == 'kto':
    desirable = flat(batch.desirable)
    weights = jnp.where(desirable, settings.desirable_weight, settings.undesirable_weight)
    loss = weights * losses.kto_loss(first, desirable, kl, beta=beta)
  elif settings.loss == 'orpo':
    loss = losses.orpo_loss(first, flat(values[:, 1]), beta=beta)
  elif settings.loss == 'simpo':
    loss = losses.simpo_loss(
      first,
      flat(values[:, 1]),
      beta=beta,
      gamma=settings.gamma,
      label_smoothing=settings.label_smoothing,
    )
  else:
    loss = losses.reference_loss(
      first - flat(values[:, 1]),
      kind=settings.loss,
      beta=beta,
      label_smoothing=settings.label_smoothing,
      offset=settings.margin_coef * flat(batch.margin),
    )
  return loss.reshape(batch.present.shape)


def lane(batch, number):
  """Returns Preferences with one of the two lanes."""
  one = lambda x: x[:, number : number + 1]
  return batch.replace(
    sequences=jax.tree.map(one, batch.sequences), ref_logprobs=one(batch.ref_logprobs)
  )


def groups(batch, settings):
  """Returns which completions [B, L, M] are chosen or desirable, and which are not."""
  present = batch.present
  if settings.loss == 'kto':
    return (present & batch.desirable)[:, None], (present & ~batch.desirable)[:, None]
  none = jnp.zeros_like(present)
  return jnp.stack([present, none], axis=1), jnp.stack([none, present], axis=1)


def train_step(state, frozen, batch, *, model, optimizers, settings, microbatch_size):
  """Takes one optimizer step. Jit it with `state` donated.

  Args:
    state: TrainState with params {'policy': ...}.
    frozen: Parameters of the policy that are not trained.
    batch: Preferences.
    model: Model.
    optimizers: {'policy': optax optimizer}.
    settings: Settings.
    microbatch_size: Rows per forward and backward pass; 0 for all.

  Returns:
    The next TrainState and metrics.
  """
  count = jnp.maximum(jnp.sum(batch.present), 1)
  chosen, rejected = (jnp.maximum(jnp.sum(mask), 1) for mask in groups(batch, settings))
  forward = functools.partial(completion_logprobs, model=model)
  trained, kl = batch, None
  if settings.loss == 'kto':
    trained, mismatched = lane(batch, 0), lane(batch, 1)

    def mean_log_ratio(params, rows):
      logprobs, _ = forward(params['policy'], frozen, rows)
      return adv.masked_sum((logprobs - rows.ref_logprobs)[:, 0], rows.present) / count, {}

    kl, _ = optim.accumulate(mean_log_ratio, state.params, mismatched, microbatch_size)
    kl = jnp.maximum(kl, 0.0)

  def loss_fn(params, rows):
    logprobs, lengths = forward(params['policy'], frozen, rows)
    values = compared_values(logprobs, lengths, rows, settings)
    loss = adv.masked_sum(example_losses(values, rows, settings, kl), rows.present) / count
    metrics = {}
    if settings.sft_coef and settings.loss != 'kto':
      nll = -logprobs[:, 0] / lengths[:, 0]
      metrics['sft/loss'] = adv.masked_sum(nll, rows.present) / count
      loss += settings.sft_coef * metrics['sft/loss']
    up, down = groups(rows, settings)
    rewards = settings.beta * values
    metrics |= {
      'loss': loss,
      'rewards/chosen': adv.masked_sum(rewards, up) / chosen,
      'rewards/rejected': adv.masked_sum(rewards, down) / rejected,
      'logps/chosen': adv.masked_sum(logprobs, up) / chosen,
      'logps/rejected': adv.masked_sum(logprobs, down) / rejected,
    }
    if settings.loss != 'kto':
      right = values[:, 0] > values[:, 1]
      metrics['rewards/accuracies'] = jnp.sum(right & rows.present) / count
    return loss, metrics

  state, metrics = update.step(
    state, loss_fn, trained, optimizers=optimizers, microbatch_size=microbatch_size
  )
  metrics['rewards/margins'] = metrics['rewards/chosen'] - metrics['rewards/rejected']
  if kl is not None:
    metrics['kto/kl'] = kl
  is_pairs = isinstance(batch.sequences, types.Pairs)
  real = batch.sequences.mask if is_pairs else batch.sequences.segments > 0
  return state, metrics | {'tokens': jnp.sum(real), 'fill': jnp.mean(real)}


def held_out_loss(batches, frozen, *, outputs, settings, mesh, prompts):
  """Returns an evaluator of the loss on held-out data, and of the accuracy and margin of rewards.

  Args:
    batches: Function that returns an iterable of Preferences.
    frozen: Parameters of the policy that are not trained.
    outputs: Jitted `completion_logprobs`.
    settings: Settings.
    mesh: Device mesh.
    prompts: Texts of the prompts of all examples.

  Returns:
    Function from a TrainState to metrics.
  """

  def evaluate(state):
    params, parts = setup.averaged(state, 'policy'), []
    for batch in batches():
      found = jax.tree.map(
        processes.to_host, outputs(params, frozen, sharding.put_rows(batch, mesh))
      )
      parts.append((*found, batch.replace(sequences=None)))
    logprobs, lengths, batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    present = batch.present
    values = compared_values(jnp.asarray(logprobs), jnp.asarray(lengths), batch, settings)
    kl = np.maximum(values[:, 1][present].mean(), 0.0) if settings.loss == 'kto' else None
    loss = example_losses(values, jax.tree.map(jnp.asarray, batch), settings, kl)
    metrics = {'loss': float(loss[present].mean())}
    if settings.sft_coef and settings.loss != 'kto':
      nll = (-logprobs / lengths)[:, 0][present]
      metrics['loss'] += settings.sft_coef * float(nll.mean())
    rewards = settings.beta * np.asarray(values)
    if settings.loss == 'kto':
      up, down = (rewards[:, 0][present & (batch.desirable == label)] for label in (True, False))
      margin = {'margin': float(up.mean() - down.mean())} if len(up) and len(down) else {}
      return metrics | margin | {'kto_kl': float(kl), 'completions': int(present.sum())}
    chosen, rejected = rewards[:, 0][present], rewards[:, 1][present]
    texts = [prompts[number] for number in batch.index[present]]
    result = calibration.pairwise(chosen, rejected, prompts=texts)
    names = ('accuracy', 'accuracy_low', 'accuracy_high', 'ties', 'margin')
    return metrics | {name: getattr(result, name) for name in names} | {'pairs': result.count}

  return evaluate


def make_reference(config, mesh, model, params, frozen):
  """Returns the ReferenceLogprobs of a run, or None for a loss without a reference.

  Args:
    config: Config of the run.
    mesh: Device mesh.
    model: Model of the policy.
    params: Its trained parameters, before the first step.
    frozen: Its parameters that are not trained.
  """
  if config.dpo.loss in WITHOUT_REFERENCE:
    return None
  tree = wiring.load_reference(config, mesh, model)
  if tree is True:
    # New adapters have no effect yet, so the frozen weights alone are the initial policy.
    new = model.lora is not None and not config.model.lora.path
    tree = frozen if new else trainable.merge(frozen, params)
  lora = model.lora if trainable.has_adapters(tree) else None
  model = dataclasses.replace(model, lora=lora)
  return reference_logprobs.ReferenceLogprobs(
    logprobs=jax.jit(lambda tree, batch: completion_logprobs(tree, {}, batch, model=model)[0]),
    params=tree,
    model={
      'dtype': model.dtype,
      'config': model.config.to_hf(),
      'lora': lora and dataclasses.asdict(lora),
    },
    batch_size=config.batch_size,
    mesh=mesh,
    folder=config.dpo.reference_logprobs,
  )


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'dpo'`.

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
    not (config.dpo.pack and model.encoder_decoder),
    f'config.dpo.pack: an encoder-decoder model ({model.family}) cannot pack examples; set it to '
    'False',
  )
  model, params, frozen = setup.split_trainable(config, model, params, mesh)
  settings = setup.settings(Settings, config.dpo)
  reference = make_reference(config, mesh, model, params, frozen)

  def rows(name, comparisons):
    """Returns the rows of a data set, whose log-probabilities the reference will know by name."""
    make = preferences.pairs
    if settings.loss == 'kto':
      make = functools.partial(preferences.labelled, both=name == 'train')
    arranged = preferences.arrange(
      make(comparisons),
      tokenizer,
      max_length=config.data.max_length,
      pack=config.dpo.pack,
      encoder_decoder=model.encoder_decoder,
    )
    if reference:
      reference.rows[name] = arranged
    return arranged

  with_reference = lambda name, batch: reference.look_up(name, batch) if reference else batch
  examples, held_out = setup.hold_out(config, formats.comparisons, tokenizer)
  iterator, count = pipelines.preference_iterator(
    rows('train', examples), batch_size=config.batch_size, seed=config.seed
  )
  steps = setup.train_steps(config, count)
  optimizers = {'policy': setup.make_optimizer(config.optim, steps)}
  state = setup.new_state(config.seed, {'policy': params}, optimizers, mesh, model.rules)
  step = setup.jit_step(
    train_step,
    state,
    model=model,
    optimizers=optimizers,
    settings=settings,
    microbatch_size=config.microbatch_size or 0,
  )

  def next_batch(state, *, timed):
    del state, timed
    return (frozen, sharding.put_rows(with_reference('train', next(iterator)), mesh)), {}

  def loss(path):
    chosen, name = held_out, 'held_out'
    if path:
      chosen = setup.read_examples(config.data, formats.comparisons, tokenizer, path=path)
      name = hashlib.sha256(path.encode()).hexdigest()[:16]
    if not chosen:
      return None
    arranged = rows(name, chosen)
    batches = pipelines.preference_batches(arranged, batch_size=config.batch_size)
    return held_out_loss(
      lambda: (with_reference(name, batch) for batch, _ in batches),
      frozen,
      outputs=jax.jit(functools.partial(completion_logprobs, model=model)),
      settings=settings,
      mesh=mesh,
      prompts=[example.prompt for example in arranged.data.examples],
    )

  context = setup.policy_context(config, model, tokenizer, mesh, frozen, params, loss=loss)
  return learner.Learner(
    steps=steps,
    iterators={'data': iterator},
    next_batch=next_batch,
    train_step=step,
    export=setup.policy_exporter(model, tokenizer, frozen),
    describe=setup.describer(model, 'policy', tokenizer),
    evaluators=evaluators.make(config.evals, context),
    prepare=reference.prepare if reference else lambda workdir: None,
  ), state

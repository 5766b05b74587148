"""Reward models, which map text to a scalar, from comparisons, rankings, picks or ratings.

One forward pass scores all completions of a prompt, so all C(K, 2) pairs of a ranking are one
batch element: Ouyang et al. 2022, eq. 1 (https://arxiv.org/abs/2203.02155). The score is read at
the last token that is not padding. A tie counts as wrong: a constant scorer has accuracy 0.

The loss, in training and held out, is the mean over the prompts that have a loss. A prompt whose
completions all tie has none: it affects neither the mean nor the gradients.

With `preference.heads` above 1 the model is an ensemble of heads on one backbone, each with its own
initial weights and, with `preference.head_fraction` below 1, its own random part of the data: the
bootstrapped heads of Osband et al. 2016 (https://arxiv.org/abs/1602.04621). The loss is the mean
over heads of each head's mean loss. Accuracy and margin are those of the mean score.

With `preference.reliability` the records' annotators get a temperature each; see reliability.py.
The reliabilities weigh what is learned. They are not part of the model and change no score.

Letters: B prompts, K completions of one prompt, T sequence length, M heads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections.config_dict import placeholder
import numpy as np

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import errors
from rlhf_jax import learner
from rlhf_jax import losses
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import reliability
from rlhf_jax.algorithms import setup
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import trainable
from rlhf_jax.rewards import calibration
from rlhf_jax.rewards import padding
from rlhf_jax.rewards import scoring


def config(preset=''):
  """Returns the default config of reward models, which have no presets."""
  defaults = config_lib.common('reward_model')
  defaults.data.kind = 'comparison'
  defaults.evals = config_lib.held_out()
  defaults.preference = ml_collections.ConfigDict(
    {
      'loss': 'pairwise',  # 'pairwise' (also for rankings), 'pick_best' or 'rating'
      'centering': 0.0,  # weight of (r_a + r_b)^2; 0.01 recommended
      'label_smoothing': 0.0,  # probability that a label is wrong
      'token_dropout': 0.0,  # fraction of tokens masked in each training example
      'heads': 1,  # scalar heads on one backbone: an ensemble, which reward.ensemble combines
      'head_fraction': 1.0,  # fraction of the prompts that each of several heads learns from
      'reliability': False,  # learn how reliable each annotator of the data is
      'reliability_learning_rate': 0.1,  # of the annotators' reliabilities
      'append_eos': True,  # end completions with an EOS; False for PPO with sampling.truncate_at
      'normalize': 'none',  # 'gain_bias': scores of mean 0 and std 1; 'bias': of mean 0; or 'none'
      'normalize_path': placeholder(str),  # completions to normalize scores on; None: training data
    }
  )
  return config_lib.apply_preset(defaults, {}, preset)


def validate(config, device_count):
  """Validates the keys that are specific to reward models.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  del device_count
  config_lib.one_of(config, 'data.kind', ('comparison',))
  config_lib.refuse_evals(
    config.evals, ('prompts', 'win_rate', 'text'), "an algorithm that trains a policy: use 'loss'"
  )
  config_lib.divides(config.microbatch_size, config.batch_size, 'microbatch_size', 'batch_size')
  config_lib.one_of(config, 'preference.loss', ('pairwise', 'pick_best', 'rating'))
  config_lib.one_of(config, 'preference.normalize', ('none', 'gain_bias', 'bias'))
  preference = config.preference
  for key in ('token_dropout', 'label_smoothing'):
    config_lib.need(
      0 <= preference[key] < 1, f'config.preference.{key}={preference[key]} must be in [0, 1)'
    )
  config_lib.need(
    preference.centering >= 0,
    f'config.preference.centering={preference.centering} must be 0 or positive',
  )
  config_lib.need(
    preference.heads > 0, f'config.preference.heads={preference.heads} must be at least 1'
  )
  config_lib.need(
    0 < preference.head_fraction <= 1 and (preference.heads > 1 or preference.head_fraction == 1),
    f'config.preference.head_fraction={preference.head_fraction} must be in (0, 1], and 1 with a '
    'single head',
  )
  config_lib.need(
    not (preference.reliability and preference.loss == 'rating'),
    "config.preference.reliability needs comparisons, but config.preference.loss='rating' learns "
    "ratings: use 'pairwise' or 'pick_best', or set it to False",
  )
  config_lib.need(
    preference.reliability_learning_rate > 0,
    f'config.preference.reliability_learning_rate={preference.reliability_learning_rate} must be '
    'positive',
  )


@dataclasses.dataclass(frozen=True)
class Settings:
  """Static settings of a reward-model train step; see `config` for the keys."""

  loss: str
  centering: float
  label_smoothing: float
  token_dropout: float
  head_fraction: float = 1.0
  examples: int = 1  # of the training data; the prior of the reliabilities counts once among them


def comparison_loss(params, batch, *, model, settings, reliability=None):
  """Returns each prompt's loss [B], whether it has one [B] bool, and the scores [B, K].

  With several heads the arrays have a last axis of M. For `reliability` see losses.pairwise_loss.
  """
  scores = scoring.comparison_scores(params, batch, model=model)
  return *loss_of_scores(scores, batch, settings, reliability), scores


def loss_of_scores(scores, batch, settings, reliability=None):
  """Returns each prompt's loss [B] for scores [B, K], and whether it has one [B] bool.

  For scores [B, K, M] of several heads, both are [B, M].
  """
  if scores.ndim == 3:
    of_head = lambda scores: loss_of_scores(scores, batch, settings, reliability)
    return jax.vmap(of_head, in_axes=2, out_axes=1)(scores)
  if settings.loss == 'pairwise':
    return losses.pairwise_loss(
      scores,
      batch.ranks,
      batch.present,
      batch.margin,
      centering=settings.centering,
      label_smoothing=settings.label_smoothing,
      reliability=reliability,
    )
  if settings.loss == 'pick_best':
    return losses.pick_best_loss(scores, batch.ranks, batch.present, reliability=reliability)
  return losses.rating_loss(scores, batch.ratings, batch.present)


def drop_tokens(key, mask, rate):
  """Removes a random fraction `rate` of the tokens from the mask [B, K, T].

  This is word dropout (Iyyer et al. 2015, https://aclanthology.org/P15-1162), against overfitting
  on small data. The first and last token of a sequence stay, so that it still begins with the BOS
  and its score is read at the end.
  """
  kept = jax.random.bernoulli(key, 1.0 - rate, mask.shape)
  position = jnp.cumsum(mask, axis=-1)
  ends = (position == 1) | (position == position[..., -1:])
  return mask & (kept | ends)


def head_subsets(key, tokens, count, fraction):
  """Chooses the heads that learn from each prompt: the same ones each time it occurs.

  Args:
    key: Random key of the run.
    tokens: [B, K, T] completions, whose tokens identify the prompt.
    count: M.
    fraction: Probability of each head.

  Returns:
    [B, M] bool.
  """
  words = tokens.reshape(len(tokens), -1).astype(jnp.uint32)
  factors = jnp.broadcast_to(jax.random.bits(key, words.shape[1:]), words.shape)
  keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.sum(words * factors, axis=1))
  return jax.vmap(lambda key: jax.random.bernoulli(key, fraction, (count,)))(keys)


def mean_over_heads(scores):
  """Returns the mean scores [B, K] of heads [B, K, M]; scores [B, K] of one head are returned."""
  return jnp.mean(scores, axis=2) if scores.ndim == 3 else scores


def pair_sums(scores, batch):
  """Counts correct, tied and all pairs of a batch, and sums their gaps r_better - r_worse."""
  better = (
    (batch.ranks[:, :, None] < batch.ranks[:, None, :])
    & batch.present[:, :, None]
    & batch.present[:, None, :]
  )
  gap = scores[:, :, None] - scores[:, None, :]
  count = lambda x: jnp.sum(x & better)
  return {
    'correct': count(gap > 0),
    'tied': count(gap == 0),
    'pairs': jnp.sum(better),
    'gap': adv.masked_sum(gap, better),
  }


def train_step(state, frozen, batch, *, model, optimizers, settings, microbatch_size):
  """Takes one optimizer step. Jit it with `state` donated.

  Args:
    state: TrainState with params {'reward': {'backbone', 'head'}}, and 'annotators' if their
      reliability is learned.
    frozen: {'backbone': parameters that are not trained}.
    batch: Comparisons.
    model: Model.
    optimizers: {name of parameters: optax optimizer}.
    settings: Settings.
    microbatch_size: Prompts per forward and backward pass; 0 for all.

  Returns:
    The next TrainState and metrics.
  """
  several = state.params['reward']['head']['bias'].shape  # () or (M,)

  def learners(rows, valid):
    if settings.head_fraction == 1:
      return valid
    return valid & head_subsets(state.key, rows.tokens, *several, settings.head_fraction)

  _, counted = loss_of_scores(jnp.zeros(batch.present.shape + several), batch, settings)
  prompts = jnp.maximum(jnp.sum(learners(batch, counted), axis=0), 1)
  if settings.token_dropout:
    batch = batch.replace(
      mask=drop_tokens(types.step_keys(state)[1], batch.mask, settings.token_dropout)
    )

  def loss_fn(params, rows):
    weights = reliability.of_batch(params, rows)
    loss, valid, scores = comparison_loss(
      trainable.merge(frozen, params['reward']),
      rows,
      model=model,
      settings=settings,
      reliability=weights,
    )
    learned = learners(rows, valid)
    loss = jnp.mean(jnp.sum(jnp.where(learned, loss, 0.0), axis=0) / prompts)
    mean = mean_over_heads(scores)
    sums = {
      'loss': loss,
      **pair_sums(mean, rows),
      'scores': adv.masked_sum(mean, rows.present),
    }
    if several:
      sums['spread'] = adv.masked_sum(jnp.std(scores, axis=2), rows.present)
    if weights is not None:
      part = jnp.mean(jnp.sum(learned, axis=0) / prompts)
      loss += part * reliability.penalty(params) / settings.examples
    return loss, sums

  state, metrics = update.step(
    state, loss_fn, batch, optimizers=optimizers, microbatch_size=microbatch_size
  )
  keys = 'correct', 'tied', 'pairs', 'gap', 'scores'
  correct, tied, pairs, gap, scores = map(metrics.pop, keys)
  pairs, present = jnp.maximum(pairs, 1), jnp.maximum(jnp.sum(batch.present), 1)
  if several:
    metrics['scores/std_of_heads'] = metrics.pop('spread') / present
  metrics |= reliability.metrics(state.params)
  return state, metrics | {
    'accuracy': correct / pairs,
    'ties': tied / pairs,
    'margin': gap / pairs,
    'scores/mean': scores / present,
    'tokens': jnp.sum(batch.mask & batch.present[:, :, None]),
  }


def normalize(head, scores, mode):
  """Changes a head so that its scores have mean 0 and, with 'gain_bias', standard deviation 1.

  Ziegler et al. 2019 §2.2 fit gain and bias on samples of the reference policy; Ouyang et al. 2022
  §3.5 fit a bias on demonstrations. Both can be folded into the head.

  Args:
    head: {'kernel', 'bias'}.
    scores: [n] scores by this head of the texts to fit on, [n, M] by several heads, each of which
      is normalized by itself.
    mode: 'gain_bias' or 'bias'.

  Returns:
    The normalized head, of the same shapes.
  """
  std, mean = np.float64(np.std(scores, axis=0)), np.float64(np.mean(scores, axis=0))
  gain = 1.0 / np.maximum(std, 1e-6) if mode == 'gain_bias' else np.ones_like(std)
  kernel, bias = head['kernel'], head['bias']
  gains = jnp.broadcast_to(jnp.asarray(gain, kernel.dtype), kernel.shape)
  shift = jnp.asarray(mean, bias.dtype)
  return {'kernel': kernel * gains, 'bias': (bias - shift) * jnp.asarray(gain, bias.dtype)}


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'reward_model'`.

  Args:
    config: Config of the run.
    mesh: Device mesh.

  Returns:
    learner.Learner and the initial TrainState.

  Raises:
    UserError: The data or the model does not fit the config.
  """
  tokenizer = setup.load_tokenizer(config)
  model, params = setup.load_scalar(
    config.model,
    tokenizer,
    mesh,
    config.seed,
    head_scale='normal',
    head_count=config.preference.heads,
  )
  check_heads(params['head'], config)
  setup.check_length(config.data.max_length, model, 'data.max_length')
  model, backbone, frozen_backbone = setup.split_trainable(config, model, params['backbone'], mesh)
  params, frozen = {'backbone': backbone, 'head': params['head']}, {'backbone': frozen_backbone}
  examples, held_out = setup.hold_out(config, formats.comparisons, tokenizer)
  check_examples(examples, config.preference.loss)
  sizes = dict(
    batch_size=config.batch_size,
    max_length=config.data.max_length,
    append_eos=config.preference.append_eos,
  )
  panel = reliability.find(examples) if config.preference.reliability else None
  iterator, rows = pipelines.comparison_iterator(
    examples, tokenizer, seed=config.seed, annotators=panel and panel.names, **sizes
  )
  steps = setup.train_steps(config, rows)
  settings = setup.settings(Settings, config.preference, examples=rows)
  loss_fn = jax.jit(functools.partial(comparison_loss, model=model, settings=settings))

  def losses_of(params, batches):
    """Yields each batch with what `comparison_loss` returns for it, on the host."""
    params = trainable.merge(frozen, params)
    for batch in batches:
      yield batch, jax.tree.map(processes.to_host, loss_fn(params, sharding.put_rows(batch, mesh)))

  def fitted_head(params):
    if config.preference.normalize == 'none':
      return params['head']
    batches = normalization_batches(config, examples, tokenizer, sizes)
    scores = [scores[batch.present] for batch, (*_, scores) in losses_of(params, batches)]
    return normalize(params['head'], np.concatenate(scores), config.preference.normalize)

  params['head'] = fitted_head(params)
  params, optimizers = {'reward': params}, {'reward': setup.make_optimizer(config.optim, steps)}
  if panel:
    params['annotators'] = reliability.initial(panel, mesh)
    optimizers['annotators'] = setup.make_optimizer(
      config.optim,
      steps,
      learning_rate=config.preference.reliability_learning_rate,
      exported=False,
    )
  rules = reliability.RULES + tuple(model.rules)
  state = setup.new_state(config.seed, params, optimizers, mesh, rules)
  step = setup.jit_step(
    train_step,
    state,
    model=model,
    optimizers=optimizers,
    settings=settings,
    microbatch_size=config.microbatch_size or 0,
  )

  def loss(path):
    chosen = held_out
    if path:
      chosen = setup.read_examples(config.data, formats.comparisons, tokenizer, path=path)
    check_ratings(chosen, settings.loss)
    batches = [batch for batch, _ in pipelines.comparison_batches(chosen, tokenizer, **sizes)]
    prompts = [example.prompt for example in chosen]
    return held_out_loss(batches, prompts, losses_of, rated=settings.loss == 'rating')

  def export(state, path):
    params = setup.averaged(state, 'reward')
    exported, merged, exported_tokenizer = padding.with_pad_token(
      dataclasses.replace(model, lora=None),
      trainable.merge_lora(model, params['backbone'], frozen_backbone),
      tokenizer,
      mesh,
    )
    head = fitted_head(params)
    if panel:  # first, because a run that has a model is finished
      panel.write(path.parent, processes.to_host(reliability.of_all(state.params)))
    hf.save(path, exported, merged, tokenizer=exported_tokenizer, head=head)

  def describe(workdir):
    setup.describer(model, 'reward', tokenizer)(workdir)
    if panel:
      panel.write(workdir)

  context = evaluators.Context(
    model=model,
    tokenizer=tokenizer,
    mesh=mesh,
    seed=config.seed,
    loss=loss,
    load=setup.load_settings(config.model),
  )
  return learner.Learner(
    steps=steps,
    iterators={'data': iterator},
    next_batch=lambda state, *, timed: ((frozen, sharding.put_rows(next(iterator), mesh)), {}),
    train_step=step,
    export=export,
    describe=describe,
    prepare=panel.check if panel else lambda workdir: None,
    check_fork=functools.partial(reliability.check_fork, panel),
    evaluators=evaluators.make(config.evals, context),
  ), state


def check_heads(head, config):
  """Raises UserError if the initial reward model has another number of heads than the config."""
  count = heads.count(head)
  if count != config.preference.heads:
    raise errors.UserError(
      f'config.preference.heads={config.preference.heads}, but the reward model '
      f'{config.model.path} has {count}: train both with the same number of heads'
    )


def check_examples(examples, loss):
  """Raises UserError if the loss cannot learn anything from the data."""
  check_ratings(examples, loss)
  if loss != 'rating' and all(len(set(example.ranks)) < 2 for example in examples):
    raise errors.UserError(
      f'config.preference.loss={loss!r} needs prompts with better and worse completions, but the '
      "data have none; if each completion has a rating, use 'rating'"
    )


def check_ratings(examples, loss):
  """Raises UserError if the loss is 'rating' and an example has no ratings."""
  if loss == 'rating' and any(example.ratings is None for example in examples):
    raise errors.UserError(
      "config.preference.loss='rating' needs a rating of every completion, but some "
      "comparisons have none: use 'pairwise' or 'pick_best'"
    )


def normalization_batches(config, examples, tokenizer, sizes):
  """Returns an iterable of Comparisons whose completions the head is normalized on."""
  if config.preference.normalize_path:
    completions = setup.read_examples(
      config.data, formats.completions, tokenizer, path=config.preference.normalize_path
    )
    examples = [formats.Comparison(e.prompt, (e.completion,), (0,)) for e in completions]
  return (batch for batch, _ in pipelines.comparison_batches(examples, tokenizer, **sizes))


def held_out_loss(batches, prompts, losses_of, *, rated):
  """Returns an evaluator of held-out loss, accuracy and calibration.

  Args:
    batches: List of Comparisons.
    prompts: Texts of their prompts, in order.
    losses_of: Function (params, batches) that yields pairs of a batch and the results of
      `comparison_loss`, on the host.
    rated: Whether the model learns ratings; their calibration is then measured too.

  Returns:
    Function from a TrainState to metrics, or None if there are no batches.
  """

  def evaluate(state):
    found = [result for _, result in losses_of(setup.averaged(state, 'reward'), batches)]
    if found[0][0].ndim == 2:  # several heads
      found = [(loss.mean(1), counted[:, 0], scores.mean(2)) for loss, counted, scores in found]
    count = sum(int(counted.sum()) for _, counted, _ in found)
    loss = sum(float(loss[counted].sum()) for loss, counted, _ in found) / max(count, 1)
    scores = [scores for *_, scores in found]
    metrics = {'loss': loss, 'prompts': count} if count else {}
    metrics |= pair_metrics(scores, batches, prompts)
    if rated:  # A gap between ratings is not log-odds, so it implies no confidence to calibrate.
      metrics.pop('ece', None)
      metrics |= rating_metrics(scores, batches)
    return metrics

  return evaluate if batches else None


def pair_metrics(scores, batches, prompts):
  """Computes metrics of the pairs of all batches; see calibration.pairwise.

  Args:
    scores: Scores [B, K] of each batch.
    batches: List of Comparisons.
    prompts: Texts of their prompts, in order.

  Returns:
    Metrics; {} if there are no pairs.
  """
  pairs = [scoring.pair_gaps(*pair) for pair in zip(scores, batches)]
  size = len(batches[0].present)
  pair_prompts = [prompts[i * size + row] for i, (_, rows) in enumerate(pairs) for row in rows]
  if not pair_prompts:
    return {}
  gaps = np.concatenate([gaps for gaps, _ in pairs])
  result = calibration.pairwise(gaps, np.zeros_like(gaps), prompts=pair_prompts)
  return {
    'accuracy': result.accuracy,
    'accuracy_low': result.accuracy_low,
    'accuracy_high': result.accuracy_high,
    'ties': result.ties,
    'margin': result.margin,
    'ece': result.ece,
    'pairs': result.count,
  }


def rating_metrics(scores, batches):
  """Computes metrics of each batch's scores [B, K] as ratings; see calibration.ratings."""
  concatenate = lambda arrays: np.concatenate(
    [array[batch.present] for array, batch in zip(arrays, batches)]
  )
  return dataclasses.asdict(
    calibration.ratings(concatenate(scores), concatenate([batch.ratings for batch in batches]))
  )

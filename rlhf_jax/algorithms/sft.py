"""Language modelling: pretraining on packed texts, SFT on completions or on whole conversations.

All minimize the mean of -log p(token | previous tokens) over the targets in `loss_mask`; only the
data differ. See Ouyang et al. 2022 §3.5 (https://arxiv.org/abs/2203.02155).

Letters: B batch, T sequence length.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import errors
from rlhf_jax import learner
from rlhf_jax import logprobs
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import setup
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import trainable

# Function from records to examples of each kind.
KINDS = {
  'text': formats.texts,
  'completion': formats.completions,
  'conversation': formats.conversations,
}


def config(preset=''):
  """Returns the default config of pretraining and supervised fine-tuning; there are no presets."""
  defaults = config_lib.common('sft')
  defaults.evals = config_lib.held_out()
  return config_lib.apply_preset(defaults, {}, preset)


def validate(config, device_count):
  """Validates the keys that are specific to language modelling.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  del device_count
  config_lib.one_of(config, 'data.kind', KINDS)
  config_lib.divides(config.microbatch_size, config.batch_size, 'microbatch_size', 'batch_size')


def token_losses(params, frozen, batch, *, model):
  """Computes the negative log-likelihood of each target.

  Args:
    params: Trained parameters of `model`.
    frozen: Parameters of `model` that are not trained.
    batch: LMBatch of [B, T] arrays, or Pairs.
    model: Model.

  Returns:
    Losses [B, n] float32 in nats and their mask [B, n] bool. For an LMBatch n = T - 1, and
    position t is the loss of token t + 1; for Pairs the n positions are those of the completion.
  """
  params = trainable.merge(frozen, params)
  if isinstance(batch, types.Pairs):
    response_length = batch.response_mask.shape[1]
    states = model.response_states(params, batch.tokens, batch.mask, response_length)
    targets, mask = batch.tokens[:, -response_length:], batch.response_mask
  else:
    hidden, _ = model.forward(params, batch.tokens, batch.positions, batch.segments)
    states, targets, mask = hidden[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:]
  return logprobs.cross_entropy(functools.partial(model.unembed, params), states, targets), mask


def loss_sums(params, frozen, batch, *, model):
  """Returns the sum of `token_losses` over the batch's targets, and the number of targets."""
  nll, mask = token_losses(params, frozen, batch, model=model)
  return adv.masked_sum(nll, mask), jnp.sum(mask)


def mean_loss(params, frozen, batch, *, model):
  """Returns the mean of `token_losses` over the batch's targets."""
  return adv.masked_mean(*token_losses(params, frozen, batch, model=model))


def ptx_gradients(params, batch, *, frozen, model, coef):
  """Computes gradients of the language-modelling loss for PPO-ptx (Ouyang et al. 2022, eq. 2).

  Args:
    params: {'policy': trained parameters of `model`, ...}.
    batch: LMBatch or Pairs.
    frozen: Parameters of the policy that are not trained.
    model: Model.
    coef: Weight of the loss.

  Returns:
    {'policy': gradients} and metrics.
  """
  loss, grads = jax.value_and_grad(mean_loss)(params['policy'], frozen, batch, model=model)
  return {'policy': jax.tree.map(lambda g: coef * g, grads)}, {'ptx/loss': loss}


def train_step(state, frozen, batch, *, model, optimizers, microbatch_size):
  """Takes one optimizer step. Jit it with `state` donated.

  Args:
    state: TrainState with params {'policy': ...}.
    frozen: Parameters of the policy that are not trained.
    batch: LMBatch or Pairs.
    model: Model.
    optimizers: {'policy': optax optimizer}.
    microbatch_size: Sequences per forward and backward pass; 0 for all.

  Returns:
    The next TrainState and metrics.
  """
  pairs = isinstance(batch, types.Pairs)
  count = jnp.maximum(jnp.sum(batch.response_mask if pairs else batch.loss_mask[:, 1:]), 1)

  def loss_fn(params, rows):
    loss = adv.masked_sum(*token_losses(params['policy'], frozen, rows, model=model)) / count
    return loss, {'loss': loss}

  state, metrics = update.step(
    state, loss_fn, batch, optimizers=optimizers, microbatch_size=microbatch_size
  )
  return state, metrics | {
    'perplexity': jnp.exp(metrics['loss']),
    'tokens': count,
    'fill': jnp.mean(batch.mask if pairs else batch.segments > 0),
  }


def ptx_iterator(config, tokenizer, model):
  """Returns the iterator over batches of `config.ptx` for PPO-ptx."""
  setup.check_length(config.ptx.max_length, model, 'ptx.max_length')
  check_kind(config.ptx.kind, model, 'ptx.kind')
  examples = setup.read_examples(config.ptx, KINDS[config.ptx.kind], tokenizer)
  if config.ptx.kind == 'text':
    return pipelines.lm_iterator(
      examples,
      tokenizer,
      batch_size=config.ptx.batch_size,
      length=config.ptx.max_length,
      seed=config.seed,
    )[0]
  return pipelines.completion_iterator(
    examples,
    tokenizer,
    batch_size=config.ptx.batch_size,
    max_length=config.ptx.max_length,
    seed=config.seed,
    pairs=model.encoder_decoder,
  )[0]


def check_kind(kind, model, key):
  """Raises UserError if an encoder-decoder is to learn anything but completions of prompts."""
  if kind != 'completion' and model.encoder_decoder:
    raise errors.UserError(
      f'config.{key}={kind!r}: an encoder-decoder model ({model.family}) can only learn '
      "completions of prompts; use 'completion'"
    )


def training_batches(config, examples, tokenizer, model):
  """Returns the iterator over training batches, and the number of sequences per epoch."""
  data = config.data
  if data.kind == 'text':
    return pipelines.lm_iterator(
      examples, tokenizer, batch_size=config.batch_size, length=data.max_length, seed=config.seed
    )
  return pipelines.completion_iterator(
    examples,
    tokenizer,
    batch_size=config.batch_size,
    max_length=data.max_length,
    seed=config.seed,
    pairs=model.encoder_decoder,
  )


def held_out_batches(config, examples, tokenizer, model):
  """Returns pairs of a batch and a mask [B] of its real sequences, with every example once."""
  data = config.data
  if data.kind == 'text':
    return pipelines.lm_batches(
      examples, tokenizer, batch_size=config.batch_size, length=data.max_length
    )
  return pipelines.completion_batches(
    examples,
    tokenizer,
    batch_size=config.batch_size,
    max_length=data.max_length,
    pairs=model.encoder_decoder,
  )


def held_out_loss(batches, frozen, *, model, mesh):
  """Returns an evaluator of the mean loss over all held-out targets, and of its perplexity.

  Args:
    batches: Result of `held_out_batches`.
    frozen: Parameters of the policy that are not trained.
    model: Model.
    mesh: Device mesh.

  Returns:
    Function from a TrainState to metrics, or None if there are no batches.
  """
  sums = jax.jit(functools.partial(loss_sums, model=model))

  def evaluate(state):
    params = setup.averaged(state, 'policy')
    # Wait for each batch, or the device would hold all of them at once.
    sums_and_counts = [
      jax.device_get(sums(params, frozen, sharding.put_rows(batch, mesh))) for batch, _ in batches
    ]
    loss = float(
      sum(total for total, _ in sums_and_counts) / sum(count for _, count in sums_and_counts)
    )
    return {'loss': loss, 'perplexity': float(jnp.exp(loss))}

  return evaluate if batches else None


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'sft'`.

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
  check_kind(config.data.kind, model, 'data.kind')
  model, params, frozen = setup.split_trainable(config, model, params, mesh)
  convert = KINDS[config.data.kind]
  examples, held_out = setup.hold_out(config, convert, tokenizer)
  iterator, rows = training_batches(config, examples, tokenizer, model)
  steps = setup.train_steps(config, rows)
  optimizers = {'policy': setup.make_optimizer(config.optim, steps)}
  state = setup.new_state(config.seed, {'policy': params}, optimizers, mesh, model.rules)
  step = setup.jit_step(
    train_step,
    state,
    model=model,
    optimizers=optimizers,
    microbatch_size=config.microbatch_size or 0,
  )

  def loss(path):
    chosen = setup.read_examples(config.data, convert, tokenizer, path=path) if path else held_out
    return held_out_loss(
      held_out_batches(config, chosen, tokenizer, model), frozen, model=model, mesh=mesh
    )

  context = setup.policy_context(config, model, tokenizer, mesh, frozen, params, loss=loss)
  return learner.Learner(
    steps=steps,
    iterators={'data': iterator},
    next_batch=lambda state, *, timed: ((frozen, sharding.put_rows(next(iterator), mesh)), {}),
    train_step=step,
    export=setup.policy_exporter(model, tokenizer, frozen),
    describe=setup.describer(model, 'policy', tokenizer),
    evaluators=evaluators.make(config.evals, context),
  ), state

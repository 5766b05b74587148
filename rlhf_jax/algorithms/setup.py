"""What every algorithm begins with: tokenizer, model, optimizer, state, data, files."""

import dataclasses
import json
import os

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf_jax import errors
from rlhf_jax import folders
from rlhf_jax import keys
from rlhf_jax import models
from rlhf_jax import optim
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import chat
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import hf_files
from rlhf_jax.models import peft
from rlhf_jax.models import trainable

# Of TrainState.extra: what is one array and no tree of parameters.
EXTRA_RULES = ((r'^[^/]+$', PartitionSpec()),)


def load_tokenizer(config):
  """The tokenizer of `config.tokenizer`, or of the model's folder."""
  if not config.tokenizer and not os.path.isdir(config.model.path or ''):
    raise errors.UserError(
      f'config.model.path={config.model.path!r}: no such folder; it has to be a Hugging Face '
      'folder, or what an earlier stage exported'
    )
  tokenizer = tokenizers.load(config.tokenizer or config.model.path)
  if config.data.chat_template:
    chat.use_template(tokenizer, config.data.chat_template)
  return tokenizer


def model_settings(config_model):
  """How a model computes, as keywords of models.create."""
  return dict(dtype=config_model.dtype, remat=config_model.remat, unroll=config_model.unroll)


def load_settings(config_model):
  """How a model is loaded and computes, as keywords of hf.load and hf.load_reward."""
  return model_settings(config_model) | {'param_dtype': config_model.param_dtype}


def load_policy(config_model, tokenizer, mesh, seed):
  """A language model from a folder, or a new one.

  Args:
    config_model: `config.model`.
    tokenizer: whose ids the embedding has to hold.
    mesh: where the parameters go.
    seed: of a new model's parameters.

  Returns:
    Model and params.
  """
  if config_model.path:
    model, params = hf.load(config_model.path, mesh=mesh, **load_settings(config_model))
  else:
    fields = {'vocab_size': max(tokenizer.get_vocab().values()) + 1, **config_model.init.to_dict()}
    model = models.create(fields, **model_settings(config_model))
    init = lambda key: jax.tree.map(lambda x: x.astype(config_model.param_dtype), model.init(key))
    key = jax.random.key(seed)
    params = jax.jit(
      init, out_shardings=sharding.shardings(jax.eval_shape(init, key), model.rules, mesh)
    )(key)
  tokenizers.fit(tokenizer, model)
  return model, params


def split_trainable(config, model, params, mesh):
  """Divides parameters into those that `config.model` trains and the frozen rest.

  Args:
    config: the run's config.
    model: Model.
    params: all of its parameters.
    mesh: where adapters go.

  Returns:
    The Model with its adapters, trained and frozen parameters; see models/trainable.py.
  """
  model, trained, frozen = trainable.start(
    model,
    params,
    unfrozen_layers=config.model.unfrozen_layers,
    seed=config.seed,
    **config.model.lora,
  )
  return model, place(trained, model, mesh), frozen


def place(params, model, mesh):
  """Parameters where the model's rules want them."""
  return jax.device_put(params, sharding.shardings(params, model.rules, mesh))


def is_reward_model(path):
  """Whether a folder holds a model with a scalar head.

  Raises:
    UserError: there is no readable config.json.
  """
  names = hf_files.read_json(folders.model(path) / 'config.json').get('architectures')
  return isinstance(names, list) and str(names[0] if names else '').endswith(
    'ForSequenceClassification'
  )


def load_scalar(config_model, tokenizer, mesh, seed, *, head_scale):
  """A model with a scalar head: saved as one, or a language model with a new head.

  Args:
    config_model: `config.model`.
    tokenizer: whose ids the embedding has to hold.
    mesh: where the parameters go.
    seed: of new parameters.
    head_scale: see heads.init_scalar.

  Returns:
    Model and params {'backbone', 'head'}.
  """
  if config_model.path and is_reward_model(config_model.path):
    model, params = hf.load_reward(config_model.path, mesh=mesh, **load_settings(config_model))
    tokenizers.fit(tokenizer, model)
    return model, params
  model, backbone = load_policy(config_model, tokenizer, mesh, seed)
  return model, {'backbone': backbone, 'head': new_head(model, mesh, seed, head_scale)}


def new_head(model, mesh, seed, scale):
  """A scalar head, placed like the other parameters."""
  key = keys.for_purpose(seed, keys.HEAD)
  return jax.device_put(heads.init_scalar(key, model.width, scale=scale), sharding.replicated(mesh))


def make_optimizer(config_optim, steps, *, updates=1, learning_rate=None, exported=True):
  """The optimizer of `config.optim`.

  Args:
    config_optim: `config.optim`.
    steps: train steps of the run.
    updates: optimizer steps of a train step.
    learning_rate: in place of the config's, unless None.
    exported: whether its parameters are the run's result, of which a moving average is kept.
  """
  c = config_optim
  return optim.make(
    name=c.name,
    learning_rate=c.learning_rate if learning_rate is None else learning_rate,
    schedule_kind=c.schedule,
    warmup_steps=c.warmup_steps,
    warmup_from=c.warmup_from,
    steps=steps,
    updates=updates,
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    weight_decay=c.weight_decay,
    clip_norm=c.clip_norm or 0.0,
    master_dtype=c.master_dtype,
    moment_dtype=c.moment_dtype,
    ema=(c.ema or 0.0) if exported else 0.0,
  )


def new_state(seed, params, optimizers, mesh, rules, *, extra=None):
  """TrainState at step 0, the optimizer's moments placed like the parameters.

  Args:
    seed: of the random key.
    params: {name: parameters}.
    optimizers: {name: optax optimizer, or None}.
    mesh: device mesh.
    rules: sharding rules of the parameters.
    extra: see TrainState; None for nothing.
  """
  init = lambda params: {name: tx.init(params[name]) for name, tx in optimizers.items() if tx}
  opt_state = jax.jit(
    init, out_shardings=sharding.shardings(jax.eval_shape(init, params), rules, mesh)
  )(params)
  extra = extra or {}
  small = jax.device_put(
    {'step': jnp.int32(0), 'key': jax.random.key(seed)}, sharding.replicated(mesh)
  )
  return types.TrainState(
    params=params,
    opt_state=opt_state,
    extra=jax.device_put(extra, sharding.shardings(extra, EXTRA_RULES + rules, mesh)),
    **small,
  )


def state_shardings(state):
  """The sharding of every array of a state: what a train step gives back."""
  return jax.tree.map(lambda x: x.sharding, state)


def jit_step(function, state):
  """Jits a train step: state donated and given back where it lay, metrics on every device.

  Without the output shardings the compiler may place the new state elsewhere, and the second
  step would compile again.
  """
  platform = next(iter(state.step.sharding.device_set)).platform
  return jax.jit(
    function,
    donate_argnums=0,
    out_shardings=(state_shardings(state), None),
    compiler_options=sharding.compiler_options(platform),
  )


def read_examples(config_data, convert, tokenizer, *, path=None):
  """Examples of a data set, with a warning that counts what was left out and empty prompts.

  Args:
    config_data: `config.data`.
    convert: formats.texts, .completions, .comparisons or .prompts.
    tokenizer: for chat templates.
    path: of another data set of the same format, in place of `config_data.path`.

  Returns:
    List of examples.
  """
  path = path or config_data.path
  columns = dict(pair.split('=') for pair in (config_data.columns or '').split(',') if pair)
  records = sources.read(
    path,
    split=config_data.split or '',
    columns=columns,
    separator=config_data.separator,
    format=config_data.format,
  )
  examples, report = convert(records, tokenizer=tokenizer, on_error=config_data.on_error)
  if report.left_out or report.empty_prompts:
    logging.warning('%s: %s', path, report)
  return examples


def hold_out(config, convert, tokenizer):
  """Training examples and those kept for evaluation.

  Args:
    config: the run's config; `data.held_out` is a share, `data.held_out_path` a data set.
    convert: see `read_examples`.
    tokenizer: for chat templates.

  Returns:
    Two lists of examples; the second may be empty.
  """
  examples = read_examples(config.data, convert, tokenizer)
  if config.data.held_out_path:
    return examples, read_examples(config.data, convert, tokenizer, path=config.data.held_out_path)
  if not config.data.held_out:
    return examples, []
  return pipelines.split(examples, holdout=config.data.held_out, seed=config.seed)


def train_steps(config, examples):
  """Train steps of the run: `config.steps`, or `config.data.epochs` passes over this many examples."""
  if config.steps:
    return config.steps
  return max(1, round(config.data.epochs * examples / config.batch_size))


def check_length(length, model, key):
  """Raises UserError where rows of `length` tokens exceed the model's context."""
  if length > model.max_length:
    raise errors.UserError(
      f'config.{key}: {length} tokens exceed the context of {model.max_length} tokens that '
      'the model was made for. Shorten it, or use a model with a longer context.'
    )


def averaged(state, name):
  """Trained parameters as they are exported: their moving average, where `optim.ema` keeps one."""
  average = optim.moving_average(state.opt_state[name])
  if average is None:
    return state.params[name]
  return jax.tree.map(lambda a, p: a.astype(p.dtype), average, state.params[name])


def save(path, model, trained, frozen, *, tokenizer):
  """Writes a language model's folder, adapters merged; and beside it 'adapter', as PEFT keeps them.

  Args:
    path: the folder.
    model: Model.
    trained: its trained parameters.
    frozen: its other parameters.
    tokenizer: saved beside.
  """
  if model.lora is not None:
    peft.save(path.parent / 'adapter', model, trained)
  hf.save(
    path,
    dataclasses.replace(model, lora=None),
    trainable.merge_lora(model, trained, frozen),
    tokenizer=tokenizer,
  )


def describer(model, name, tokenizer):
  """`Learner.describe` of an algorithm that trains a model: model.json and the tokenizer.

  Args:
    model: Model.
    name: of its parameters in `TrainState.params`.
    tokenizer: its tokenizer.
  """

  def describe(workdir):
    temporary = workdir / 'model.json.tmp'
    temporary.write_text(json.dumps({'name': name, **model.config.to_hf()}, indent=2))
    os.replace(temporary, workdir / 'model.json')
    tokenizer.save_pretrained(workdir / 'tokenizer')

  return describe


def policy_context(config, model, tokenizer, mesh, frozen, start, *, loss=None):
  """evaluators.Context of an algorithm that trains `state.params['policy']`.

  Args:
    config: the run's config.
    model: Model.
    tokenizer: its tokenizer.
    mesh: device mesh.
    frozen: the policy's parameters that are not trained.
    start: () -> the trained parameters before the first step, not to be donated.
    loss: see evaluators.Context.
  """
  return evaluators.Context(
    model=model,
    tokenizer=tokenizer,
    mesh=mesh,
    seed=config.seed,
    loss=loss,
    policy=lambda state: trainable.merge(frozen, averaged(state, 'policy')),
    start=lambda: trainable.merge(frozen, start()),
    load=load_settings(config.model),
    sampling=config.get('sampling', {}),
  )


def policy_exporter(model, tokenizer, frozen):
  """`Learner.export` of an algorithm whose result is `state.params['policy']`."""

  def export(state, path):
    save(path, model, averaged(state, 'policy'), frozen, tokenizer=tokenizer)

  return export

"""Functions that all algorithms use: tokenizer, model, optimizer, train state, data, exports."""

import dataclasses
import functools
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
from rlhf_jax.data import mixtures
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import hf_files
from rlhf_jax.models import peft
from rlhf_jax.models import trainable

# Sharding of TrainState.extra: arrays at its top level are replicated.
EXTRA_RULES = ((r'^[^/]+$', PartitionSpec()),)


def load_tokenizer(config):
  """Loads the tokenizer of `config.tokenizer`, or of the model's folder if that is None."""
  if not config.tokenizer and not os.path.isdir(config.model.path or ''):
    raise errors.UserError(
      f'config.model.path={config.model.path!r}: no such folder; it must be a Hugging Face '
      'folder or the export of an earlier stage'
    )
  tokenizer = tokenizers.load(config.tokenizer or config.model.path)
  if config.data.chat_template:
    chat.use_template(tokenizer, config.data.chat_template)
  return tokenizer


def model_settings(config_model):
  """Returns the settings of a model's computation, as keyword arguments of models.create."""
  return dict(dtype=config_model.dtype, remat=config_model.remat, unroll=config_model.unroll)


def load_settings(config_model):
  """Returns a model's settings, as keyword arguments of hf.load and hf.load_reward."""
  return model_settings(config_model) | {'param_dtype': config_model.param_dtype}


def load_policy(config_model, tokenizer, mesh, seed):
  """Loads a language model from a folder, or creates a new one.

  Args:
    config_model: `config.model`.
    tokenizer: Tokenizer whose ids must fit the embedding.
    mesh: Device mesh for the parameters.
    seed: Random seed of a new model.

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
  """Splits parameters into those that `config.model` trains and those that stay frozen.

  Args:
    config: Config of the run.
    model: Model.
    params: All of its parameters.
    mesh: Device mesh for new adapters.

  Returns:
    Model with its adapters, trained parameters, frozen parameters; see models/trainable.py.
  """
  model, trained, frozen = trainable.set_up(
    model,
    params,
    unfrozen_layers=config.model.unfrozen_layers,
    seed=config.seed,
    **config.model.lora,
  )
  return model, place(trained, model, mesh), frozen


def place(params, model, mesh):
  """Puts parameters on the devices by the model's sharding rules."""
  return jax.device_put(params, sharding.shardings(params, model.rules, mesh))


def is_reward_model(path):
  """Returns whether a folder holds a model with a scalar head.

  Raises:
    UserError: There is no readable config.json.
  """
  names = hf_files.read_json(folders.find_model(path) / 'config.json').get('architectures')
  return isinstance(names, list) and str(names[0] if names else '').endswith(
    'ForSequenceClassification'
  )


def load_scalar(config_model, tokenizer, mesh, seed, *, head_scale, head_count=1):
  """Loads a model with a scalar head, or a language model to which it adds a new head.

  Args:
    config_model: `config.model`.
    tokenizer: Tokenizer whose ids must fit the embedding.
    mesh: Device mesh for the parameters.
    seed: Random seed of new parameters.
    head_scale: Initialization of a new head; see heads.init_scalar.
    head_count: Number of new heads.

  Returns:
    Model and params {'backbone', 'head'}.
  """
  if config_model.path and is_reward_model(config_model.path):
    model, params = hf.load_reward(config_model.path, mesh=mesh, **load_settings(config_model))
    tokenizers.fit(tokenizer, model)
    return model, params
  model, backbone = load_policy(config_model, tokenizer, mesh, seed)
  head = new_head(model, mesh, seed, head_scale, head_count)
  return model, {'backbone': backbone, 'head': head}


def new_head(model, mesh, seed, scale, count=1):
  """Returns a new scalar head, or several, replicated over the mesh."""
  key = keys.for_purpose(seed, keys.HEAD)
  head = heads.init_scalar(key, model.width, scale=scale, count=count)
  return jax.device_put(head, sharding.replicated(mesh))


def make_optimizer(config_optim, steps, *, updates=1, learning_rate=None, exported=True):
  """Creates the optimizer of `config.optim`.

  Args:
    config_optim: `config.optim`.
    steps: Train steps of the run.
    updates: Optimizer steps per train step.
    learning_rate: Replaces the config's learning rate unless None.
    exported: Whether the parameters are exported; only then `optim.ema` applies.
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


def settings(cls, block, **others):
  """Creates the dataclass `cls`: each field is a key of a config block, or one of `others`."""
  names = {field.name for field in dataclasses.fields(cls)} - others.keys()
  return cls(**{name: block[name] for name in names}, **others)


def new_state(seed, params, optimizers, mesh, rules, *, extra=None):
  """Returns the TrainState at step 0, with optimizer moments sharded like the parameters.

  Args:
    seed: Random seed.
    params: {name: parameters}.
    optimizers: {name: optax optimizer, or None}.
    mesh: Device mesh.
    rules: Sharding rules of the parameters.
    extra: TrainState.extra; None for {}.
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


def jit_step(function, state, **static):
  """Jits a train step that donates its state and returns it with the same shardings.

  Without these output shardings the compiler could choose others, and the second step would compile
  again. `static` are keyword arguments of the function.
  """
  platform = next(iter(state.step.sharding.device_set)).platform
  return jax.jit(
    functools.partial(function, **static),
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    compiler_options=sharding.compiler_options(platform),
  )


def read_examples(config_data, convert, tokenizer, *, path=None):
  """Reads the examples of a data set; warns about skipped records and empty prompts.

  Args:
    config_data: `config.data`.
    convert: formats.texts, .completions, .comparisons or .prompts.
    tokenizer: Tokenizer, for chat templates.
    path: Another data set, read instead of `config_data.path` and `config_data.mixture`.

  Returns:
    A sequence of examples; a mixtures.Mixture if `config_data.mixture` has sources.

  Raises:
    UserError: A source cannot be read; in a mixture, the message names it.
  """
  read = functools.partial(_read_source, config_data, convert, tokenizer)
  if path or not config_data.mixture:
    return read({'path': path or config_data.path})
  names, parts = sorted(config_data.mixture), []
  for name in names:
    try:
      parts.append(read(config_data.mixture[name]))
    except errors.UserError as error:
      raise type(error)(f'source {name!r} of the mixture: {error}') from error
  weights = [config_data.mixture[name].get('weight', 1.0) for name in names]
  for name, weight, part in zip(names, weights, parts):
    logging.info(
      'source %s of the mixture: %d examples of %s, %.3g %% of those drawn',
      name,
      len(part),
      config_data.mixture[name].path,
      100 * weight / sum(weights),
    )
  return mixtures.Mixture(names, weights, parts)


def _read_source(config_data, convert, tokenizer, source):
  """Reads one data set, whose keys in `source` replace those of `config_data`."""
  key = lambda name: source.get(name, config_data[name])
  path = key('path')
  records = sources.read(
    path,
    split=key('split') or '',
    columns=dict(pair.split('=') for pair in (key('columns') or '').split(',') if pair),
    separator=key('separator'),
    format=key('format'),
  )
  examples, report = convert(records, tokenizer=tokenizer, on_error=config_data.on_error)
  if report.left_out or report.empty_prompts:
    logging.warning('%s: %s', path, report)
  return examples


def hold_out(config, convert, tokenizer):
  """Reads the training examples and the held-out examples.

  Args:
    config: Config of the run; `data.held_out` is a fraction, `data.held_out_path` a data set.
    convert: Function from records to examples; see `read_examples`.
    tokenizer: Tokenizer, for chat templates.

  Returns:
    Two sequences of examples; the second may be empty. Those of a mixture are split together, so
    that no held-out prompt is in the training part of any source.
  """
  examples = read_examples(config.data, convert, tokenizer)
  if config.data.held_out_path:
    return examples, read_examples(config.data, convert, tokenizer, path=config.data.held_out_path)
  if not config.data.held_out:
    return examples, []
  return pipelines.split(examples, holdout=config.data.held_out, seed=config.seed)


def train_steps(config, examples):
  """Returns the number of train steps: `config.steps`, or `config.data.epochs` over the examples.

  Args:
    config: Config of the run.
    examples: Number of examples per epoch.
  """
  if config.steps:
    return config.steps
  return max(1, round(config.data.epochs * examples / config.batch_size))


def check_length(length, model, key):
  """Raises UserError if sequences of `length` tokens exceed the model's context."""
  if length > model.max_length:
    raise errors.UserError(
      f"config.{key}: {length} tokens exceed the model's context of {model.max_length} tokens. "
      'Lower it, or use a model with a longer context.'
    )


def averaged(state, name):
  """Returns the trained parameters to export: their moving average if `optim.ema` is set."""
  average = optim.moving_average(state.opt_state[name])
  if average is None:
    return state.params[name]
  return jax.tree.map(lambda a, p: a.astype(p.dtype), average, state.params[name])


def save(path, model, trained, frozen, *, tokenizer, files=None):
  """Saves a language model with merged adapters, and the adapters alone in PEFT's format.

  Args:
    path: pathlib.Path of the model's folder; the adapters go to 'adapter' beside it.
    model: Model.
    trained: Trained parameters.
    frozen: Parameters that are not trained.
    tokenizer: Tokenizer, saved in the same folder.
    files: See hf.save.
  """
  if model.lora is not None:
    base = trainable.merge_lora(dataclasses.replace(model, lora=None), {}, frozen)
    peft.save(path.parent / 'adapter', model, trained, base=base)
  hf.save(
    path,
    dataclasses.replace(model, lora=None),
    trainable.merge_lora(model, trained, frozen),
    tokenizer=tokenizer,
    files=files,
  )


def describer(model, name, tokenizer):
  """Returns a function for `Learner.describe`, which writes model.json and the tokenizer.

  Args:
    model: Model.
    name: Name of its parameters in `TrainState.params`.
    tokenizer: Its tokenizer.
  """

  def describe(workdir):
    temporary = workdir / 'model.json.tmp'
    temporary.write_text(json.dumps({'name': name, **model.config.to_hf()}, indent=2))
    os.replace(temporary, workdir / 'model.json')
    tokenizer.save_pretrained(workdir / 'tokenizer')

  return describe


def policy_context(
  config,
  model,
  tokenizer,
  mesh,
  frozen,
  policy,
  *,
  start=None,
  loss=None,
  guided_model=None,
  q_functions=None,
):
  """Returns the evaluators.Context of an algorithm that trains `state.params['policy']`.

  Args:
    config: Config of the run.
    model: Model.
    tokenizer: Its tokenizer.
    mesh: Device mesh.
    frozen: Parameters of the policy that are not trained.
    policy: Trained parameters before the first step, which will donate them.
    start: Equal parameters that no step donates. If it is None or {}, `policy` is copied when an
      evaluator asks for them, which must be before the first step.
    loss: Held-out loss; see evaluators.Context for this and the following.
    guided_model: Function from beta to a model that samples with Q functions.
    q_functions: Function from a state to their parameters.
  """
  return evaluators.Context(
    model=model,
    tokenizer=tokenizer,
    mesh=mesh,
    seed=config.seed,
    policy=lambda state: trainable.merge(frozen, averaged(state, 'policy')),
    start=lambda: trainable.merge(frozen, start or jax.tree.map(jnp.copy, policy)),
    load=load_settings(config.model),
    loss=loss,
    sampling=config.get('sampling', {}),
    guided_model=guided_model,
    q_functions=q_functions,
  )


def policy_exporter(model, tokenizer, frozen, files=lambda state: None):
  """Returns `Learner.export` of an algorithm whose result is `state.params['policy']`.

  `files` is a function from the TrainState to other files of the model's folder; see hf.save.
  """

  def export(state, path):
    trained = averaged(state, 'policy')
    save(path, model, trained, frozen, tokenizer=tokenizer, files=files(state))

  return export

"""Every config key, its default, and the checks made before anything is compiled.

A file in configs/ starts from `sft()`, `reward_model()` or `ppo(preset)` and changes what its
experiment changes. Configs stop at `create` of an algorithm: library functions take scalars.
"""

import ast
import re

import ml_collections

from rlhf_jax import advantages
from rlhf_jax import errors
from rlhf_jax import optim
from rlhf_jax.algorithms import ppo_settings

# Kinds of data each algorithm reads.
KINDS = {'sft': ('text', 'completion'), 'reward_model': ('comparison',), 'ppo': ('prompt',)}


def common(algorithm):
  """Keys all algorithms have."""
  return ml_collections.ConfigDict({
      'algorithm': algorithm,
      'seed': 0,
      'steps': 0,               # train steps; or say it in epochs
      'epochs': 0.0,            # passes over the data; 0 where `steps` is given
      'batch_size': 32,         # rows of a step over all devices; for PPO episodes
      'microbatch_size': 0,     # rows of one forward and backward pass; 0 takes all at once
      'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},   # -1: the devices that are left
      'model': {
          'path': '',           # Hugging Face folder, or empty to start from `init`
          'init': {},           # config.json fields of a new model; vocab_size may be left out
          'dtype': 'float32',   # of the computation
          'param_dtype': 'float32',
          'remat': 'none',      # or recompute in the backward pass: 'block', or 'dots' all but matmuls
          'unroll': 1,          # layers unrolled in the compiled loop; more is faster on CPUs
          'unfrozen_layers': -1,    # train the last k layers only; -1 trains all
          'lora': {
              'targets': (),    # ((regex on a linear map's path, rank, alpha), ...); none: no adapters
              'rslora': False,  # scale by alpha / sqrt(rank) instead of alpha / rank
              'path': '',       # PEFT folder of adapters to start from, instead of `targets`
          },
      },
      'tokenizer': '',          # folder; empty: the model's
      'data': data(),
      'optim': {
          'name': 'adam',       # 'adam' or 'tf_adam'
          'learning_rate': 1e-3,
          'schedule': 'constant',   # 'constant', 'linear' or 'cosine', the last two to 0
          'warmup_steps': 0,
          'b1': 0.9, 'b2': 0.999, 'eps': 1e-8,
          'master_dtype': 'float32',    # of the weights that updates add up in, if param_dtype differs
          'moment_dtype': 'float32',    # of the first moment
          'ema': 0.0,           # decay a step of a moving average of the weights, then exported
          'weight_decay': 0.0,
          'clip_norm': 0.0,     # 0 for none
      },
      'log_every': 1,
      'eval_every': 0,          # 0: at the end only
      'checkpoint_every': 0,    # 0: at the end only
      'keep_checkpoints': 2,
      'samples_every': 0,       # steps between the sampled texts in samples.jsonl; 0: the last
      'wandb_project': '',
  })


def data():
  """Keys of a data set."""
  return ml_collections.ConfigDict({
      'path': '',               # file, folder, hub name, or tfds:NAME
      'split': '',
      'columns': '',            # 'prompt=question,completion=answer' where yours differ
      'separator': '\n',        # between two texts of a plain text file
      'kind': 'text',           # for sft: 'text' (packed) or 'completion'
      'max_length': 128,        # tokens of a row
      'on_error': 'stop',       # 'stop' at a malformed record or 'skip' and count it
      'chat_template': '',      # jinja template, where the tokenizer has none
      'held_out': 0.0,          # share of the examples kept for evaluation
      'held_out_path': '',      # or a data set of its own
  })


def sft():
  """Pretraining (`data.kind = 'text'`) and supervised fine-tuning ('completion')."""
  return common('sft')


def reward_model():
  """Reward model from comparisons, rankings, picks or ratings."""
  config = common('reward_model')
  config.data.kind = 'comparison'
  config.reward = ml_collections.ConfigDict({
      'loss': 'pairwise',       # 'pairwise' (K-way too), 'pick_best' or 'rating'
      'centering': 0.0,         # weight of (r_a + r_b)^2; 0.01 recommended
      'label_smoothing': 0.0,
      'token_dropout': 0.0,     # share of tokens hidden from each training row
      'normalize': 'none',      # 'gain_bias': mean 0, std 1; 'bias': mean 0; on `normalize_path`
      'normalize_path': '',     # completions to fit on; empty: those of the training comparisons
  })
  return config


def ppo(preset=''):
  """PPO, all toggles of ppo_settings.Settings.

  Args:
    preset: '' or a name in ppo_settings.PRESETS.

  Returns:
    ConfigDict.

  Raises:
    UserError: there is no such preset.
  """
  config = common('ppo')
  config.data.kind = 'prompt'
  config.data.max_prompt_length = 64
  config.data.on_long = 'error'  # a prompt beyond that: 'error', 'truncate_left' or 'drop'
  config.batch_size = 64
  config.optim.learning_rate = 1e-5
  config.critic = ml_collections.ConfigDict({
      'kind': 'separate',       # 'trunk': a head on the policy's hidden states; or 'adapters'
      'path': '',               # separate: folder to start from; empty: the reward model's
      'learning_rate': 0.0,     # 0: as the policy's
  })
  config.reference = ''         # folder; empty: the policy as it starts
  config.reward = ml_collections.ConfigDict({
      'model': '',              # folder of a reward model, or
      'function': '',           # 'package.module:function' over strings
      'max_length': 0,          # of a reward model with its own tokenizer; 0: its context
  })
  config.sampling = ml_collections.ConfigDict({
      'max_new_tokens': 32, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0,
      'rows': 0,                # sampled at a time, a prompt taking the place of a response that has ended; 0: all
      'gather_weights': False,  # over 'fsdp' once a rollout, where memory allows, not once a token; with rows always
  })
  config.ptx = data()
  config.ptx.batch_size = 0     # pretraining rows an iteration, shared out over minibatches
  config.ppo = ml_collections.ConfigDict({
      'epochs': 4, 'minibatches': 1,
      'length_buckets': 4,      # lengths that microbatches are sorted by and cut to, each compiled; 1: all slots
      'kl_coef': 0.05, 'kl_estimator': 'k1', 'kl_in': 'reward',
      'kl_controller': 'fixed', 'kl_target': 6.0, 'kl_horizon': 10_000.0,
      'gamma': 1.0, 'lam': 0.95,
      'clip_low': 0.2, 'clip_high': 0.2, 'dual_clip': 0.0,
      'value_clip': 0.2, 'vf_coef': 0.1, 'entropy_coef': 0.0, 'ptx_coef': 0.0,
      'response': 'truncated', 'score_position': 'eos',
      'missing_eos': 'none', 'missing_eos_value': -1.0,
      'scale_scores': False, 'clip_scores': 0.0,
      'whiten_rewards': False, 'whiten_advantages': 'batch', 'whiten_unbiased': False,
      'behaviour': 'forward',
  })
  if preset:
    if preset not in ppo_settings.PRESETS:
      raise errors.UserError(
          f'unknown PPO preset {preset!r}: one of {", ".join(ppo_settings.PRESETS)}')
    config.update_from_flattened_dict(ppo_settings.PRESETS[preset])
  return config


def parse_arg(arg, **defaults):
  """Reads the string after the colon of `--config=configs/X.py:arg`.

  Args:
    arg: 'key=value,key=value'; a key alone is True. Each value must have its default's type.
    **defaults: every key the config knows.

  Returns:
    ConfigDict of the keys.

  Raises:
    UserError: an unknown key, or a value of the wrong type.
  """
  parsed = dict(defaults)
  for part in filter(None, (arg or '').split(',')):
    key, _, text = part.partition('=')
    if key not in defaults:
      raise errors.UserError(
          f'config argument {key!r} is unknown; this config takes: {", ".join(defaults)}')
    default = defaults[key]
    try:
      value = text if isinstance(default, str) else ast.literal_eval(text or 'True')
    except (SyntaxError, ValueError):
      value = text
    if isinstance(default, float) and type(value) is int:
      value = float(value)
    if type(value) is not type(default):
      raise errors.UserError(
          f'config argument {key}={text!r} has to be of type {type(default).__name__}')
    parsed[key] = value
  return ml_collections.ConfigDict(parsed)


def _need(condition, message):
  if not condition:
    raise errors.UserError(message)


def _one_of(config, key, choices):
  value = config
  for part in key.split('.'):
    value = value[part]
  _need(value in choices, f'config.{key}={value!r} has to be one of {", ".join(choices)}')


def _divides(small, big, small_name, big_name):
  _need(small >= 0 and (small == 0 or big % small == 0),
        f'config.{small_name}={small} does not divide config.{big_name}={big}: change either')


def validate(config, device_count):
  """Checks a single-stage config before anything is loaded or compiled.

  Args:
    config: from `sft`, `reward_model` or `ppo`.
    device_count: devices of all processes.

  Raises:
    UserError: names the key, the value and the remedy.
  """
  _one_of(config, 'algorithm', ('sft', 'reward_model', 'ppo'))
  _need((config.steps > 0) != (config.epochs > 0) and min(config.steps, config.epochs) == 0,
        f'set one of config.steps (now {config.steps}) and config.epochs (now '
        f'{config.epochs}) to a positive number and the other to 0')
  _need(config.batch_size > 0, f'config.batch_size={config.batch_size} has to be positive')
  _one_of(config, 'optim.name', optim.OPTIMIZERS)
  _one_of(config, 'optim.schedule', optim.SCHEDULES)
  _one_of(config, 'data.on_error', ('stop', 'skip'))
  _one_of(config, 'data.kind', KINDS[config.algorithm])
  _one_of(config, 'model.dtype', ('float32', 'bfloat16'))
  for key in ('model.param_dtype', 'optim.master_dtype', 'optim.moment_dtype'):
    _one_of(config, key, ('float32', 'bfloat16'))
  _need(config.model.unfrozen_layers >= -1,
        f'config.model.unfrozen_layers={config.model.unfrozen_layers} has to be -1 (all) or more')
  validate_lora(config.model.lora, config.model.unfrozen_layers)
  _need(0 <= config.optim.ema < 1, f'config.optim.ema={config.optim.ema} has to be in [0, 1)')
  _need(bool(config.data.path),
        'config.data.path is empty: name a file, a folder, a hub data set or tfds:NAME')
  _need(bool(config.model.path) or len(config.model.init) > 0,
        'config.model.path and config.model.init are both empty: name a Hugging Face folder '
        'or describe a new model')
  _need(config.model.path or config.tokenizer,
        'config.tokenizer is empty and there is no config.model.path to take it from')
  _need(all(pair.count('=') == 1 for pair in config.data.columns.split(',') if pair),
        f'config.data.columns={config.data.columns!r} has to read new=stored,new=stored')
  _need(config.data.max_length > 0,
        f'config.data.max_length={config.data.max_length} has to be positive')
  _need(config.keep_checkpoints > 0,
        f'config.keep_checkpoints={config.keep_checkpoints} has to be positive: a run that '
        'keeps none cannot go on')
  for key in ('log_every', 'eval_every', 'checkpoint_every', 'samples_every'):
    _need(config[key] >= 0, f'config.{key}={config[key]} has to be positive, or 0 for the end')
  _need(0 <= config.data.held_out < 1,
        f'config.data.held_out={config.data.held_out} has to be in [0, 1)')
  _need(not (config.data.held_out and config.data.held_out_path),
        f'config.data.held_out={config.data.held_out} and config.data.held_out_path='
        f'{config.data.held_out_path!r}: set one of them')
  for key in ('learning_rate', 'warmup_steps', 'weight_decay', 'clip_norm'):
    _need(config.optim[key] >= 0,
          f'config.optim.{key}={config.optim[key]} has to be 0 or positive')
  validate_mesh(config, device_count)
  if config.algorithm == 'ppo':
    validate_ppo(config)
  else:
    _divides(config.microbatch_size, config.batch_size, 'microbatch_size', 'batch_size')
  if config.algorithm == 'reward_model':
    _one_of(config, 'reward.loss', ('pairwise', 'pick_best', 'rating'))
    _one_of(config, 'reward.normalize', ('none', 'gain_bias', 'bias'))
    _need(0 <= config.reward.token_dropout < 1,
          f'config.reward.token_dropout={config.reward.token_dropout} has to be in [0, 1)')


def validate_lora(lora, unfrozen_layers):
  """The part of `validate` about `config.model.lora`."""
  _need(not lora.path or not lora.targets and unfrozen_layers < 0,
        f'config.model.lora.path={lora.path!r} brings its own targets: leave config.model.lora.targets '
        'empty and config.model.unfrozen_layers at -1')
  for target in lora.targets:
    fits = len(target) == 3 and isinstance(target[0], str) and isinstance(target[1], int)
    _need(fits and target[1] > 0 and target[2] > 0,
          f'config.model.lora.targets has {target!r}: each has to be (regex, rank, alpha), rank a '
          'positive whole number and alpha positive')
    try:
      re.compile(target[0])
    except re.error as error:
      raise errors.UserError(
          f'config.model.lora.targets: {target[0]!r} is no regular expression: {error}') from None


def validate_mesh(config, device_count):
  """The part of `validate` about devices, and batches split over them."""
  sizes = dict(config.mesh)
  known = 1
  for name, size in sizes.items():
    _need(size == -1 or size > 0, f'config.mesh.{name}={size} has to be positive, or -1')
    known *= max(size, 1)
  free = sum(size == -1 for size in sizes.values())
  _need(free <= 1, f'config.mesh={sizes}: only one axis can be -1')
  _need(device_count % known == 0 and (free or known == device_count),
        f'config.mesh={sizes} does not fit {device_count} devices')
  tensor = sizes['tensor'] if sizes['tensor'] > 0 else device_count // known
  shards = device_count // tensor
  batches = {'batch_size': config.batch_size}
  if config.algorithm == 'ppo':
    batches |= {'ptx.batch_size': config.ptx.batch_size, 'sampling.rows': config.sampling.rows}
  for name, size in batches.items():
    _need(size % shards == 0,
          f'config.{name}={size} does not divide over the {shards} data shards of '
          f'config.mesh={sizes} on {device_count} devices: make it a multiple')


def validate_ppo(config):
  """The part of `validate` that only PPO has."""
  ppo_config = config.ppo
  for key, low, high in (('gamma', 0, 1), ('lam', 0, 1), ('clip_low', 0, 1)):
    _need(low <= ppo_config[key] <= high,
          f'config.ppo.{key}={ppo_config[key]} has to be in [{low}, {high}]')
  _need(ppo_config.dual_clip == 0 or ppo_config.dual_clip > 1,
        f'config.ppo.dual_clip={ppo_config.dual_clip} has to be above 1, or 0 for none')
  choices = {
      'kl_estimator': advantages.KL_ESTIMATORS, 'kl_controller': advantages.KL_CONTROLLERS,
      'kl_in': ('reward', 'loss'), 'response': ('truncated', 'raw'),
      'score_position': advantages.SCORE_POSITIONS, 'missing_eos': advantages.MISSING_EOS,
      'whiten_advantages': ('batch', 'minibatch', 'none'),
      'behaviour': ('forward', 'sampler')}
  for key, values in choices.items():
    _one_of(config, f'ppo.{key}', values)
  _one_of(config, 'critic.kind', ('separate', 'trunk', 'adapters'))
  _need(config.critic.kind == 'separate' or not config.critic.path,
        f'config.critic.kind={config.critic.kind!r} sits on the policy: it cannot start from '
        f'config.critic.path={config.critic.path!r}; use \'separate\' or leave the path empty')
  _need(config.critic.kind != 'adapters' or len(config.model.lora.targets) > 0
        or config.model.lora.path,
        "config.critic.kind='adapters' needs config.model.lora.targets, which it has too")
  _need(config.model.unfrozen_layers < 0 or not config.reference,
        f'config.reference={config.reference!r}: with config.model.unfrozen_layers='
        f'{config.model.unfrozen_layers} the reference shares the layers below with the policy; '
        'leave it empty, or set unfrozen_layers to -1')
  _one_of(config, 'data.on_long', ('error', 'truncate_left', 'drop'))
  _need(ppo_config.epochs > 0, f'config.ppo.epochs={ppo_config.epochs} has to be positive')
  _need(ppo_config.minibatches > 0,
        f'config.ppo.minibatches={ppo_config.minibatches} has to be positive')
  _need(ppo_config.length_buckets > 0,
        f'config.ppo.length_buckets={ppo_config.length_buckets} has to be positive; 1 cuts no microbatch')
  _divides(ppo_config.minibatches, config.batch_size, 'ppo.minibatches', 'batch_size')
  _divides(config.microbatch_size, config.batch_size // ppo_config.minibatches,
           'microbatch_size', 'batch_size / config.ppo.minibatches')
  _need(bool(config.reward.model) != bool(config.reward.function),
        'set one of config.reward.model and config.reward.function, not both and not neither')
  _need(config.sampling.temperature > 0,
        f'config.sampling.temperature={config.sampling.temperature} has to be positive: PPO '
        'cannot learn from greedy samples')
  _need(config.sampling.max_new_tokens > 0,
        f'config.sampling.max_new_tokens={config.sampling.max_new_tokens} has to be positive')
  _need(config.sampling.top_k >= 0,
        f'config.sampling.top_k={config.sampling.top_k} has to be positive, or 0 for all')
  _need(0 <= config.sampling.rows < config.batch_size,
        f'config.sampling.rows={config.sampling.rows} has to be less than config.batch_size={config.batch_size}, '
        'or 0 to sample all at once')
  _need(0 < config.sampling.top_p <= 1,
        f'config.sampling.top_p={config.sampling.top_p} has to be in (0, 1]')
  _need(ppo_config.kl_controller == 'fixed'
        or min(ppo_config.kl_coef, ppo_config.kl_target, ppo_config.kl_horizon) > 0,
        f'config.ppo.kl_controller={ppo_config.kl_controller!r} multiplies config.ppo.kl_coef: '
        'it, kl_target and kl_horizon have to be positive')
  _need(not (ppo_config.kl_estimator == 'full' and ppo_config.kl_in == 'loss'),
        "config.ppo.kl_estimator='full' works with config.ppo.kl_in='reward' only")
  _need((ppo_config.score_position == 'last') == (ppo_config.response == 'raw'),
        "config.ppo.score_position='last' and config.ppo.response='raw' belong together: the "
        'last slot is a token of the response only if sampling goes on past the EOS')
  _need((ppo_config.ptx_coef > 0) == (config.ptx.batch_size > 0),
        f'config.ppo.ptx_coef={ppo_config.ptx_coef} and config.ptx.batch_size='
        f'{config.ptx.batch_size}: set both to mix in pretraining, or neither')
  _divides(ppo_config.minibatches, config.ptx.batch_size, 'ppo.minibatches', 'ptx.batch_size')
  if config.ptx.batch_size:
    _need(bool(config.ptx.path),
          'config.ptx.path is empty: name the pretraining data to mix in')
    _one_of(config, 'ptx.kind', KINDS['sft'])
  _need(not (ppo_config.missing_eos == 'subtract' and ppo_config.missing_eos_value < 0),
        "config.ppo.missing_eos='subtract' takes missing_eos_value off the score: a negative "
        'one would be a reward for never ending')

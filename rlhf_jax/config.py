"""The config keys that all algorithms share, with defaults and checks.

A file in configs/ starts from `config()` of an algorithm, which starts from `common` here. None
means that a key is absent. Only `create` of an algorithm and the code around it read configs;
library functions take scalars.
"""

import ast
import importlib.util
import re

import ml_collections
from ml_collections.config_dict import placeholder

from rlhf_jax import config_keys
from rlhf_jax import errors
from rlhf_jax import optim
from rlhf_jax.errors import need

# Defaults of sampling in an evaluator if neither it nor `config.sampling` sets a key. Temperature 0
# is greedy; beta is the weight of the Q functions of ILQL.
SAMPLING = {
  'max_new_tokens': 32,
  'temperature': 1.0,
  'top_k': None,
  'top_p': 1.0,
  'min_new_tokens': 0,
  'stop': (),
  'truncate_at': None,
  'truncate_after': 0,
  'beta': 0.0,
}
EVALUATOR_TYPES = dict(
  kind=str, every=int, function=str, path=str, split=str, columns=str, count=int, batch_size=int
)
# The requirement for Weights & Biases, as in setup.py.
WANDB = 'wandb>=0.31.0,<0.32'

# Formats of data files; see data/files.py.
FORMATS = ('jsonl', 'json', 'csv', 'tsv', 'parquet', 'text', 'arrayrecord')
# Keys of a data set that each source of a mixture may have.
SOURCE = ('path', 'split', 'columns', 'format', 'separator')


def common(algorithm):
  """Returns a ConfigDict of the keys that all algorithms have.

  Args:
    algorithm: Name of a module in rlhf_jax/algorithms, or the dotted path of another module.
  """
  return ml_collections.ConfigDict(
    {
      'algorithm': algorithm,  # name in rlhf_jax/algorithms, or dotted path of your own module
      'seed': 0,  # random seed; None in a stage: the pipeline's
      'steps': placeholder(int),  # number of train steps; or set data.epochs
      'batch_size': 32,  # examples per step on all devices; in RL, responses per step
      'microbatch_size': placeholder(int),  # examples per forward and backward pass; None: all
      'mesh': {  # number of devices on each axis; -1 on one axis: all that are left
        'data': -1,  # splits the batch; each device has a copy of the parameters
        'fsdp': 1,  # splits the batch and the parameters
        'tensor': 1,  # splits the matrices of every layer
      },
      'model': {
        'path': placeholder(str),  # Hugging Face folder; None: a new model, see init
        'init': {},  # config.json fields of a new model; vocab_size is optional
        'dtype': 'float32',  # dtype of the computation
        'param_dtype': 'float32',  # dtype of the weights
        'remat': 'none',  # recompute: 'none', 'block' (whole blocks) or 'dots' (all but matmuls)
        'unroll': placeholder(int),  # layers per loop iteration; None: 1, or all on CPUs if few
        'unfrozen_layers': placeholder(int),  # train only the last k layers; None: all
        'lora': {
          'targets': (),  # ((regex on a linear map's path, rank, alpha), ...); (): no adapters
          'rslora': False,  # scale by alpha / sqrt(rank) instead of alpha / rank
          'path': placeholder(str),  # PEFT folder of adapters to start from, instead of targets
        },
      },
      'tokenizer': placeholder(str),  # folder of the tokenizer; None: the model's
      'data': data()
      | {
        'epochs': placeholder(float),  # passes over the data; or set steps
        'held_out': placeholder(float),  # fraction of examples held out for evaluation, by prompt
        'held_out_path': placeholder(str),  # or a separate data set for evaluation
      },
      'optim': {
        'name': 'adam',  # 'adam', 'tf_adam', 'rmsprop' or 'tf_rmsprop'
        'learning_rate': 1e-3,  # peak of the schedule
        'schedule': 'constant',  # 'constant', or 'linear' or 'cosine' down to 0
        'warmup_steps': 0,  # train steps of linear growth to the peak
        'warmup_from': 0.0,  # fraction of the peak at which warmup starts
        'b1': 0.9,  # decay of Adam's first moment
        'b2': 0.999,  # decay of the second moment of Adam and RMSProp
        'eps': 1e-8,  # epsilon of Adam or RMSProp
        'master_dtype': 'float32',  # dtype of the optimizer's weights, if it is not param_dtype
        'moment_dtype': 'float32',  # dtype of Adam's first moment
        'ema': placeholder(float),  # decay of the moving average of weights to evaluate and export
        'weight_decay': 0.0,  # decoupled weight decay (AdamW), applied to matrices only
        'clip_norm': placeholder(float),  # largest global norm of the gradients; None: no clipping
      },
      'log_every': 1,  # steps between log lines
      'evals': {},  # {name: keys of an evaluator}; see evals.NAME
      'checkpoint_every': placeholder(int),  # steps between checkpoints; also checkpoint_minutes
      'checkpoint_minutes': 10.0,  # minutes between checkpoints; None: no limit
      'keep_checkpoints': 2,  # newest checkpoints to keep
      'samples_every': placeholder(int),  # steps between samples in samples.jsonl; None: no samples
      'wandb_project': placeholder(str),  # Weights & Biases project to log to; None: only files
    }
  )


def data():
  """Returns a dict of the keys of a data set."""
  return {
    'path': placeholder(str),  # file, folder, hub data set, tfds:NAME or feedback:URL#PROJECT
    'split': placeholder(str),  # split of a public data set or of a folder; None: train
    'columns': placeholder(str),  # names of your columns, such as prompt=question,completion=answer
    'format': placeholder(str),  # jsonl, json, csv, tsv, parquet, arrayrecord, text; None: suffix
    'separator': '\n',  # string between two texts of a plain text file
    'mixture': {},  # or {name: {'weight': 1.0, 'path': ..., keys from above}}, drawn by weight
    'kind': 'text',  # for sft 'text' (packed), 'completion', or 'conversation' (all answers)
    'max_length': 128,  # maximum number of tokens of an example
    'on_error': 'stop',  # malformed records: 'stop', or 'skip' and count them
    'chat_template': placeholder(str),  # jinja template; None: the tokenizer's
  }


def held_out():
  """Returns `config.evals` with a held-out loss, on data.held_out or data.held_out_path."""
  return ml_collections.ConfigDict({'held_out': {'kind': 'loss', 'every': placeholder(int)}})


def evaluator(name, block):
  """Returns all keys of an evaluator: those of its block, and the defaults of the others.

  Args:
    name: Key of `config.evals`.
    block: `config.evals[name]`. Its `kind` is 'loss', 'prompts', 'win_rate' or 'text', by default
      `name`; or its `function` is 'package.module:name' of a user's evaluator.

  Returns:
    ConfigDict whose `kind` is one of these, or 'function' for a user's evaluator.

  Raises:
    UserError: The kind or a key does not exist.
  """
  block = ml_collections.ConfigDict(block).to_dict()
  kind = 'function' if block.get('function') else block.get('kind') or name
  need(
    kind in ('loss', 'prompts', 'win_rate', 'text', 'function'),
    f'config.evals.{name}.kind={kind!r} must be one of loss, prompts, win_rate, text; or set '
    f"config.evals.{name}.function to 'package.module:name'",
  )
  keys = {
    'kind': kind,  # 'loss', 'prompts', 'win_rate' or 'text'; None: its name
    'every': None,  # steps between evaluations; None: only at the end
  }
  if kind == 'function':
    keys['function'] = None  # 'package.module:name' of a user's evaluator
  else:
    keys['path'] = None  # data set; kind 'loss' uses data.held_out or data.held_out_path if None
  if kind in ('prompts', 'win_rate', 'text'):
    keys |= {
      'split': None,  # as in config.data
      'columns': None,  # as in config.data
      'count': None,  # number of prompts, from the start of the data; None: all
      'batch_size': 64,  # responses sampled at a time
      'sampling': {},  # keys of config.sampling that differ, or beta; temperature 0 is greedy
    }
  if kind in ('prompts', 'win_rate'):
    keys['reward'] = {}  # reward, with the keys of config.reward
  if kind == 'text':
    keys['metrics'] = {}  # {name: {'function': 'module:name', 'arguments': {}}}, of all responses
  unknown = sorted(block.keys() - keys.keys())
  need(
    not unknown,
    f'config.evals.{name} has no key {unknown and unknown[0]!r} for kind={kind!r}: its keys are '
    f'{", ".join(keys)}',
  )
  for key in block:
    config_keys.check_value(
      block[key],
      EVALUATOR_TYPES.get(key),
      f'config.evals.{name}.{key}',
      optional=key != 'batch_size',
    )
  keys |= block | {'kind': kind}
  return ml_collections.ConfigDict(keys)


def validate_evals(evals):
  """Checks `config.evals`; see `validate`."""
  for name, block in evals.items():
    block, key = evaluator(name, block), f'evals.{name}.'
    optional_positive(block, key, ('every',))
    if block.kind in ('loss', 'function'):
      continue
    need(block.path, f'config.{key}path is empty: name a data set of prompts')
    optional_positive(block, key, ('count', 'batch_size'))
    unknown = sorted(set(block.sampling) - set(SAMPLING))
    need(not unknown, f'config.{key}sampling has {unknown}: its keys are {", ".join(SAMPLING)}')
    settings = SAMPLING | dict(block.sampling)
    for option, value in settings.items():
      kind = {'top_k': int, 'truncate_at': str}.get(option, type(SAMPLING[option]))
      config_keys.check_value(
        value, kind, f'config.{key}sampling.{option}', optional=SAMPLING[option] is None
      )
    for name in ('max_new_tokens', 'top_p'):
      need(settings[name] > 0, f'config.{key}sampling.{name}={settings[name]} must be positive')
    for name in ('temperature', 'beta'):
      need(
        settings[name] >= 0, f'config.{key}sampling.{name}={settings[name]} must be 0 or positive'
      )


def refuse_evals(evals, kinds, reason):
  """Raises UserError if `config.evals` has one of `kinds`, which the algorithm cannot run."""
  for name, block in evals.items():
    kind = evaluator(name, block).kind
    need(kind not in kinds, f'config.evals.{name}.kind={kind!r} needs {reason}')


def apply_preset(config, presets, name):
  """Locks a config and sets the keys of a preset.

  Args:
    config: ConfigDict of an algorithm.
    presets: Dict from the name of a preset to {dotted key: value}.
    name: Name of the preset, or ''.

  Returns:
    The same ConfigDict.

  Raises:
    UserError: The preset does not exist.
  """
  config_keys.lock(config)
  if not name:
    return config
  if name not in presets:
    raise errors.UserError(
      f'unknown preset {name!r} of {config.algorithm}: one of {", ".join(presets) or "none"}'
    )
  config.update_from_flattened_dict(presets[name])
  return config


def parse_arg(arg, **defaults):
  """Parses the string after the colon of `--config=configs/X.py:arg`.

  Args:
    arg: 'key=value,key=value'. A key without a value is True. Each value must have the type of its
      default.
    **defaults: All keys of the argument, with their defaults.

  Returns:
    ConfigDict of all keys.

  Raises:
    UserError: A key is unknown, or a value has the wrong type.
  """
  parsed = dict(defaults)
  for part in filter(None, (arg or '').split(',')):
    key, _, text = part.partition('=')
    if key not in defaults:
      raise errors.UserError(
        f'config argument {key!r} is unknown; this config takes: {", ".join(defaults)}'
      )
    default = defaults[key]
    try:
      value = text if isinstance(default, str) else ast.literal_eval(text or 'True')
    except (SyntaxError, ValueError):
      value = text
    if isinstance(default, float) and type(value) is int:
      value = float(value)
    if type(value) is not type(default):
      raise errors.UserError(
        f'config argument {key}={text!r} must be of type {type(default).__name__}'
      )
    parsed[key] = value
  return ml_collections.ConfigDict(parsed)


def need_argument(arg, key, what):
  """Raises UserError if an argument of a config is empty.

  Args:
    arg: Result of `parse_arg`.
    key: Key of the argument.
    what: Description of what the argument names.
  """
  need(arg[key], f'this config needs the argument {key}, {what}: --config=FILE:{key}=...')


def one_of(config, key, choices):
  """Raises UserError unless the value of a dotted key is in `choices`."""
  value = config
  for part in key.split('.'):
    value = value[part]
  need(value in choices, f'config.{key}={value!r} must be one of {", ".join(choices)}')


def divides(small, big, small_name, big_name):
  """Raises UserError unless `small` is None or a divisor of `big`."""
  need(
    small is None or small > 0 and big % small == 0,
    f'config.{small_name}={small} does not divide config.{big_name}={big}: change either',
  )


def optional_positive(block, name, keys):
  """Raises UserError if the value of one of `keys` is neither None nor positive."""
  for key in keys:
    need(
      block[key] is None or block[key] > 0,
      f'config.{name}{key}={block[key]} must be positive, or None',
    )


def validate(config, device_count):
  """Checks the keys of `common` before anything is loaded or compiled.

  Args:
    config: Config of a run.
    device_count: Number of devices of all processes.

  Raises:
    UserError: A value is wrong; the message names the key, the value and the remedy.
  """
  need(
    (config.steps is None) != (config.data.epochs is None)
    and (config.steps or config.data.epochs or 0) > 0,
    f'set exactly one of config.steps (now {config.steps}) and config.data.epochs (now '
    f'{config.data.epochs}), to a positive number',
  )
  need(config.batch_size > 0, f'config.batch_size={config.batch_size} must be positive')
  need(config.seed >= 0, f'config.seed={config.seed} must be 0 or positive')
  one_of(config, 'optim.name', optim.OPTIMIZERS)
  one_of(config, 'optim.schedule', optim.SCHEDULES)
  one_of(config, 'model.remat', ('none', 'block', 'dots'))
  for key in ('model.dtype', 'model.param_dtype', 'optim.master_dtype', 'optim.moment_dtype'):
    one_of(config, key, ('float32', 'bfloat16'))
  unfrozen = config.model.unfrozen_layers
  need(
    unfrozen is None or unfrozen >= 0,
    f'config.model.unfrozen_layers={unfrozen} must be 0 or more, or None for all',
  )
  validate_lora(config.model.lora, unfrozen)
  need(
    config.optim.ema is None or 0 < config.optim.ema < 1,
    f'config.optim.ema={config.optim.ema} must be in (0, 1), or None',
  )
  validate_data(config.data, 'data')
  need(
    config.model.path or len(config.model.init) > 0,
    'config.model.path and config.model.init are both empty: name a Hugging Face folder '
    'or describe a new model',
  )
  need(
    config.model.path or config.tokenizer,
    'config.tokenizer is None and there is no config.model.path to take it from',
  )
  need(
    config.keep_checkpoints > 0,
    f'config.keep_checkpoints={config.keep_checkpoints} must be positive: a run without '
    'checkpoints cannot resume',
  )
  need(config.log_every > 0, f'config.log_every={config.log_every} must be positive')
  optional_positive(
    config, '', ('checkpoint_every', 'checkpoint_minutes', 'samples_every', 'microbatch_size')
  )
  optional_positive(config.optim, 'optim.', ('clip_norm', 'eps'))
  optional_positive(config.model, 'model.', ('unroll',))
  for key in ('b1', 'b2'):
    need(0 <= config.optim[key] < 1, f'config.optim.{key}={config.optim[key]} must be in [0, 1)')
  need(
    not config.wandb_project or importlib.util.find_spec('wandb'),
    f'config.wandb_project={config.wandb_project!r} needs the package wandb: '
    f"pip install '{WANDB}'; or set it to None",
  )
  validate_evals(config.evals)
  if 'held_out' in config.data:
    held_out, path = config.data.held_out, config.data.held_out_path
    need(
      held_out is None or 0 < held_out < 1,
      f'config.data.held_out={held_out} must be in (0, 1), or None',
    )
    need(
      not (held_out and path),
      f'config.data.held_out={held_out} and config.data.held_out_path={path!r}: set at most one',
    )
  warmup_from = config.optim.warmup_from
  need(0 <= warmup_from <= 1, f'config.optim.warmup_from={warmup_from} must be in [0, 1]')
  for key in ('learning_rate', 'warmup_steps', 'weight_decay'):
    need(config.optim[key] >= 0, f'config.optim.{key}={config.optim[key]} must be 0 or positive')
  validate_mesh(config, device_count)


def validate_data(block, name):
  """Checks the keys of `data`.

  Args:
    block: `config.data` or another block with its keys.
    name: Dotted key of the block.

  Raises:
    UserError: See `validate`.
  """
  need(
    block.path or block.mixture,
    f'config.{name}.path is empty: name a file, a folder, a hub data set, tfds:NAME or '
    f'feedback:URL#PROJECT; or name several in config.{name}.mixture',
  )
  need(
    not (block.path and block.mixture),
    f'config.{name}.path={block.path!r} and config.{name}.mixture has {", ".join(block.mixture)}: '
    'set one of them',
  )
  need(
    block.on_error in ('stop', 'skip'),
    f'config.{name}.on_error={block.on_error!r} must be one of stop, skip',
  )
  length = block.get('max_length', 1)
  need(length > 0, f'config.{name}.max_length={length} must be positive')
  _validate_source(block, f'config.{name}')
  of_source = ml_collections.ConfigDict({'weight': 1.0} | {key: data()[key] for key in SOURCE})
  for source, keys in block.mixture.items():
    key = f'config.{name}.mixture.{source}'
    need(
      isinstance(keys, ml_collections.ConfigDict),
      f"{key}={keys!r} must be a dict, such as {{'weight': 1.0, 'path': 'FILE'}}",
    )
    config_keys.check_keys(keys, of_source, key, require_all=False)
    need(keys.get('path'), f'{key}.path is empty: name a file, a folder, a hub data set, tfds:NAME')
    weight = keys.get('weight', 1.0)
    need(weight > 0, f'{key}.weight={weight} must be positive')
    _validate_source(keys, key)


def _validate_source(block, key):
  """Checks how a data set is read: `columns` and `format` of a block with the dotted name `key`."""
  columns, format = block.get('columns'), block.get('format')
  pairs = [pair.split('=') for pair in (columns or '').split(',') if pair]
  need(
    all(len(pair) == 2 and all(pair) for pair in pairs) and len(dict(pairs)) == len(pairs),
    f"{key}.columns={columns!r} must have the form 'new=stored,new=stored', with different new "
    'names',
  )
  need(
    format in (None, *FORMATS),
    f'{key}.format={format!r} must be one of {", ".join(FORMATS)}, or None',
  )


def validate_lora(lora, unfrozen_layers):
  """Checks `config.model.lora`; see `validate`."""
  need(
    not lora.path or not lora.targets and unfrozen_layers is None,
    f'config.model.lora.path={lora.path!r} has its own targets: leave config.model.lora.targets '
    'empty and config.model.unfrozen_layers at None',
  )
  for target in lora.targets:
    fits = len(target) == 3 and isinstance(target[0], str) and isinstance(target[1], int)
    need(
      fits and target[1] > 0 and target[2] > 0,
      f'config.model.lora.targets has {target!r}: each must be (regex, rank, alpha), with a '
      'positive integer as rank and a positive alpha',
    )
    try:
      re.compile(target[0])
    except re.error as error:
      raise errors.UserError(
        f'config.model.lora.targets: {target[0]!r} is not a regular expression: {error}'
      ) from None


def data_shards(config, device_count):
  """Returns the number of shards that the examples of a batch are split into."""
  tensor = config.mesh.tensor
  if tensor < 0:
    tensor = device_count // (config.mesh.data * config.mesh.fsdp)
  return device_count // tensor


def divides_over_shards(config, device_count, name, size):
  """Raises UserError unless `size` is a multiple of the number of data shards."""
  shards = data_shards(config, device_count)
  need(
    size % shards == 0,
    f'config.{name}={size} does not divide over the {shards} data shards of '
    f'config.mesh={dict(config.mesh)} on {device_count} devices: make it a multiple',
  )


def validate_mesh(config, device_count):
  """Checks `config.mesh`, and that the batch divides over its shards; see `validate`."""
  sizes = dict(config.mesh)
  known = 1
  for name, size in sizes.items():
    need(size == -1 or size > 0, f'config.mesh.{name}={size} must be positive, or -1')
    known *= max(size, 1)
  free = sum(size == -1 for size in sizes.values())
  need(free <= 1, f'config.mesh={sizes}: only one axis can be -1')
  need(
    device_count % known == 0 and (free or known == device_count),
    f'config.mesh={sizes} does not fit {device_count} devices',
  )
  divides_over_shards(config, device_count, 'batch_size', config.batch_size)

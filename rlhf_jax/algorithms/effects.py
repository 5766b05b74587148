"""Keys that do nothing in some setting: one table, read after the checks of a config.

Where such a key differs from its default somebody expects something of it, and is told. A key that
contradicts another is an error instead, and stands in the `validate` of its algorithm.
"""

import ml_collections

from rlhf_jax.rewards import scorers

# (keys, the other key, the values of it with which they have no effect, why). Values are a tuple, or a
# function of (value, config). Keys that a config lacks are passed over.
TABLE = (
  (
    'data.separator',
    'data.path',
    lambda path, config: _has_records(path),
    'it parts the texts of a text file',
  ),
  (
    'ptx.separator',
    'ptx.path',
    lambda path, config: _has_records(path),
    'it parts the texts of a text file',
  ),
  (
    'data.held_out data.held_out_path',
    'evals',
    lambda evals, config: not _held_out_losses(evals),
    "no evaluator of kind 'loss' reads it",
  ),
  ('model.lora.rslora', 'model.lora.targets', ((),), 'only new adapters are scaled by it'),
  ('optim.warmup_from', 'optim.warmup_steps', (0,), 'there is no warmup'),
  (
    'samples_every',
    'algorithm',
    lambda name, config: 'sampling' not in config,
    'it samples no texts',
  ),
  # Reward models.
  (
    'preference.centering preference.label_smoothing',
    'preference.loss',
    ('pick_best', 'rating'),
    "it is part of the 'pairwise' loss",
  ),
  ('preference.normalize_path', 'preference.normalize', ('none',), 'scores are not normalized'),
  # On-policy algorithms.
  (
    'sampling.truncate_after',
    'sampling.truncate_at',
    (None,),
    'no token but the EOS ends a response',
  ),
  (
    'sampling.gather_weights',
    'sampling.max_concurrent',
    lambda slots, config: slots is not None,
    'the weights are gathered once a rollout anyway',
  ),
  ('rl.missing_eos_value', 'rl.missing_eos', ('none',), 'a missing EOS changes no score'),
  ('rl.kl_in rl.kl_estimator', 'rl.kl_coef', (0,), 'there is no KL penalty'),
  ('rl.length_buckets', 'microbatch_size', (None,), 'only microbatches are cut by length'),
  (
    'rl.clip_low rl.clip_high rl.dual_clip rl.value_clip',
    'rl.minibatches',
    lambda count, config: count == config.rl.epochs == 1 and config.rl.behaviour != 'sampler',
    'with config.rl.epochs=1 too there is one update a rollout, at which the ratio is 1',
  ),
  (
    'rl.behaviour',
    'rl.minibatches',
    lambda count, config: (
      count == 1 and not config.microbatch_size and config.rl.behaviour == 'minibatch'
    ),
    'the first epoch is one minibatch anyway',
  ),
  (
    'ptx.path ptx.split ptx.columns ptx.separator ptx.kind ptx.max_length ptx.on_error',
    'rl.ptx_coef',
    (0,),
    'no pretraining is mixed in',
  ),
  # PPO.
  (
    'rl.kl_target rl.kl_horizon',
    'rl.kl_controller',
    ('fixed',),
    'config.rl.kl_coef stays as it is',
  ),
  (
    'rl.kl_horizon',
    'rl.kl_controller',
    ('adaptive_per_token',),
    'config.rl.kl_coef changes by a fixed share',
  ),
  ('rl.value_clip critic.learning_rate', 'rl.vf_coef', (0,), 'the critic is not trained'),
  (
    'rl.whiten_unbiased',
    'rl.whiten_advantages',
    lambda how, config: how == 'none' and not config.rl.whiten_rewards,
    'nothing is whitened',
  ),
)
# The same of a block of scorers.config.
REWARDS = (
  ('max_length', 'function', lambda name, config: bool(name), 'a function is given whole texts'),
  ('ensemble ensemble_coef', 'models', ((), None), 'there is no ensemble'),
  ('ensemble_coef', 'ensemble', ('mean', 'min', None), "it is the coefficient of 'variance'"),
)


def without(config, defaults):
  """What a run sets and has no effect, and a warmup without an end.

  Args:
    config: of a single run, which is valid.
    defaults: the config() of its algorithm.

  Returns:
    List of lines for the user.
  """
  lines = _lines(TABLE, config, defaults, 'config')
  for key, block in _rewards(config):
    lines += _lines(REWARDS, block, scorers.config(), key)
  return lines + _losses_without_data(config, defaults) + _endless_warmup(config)


def _endless_warmup(config):
  """A warmup that the run is too short for, where the config says how long it is."""
  warmup = config.optim.warmup_steps
  return (
    []
    if not config.steps or warmup < config.steps
    else [
      f'config.optim.warmup_steps={warmup} is not below config.steps={config.steps}: the learning '
      'rate never reaches config.optim.learning_rate'
    ]
  )


def _lines(table, config, defaults, prefix):
  """The rows of a table that apply to a block whose dotted name is `prefix`; a key is named once."""
  lines = {}
  for keys, other, values, reason in table:
    given = _value(config, other)
    for key in keys.split():
      value = _value(config, key)
      if value is None or value == _value(defaults, key):
        continue
      if values(given, config) if callable(values) else given in values:
        setting = f'{prefix}.{other}={_plain(given)!r}'
        lines.setdefault(key, f'{prefix}.{key}={value!r} has no effect with {setting}: {reason}')
  return list(lines.values())


def _value(config, key):
  """The value of a dotted key; None where there is no such key."""
  for part in key.split('.'):
    if part not in config:
      return None
    config = config[part]
  return config


def _plain(value):
  return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def _rewards(config):
  """(dotted name, block) of every reward of a run: its own, its evaluators', and the parts of each."""
  blocks = [('config.reward', config.reward)] if 'reward' in config else []
  blocks += [
    (f'config.evals.{name}.reward', block.reward)
    for name, block in config.evals.items()
    if 'reward' in block
  ]
  return blocks + [
    (f'{key}.parts.{name}', part)
    for key, block in blocks
    for name, part in (block.get('parts') or {}).items()
  ]


def _held_out_losses(evals):
  """Names of the evaluators that compute a loss on what the run holds out."""
  return [
    name
    for name, block in evals.items()
    if (block.get('kind') or name) == 'loss' and not block.get('path')
  ]


def _losses_without_data(config, defaults):
  """Evaluators of the held-out loss, other than those that every run has, where nothing is held out."""
  if config.data.get('held_out') or config.data.get('held_out_path'):
    return []
  return [
    f'config.evals.{name} has no effect with config.data.held_out=None: set it, config.data.held_out_path '
    f'or config.evals.{name}.path'
    for name in _held_out_losses(config.evals)
    if _plain(config.evals[name]) != _plain(defaults.evals.get(name))
  ]


def _has_records(path):
  """Whether a path names a file of records, in which nothing stands between texts."""
  return bool(path) and path.lower().removesuffix('.gz').endswith(
    ('.jsonl', '.json', '.parquet', '.csv', '.tsv')
  )

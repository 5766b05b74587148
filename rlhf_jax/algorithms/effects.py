"""Warnings about config keys that have no effect because of the value of another key.

They are reported after a config is validated, for keys that differ from their defaults. Keys that
contradict each other are errors, which the `validate` of each algorithm raises.
"""

import ml_collections

from rlhf_jax.rewards import scorers

# (keys, other key, values, reason): `keys` have no effect if `other key` has one of `values`, which
# is a tuple or a predicate of (value, config). Keys that a config lacks are skipped.
TABLE = (
  (
    'data.separator',
    'data.path',
    lambda path, config: _has_records(path),
    'it separates the texts of a plain text file',
  ),
  (
    'ptx.separator',
    'ptx.path',
    lambda path, config: _has_records(path),
    'it separates the texts of a plain text file',
  ),
  (
    'data.held_out data.held_out_path',
    'evals',
    lambda evals, config: not _held_out_losses(evals),
    "only evaluators of kind 'loss' read it",
  ),
  ('model.lora.rslora', 'model.lora.targets', ((),), 'it scales new adapters only'),
  ('optim.warmup_from', 'optim.warmup_steps', (0,), 'there is no warmup'),
  (
    'optim.b1 optim.moment_dtype',
    'optim.name',
    ('rmsprop', 'tf_rmsprop'),
    'RMSProp has no first moment',
  ),
  (
    'samples_every',
    'algorithm',
    lambda name, config: 'sampling' not in config,
    'this algorithm samples no responses',
  ),
  # Reward models.
  (
    'preference.centering preference.label_smoothing',
    'preference.loss',
    ('pick_best', 'rating'),
    "it is part of the 'pairwise' loss",
  ),
  (
    'dpo.label_smoothing',
    'dpo.loss',
    ('hinge', 'ipo', 'kto', 'orpo'),
    'this loss has no such term',
  ),
  ('dpo.length_normalize', 'dpo.loss', ('orpo', 'simpo'), 'it always takes means over tokens'),
  ('dpo.length_normalize', 'dpo.loss', ('kto',), 'it compares sums over tokens'),
  ('dpo.sft_coef', 'dpo.loss', ('kto',), 'it has no pairs'),
  (
    'dpo.margin_coef',
    'dpo.loss',
    lambda loss, config: loss != 'sigmoid',
    "it is part of the 'sigmoid' loss",
  ),
  ('dpo.gamma', 'dpo.loss', lambda loss, config: loss != 'simpo', "it is part of 'simpo'"),
  (
    'dpo.desirable_weight dpo.undesirable_weight',
    'dpo.loss',
    lambda loss, config: loss != 'kto',
    "it is part of 'kto'",
  ),
  ('reference dpo.reference_logprobs', 'dpo.loss', ('orpo', 'simpo'), 'there is no reference'),
  (
    'preference.reliability_learning_rate',
    'preference.reliability',
    (False,),
    'no reliability is learned',
  ),
  ('preference.normalize_path', 'preference.normalize', ('none',), 'scores are not normalized'),
  # Distillation.
  ('distillation.beta', 'distillation.loss', ('reverse_kl', 'forward_kl'), "only 'jsd' mixes"),
  (
    'data.max_length',
    'distillation.student_fraction',
    (1.0,),
    'the student samples all responses',
  ),
  (
    'data.max_prompt_length data.on_long sampling.max_new_tokens sampling.top_k sampling.top_p '
    'sampling.min_new_tokens sampling.stop sampling.max_concurrent sampling.gather_weights '
    'samples_every',
    'distillation.student_fraction',
    (0.0,),
    'the student samples nothing',
  ),
  # ILQL.
  ('ilql.awac_beta ilql.awac_mean', 'ilql.awac_coef', (0,), 'the policy has no loss'),
  # On-policy algorithms.
  (
    'sampling.truncate_after',
    'sampling.truncate_at',
    (None,),
    'only the EOS ends a response',
  ),
  (
    'sampling.gather_weights',
    'sampling.max_concurrent',
    lambda slots, config: slots is not None,
    'the weights are gathered once per rollout anyway',
  ),
  ('rl.missing_eos_value', 'rl.missing_eos', ('none',), 'a missing EOS does not change the score'),
  ('rl.kl_in rl.kl_estimator', 'rl.kl_coef', (0,), 'there is no KL penalty'),
  ('rl.length_buckets', 'microbatch_size', (None,), 'only microbatches are grouped by length'),
  (
    'rl.clip_low rl.clip_high rl.dual_clip rl.value_clip',
    'rl.minibatches',
    lambda count, config: count == config.rl.epochs == 1 and config.rl.behaviour != 'sampler',
    'with config.rl.epochs=1 there is one update per rollout, and its ratio is always 1',
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
    'rl.importance_cap',
    'rl.behaviour',
    ('sampler',),
    'the old log-probabilities are those of the sampler, so all weights are 1',
  ),
  (
    'ptx.path ptx.mixture ptx.split ptx.columns ptx.separator ptx.kind ptx.max_length ptx.on_error',
    'rl.ptx_coef',
    (0,),
    'no pretraining batches are used',
  ),
  # GRPO.
  ('rl.tau_positive rl.tau_negative', 'rl.loss', ('clip', 'cispo'), "only 'sapo' has a gate"),
  ('rl.clip_low rl.clip_high', 'rl.loss', ('sapo',), 'its gate takes the place of a clip'),
  ('rl.dual_clip', 'rl.loss', ('cispo', 'sapo'), 'nothing clips the loss'),
  # REINFORCE.
  ('rl.clip_low rl.clip_high rl.dual_clip', 'rl.clip', (False,), 'the loss is -A log p'),
  ('rl.gamma', 'rl.returns', ('sequence',), 'the rewards of a response are summed'),
  (
    'rl.baseline_decay',
    'rl.baseline',
    ('none', 'batch', 'group'),
    'there is no moving average',
  ),
  # PPO.
  (
    'rl.kl_target rl.kl_horizon',
    'rl.kl_controller',
    ('fixed',),
    'config.rl.kl_coef is constant',
  ),
  (
    'rl.kl_horizon',
    'rl.kl_controller',
    ('adaptive_per_token',),
    'config.rl.kl_coef changes by a fixed factor',
  ),
  (
    'rl.clip_low rl.clip_high rl.dual_clip rl.value_clip',
    'algorithm',
    ('a2c', 'rejection_sampling'),
    'its loss has no clips',
  ),
  (
    'rl.clip_low rl.clip_high rl.dual_clip',
    'algorithm',
    ('trpo',),
    'the bound on the KL replaces the clips',
  ),
  ('rl.vf_coef', 'algorithm', ('trpo',), 'the critic has updates of its own'),
  (
    'rl.clip_low rl.clip_high rl.dual_clip rl.entropy_coef rl.kl_in rl.kl_estimator',
    'algorithm',
    ('online_dpo',),
    'the loss of a pair has no such term',
  ),
  ('rl.label_smoothing', 'rl.loss', ('ipo', 'hinge'), 'this loss has no such term'),
  ('rl.keep_count', 'rl.keep', ('percentile',), 'the scores decide how many responses are kept'),
  (
    'rl.start_percentile rl.end_percentile rl.improve_steps',
    'rl.keep',
    ('best',),
    'a fixed number of responses is kept',
  ),
  (
    'rl.mask_min_tokens rl.mask_every rl.mask_update',
    'rl.mask_top_p',
    (1.0,),
    'all tokens are allowed',
  ),
  ('rl.value_clip critic.learning_rate', 'rl.vf_coef', (0,), 'the critic is not trained'),
  (
    'rl.whiten_unbiased',
    'rl.whiten_advantages',
    lambda how, config: how == 'none' and not config.rl.whiten_rewards,
    'nothing is whitened',
  ),
)
# The same for blocks with the keys of scorers.config(), such as config.reward.
REWARDS = (
  ('max_length', 'function', lambda name, config: bool(name), 'a function gets the full texts'),
  (
    'example_timeout error_score',
    'workers',
    (0, None),
    'only workers score one example at a time',
  ),
  ('error_score', 'on_error', ('stop', 'skip', None), 'no failed example gets a score'),
  ('workers', 'function', (None,), 'only a function runs in workers'),
  ('max_length', 'url', lambda url, config: bool(url), 'a server gets the full texts'),
  ('request_size request_timeout attempts', 'url', (None,), 'there is no reward server'),
  (
    'ensemble ensemble_coef',
    'models',
    lambda models, block: not models and not block.get('model'),  # a model may have several heads
    'there is no ensemble',
  ),
  ('ensemble_coef', 'ensemble', ('mean', 'min', None), "only 'variance' uses it"),
)


def warnings(config, defaults):
  """Returns a warning for each setting without effect, and for a warmup longer than the run.

  Args:
    config: Valid config of a single run.
    defaults: Default config of its algorithm.

  Returns:
    List of messages.
  """
  lines = _lines(TABLE, config, defaults, 'config')
  for key, block in _rewards(config):
    lines += _lines(REWARDS, block, scorers.config(), key)
  return lines + _losses_without_data(config, defaults) + _endless_warmup(config)


def _endless_warmup(config):
  """Returns a warning if `config.steps` is set and is not above the warmup steps."""
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
  """Returns the warnings of a table for a block named `prefix`, at most one per key."""
  lines = {}
  for keys, other, values, reason in table:
    given = _value(config, other)
    for key in keys.split():
      value = _value(config, key)
      if value is None or _plain(value) == _plain(_value(defaults, key)):
        continue
      if values(given, config) if callable(values) else given in values:
        setting = f'{prefix}.{other}={_plain(given)!r}'
        lines.setdefault(
          key, f'{prefix}.{key}={_plain(value)!r} has no effect with {setting}: {reason}'
        )
  return list(lines.values())


def _value(config, key):
  """Returns the value of a dotted key, or None if there is no such key."""
  for part in key.split('.'):
    if part not in config:
      return None
    config = config[part]
  return config


def _plain(value):
  return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def _rewards(config):
  """Returns (dotted name, block) for the run's reward, its evaluators' rewards and their parts."""
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
  """Returns the names of the evaluators that compute the loss on the run's held-out data."""
  return [
    name
    for name, block in evals.items()
    if (block.get('kind') or name) == 'loss' and not block.get('path')
  ]


def _losses_without_data(config, defaults):
  """Returns warnings about evaluators of the held-out loss if the run holds out no data."""
  if config.data.get('held_out') or config.data.get('held_out_path'):
    return []
  return [
    f'config.evals.{name} has no effect with config.data.held_out=None: set config.data.held_out, '
    f'config.data.held_out_path or config.evals.{name}.path'
    for name in _held_out_losses(config.evals)
    if _plain(config.evals[name]) != _plain(defaults.evals.get(name))
  ]


def _has_records(path):
  """Returns whether a path names a file of records, which needs no separator between texts."""
  return bool(path) and path.lower().removesuffix('.gz').endswith(
    ('.jsonl', '.json', '.parquet', '.csv', '.tsv')
  )

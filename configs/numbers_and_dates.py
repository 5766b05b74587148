"""RL on RL4LMs' toy tasks: a small model learns to write increasing numbers, or a date.

rlhf run --config=numbers_and_dates --workdir=/tmp/numbers
rlhf run --config=numbers_and_dates:task=dates,algorithm=nlpo --workdir=/tmp/dates
rlhf run --config=numbers_and_dates:debug --workdir=/tmp/debug
rlhf sweep --config=numbers_and_dates:task=dates,model=FOLDER --workdir=/tmp/dates_sweep

See rlhf_jax/tasks/numbers.py for the tasks and their source. A model is pretrained on generated
lists of numbers and sentences, and then trained by RL from an empty prompt: 20 new tokens, or 30
for dates. An iteration has 64 responses, as many as RL4LMs has (1,280 tokens of 20). The maximum
of both rewards is 1; `objective/scores` of the RL stage is the mean reward.

Measured, seed 0, 1,000 samples: increasing numbers from 0.21 to 0.90 (NLPO) to 0.99 (rejection
sampling), dates from 0.17 to between 0.97 and 1.00; see docs/algorithms/index.md. A run takes one
to two minutes of CPU. A2C learns numbers slowly, so it has 200 iterations; at a learning rate of
5e-4 it collapses.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import sft

LENGTHS = {'increasing_numbers': 20, 'dates': 30}  # new tokens of each task, as in RL4LMs
# Settings of each algorithm, in addition to those in `train`. PPO's advantages are not whitened:
# few of the first samples have a reward on dates, and whitened ones made a policy forget them.
SETTINGS = {
  'ppo': {
    'critic.kind': 'trunk',
    'rl.lam': 1.0,
    'rl.whiten_advantages': 'none',
    'optim.eps': 1e-4,
  },
  'a2c': {
    'critic.kind': 'trunk',
    'rl.epochs': 1,
    'rl.minibatches': 8,
    'rl.gamma': 1.0,
    'rl.lam': 0.95,
    'optim.name': 'rmsprop',
    'optim.learning_rate': 2e-4,
    'steps': 200,
  },
  'nlpo': {'critic.kind': 'trunk', 'rl.mask_min_tokens': 10, 'rl.mask_every': 5},
  'trpo': {'rl.epochs': 5, 'optim.learning_rate': 1e-3, 'rl.max_kl': 0.03},
  'grpo': {'sampling.samples': 8, 'rl.normalize': 'token'},
  'rloo': {'sampling.samples': 8, 'rl.epochs': 2},
  'reinforce': {'rl.clip': True, 'rl.whiten_advantages': True},
  'online_dpo': {'sampling.samples': 4, 'rl.epochs': 2, 'rl.kl_coef': 0.1},
  'rejection_sampling': {'sampling.samples': 8, 'rl.kl_coef': 0.0},
}


def get_config(arg=None):
  """Returns the config.

  Arguments: debug (seconds), seed, task (increasing_numbers or dates), algorithm, model (a folder,
  instead of pretraining).
  """
  defaults = {'debug': False, 'seed': 0, 'task': 'increasing_numbers'}
  arg = c.parse_arg(arg, **defaults, algorithm='ppo', model='')
  c.need(
    arg.task in LENGTHS,
    f'config argument task={arg.task!r} must be one of {", ".join(LENGTHS)}',
  )
  name = arg.algorithm.replace('.', '_')
  model = arg.model or '$workdir/pretrain'
  stages = ('world', name, 'evaluate') if arg.model else ('world', 'pretrain', name, 'evaluate')
  config = ml_collections.ConfigDict({'seed': arg.seed, 'stages': stages})
  config.world = ml_collections.ConfigDict(
    {'function': 'rlhf_jax.tasks.numbers:write', 'count': 8_000, 'seed': None}
  )
  if not arg.model:
    config.pretrain = pretrain()
  config[name] = train(arg.task, arg.algorithm, arg.model or '$workdir/pretrain/model')
  config.evaluate = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': f'Toy task of RL4LMs: {arg.task.replace("_", " ")}',
      'summary': 'Gold is the reward itself; its maximum is 1.',
      'workdir': '$workdir',
      'policies': (('pretrained', model), (name, f'$workdir/{name}')),
      'baseline': 'pretrained',
      'trained': name,
      'best_of': 0,
      'reward_model': '',
      'comparisons': '',
      'prompts': '$workdir/world/prompts.jsonl',
      'samples': 1_000,
      'max_new_tokens': LENGTHS[arg.task],
      'temperature': 1.0,
      'gold': f'rlhf_jax.tasks.numbers:{arg.task}',
      'gold_path': '',
      'curves': stages[1:-1],
      'seed': None,
    }
  )
  if arg.debug:
    debug(config, name)
  return config


def get_hyper(h):
  """Lists the runs of `rlhf sweep`: every algorithm."""
  return h.sweep(':algorithm', tuple(SETTINGS))


def pretrain():
  """Returns the pretraining stage."""
  stage = sft.config()
  stage.seed, stage.tokenizer = None, '$workdir/world/tokenizer'
  stage.model.init = ml_collections.ConfigDict(
    {
      'family': 'llama',
      'hidden_size': 64,
      'intermediate_size': 192,
      'num_hidden_layers': 2,
      'num_attention_heads': 2,
      'num_key_value_heads': 2,
      'max_position_embeddings': 64,
      'tie_word_embeddings': True,
    }
  )
  stage.data.update({'path': '$workdir/world/texts.jsonl', 'max_length': 64, 'held_out': 0.05})
  stage.batch_size, stage.steps = 16, 400
  stage.optim.update(
    {'learning_rate': 3e-3, 'schedule': 'cosine', 'warmup_steps': 20, 'clip_norm': 1.0}
  )
  stage.log_every = 10
  return stage


def train(task, algorithm, model):
  """Returns the RL stage."""
  stage = build.load(algorithm).config()
  stage.seed, stage.model.path = None, model
  stage.data.update({'path': '$workdir/world/prompts.jsonl', 'max_prompt_length': 1})
  stage.reward.function = f'rlhf_jax.tasks.numbers:{task}'
  stage.sampling.max_new_tokens = LENGTHS[task]
  stage.batch_size, stage.steps = 64, 100
  stage.rl.update({'epochs': 4, 'minibatches': 2, 'kl_coef': 0.01})
  stage.optim.update(
    {'name': 'adam', 'learning_rate': 1e-3, 'clip_norm': 1.0, 'schedule': 'linear'}
  )
  stage.samples_every = 10
  stage.update_from_flattened_dict(SETTINGS.get(algorithm, {}))
  return stage


def debug(config, name):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  config.world.count = 200
  if 'pretrain' in config:
    config.pretrain.steps, config.pretrain.optim.warmup_steps = 2, 0
  config[name].update({'steps': 2, 'batch_size': 16})
  config.evaluate.samples = 16

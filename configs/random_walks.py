"""RL on trlX's random walks: a small GPT-2 learns the shortest walks to a goal on a graph.

rlhf run --config=random_walks --workdir=/tmp/walks
rlhf run --config=random_walks:seed=1 --workdir=/tmp/walks_1
rlhf run --config=random_walks:debug --workdir=/tmp/debug
rlhf sweep --config=random_walks:model=FOLDER --workdir=/tmp/walks_sweep

See rlhf_jax/tasks/random_walks.py for the task and its source. A model is pretrained on 20,000
random walks and then trained on the optimality of its own walks, much as in trlX's
examples/randomwalks. `objective/scores` of the RL stage is the sampled optimality.

Expected of PPO, seeds 0 to 4 from one pretrained model (model=FOLDER), 5,000 samples: optimality
0.34 before (0.346 is exact for uniform steps) and 0.99 after, first above 0.9 at iteration 3 or 4.
docs/algorithms/index.md has the other algorithms. The loss of the pretrained model on the example's
walks is 0.714; their entropy is 0.705. Takes 2 to 3 minutes on 2 shared CPU cores.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import sft
from rlhf_jax.tasks import random_walks

LENGTH = random_walks.MAX_LENGTH - 1
# Settings of each algorithm, in addition to those in `train`. PPO has trlX's epochs, value
# coefficient and betas. It differs in minibatches of 70 and 70 instead of 100 and 40, in lambda 1
# instead of 0.95, and in advantages that are not whitened: when nearly all walks are optimal,
# whitening only amplifies noise, and some seeds collapse. A large epsilon has the same reason: as
# the gradients shrink, so do Adam's steps, which allows a learning rate of 2e-3 at the start.
SETTINGS = {
  'ppo': {
    'rl.minibatches': 2,
    'rl.vf_coef': 1.2,
    'rl.lam': 1.0,
    'rl.whiten_advantages': 'none',
    'rl.whiten_unbiased': False,
    'optim.learning_rate': 2e-3,
    'optim.eps': 4e-4,
  },
  'a2c': {
    'rl.epochs': 1,
    'rl.minibatches': 10,
    'rl.gamma': 1.0,
    'rl.lam': 0.95,
    'optim.learning_rate': 1e-4,
  },
  'nlpo': {
    'rl.minibatches': 2,
    'rl.vf_coef': 1.2,
    'rl.whiten_advantages': 'minibatch',
    'rl.entropy_coef': 0.01,
    'rl.mask_min_tokens': 8,
    'rl.mask_every': 1,
    'critic.kind': 'trunk',
    'optim.b2': 0.95,
  },
  'rejection_sampling': {
    'rl.minibatches': 2,
    'sampling.samples': 7,
    'optim.learning_rate': 1e-3,
    'optim.b2': 0.95,
  },
  'grpo': {'rl.minibatches': 2, 'rl.normalize': 'token', 'sampling.samples': 7, 'optim.b2': 0.95},
  'online_dpo': {
    'rl.kl_coef': 1.0,
    'sampling.samples': 7,
    'optim.learning_rate': 2e-4,
    'optim.b2': 0.95,
  },
  'trpo': {'rl.epochs': 5, 'rl.max_kl': 0.01, 'rl.cg_steps': 10},
  'reinforce': {
    'rl.minibatches': 2,
    'rl.clip': True,
    'rl.whiten_advantages': True,
    'optim.b2': 0.95,
  },
  'reinforce_plus_plus': {'rl.minibatches': 2, 'optim.b2': 0.95},
  'rloo': {'rl.minibatches': 2, 'sampling.samples': 7, 'optim.b2': 0.95},
}
# The module and preset of entries of SETTINGS that are not a module without a preset.
PRESETS = {'ppo': ('ppo', 'trlx'), 'reinforce_plus_plus': ('reinforce', 'reinforce_plus_plus')}


def get_config(arg=None):
  """Returns the config.

  Arguments: debug (seconds), seed, algorithm, model (a folder, instead of pretraining).
  """
  arg = c.parse_arg(arg, debug=False, seed=0, algorithm='ppo', model='')
  name = arg.algorithm.replace('.', '_')
  model = arg.model or '$workdir/pretrain'
  stages = ('world', name, 'evaluate') if arg.model else ('world', 'pretrain', name, 'evaluate')
  config = ml_collections.ConfigDict({'seed': arg.seed, 'stages': stages})
  config.world = ml_collections.ConfigDict(
    {'function': 'rlhf_jax.tasks.random_walks:write', 'walks': 20_000, 'seed': None}
  )
  if not arg.model:
    config.pretrain = pretrain()
  config[name] = train(arg.algorithm, arg.model or '$workdir/pretrain/model')
  config.evaluate = evaluate((('pretrained', model), (name, f'$workdir/{name}')))
  config.evaluate.curves = stages[1:-1]
  if arg.debug:
    debug(config, name)
  return config


def get_hyper(h):
  """Lists the runs of `rlhf sweep`: every algorithm with five seeds."""
  return h.product([h.sweep(':algorithm', tuple(SETTINGS)), h.sweep(':seed', range(5))])


def pretrain():
  """Returns the pretraining stage; `held_out/loss` is the loss on the example's 1,000 walks."""
  stage = sft.config()
  stage.seed = None
  stage.tokenizer = '$workdir/world/tokenizer'
  stage.model.init = ml_collections.ConfigDict(random_walks.MODEL)
  stage.data.update(
    {
      'path': '$workdir/world/texts.jsonl',
      'held_out_path': '$workdir/world/walks.jsonl',
      'max_length': 44,
    }
  )
  stage.batch_size, stage.data.epochs, stage.evals.held_out.every = 32, 3.0, 50
  stage.optim.update(
    {'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 20, 'clip_norm': 1.0}
  )
  stage.log_every = 10
  return stage


def train(algorithm, model):
  """Returns the RL stage, without KL penalty.

  Each of its 20 iterations samples 140 responses, 7 to each of the 20 prompts.
  """
  module, preset = PRESETS.get(algorithm, (algorithm, ''))
  stage = build.load(module).config(preset)
  stage.seed = None
  stage.model.path = model
  stage.data.update({'path': '$workdir/world/prompts.jsonl', 'max_prompt_length': 1})
  stage.reward.function = 'rlhf_jax.tasks.random_walks:reward'
  stage.sampling.max_new_tokens = LENGTH
  stage.batch_size, stage.steps = 140, 20
  stage.rl.update({'epochs': 4, 'kl_coef': 0.0})
  stage.optim.update({'learning_rate': 3e-4, 'schedule': 'linear'})
  stage.samples_every = 5
  stage.update_from_flattened_dict(SETTINGS.get(algorithm, {}))
  return stage


def evaluate(policies):
  """Returns the stage that compares policies (name, folder): the first is the baseline."""
  names = [name for name, _ in policies]
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': 'Random walks',
      'summary': 'Gold is the reward itself: the optimality of the walk.',
      'workdir': '$workdir',
      'policies': tuple(policies),
      'baseline': names[0],
      'trained': names[-1],
      'best_of': 0,
      'reward_model': '',
      'comparisons': '',
      'prompts': '$workdir/world/prompts.jsonl',
      'samples': 5_000,
      'max_new_tokens': LENGTH,
      'temperature': 1.0,
      'gold': 'rlhf_jax.tasks.random_walks:optimality',
      'gold_path': '',
      'curves': tuple(names[1:]),
      'seed': None,
    }
  )


def debug(config, name):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  config.world.walks = 200
  if 'pretrain' in config:
    config.pretrain.model.init.update({'n_layer': 2, 'n_embd': 48})
    config.pretrain.steps, config.pretrain.data.epochs = 3, None
    config.pretrain.optim.warmup_steps = 0
  config[name].update({'steps': 2, 'batch_size': 28})
  config.evaluate.samples = 40

"""RL on trlX's random walks: a small GPT-2 learns the shortest ways to a goal on a graph.

rlhf run --config=random_walks --workdir=/tmp/walks
rlhf run --config=random_walks:seed=1 --workdir=/tmp/walks_1
rlhf run --config=random_walks:debug --workdir=/tmp/debug

The task and its source are described in rlhf_jax/tasks/random_walks.py. A model is pretrained on
20,000 random walks, then trained on the optimality of its own walks, much as in trlX's
examples/randomwalks. `objective/scores` of the rl stage is the sampled optimality.

Expected of PPO, seed 0, 5,000 samples: optimality 0.34 before (0.346 is exact for uniform steps)
and 0.98 after, first above 0.9 at iteration 6; loss of the pretrained model on the example's walks
0.714, whose entropy is 0.705. 2 to 3 minutes on 2 CPU cores shared with others.
From one pretrained model (model=FOLDER): PPO, seeds 0 to 5, 0.97 to 0.99, first above 0.9 at
iteration 4 to 8; GRPO, seeds 0 to 2, 0.99, first above 0.9 at iteration 5 or 6.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import sft
from rlhf_jax.tasks import random_walks

LENGTH = random_walks.MAX_LENGTH - 1
# What differs from `common` of each algorithm. PPO: trlX's settings, but for minibatches of 70 and
# 70, not 100 and 40, and a learning rate that falls to 0: with trlX's constant one seeds 0 to 2 of
# the given model end at 0.91 to 0.92.
SETTINGS = {
  'ppo': {'rl.minibatches': 2, 'rl.vf_coef': 1.2},
  'grpo': {'rl.minibatches': 2, 'rl.normalize': 'token', 'sampling.samples': 7, 'optim.b2': 0.95},
}
PRESETS = {'ppo': 'trlx'}


def get_config(arg=None):
  """Arguments: debug (seconds), seed, algorithm, model (a folder, in place of pretraining)."""
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
  config.evaluate = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': 'Random walks',
      'summary': 'Gold is the reward itself: the optimality of the walk.',
      'workdir': '$workdir',
      'policies': (('pretrained', model), (name, f'$workdir/{name}')),
      'baseline': 'pretrained',
      'trained': name,
      'best_of': 0,
      'reward_model': '',
      'comparisons': '',
      'prompts': '$workdir/world/prompts.jsonl',
      'samples': 5_000,
      'max_new_tokens': LENGTH,
      'temperature': 1.0,
      'gold': 'rlhf_jax.tasks.random_walks:optimality',
      'gold_path': '',
      'curves': stages[1:-1],
      'seed': None,
    }
  )
  if arg.debug:
    debug(config, name)
  return config


def pretrain():
  """Language modelling of random walks; `held_out/loss` is that of the example's 1,000 walks."""
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
  """20 iterations of 140 responses, each of the 20 prompts 7 times, 4 epochs, no KL penalty."""
  stage = build.load(algorithm).config(PRESETS.get(algorithm, ''))
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


def debug(config, name):
  """Shrinks everything to seconds; the figures mean nothing."""
  config.world.walks = 200
  if 'pretrain' in config:
    config.pretrain.model.init.update({'n_layer': 2, 'n_embd': 48})
    config.pretrain.steps, config.pretrain.data.epochs = 3, None
    config.pretrain.optim.warmup_steps = 0
  config[name].update({'steps': 2, 'batch_size': 28})
  config.evaluate.samples = 40

"""Reward models on Anthropic's HH comparisons (Bai et al. 2022, https://arxiv.org/abs/2204.05862).

rlhf run --config=hh_reward:data=FOLDER --workdir=/tmp/hh

This is a 5-fold cross-validation. On the training part of each fold, a tokenizer and an ensemble of
reward models are trained from scratch. Their mean score is evaluated on the test part: accuracy
with a 95 % interval, next to two baselines, "the shorter response wins" and a logistic model on
bags of words. With 1,842 training pairs, only a very small model with strong token dropout
generalizes. There is no pretraining.

Expected, seed 0: accuracy 0.615 [0.594, 0.636], the logistic model 0.621 [0.602, 0.641], the
shorter response 0.552. Takes about 5 minutes on 2 CPU cores.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.algorithms import reward_model as reward_model_lib

FOLDS = 5
LENGTH = 128


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed, data (a folder), models (per fold)."""
  arg = c.parse_arg(arg, debug=False, seed=0, data='', models=2)
  c.need_argument(arg, 'data', 'the file or folder of HH comparisons')
  folds = range(2 if arg.debug else FOLDS)
  names = [(k, i, f'reward_{k}_{i}') for k in folds for i in range(arg.models)]
  config = ml_collections.ConfigDict(
    {'seed': arg.seed, 'stages': ('folds', *(name for _, _, name in names), 'evaluate')}
  )
  config.folds = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.tasks.hh:write',
      'path': arg.data,
      'count': len(folds),
      'vocab_size': 8_192,
      'turns': 1,
      'seed': None,
    }
  )
  for fold, member, name in names:
    config[name] = reward(fold, 1_000 * arg.seed + member, arg.debug)
  config.evaluate = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.tasks.hh:run',
      'reward_models': tuple(
        tuple(f'$workdir/reward_{k}_{i}/model' for i in range(arg.models)) for k in folds
      ),
      'train': tuple(f'$workdir/folds/train_{k}.jsonl' for k in folds),
      'test': tuple(f'$workdir/folds/test_{k}.jsonl' for k in folds),
      'max_length': LENGTH,
    }
  )
  return config


def reward(fold, seed, debug):
  """Returns the stage that trains a reward model on one fold."""
  stage = reward_model_lib.config()
  stage.seed = seed
  stage.tokenizer = f'$workdir/folds/tokenizer_{fold}'
  stage.model.init = ml_collections.ConfigDict(
    {
      'family': 'llama',
      'hidden_size': 64,
      'intermediate_size': 192,
      'num_hidden_layers': 1,
      'num_attention_heads': 2,
      'num_key_value_heads': 2,
      'max_position_embeddings': 256,
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-5,
    }
  )
  stage.data.update(
    {
      'path': f'$workdir/folds/train_{fold}.jsonl',
      'max_length': LENGTH,
      'held_out_path': f'$workdir/folds/test_{fold}.jsonl',
    }
  )
  stage.batch_size, stage.data.epochs, stage.evals.held_out.every = 32, 4.0, 58
  stage.preference.token_dropout = 0.7
  stage.optim.update(
    {
      'learning_rate': 3e-4,
      'schedule': 'cosine',
      'warmup_steps': 20,
      'b2': 0.98,
      'weight_decay': 0.1,
      'clip_norm': 1.0,
    }
  )
  stage.log_every = 10
  if debug:
    stage.steps, stage.data.epochs, stage.optim.warmup_steps = 3, None, 0
  return stage

"""Reward models of Anthropic's HH comparisons (Bai et al. 2022, https://arxiv.org/abs/2204.05862).

python -m rlhf_jax.main --config=configs/hh_reward.py --workdir=/tmp/hh

5-fold cross-validation: on each fold's training part a tokenizer, a small Llama and from it a
reward model; accuracy on the rest with a bootstrap interval, beside "the shorter reply wins" and a
logistic model on bags of words.
"""

import ml_collections

from rlhf_jax import config as c

FOLDS = 5
LENGTH = 128


def get_config(arg=None):
  """Arguments: debug (seconds), seed, path (a data set of comparisons)."""
  arg = c.parse_arg(arg, debug=False, seed=0, path='../shared/data/hh-rlhf')
  folds = range(2 if arg.debug else FOLDS)
  stages = ['folds'] + [f'{name}_{k}' for k in folds for name in ('pretrain', 'reward')]
  config = ml_collections.ConfigDict({
      'seed': arg.seed, 'stages': (*stages, 'evaluate'), 'data': {'path': arg.path}})
  config.folds = ml_collections.ConfigDict({
      'function': 'rlhf_jax.data.folds:write', 'path': config.data.get_ref('path'),
      'count': len(folds), 'vocab_size': 2_048, 'turns': 1, 'seed': -1})
  for k in folds:
    config[f'pretrain_{k}'] = pretrain(k, arg.debug)
    config[f'reward_{k}'] = reward(k, arg.debug)
  config.evaluate = ml_collections.ConfigDict({
      'function': 'rlhf_jax.evaluation.folds:run',
      'reward_models': tuple((f'$workdir/reward_{k}/model',) for k in folds),
      'train': tuple(f'$workdir/folds/train_{k}.jsonl' for k in folds),
      'test': tuple(f'$workdir/folds/test_{k}.jsonl' for k in folds),
      'max_length': LENGTH, 'unroll': 2})
  return config


def pretrain(fold, debug):
  """Language modelling of the fold's dialogues."""
  stage = c.sft()
  stage.seed = -1
  stage.tokenizer = f'$workdir/folds/tokenizer_{fold}'
  stage.model.unroll = 2
  stage.model.init = ml_collections.ConfigDict({
      'family': 'llama', 'hidden_size': 128, 'intermediate_size': 384,
      'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 4,
      'max_position_embeddings': 256, 'tie_word_embeddings': True, 'rms_norm_eps': 1e-5})
  stage.data.update({'path': f'$workdir/folds/texts_{fold}.jsonl', 'max_length': LENGTH})
  stage.batch_size, stage.epochs = 32, 4.0
  stage.optim.update({'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_steps': 20,
                      'weight_decay': 0.1, 'clip_norm': 1.0})
  stage.log_every = 10
  if debug:
    stage.steps, stage.epochs = 3, 0.0
  return stage


def reward(fold, debug):
  """Pairwise loss from the pretrained model."""
  stage = c.reward_model()
  stage.seed = -1
  stage.model.path = f'$workdir/pretrain_{fold}/model'
  stage.model.unroll = 2
  stage.data.update({'path': f'$workdir/folds/train_{fold}.jsonl', 'max_length': LENGTH,
                     'held_out_path': f'$workdir/folds/test_{fold}.jsonl'})
  stage.batch_size, stage.epochs = 32, 2.0
  stage.reward.lm_coef = 0.1
  stage.optim.update({'learning_rate': 3e-4, 'schedule': 'cosine', 'warmup_steps': 10,
                      'weight_decay': 0.1, 'clip_norm': 1.0})
  stage.log_every = 10
  if debug:
    stage.steps, stage.epochs = 3, 0.0
  return stage

"""PPO for positive film reviews on real text, evaluated by an independent judge.

rlhf run --config=sentiment:data=FOLDER --workdir=/tmp/sentiment

FOLDER holds rt-polarity.pos and rt-polarity.neg of Pang & Lee 2005
(https://arxiv.org/abs/cs/0506075).

A small Llama is pretrained on snippets, and a reward model is trained to prefer positive snippets
to negative ones. PPO's prompts are the first words of snippets. The judge is a logistic model on
words and word pairs, fitted on a half of the data that no model is trained on; the reward model is
evaluated on that half too. The prompts of the evaluation are the first words of snippets of that
half, without PPO's prompts.

Measured on PPO's own prompts, seeds 0 to 2, 512 samples: held-out pair accuracy 0.81 to 0.82;
fraction of positive samples 0.50 to 0.55 before and 0.87 to 0.91 after, at a KL of 7 to 9 nats per
response; distinct-2 0.85 before and 0.75 to 0.77 after. Takes about 5 minutes on 2 CPU cores.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib
from rlhf_jax.algorithms import sft as sft_lib

LENGTH = 64
RESPONSE = 28


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed, data (a folder)."""
  arg = c.parse_arg(arg, debug=False, seed=0, data='')
  c.need_argument(arg, 'data', 'the folder of rt-polarity.pos and rt-polarity.neg')
  config = ml_collections.ConfigDict(
    {
      'seed': arg.seed,
      'stages': ('split', 'pretrain', 'samples', 'reward_model', 'ppo', 'evaluate'),
    }
  )
  config.split = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.tasks.polarity:write',
      'path': arg.data,
      'vocab_size': 8_192,
      'pairings': 8,
      'prompt_words': 3,
      'prompt_count': 2_048,
      'seed': None,
    }
  )
  config.pretrain = pretrain()
  config.samples = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:sample',
      'policy': '$workdir/pretrain',
      'prompts': '$workdir/split/prompts.jsonl',
      'count': 512,
      'max_new_tokens': RESPONSE,
      'temperature': 1.0,
      'seed': None,
    }
  )
  config.reward_model = reward_model()
  config.ppo = ppo()
  config.evaluate = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': 'Film reviews: positive continuations',
      'summary': 'Gold is 1 if the independent judge classifies the text as positive, else 0.',
      'workdir': '$workdir',
      'policies': (('pretrained', '$workdir/pretrain'), ('ppo', '$workdir/ppo')),
      'baseline': 'pretrained',
      'trained': 'ppo',
      'best_of': 8,
      'reward_model': '$workdir/reward_model/model',
      'comparisons': '$workdir/split/held_out.jsonl',
      'prompts': '$workdir/split/held_out_prompts.jsonl',
      'samples': 512,
      'max_new_tokens': RESPONSE,
      'temperature': 1.0,
      'gold': 'rlhf_jax.tasks.polarity:sentiment',
      'gold_path': '$workdir/split/judge.jsonl',
      'curves': ('pretrain', 'reward_model', 'ppo'),
      'seed': None,
    }
  )
  if arg.debug:
    debug(config)
  return config


def base(stage, model):
  """Sets the keys that all training stages share."""
  stage.seed = None
  stage.tokenizer = '$workdir/split/tokenizer'
  stage.model.path = model
  stage.optim.clip_norm = 1.0
  stage.log_every, stage.checkpoint_every = 5, 100
  return stage


def llama(*, width, layers):
  """Returns the config.json of a small Llama with heads of width 32."""
  return ml_collections.ConfigDict(
    {
      'family': 'llama',
      'hidden_size': width,
      'intermediate_size': 3 * width,
      'num_hidden_layers': layers,
      'num_attention_heads': width // 32,
      'num_key_value_heads': width // 32,
      'max_position_embeddings': 128,
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-5,
    }
  )


def pretrain():
  """Returns the pretraining stage, on the packed snippets."""
  stage = base(sft_lib.config(), None)
  stage.model.init = llama(width=192, layers=3)
  stage.data.update({'path': '$workdir/split/texts.jsonl', 'max_length': LENGTH, 'held_out': 0.04})
  stage.batch_size, stage.data.epochs, stage.evals.held_out.every = 16, 5.0, 100
  stage.optim.update(
    {'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_steps': 20, 'weight_decay': 0.1}
  )
  return stage


def reward_model():
  """Returns the reward model stage.

  On so few texts a small model from scratch with token dropout works best.
  """
  stage = base(reward_model_lib.config(), None)
  stage.model.init = llama(width=64, layers=1)
  stage.data.update(
    {
      'path': '$workdir/split/pairs.jsonl',
      'max_length': LENGTH,
      'held_out_path': '$workdir/split/held_out.jsonl',
    }
  )
  stage.batch_size, stage.data.epochs = 32, 1.25
  stage.preference.update(
    {
      'token_dropout': 0.5,
      'normalize': 'gain_bias',
      'normalize_path': '$workdir/samples/samples.jsonl',
    }
  )
  stage.optim.update(
    {
      'learning_rate': 5e-4,
      'schedule': 'cosine',
      'warmup_steps': 30,
      'b2': 0.98,
      'weight_decay': 0.1,
    }
  )
  return stage


def ppo():
  """Returns the PPO stage."""
  stage = base(ppo_lib.config(), '$workdir/pretrain/model')
  stage.data.update({'path': '$workdir/split/prompts.jsonl', 'max_prompt_length': 16})
  stage.reward.model = '$workdir/reward_model/model'
  stage.sampling.max_new_tokens = RESPONSE
  stage.batch_size, stage.steps = 128, 60
  stage.rl.update({'epochs': 2, 'minibatches': 4, 'kl_coef': 0.13})
  stage.optim.update({'learning_rate': 2e-4, 'schedule': 'linear'})
  stage.samples_every, stage.checkpoint_every = 10, 20
  return stage


def debug(config):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  config.split.update({'prompt_count': 32, 'pairings': 1, 'vocab_size': 512})
  config.samples.count = 16
  config.pretrain.steps, config.pretrain.data.epochs = 3, None
  config.pretrain.optim.warmup_steps = 0
  config.reward_model.steps, config.reward_model.data.epochs = 3, None
  config.reward_model.optim.warmup_steps = 0
  config.ppo.update({'steps': 2, 'batch_size': 16})
  config.evaluate.update({'samples': 32, 'best_of': 2})

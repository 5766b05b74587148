"""PPO of a pretrained story model with a Python reward for direct speech.

rlhf run --config=stories:model=FOLDER --workdir=/tmp/stories

FOLDER is a Hugging Face folder of stories260K of llama2.c, a Llama with 260 K parameters trained on
TinyStories (Eldan & Li 2023, https://arxiv.org/abs/2305.07759). The reward is the fraction of
sentences with a quotation mark.

Expected, seed 0, 512 samples: reward 0.13 before and 0.73 after, at a KL of 0.24 nats per token;
distinct-2 0.48 before and 0.45 after. Takes less than 2 minutes on 2 CPU cores.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.algorithms import ppo as ppo_lib


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed, model (a folder)."""
  arg = c.parse_arg(arg, debug=False, seed=0, model='')
  c.need_argument(arg, 'model', 'a Hugging Face folder')
  config = ml_collections.ConfigDict({'seed': arg.seed, 'stages': ('prompts', 'ppo', 'evaluate')})
  config.prompts = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.tasks.stories:write',
      'count': 512,
      'texts': (
        'Once upon a time',
        'One day',
        'There was a little girl named Lily.',
        'Tom and Sue were best friends.',
        'It was a sunny day.',
      ),
    }
  )
  ppo = ppo_lib.config('trlx')
  ppo.seed = None
  ppo.model.path = arg.model
  ppo.data.update({'path': '$workdir/prompts/prompts.jsonl', 'max_prompt_length': 24})
  ppo.reward.function = 'rlhf_jax.tasks.stories:direct_speech'
  ppo.sampling.max_new_tokens = 128
  ppo.batch_size, ppo.steps = 64, 60
  ppo.rl.update({'epochs': 2, 'minibatches': 2, 'kl_coef': 0.01})
  ppo.optim.update({'learning_rate': 5e-4, 'clip_norm': 1.0, 'schedule': 'linear'})
  ppo.log_every = 5
  ppo.samples_every, ppo.checkpoint_every = 10, 20
  config.ppo = ppo
  config.evaluate = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': 'Stories with direct speech',
      'summary': 'Gold is the reward itself: the fraction of sentences with a quotation mark.',
      'workdir': '$workdir',
      'policies': (('base', arg.model), ('ppo', '$workdir/ppo')),
      'baseline': 'base',
      'trained': 'ppo',
      'best_of': 0,
      'reward_model': '',
      'comparisons': '',
      'prompts': '$workdir/prompts/prompts.jsonl',
      'samples': 512,
      'max_new_tokens': 128,
      'temperature': 1.0,
      'gold': 'rlhf_jax.tasks.stories:direct_speech_of',
      'gold_path': '',
      'curves': ('ppo',),
      'seed': None,
    }
  )
  if arg.debug:
    ppo.update({'steps': 2, 'batch_size': 8})
    ppo.sampling.max_new_tokens = 16
    config.evaluate.update({'samples': 16, 'max_new_tokens': 16})
  return config

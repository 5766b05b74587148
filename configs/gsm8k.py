"""SFT and GRPO of your model on the word problems of GSM8K, with their checker as the reward.

rlhf run --config=gsm8k:model=FOLDER,data=DATA --workdir=/tmp/gsm8k

FOLDER is a Hugging Face folder, DATA one with train.jsonl and test.jsonl of GSM8K (Cobbe et al.
2021, https://arxiv.org/abs/2110.14168; https://github.com/openai/grade-school-math). SFT on the
worked answers teaches the form `#### N`, which the reward reads. Gold is the reward itself on the
test set, at temperature 1.

For a model that already solves problems in its own words, skip SFT and let Math-Verify find the
answer, in processes that can be killed when it hangs:

rlhf run --config=gsm8k:model=FOLDER,data=DATA,sft=False --workdir=/tmp/gsm8k \\
    --config.grpo.reward.function=rlhf_jax.rewards.mathematics:correct \\
    --config.grpo.reward.workers=8 --config.grpo.reward.on_error=score

Lab note: run at `:debug` only, with a random model of 16 dimensions; data, rewards and all stages
work, the results mean nothing. No model that can do arithmetic was at hand, and none was trained;
the settings of GRPO are those of DeepSeekMath (https://arxiv.org/abs/2402.03300) with 8 responses
instead of 64, and were not tuned.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import sft as sft_lib

LENGTH, RESPONSE = 512, 320  # tokens of a prompt with its answer, and of an answer


def get_config(arg=None):
  """Returns the config.

  Arguments: debug (seconds), seed, model (a folder), data (a folder), sft (whether to begin with
  SFT).
  """
  arg = c.parse_arg(arg, debug=False, seed=0, model='', data='', sft=True)
  c.need_argument(arg, 'model', 'a Hugging Face folder')
  c.need_argument(arg, 'data', 'a folder with train.jsonl and test.jsonl of GSM8K')
  trained = ('sft', 'grpo') if arg.sft else ('grpo',)
  config = ml_collections.ConfigDict({'seed': arg.seed, 'stages': ('data', *trained, 'evaluate')})
  config.data = ml_collections.ConfigDict(
    {'function': 'rlhf_jax.tasks.gsm8k:write', 'path': arg.data}
  )
  if arg.sft:
    config.sft = sft(arg.model)
  config.grpo = grpo('$workdir/sft/model' if arg.sft else arg.model)
  config.evaluate = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': 'GSM8K',
      'summary': 'Gold is the fraction of test problems with the right answer, at temperature 1.',
      'workdir': '$workdir',
      'policies': (('base', arg.model), *((name, f'$workdir/{name}') for name in trained)),
      'baseline': trained[0] if arg.sft else 'base',
      'trained': 'grpo',
      'best_of': 0,
      'reward_model': '',
      'comparisons': '',
      'prompts': '$workdir/data/test_prompts.jsonl',
      'samples': 1_319,
      'max_new_tokens': RESPONSE,
      'temperature': 1.0,
      'gold': 'rlhf_jax.tasks.gsm8k:correct',
      'gold_path': '',
      'curves': trained,
      'seed': None,
    }
  )
  if arg.debug:
    debug(config)
  return config


def sft(model):
  """Returns the SFT stage, on the worked answers."""
  stage = sft_lib.config()
  stage.seed, stage.model.path = None, model
  stage.data.update(
    {
      'path': '$workdir/data/demonstrations.jsonl',
      'kind': 'completion',
      'max_length': LENGTH,
      'held_out': 0.02,
    }
  )
  stage.batch_size, stage.data.epochs = 64, 2.0
  stage.optim.update(
    {'learning_rate': 1e-5, 'schedule': 'cosine', 'warmup_steps': 10, 'clip_norm': 1.0}
  )
  return stage


def grpo(model):
  """Returns the GRPO stage."""
  stage = grpo_lib.config()
  stage.seed, stage.model.path = None, model
  stage.data.update(
    {
      'path': '$workdir/data/prompts.jsonl',
      'max_prompt_length': LENGTH - RESPONSE,
      'on_long': 'truncate_left',
    }
  )
  stage.reward.function = 'rlhf_jax.tasks.gsm8k:correct'
  stage.sampling.max_new_tokens = RESPONSE
  stage.batch_size, stage.steps = 512, 500
  stage.optim.update(
    {'learning_rate': 1e-6, 'warmup_steps': 10, 'warmup_from': 0.1, 'clip_norm': 1.0}
  )
  stage.update({'samples_every': 20, 'checkpoint_every': 50})
  return stage


def debug(config):
  """Shrinks all stages so that a tiny model takes seconds; the results mean nothing."""
  if 'sft' in config:
    config.sft.update({'steps': 2, 'batch_size': 8})
    config.sft.data.update({'epochs': None, 'max_length': 256})
    config.sft.optim.warmup_steps = 0
  config.grpo.update({'steps': 2, 'batch_size': 16})
  config.grpo.sampling.update({'samples': 2, 'max_new_tokens': 8})
  config.grpo.optim.update({'warmup_steps': 0, 'warmup_from': 0.0})
  config.evaluate.update({'samples': 8, 'max_new_tokens': 8})

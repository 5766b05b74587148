"""Context distillation on generated product reviews: a model learns to answer without its prompt.

rlhf run --config=context_distillation --workdir=/tmp/context
rlhf run --config=context_distillation:debug --workdir=/tmp/debug

A small Llama is pretrained on documents of several reviews of one mood, so after three positive
reviews, the context, it writes another positive one. Context distillation (Askell et al. 2021,
https://arxiv.org/abs/2112.00861) trains it to do so without the context: the teacher is the model
itself, which reads the context before each prompt.

Measured, seeds 0, 1 and 2: the reverse KL to the prompted model falls from 0.096, 0.231 and 0.185
to 0.0050, 0.0042 and 0.0044 nats per token, and the gold score rises from -0.35, -0.78 and -0.81 to
0.41, 0.17 and 0.11 (standard error 0.05 to 0.07). Two minutes on one CPU core.
"""

import ml_collections

import _review_stages as shared
from rlhf_jax import config as c
from rlhf_jax.algorithms import distillation as distillation_lib

CONTEXT = 128  # tokens
STOP = '\n'  # ends a review


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed, mood (of the context), lora."""
  arg = c.parse_arg(arg, debug=False, seed=0, mood='positive', lora=False)
  stages = {'world': world(arg.mood), 'pretrain': pretrain(), 'distill': distill()}
  stages['prompted'] = evaluate('prompted', (('prompted', '$workdir/pretrain'),))
  stages['evaluate'] = evaluate(
    'eval_prompts', (('before', '$workdir/pretrain'), ('after', '$workdir/distill'))
  )
  if arg.lora:
    stages['distill'].model.lora.targets = (('attention/|mlp/', 16, 32.0),)
  if arg.debug:
    debug(stages)
  return ml_collections.ConfigDict({'seed': arg.seed, 'stages': tuple(stages), **stages})


def world(mood):
  """Returns the stage that writes the documents, the prompts, the context and the tokenizer."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.tasks.reviews:write_in_moods',
      'document_count': 6_000,
      'reviews': 4,
      'mood': mood,
      'prompt_count': 4_096,
      'eval_prompt_count': 512,
      'vocab_size': 1_024,
      'seed': None,
    }
  )


def pretrain():
  """Returns the pretraining stage, whose model can read a whole document."""
  stage = shared.pretrain()
  stage.model.init.max_position_embeddings = stage.data.max_length = CONTEXT
  stage.batch_size, stage.steps = 16, 600
  return stage


def distill():
  """Returns the distillation stage: the teacher is the pretrained model behind the context."""
  stage = shared.base(distillation_lib.config(), '$workdir/pretrain/model')
  stage.data.update({'path': '$workdir/world/prompts.jsonl', 'max_prompt_length': 12})
  stage.distillation.context = '$workdir/world/context.txt'
  stage.sampling.update({'max_new_tokens': 36, 'stop': (STOP,)})
  stage.batch_size, stage.steps = 64, 200
  stage.optim.update({'learning_rate': 1e-3, 'schedule': 'linear', 'warmup_steps': 5})
  stage.samples_every = 25
  return stage


def evaluate(prompts, policies):
  """Returns the stage that compares policies on prompts, with or without the context."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': 'Context distillation: product reviews',
      'summary': 'Gold is the hidden score of a review. The context is three reviews of one mood.',
      'workdir': '$workdir',
      'policies': policies,
      'baseline': policies[0][0],
      'trained': policies[-1][0],
      'best_of': 0,
      'reward_model': '',
      'comparisons': '',
      'prompts': f'$workdir/world/{prompts}.jsonl',
      'samples': 512,
      'max_new_tokens': 36,
      'temperature': 1.0,
      'truncate_at': STOP,
      'gold': 'rlhf_jax.tasks.reviews:gold_score',
      'gold_path': '',
      'curves': ('pretrain', 'distill'),
      'seed': None,
    }
  )


def debug(stages):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  stages['world'].update({'document_count': 200, 'prompt_count': 64, 'eval_prompt_count': 16})
  stages['pretrain'].model.init.update({'hidden_size': 32, 'num_hidden_layers': 2})
  stages['pretrain'].steps, stages['pretrain'].optim.warmup_steps = 4, 0
  stages['distill'].update({'steps': 2, 'batch_size': 16})
  stages['distill'].optim.warmup_steps = 0
  for name in ('prompted', 'evaluate'):
    stages[name].update({'samples': 16, 'max_new_tokens': 12})

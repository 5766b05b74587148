"""The runs of lm-human-preferences (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593).

To run at the published size, with the constants of launch.py in
https://github.com/openai/lm-human-preferences:

rlhf run --workdir=DIR \\
    --config=lm_human_preferences:task=tldr,data=TEXTS,model=FOLDER,labels=FILE

The task is sentiment, descriptiveness, tldr or cnndm. TEXTS are the documents from which queries
are cut: books, posts or articles. FOLDER is a Hugging Face folder of GPT-2. FILE has records
{"prompt", "completions", "best"}.

To run `sentiment` at a size for CPUs, with all stages and simulated annotators:

rlhf run --workdir=DIR --config=lm_human_preferences:small,data=FOLDER

FOLDER holds rt-polarity.pos and rt-polarity.neg of Pang & Lee 2005
(https://arxiv.org/abs/cs/0506075). The annotators prefer by the probability of a judge, which is
fitted on text that no model is trained on.

PUBLISHED_CURVES describes the published curves of sentiment (Huang et al. 2023, "The N
Implementation Details of RLHF with PPO").

Expected of the small run, seed 0, first update and mean of the last 10 of 150 updates:
objective/postprocessed_scores -0.55 to 0.70, objective/kl 0 to 6.0, objective/kl_coef 0.15 to 0.12
(0.087 at update 15), objective/entropy_per_response 84 to 69, value/loss 3.7 to 1.5;
policy/approxkl at most 0.014, policy/clipfrac 0.14, both in the first update. Accuracy of the
reward model 0.74; gold score from 0.53 to 0.70, win rate 0.70 (512 samples).
At the published size only 2 steps were run. The small run takes 12 minutes on 2 shared CPU cores.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax import errors
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib
from rlhf_jax.algorithms import sft as sft_lib

PUBLISHED_CURVES = (
  'Published curves of sentiment (GPT-2 124M, 10 seeds, about 1,950 updates): '
  'objective/postprocessed_scores -0.5 to 1.8, objective/kl 0 to 6, '
  'objective/kl_coef 0.15 to 0.25, '
  'objective/entropy_per_response 53 to 44, value/loss 4 to 0.7, policy/approxkl at most 4.5e-4, '
  'policy/clipfrac at most 0.0016.'
)
BOOKS = {
  'query': 64,
  'start': '.',
  'end': '.',
  'prefix': '',
  'suffix': '',
  'prompt': 64,
  'response': 24,
  'truncate_at': '.',
  'truncate_after': 16,
  'temperature': 0.7,
  'reward_batch': 32,
  'reward_lr': 5e-5,
  'lr': 1e-5,
  'batch': 512,
  'steps': 1_953,
  'whiten_rewards': True,
  'kl_coef': 0.15,
  'kl_controller': 'adaptive',
  'kl_horizon': 10_000.0,
}
# The prompt is the query (up to 500 tokens) with prefix and suffix.
TLDR = BOOKS | {
  'query': 500,
  'start': None,
  'end': None,
  'suffix': '\n\nTL;DR:',
  'prompt': 512,
  'response': 75,
  'truncate_at': '\n',
  'truncate_after': 55,
  'reward_batch': 16,
  'reward_lr': 2.5e-5,
  'lr': 2e-6,
  'batch': 32,
  'steps': 31_250,
  'whiten_rewards': False,
  'kl_coef': 0.03,
  'kl_controller': 'fixed',
}
CNNDM = TLDR | {'end': '\n', 'prefix': 'Article:\n\n', 'temperature': 0.5, 'kl_coef': 0.01}
TASKS = {'sentiment': BOOKS, 'descriptiveness': BOOKS, 'tldr': TLDR, 'cnndm': CNNDM}
# The snippets are tokenized, so there is a space before '.'. The run has far fewer episodes, so the
# KL coefficient must adapt faster.
SMALL = BOOKS | {
  'query': 32,
  'prompt': 32,
  'start': ' .',
  'end': ' .',
  'truncate_at': ' .',
  'reward_lr': 1e-3,
  'lr': 3e-4,
  'batch': 128,
  'steps': 150,
  'kl_horizon': 600.0,
}


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed, task, small, data, model, labels."""
  arg = c.parse_arg(
    arg, debug=False, seed=0, task='sentiment', small=False, data='', model='', labels=''
  )
  if arg.task not in TASKS:
    raise errors.UserError(f'config argument task={arg.task!r} must be one of {", ".join(TASKS)}')
  c.need(
    not arg.small or arg.task == 'sentiment', 'config argument small works with task=sentiment only'
  )
  c.need_argument(
    arg,
    'data',
    'the folder of rt-polarity.pos and rt-polarity.neg'
    if arg.small
    else 'the documents from which queries are cut',
  )
  config = small(arg) if arg.small else published(arg)
  if arg.debug:
    debug(config)
  return config


def published(arg):
  """Returns the stages at the published size: queries, samples, reward model, PPO."""
  c.need_argument(arg, 'model', 'a Hugging Face folder of the language model')
  c.need_argument(arg, 'labels', 'a file of {"prompt", "completions", "best"}')
  task = TASKS[arg.task]
  config = ml_collections.ConfigDict(
    {'seed': arg.seed, 'stages': ('queries', 'samples', 'reward_model', 'ppo', 'report')}
  )
  config.queries = queries(task, path=arg.data, tokenizer=arg.model, held_out=512)
  config.samples = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:sample',
      'policy': arg.model,
      'prompts': '$workdir/queries/prompts.jsonl',
      'count': 256,
      **answers(task),
      'seed': None,
    }
  )
  config.reward_model = reward_model(
    task, model=arg.model, labels=arg.labels, samples='$workdir/samples/samples.jsonl'
  )
  config.reward_model.data.held_out = 0.02
  config.ppo = ppo(task, model=arg.model)
  config.report = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.report:of_stages',
      'workdir': '$workdir',
      'title': f'lm-human-preferences: {arg.task}',
      'summary': PUBLISHED_CURVES,
      'curves': ('reward_model', 'ppo'),
    }
  )
  return config


def small(arg):
  """Returns the stages of the small run, which include pretraining and labels."""
  config = ml_collections.ConfigDict(
    {
      'seed': arg.seed,
      'stages': ('text', 'pretrain', 'queries', 'labels', 'reward_model', 'ppo', 'evaluate'),
    }
  )
  config.text = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.tasks.polarity:write_documents',
      'path': arg.data,
      'vocab_size': 4_096,
      'snippets': 4,
      'shuffles': 5,
      'seed': None,
    }
  )
  config.pretrain = pretrain()
  config.queries = queries(
    SMALL, path='$workdir/text/documents.jsonl', tokenizer='$workdir/text/tokenizer', held_out=512
  )
  gold = {'gold': 'rlhf_jax.tasks.polarity:positivity', 'gold_path': '$workdir/text/judge.jsonl'}
  config.labels = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:best_of',
      'policy': '$workdir/pretrain',
      'prompts': '$workdir/queries/prompts.jsonl',
      'count': 1_500,
      'held_out': 200,
      'completions': 4,
      'samples': 12,
      **answers(SMALL),
      **gold,
      'annotator_count': 5,
      'annotator_temperature': 0.05,
      'label_noise': 0.05,
      'disagreement': 0.02,
      'seed': None,
    }
  )
  config.reward_model = reward_model(
    SMALL,
    model='$workdir/pretrain/model',
    labels='$workdir/labels/labels.jsonl',
    samples='$workdir/labels/samples.jsonl',
  )
  config.reward_model.data.update(
    {'held_out_path': '$workdir/labels/held_out.jsonl', 'epochs': 2.0}
  )
  config.reward_model.preference.token_dropout = 0.2
  config.ppo = ppo(SMALL, model='$workdir/pretrain/model')
  config.evaluate = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.policies:run',
      'title': 'lm-human-preferences: sentiment, small',
      'summary': 'Gold is the probability that the response is positive, by an independent judge. '
      'KL is that of the truncated response; objective/kl counts all tokens. ' + PUBLISHED_CURVES,
      'workdir': '$workdir',
      'policies': (('pretrained', '$workdir/pretrain'), ('ppo', '$workdir/ppo')),
      'baseline': 'pretrained',
      'trained': 'ppo',
      'best_of': 4,
      'reward_model': '$workdir/reward_model/model',
      'comparisons': '$workdir/labels/held_out.jsonl',
      'prompts': '$workdir/queries/held_out.jsonl',
      'samples': 512,
      **answers(SMALL),
      **gold,
      'curves': ('pretrain', 'reward_model', 'ppo'),
      'seed': None,
    }
  )
  return config


def answers(task):
  """Returns the sampling keys that stages of a task share."""
  return {
    'max_new_tokens': task['response'],
    'temperature': task['temperature'],
    'truncate_at': task['truncate_at'],
    'truncate_after': task['truncate_after'],
  }


def queries(task, *, path, tokenizer, held_out):
  """Returns the stage that cuts queries from documents."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.data.running_text:write',
      'path': path,
      'tokenizer': tokenizer,
      'length': task['query'],
      'start_text': task['start'],
      'end_text': task['end'],
      'prefix': task['prefix'],
      'suffix': task['suffix'],
      'held_out': held_out,
    }
  )


def pretrain():
  """Returns the stage that pretrains a small language model on the documents."""
  stage = sft_lib.config()
  stage.seed = None
  stage.tokenizer = '$workdir/text/tokenizer'
  stage.model.init = ml_collections.ConfigDict(
    {
      'family': 'llama',
      'hidden_size': 128,
      'intermediate_size': 384,
      'num_hidden_layers': 3,
      'num_attention_heads': 4,
      'num_key_value_heads': 4,
      'max_position_embeddings': 128,
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-5,
    }
  )
  stage.data.update({'path': '$workdir/text/documents.jsonl', 'max_length': 112, 'held_out': 0.02})
  stage.batch_size, stage.data.epochs, stage.evals.held_out.every = 12, 1.0, 100
  stage.optim.update(
    {
      'learning_rate': 2e-3,
      'schedule': 'cosine',
      'warmup_steps': 20,
      'weight_decay': 0.1,
      'clip_norm': 1.0,
    }
  )
  stage.log_every = 10
  return stage


def reward_model(task, *, model, labels, samples):
  """Returns the reward model stage: one epoch on the best of 4 responses.

  Gain and bias of the head are fitted on samples before and after training.
  """
  stage = reward_model_lib.config()
  stage.seed = None
  stage.model.path = model
  # A sampled text may have a few more tokens when it is encoded again.
  stage.data.update(
    {'path': labels, 'max_length': task['prompt'] + task['response'] + 8, 'epochs': 1.0}
  )
  stage.preference.update(
    {'loss': 'pick_best', 'append_eos': False, 'normalize': 'gain_bias', 'normalize_path': samples}
  )
  stage.batch_size = task['reward_batch']
  stage.optim.update({'learning_rate': task['reward_lr'], 'schedule': 'linear'})
  stage.log_every = 5
  return stage


def ppo(task, *, model):
  """Returns the PPO stage.

  Responses are sampled to their full length, and the reward model reads them truncated.
  """
  stage = ppo_lib.config('openai2019')
  stage.seed = None
  stage.model.path = model
  stage.data.update({'path': '$workdir/queries/prompts.jsonl', 'max_prompt_length': task['prompt']})
  stage.reward.model = '$workdir/reward_model/model'
  stage.sampling.update(answers(task))
  stage.batch_size, stage.steps = task['batch'], task['steps']
  stage.rl.update(
    {key: task[key] for key in ('kl_coef', 'kl_controller', 'kl_horizon', 'whiten_rewards')}
  )
  stage.optim.learning_rate = task['lr']
  stage.samples_every, stage.checkpoint_every = 25, 100
  return stage


def debug(config):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  config.queries.held_out = 8
  config.reward_model.update({'steps': 2, 'batch_size': 4})
  config.reward_model.data.epochs = None
  config.ppo.update({'steps': 2, 'batch_size': 8})
  if 'samples' in config:
    config.samples.count = 8
    return
  config.text.update({'vocab_size': 512, 'shuffles': 1})
  config.pretrain.steps, config.pretrain.data.epochs = 3, None
  config.pretrain.optim.warmup_steps = 0
  config.labels.update({'count': 48, 'held_out': 4, 'samples': 32, 'truncate_after': 4})
  config.evaluate.update({'samples': 16, 'best_of': 2})

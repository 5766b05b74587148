"""Preference-model pretraining, and what it saves in human comparisons.

rlhf run --config=pmp --workdir=/tmp/pmp
rlhf run --config=pmp:debug --workdir=/tmp/debug

Askell et al. 2021 (https://arxiv.org/abs/2112.00861) and Bai et al. 2022
(https://arxiv.org/abs/2204.05862) train a preference model on many cheap ranked data, such as votes
on web pages, before the few comparisons by people. Here, on the generated reviews of the
quickstart, the cheap data are 16,000 pairs of the pretrained model, labelled by a crowd that is
careless and has tastes of its own. The comparisons are of the SFT policy, by the quickstart's five
annotators. Reward models learn from 100 to 3,200 of them, with and without the pretraining. The
page pmp.html in the workdir shows their held-out accuracy.

On your own data it is two runs of `reward_model`: the second with `--config.model.path` of the
first.
"""

import ml_collections

import _review_stages as shared
from rlhf_jax import config as c
from rlhf_jax.algorithms import reward_model as reward_model_lib

COMPARISONS = 100, 200, 400, 800, 1_600, 3_200


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds a stage), seed."""
  arg = c.parse_arg(arg, debug=False, seed=0)
  stages = {
    'world': shared.world(),
    'pretrain': shared.pretrain(),
    'sft': shared.sft(),
    'rank': collect('$workdir/pretrain', 16_000, 0, 1_000 * arg.seed + 1),
    'compare': collect('$workdir/sft', max(COMPARISONS), 1_000, None),
  }
  # A crowd: a quarter of the labels are wrong, and people differ in what they like.
  stages['rank'].update({'annotator_count': 50, 'label_noise': 0.25, 'disagreement': 1.0})
  stages['subsets'] = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:subsets',
      'path': '$workdir/compare/comparisons.jsonl',
      'counts': COMPARISONS,
    }
  )
  stages['pmp'] = reward_model('$workdir/pretrain/model', '$workdir/rank/comparisons.jsonl')
  for count in COMPARISONS:
    data = f'$workdir/subsets/first_{count}.jsonl'
    stages[f'with_{count}'] = reward_model('$workdir/pmp/model', data)
    stages[f'without_{count}'] = reward_model('$workdir/pretrain/model', data)
  stages['page'] = page()
  if arg.debug:
    debug(stages)
  return ml_collections.ConfigDict({'seed': arg.seed, 'stages': tuple(stages), **stages})


def collect(policy, pairs, held_out, seed):
  """Returns a stage that samples pairs of responses and labels them."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:run',
      'policy': policy,
      'prompts': '$workdir/world/prompts.jsonl',
      'pairs': pairs,
      'held_out': held_out,
      'max_new_tokens': 36,
      'temperature': 1.0,
      'gold': 'rlhf_jax.tasks.reviews:gold_score',
      'annotator_count': 5,
      'annotator_temperature': 0.5,
      'label_noise': 0.05,
      'disagreement': 0.3,
      'seed': seed,
    }
  )


def reward_model(model, data):
  """Returns a reward model stage, one epoch from a language model or a reward model."""
  stage = shared.base(reward_model_lib.config(), model)
  stage.data.update(
    {'path': data, 'max_length': 48, 'held_out_path': '$workdir/compare/held_out.jsonl'}
  )
  stage.batch_size, stage.data.epochs = 16, 1.0
  stage.optim.update({'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 3})
  return stage


def page():
  """Returns the stage that writes the page."""
  series = {
    label: tuple((count, f'{stage}_{count}') for count in COMPARISONS)
    for label, stage in (('with PMP', 'with'), ('without', 'without'))
  }
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.data_efficiency:run',
      'workdir': '$workdir',
      'title': 'Preference-model pretraining',
      'summary': 'Held-out accuracy of reward models by the number of comparisons. With PMP, they '
      'learn from 16,000 cheap comparisons first.',
      'series': tuple(series.items()),
      'metric': 'held_out/accuracy',
      'low': 'held_out/accuracy_low',
      'high': 'held_out/accuracy_high',
      'x': 'comparisons',
      'page': 'pmp.html',
    }
  )


def debug(stages):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  stages['world'].update({'corpus_size': 400, 'demonstration_count': 64, 'prompt_count': 64})
  for name, stage in list(stages.items()):
    if name.startswith('with') and not name.endswith('_100'):
      del stages[name]
    elif 'algorithm' in stage:
      stage.steps, stage.batch_size, stage.data.epochs, stage.optim.warmup_steps = 2, 8, None, 0
  stages['pretrain'].model.init.update(
    {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2}
  )
  for name in ('rank', 'compare'):
    stages[name].update({'pairs': 32, 'held_out': 16, 'max_new_tokens': 12})
  stages['page'].series = tuple((label, runs[:1]) for label, runs in stages['page'].series)

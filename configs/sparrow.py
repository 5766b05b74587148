"""A mixture of a preference model and rule models, as in Sparrow (Glaese et al. 2022).

rlhf run --config=sparrow --workdir=/tmp/sparrow
rlhf run --config=sparrow:debug --workdir=/tmp/debug

Sparrow (https://arxiv.org/abs/2209.14375) is trained on the sum of a preference reward and the
estimate of a rule model that the response breaks no rule. Here, on the generated reviews of the
quickstart, annotators prefer positive reviews and do not care about rules. Two rules are learned
from labels of their own, by regression to 1 if a response follows the rule and 0 if not:

    on_topic      says nothing about other products
    well_formed   only whole sentences of the grammar, no repetitions

PPO is trained twice, on the preference model alone and on the mixture. `on_topic/score` and
`well_formed/score` in metrics.jsonl and in the report are how often the responses to held-out
prompts follow each rule; `reward/rule_NAME` is the rule model's estimate.

Difference from the paper: each rule has a model of its own, where Sparrow has one model that reads
the rule with the dialogue.
"""

import ml_collections

import _review_stages as shared
from rlhf_jax import config as c
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib

RULES = {
  'on_topic': 'rlhf_jax.tasks.reviews:on_topic',
  'well_formed': 'rlhf_jax.tasks.reviews:well_formed',
}
TOKENS = 36  # of a response


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds a stage), seed."""
  arg = c.parse_arg(arg, debug=False, seed=0)
  stages = {
    'world': shared.world(eval_prompts=256),
    'pretrain': shared.pretrain(),
    'sft': shared.sft(epochs=1.0),
    'compare': compare(),
    'rules': rules(),
    'preference': preference(),
  }
  stages |= {f'rule_{name}': rule(name) for name in RULES}
  stages['ppo_preference'] = ppo({'model': '$workdir/preference/model'})
  parts = {
    f'rule_{name}': {'weight': 1.0, 'model': f'$workdir/rule_{name}/model'} for name in RULES
  }
  stages['ppo_mixture'] = ppo(
    {'parts': {'preference': {'weight': 1.0, 'model': '$workdir/preference/model'}} | parts}
  )
  stages['report'] = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.report:of_stages',
      'workdir': '$workdir',
      'title': 'A preference model and rule models',
      'summary': 'PPO on the preference model alone, and on its sum with two rule models.',
      'curves': (
        'preference',
        *(f'rule_{name}' for name in RULES),
        'ppo_preference',
        'ppo_mixture',
      ),
    }
  )
  if arg.debug:
    debug(stages)
  return ml_collections.ConfigDict({'seed': arg.seed, 'stages': tuple(stages), **stages})


def compare():
  """Returns the stage in which annotators compare responses by their sentiment."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:run',
      'policy': '$workdir/sft',
      'prompts': '$workdir/world/prompts.jsonl',
      'pairs': 4_000,
      'held_out': 500,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'gold': 'rlhf_jax.tasks.reviews:sentiment',
      'annotator_count': 5,
      'annotator_temperature': 0.2,
      'label_noise': 0.05,
      'disagreement': 0.0,
      'seed': None,
    }
  )


def rules():
  """Returns the stage in which annotators say whether a response follows each rule."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.rules:run',
      'policy': '$workdir/sft',
      'prompts': '$workdir/world/prompts.jsonl',
      'count': 4_000,
      'held_out': 500,
      'rules': RULES,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'label_noise': 0.05,
      'seed': None,
    }
  )


def preference():
  """Returns the stage that trains the preference model; its scores of SFT samples have std 1."""
  stage = learned('$workdir/compare/comparisons.jsonl', '$workdir/compare/held_out.jsonl')
  stage.preference.update(
    {'normalize': 'gain_bias', 'normalize_path': '$workdir/compare/samples.jsonl'}
  )
  return stage


def rule(name):
  """Returns the stage that trains a rule model, whose scores estimate a probability."""
  stage = learned(f'$workdir/rules/{name}.jsonl', f'$workdir/rules/{name}_held_out.jsonl')
  stage.preference.loss = 'rating'
  return stage


def learned(path, held_out):
  """Returns the stage of a reward model, two epochs from the pretrained model."""
  stage = shared.base(reward_model_lib.config(), '$workdir/pretrain/model')
  stage.data.update({'path': path, 'max_length': 48, 'held_out_path': held_out, 'epochs': 2.0})
  stage.batch_size = 32
  stage.optim.update({'learning_rate': 5e-4, 'schedule': 'cosine', 'warmup_steps': 10})
  return stage


def ppo(reward):
  """Returns a PPO stage, which measures how often held-out responses follow the rules."""
  stage = shared.base(ppo_lib.config(), '$workdir/sft/model')
  stage.data.update({'path': '$workdir/world/prompts.jsonl', 'max_prompt_length': 12})
  stage.reward.update(reward)
  stage.sampling.update({'max_new_tokens': TOKENS, 'temperature': 1.0})
  stage.critic.kind = 'trunk'
  stage.batch_size, stage.steps = 128, 60
  stage.rl.update(
    {
      'epochs': 2,
      'minibatches': 4,
      'kl_coef': 0.05,
      'score_position': 'eos',
      'missing_eos': 'replace',
      'missing_eos_value': -2.0,
    }
  )
  stage.optim.update({'learning_rate': 3e-4, 'schedule': 'linear'})
  for name, function in RULES.items():
    stage.evals[name] = ml_collections.ConfigDict(
      {
        'kind': 'prompts',
        'path': '$workdir/world/eval_prompts.jsonl',
        'every': 20,
        'count': 256,
        'reward': {'function': function},
      }
    )
  stage.samples_every = 20
  return stage


def debug(stages):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  stages['world'].update(
    {'corpus_size': 400, 'demonstration_count': 64, 'prompt_count': 64, 'eval_prompt_count': 16}
  )
  for stage in stages.values():
    if 'algorithm' in stage:
      stage.steps, stage.batch_size, stage.data.epochs, stage.optim.warmup_steps = 2, 16, None, 0
    if 'sampling' in stage:
      stage.sampling.max_new_tokens = 12
      for name in RULES:
        stage.evals[name].update({'every': 2, 'count': 16})
  stages['pretrain'].model.init.update(
    {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2}
  )
  stages['compare'].update({'pairs': 32, 'held_out': 16, 'max_new_tokens': 12})
  stages['rules'].update({'count': 32, 'held_out': 16, 'max_new_tokens': 12})

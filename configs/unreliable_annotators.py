"""A reward model that learns how reliable each of its annotators is. The annotators are simulated.

rlhf run --config=unreliable_annotators --workdir=/tmp/unreliable
rlhf run --config=unreliable_annotators:debug --workdir=/tmp/debug

On the generated reviews of the quickstart ten simulated annotators make 800 comparisons each. They
prefer by the gold score, but an annotator gives the opposite label with a probability of 0 to 0.22,
and three of the ten choose at random. Two reward models learn from the same comparisons: with
config.preference.reliability, which learns an inverse temperature of each annotator, and without.
Both are measured on 2,000 pairs of responses to other prompts, which are ordered by the gold score.
The page reliability.html in the workdir shows both accuracies, their difference on the same pairs,
and the learned reliability of each annotator by its noise.

Measured, seeds 0, 1 and 2: accuracy 0.727, 0.748 and 0.744 with reliabilities, 0.712, 0.730 and
0.727 without. The difference over the 5,989 pairs of the three seeds is 0.017, 95 % interval 0.008
to 0.026. The random three are the least reliable ones in each seed, and the rank correlation with
the truth is 0.96, 0.99 and 0.98. The learning rate of the reliabilities was chosen on synthetic
features. One epoch matters: a model that sees a label twice agrees with it, also if it is random.
"""

import ml_collections
import quickstart

from rlhf_jax import config as c

# Probability that each annotator gives the opposite label. The last three choose at random.
NOISE = 0.0, 0.03, 0.06, 0.1, 0.14, 0.18, 0.22, 0.5, 0.5, 0.5


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds a stage), seed."""
  arg = c.parse_arg(arg, debug=False, seed=0)
  stages = {
    'world': quickstart.world(),
    'pretrain': quickstart.pretrain(),
    'sft': quickstart.sft(),
    'compare': compare(),
    'gold': gold(),
    'with_reliability': reward_model(True),
    'without': reward_model(False),
    'page': page(),
  }
  if arg.debug:
    debug(stages)
  return ml_collections.ConfigDict({'seed': arg.seed, 'stages': tuple(stages), **stages})


def compare():
  """Returns the stage in which the annotators compare responses of the SFT model."""
  stage = quickstart.compare()
  stage.update({'pairs': 8_000, 'held_out': 0, 'annotator_count': len(NOISE), 'disagreement': 0.0})
  return ml_collections.ConfigDict(stage.to_dict() | {'label_noise': NOISE})


def gold():
  """Returns the stage that orders pairs of responses to other prompts by the gold score."""
  stage = quickstart.compare()
  stage.update(
    {
      'prompts': '$workdir/world/eval_prompts.jsonl',
      'pairs': 0,
      'held_out': 2_000,
      'annotator_count': 1,
      'annotator_temperature': 0.0,
      'label_noise': 0.0,
      'disagreement': 0.0,
    }
  )
  return stage


def reward_model(reliability):
  """Returns a reward model stage, with or without the reliability of annotators."""
  stage = quickstart.reward_model()
  stage.data.update({'held_out_path': '$workdir/gold/held_out.jsonl'})
  stage.optim.learning_rate = 1e-3
  stage.preference.update({'normalize': 'none', 'normalize_path': None, 'reliability': reliability})
  if reliability:
    stage.preference.reliability_learning_rate = 0.05
  return stage


def page():
  """Returns the stage that writes the page."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.reliability_stage:run',
      'workdir': '$workdir',
      'title': 'Unreliable annotators',
      'summary': 'Reward models of the same comparisons by ten simulated annotators, three of whom '
      'choose at random, with and without the reliability of each annotator.',
      'noise': NOISE,
      'reliability': 'with_reliability',
      'baseline': 'without',
      'held_out': '$workdir/gold/held_out.jsonl',
      'page': 'reliability.html',
    }
  )


def debug(stages):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  stages['world'].update({'corpus_size': 400, 'demonstration_count': 64, 'prompt_count': 64})
  stages['world'].eval_prompt_count = 16
  stages['pretrain'].model.init.update(
    {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2}
  )
  for stage in stages.values():
    if 'algorithm' in stage:
      stage.steps, stage.batch_size, stage.data.epochs, stage.optim.warmup_steps = 2, 8, None, 0
  stages['compare'].update({'pairs': 80, 'max_new_tokens': 12})
  stages['gold'].update({'held_out': 16, 'max_new_tokens': 12})

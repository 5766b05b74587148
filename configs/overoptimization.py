"""Over-optimization of reward models (Gao et al. 2022, https://arxiv.org/abs/2210.10760).

rlhf run --config=overoptimization --workdir=/tmp/overoptimization
rlhf run --config=overoptimization:debug --workdir=/tmp/debug

The setting of the paper, on the generated reviews of the quickstart: a large reward model, the gold
model, stands for people. It labels comparisons of the SFT policy's responses, from which proxy
reward models of three sizes and three amounts of data are trained. Best-of-n and PPO then optimize
each proxy, ensembles of proxies (Coste et al. 2023, https://arxiv.org/abs/2310.02743), and the
proxy with a KL penalty. The page overoptimization.html in the workdir shows gold and proxy scores
over the square root of the KL, with the paper's curves fitted to them.

The gold model learns from comparisons by the hidden score of rlhf_jax/tasks/reviews.py, which the
page shows too.

Measured, seed 0: docs/overoptimization.md. Takes 20 minutes on one CPU core.
"""

import ml_collections

import _review_stages as shared
from rlhf_jax import config as c
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib

# Width, layers and heads of the models. The policy has size 'large'.
SIZES = {'small': (32, 1, 2), 'medium': (64, 2, 4), 'large': (128, 4, 4), 'gold': (192, 4, 6)}
DATA = 500, 2_000, 8_000  # comparisons of the proxies; the middle one is the default
MEMBERS = 4  # of the ensembles
HIDDEN = 'rlhf_jax.tasks.reviews:gold_score'
TOKENS = 36  # of a response
LINES = {  # runs of each figure
  'Size of the proxy': ('small', 'medium', 'large'),
  'Comparisons of the proxy': ('medium_500', 'medium', 'medium_8000'),
  'Ensembles': ('medium', 'mean', 'min', 'variance', 'heads'),
  'KL penalty': ('medium', 'penalty'),
}
PENALTY = 0.1  # kl_coef of the run 'penalty'; all others have none


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds a stage), seed."""
  arg = c.parse_arg(arg, debug=False, seed=0)
  stages = {'world': shared.world()}
  stages |= {f'pretrain_{size}': shared.pretrain(*SIZES[size]) for size in SIZES}
  stages |= {
    'sft': shared.sft('$workdir/pretrain_large/model'),
    'samples': samples(),
    'compare_gold': compare_gold(),
  }
  stages['gold'] = reward_model('gold', 'compare_gold/comparisons', 'compare_gold')
  stages['compare'] = compare(1_000 * arg.seed + 1)
  for name, size, count in proxies():
    stages[name] = reward_model(size, f'compare/first_{count}', 'compare')
  for i in range(1, MEMBERS):
    stages[f'medium_{i}'] = reward_model('medium', f'compare/first_{DATA[1]}', 'compare')
    stages[f'medium_{i}'].seed = 1_000 * arg.seed + i
  stages['heads'] = reward_model('medium', f'compare/first_{DATA[1]}', 'compare')
  stages['heads'].preference.update({'heads': MEMBERS, 'head_fraction': 0.5})
  stages['best_of_n'] = best_of_n()
  stages |= {f'ppo_{name}': ppo(reward) for name, reward in rewards().items()}
  stages['ppo_penalty'] = ppo(rewards()['medium'])
  stages['ppo_penalty'].rl.kl_coef = PENALTY
  stages['page'] = page()
  if arg.debug:
    debug(stages)
  return ml_collections.ConfigDict({'seed': arg.seed, 'stages': tuple(stages), **stages})


def proxies():
  """Returns (stage, size, comparisons) of the single proxies."""
  sizes = [(size, size, DATA[1]) for size in ('small', 'medium', 'large')]
  return sizes + [(f'medium_{count}', 'medium', count) for count in (DATA[0], DATA[2])]


def rewards():
  """Returns {name: config.reward} of everything that is optimized."""
  model = lambda stage: f'$workdir/{stage}/model'
  single = {stage: {'model': model(stage)} for stage, _, _ in proxies()}
  members = (model('medium'), *(model(f'medium_{i}') for i in range(1, MEMBERS)))
  ensembles = {
    how: {'models': members, 'ensemble': how, 'ensemble_coef': 1.0}
    for how in ('mean', 'min', 'variance')
  }
  return single | ensembles | {'heads': {'model': model('heads'), 'ensemble': 'mean'}}


def samples():
  """Returns the stage that samples the responses on which all reward models are normalized."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:sample',
      'policy': '$workdir/sft',
      'prompts': '$workdir/world/prompts.jsonl',
      'count': 2_000,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'seed': None,
    }
  )


def compare_gold():
  """Returns the stage that labels the comparisons of the gold model, by the hidden score.

  A temperature above 1 gives worse responses too, so that the gold model knows nonsense.
  """
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:run',
      'policy': '$workdir/sft',
      'prompts': '$workdir/world/prompts.jsonl',
      'pairs': 12_000,
      'held_out': 500,
      'max_new_tokens': TOKENS,
      'temperature': 1.3,
      'gold': HIDDEN,
      'annotator_count': 1,
      'annotator_temperature': 0.25,
      'label_noise': 0.0,
      'disagreement': 0.0,
      'seed': None,
    }
  )


def compare(seed):
  """Returns the stage that labels the comparisons of the proxies, by the gold model."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.overoptimization:label',
      'policy': '$workdir/sft',
      'prompts': '$workdir/world/prompts.jsonl',
      'pairs': max(DATA),
      'subsets': DATA,
      'held_out': 500,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'gold': '$workdir/gold/model',
      'annotator_temperature': 0.25,
      'label_noise': 0.05,
      'seed': seed,
    }
  )


def reward_model(size, data, held_out):
  """Returns the stage that trains a reward model; its scores of SFT samples have mean 0, std 1."""
  stage = shared.base(reward_model_lib.config(), f'$workdir/pretrain_{size}/model')
  stage.data.update(
    {
      'path': f'$workdir/{data}.jsonl',
      'max_length': 48,
      'held_out_path': f'$workdir/{held_out}/held_out.jsonl',
      'epochs': 1.0,
    }
  )
  stage.batch_size = 32 if size == 'gold' else 16
  stage.preference.update(
    {'normalize': 'gain_bias', 'normalize_path': '$workdir/samples/samples.jsonl'}
  )
  rate = 5e-4 if size == 'gold' else 1e-3
  stage.optim.update({'learning_rate': rate, 'schedule': 'cosine', 'warmup_steps': 5})
  return stage


def best_of_n():
  """Returns the stage that measures best-of-n against all proxies."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.overoptimization:best_of_n',
      'policy': '$workdir/sft',
      'prompts': '$workdir/world/eval_prompts.jsonl',
      'count': 64,
      'samples': 512,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'rewards': rewards(),
      'gold': '$workdir/gold/model',
      'hidden': HIDDEN,
      'seed': None,
    }
  )


def ppo(reward):
  """Returns a PPO stage without a KL penalty, which logs all responses of every second step."""
  stage = shared.base(ppo_lib.config(), '$workdir/sft/model')
  stage.data.update({'path': '$workdir/world/prompts.jsonl', 'max_prompt_length': 12})
  stage.reward.update(reward)
  stage.sampling.update({'max_new_tokens': TOKENS, 'temperature': 1.0})
  stage.critic.kind = 'trunk'
  stage.batch_size, stage.steps = 64, 120
  stage.rl.update(
    {'epochs': 2, 'minibatches': 2, 'kl_coef': 0.0, 'score_position': 'eos', 'missing_eos': 'none'}
  )
  stage.optim.update({'learning_rate': 5e-5, 'schedule': 'constant'})
  stage.samples_every, stage.log_every = 2, 2
  return stage


def page():
  """Returns the stage that fits the curves and writes the page."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.overoptimization:run',
      'workdir': '$workdir',
      'best_of_n': 'best_of_n',
      'runs': {name: f'ppo_{name}' for name in (*rewards(), 'penalty')},
      'penalties': {'penalty': 'medium'},
      'plots': tuple(LINES.items()),
      'gold': '$workdir/gold/model',
      'hidden': HIDDEN,
    }
  )


def debug(stages):
  """Leaves out and shrinks stages so that the pipeline takes two minutes; results mean nothing."""
  kept = 'medium', 'mean', 'heads', 'penalty'
  for name in ('pretrain_small', 'small', 'large', f'medium_{DATA[0]}', f'medium_{DATA[2]}'):
    del stages[name]
  for name in [name for name in stages if name.startswith('ppo_')]:
    stage = stages[name]
    if name.removeprefix('ppo_') not in kept:
      del stages[name]
    stage.sampling.max_new_tokens, stage.samples_every, stage.log_every = 12, 1, 1
    stage.steps, stage.optim.learning_rate = 6, 3e-3
  for page, names in (('best_of_n', 'rewards'), ('page', 'runs')):
    stages[page][names] = {name: x for name, x in stages[page][names].items() if name in kept}
  stages['world'].update(
    {'corpus_size': 400, 'demonstration_count': 64, 'prompt_count': 64, 'eval_prompt_count': 32}
  )
  for name, stage in stages.items():
    if 'algorithm' in stage:
      stage.batch_size, stage.data.epochs, stage.optim.warmup_steps = 16, None, 0
      stage.steps = stage.steps if name.startswith('ppo_') else 2
  stages['samples'].update({'count': 32, 'max_new_tokens': 12})
  for name in ('compare_gold', 'compare'):
    stages[name].update({'pairs': 32, 'held_out': 16, 'max_new_tokens': 12})
  stages['best_of_n'].update({'count': 4, 'samples': 16, 'max_new_tokens': 12})

"""Iterated online RLHF (Bai et al. 2022, §4.5, https://arxiv.org/abs/2204.05862).

rlhf run --config=online --workdir=/tmp/online
rlhf run --config=online:people --workdir=/tmp/online
rlhf run --config=online:debug --workdir=/tmp/debug

Each round has responses of the newest policy ranked, among each other and beside those of earlier
policies, retrains the reward model on the comparisons of all rounds, and trains the next policy by
PPO. Beside it, one-shot RLHF learns from as many rankings, all of the SFT policy. In the end all
policies answer the same prompts and are ranked. The page online.html in the workdir shows all
rounds, the folder round_N the report of each.

Annotators are simulated. With the argument `people` every round waits until people have answered on
the page of

rlhf label --db=/tmp/online/feedback.db --project=online

which may run all the time, and the end of the run for answers in the projects online_one_shot and
online_evaluation.

PPO starts from the policy of the round before; the paper trains new ones from the start. The rounds
are short: within 10 to 20 steps a policy can leave what its reward model knows, and the gold score
falls.

In all of seeds 3 to 5 the gold score and Elo rise from round to round and end above those of
one-shot RLHF; see docs/feedback.md. A seed takes 20 minutes of CPU time.
"""

import ml_collections
import quickstart

from rlhf_jax import config as c
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib

COUNT = 600  # rankings of a round
RESPONSES, NEWEST = 4, 2  # responses in a ranking, and those of the newest policy among them
STEPS = 8  # of PPO in a round
TOKENS = 36  # of a response
SFT = ('sft', '$workdir/sft')
PROMPTS, EVAL_PROMPTS = '$workdir/world/prompts.jsonl', '$workdir/world/eval_prompts.jsonl'


def get_config(arg=None):
  """Returns the config.

  Arguments: debug (a minute), seed, rounds, people (instead of simulated annotators), one_shot
  (False leaves it out), store (URL of the database; by default feedback.db in the workdir), project
  (its name in the store).
  """
  arg = c.parse_arg(
    arg,
    debug=False,
    seed=0,
    rounds=4,
    people=False,
    one_shot=True,
    store='$workdir/feedback.db',
    project='online',
  )
  stages = {
    'world': quickstart.world(),
    'pretrain': quickstart.pretrain(),
    'sft': quickstart.sft(),
    'samples': samples(),
  }
  policies, reports = [SFT], [f'round_{i + 1}' for i in range(arg.rounds)]
  for number in range(1, arg.rounds + 1):
    stages |= one_round(arg, number, policies)
    policies.append((f'round_{number}', f'$workdir/ppo_{number}'))
  if arg.one_shot:
    stages |= one_shot(arg)
    policies.append(('one_shot', '$workdir/ppo_one_shot'))
    reports.append('one_shot')
  stages |= evaluation(arg, policies)
  for name in (*reports, 'page'):
    stages[name].reports = tuple(reports)
  if arg.debug:
    debug(stages)
  return ml_collections.ConfigDict({'seed': arg.seed, 'stages': tuple(stages), **stages})


def one_round(arg, number, policies):
  """Returns the stages of a round.

  Args:
    arg: Arguments of the config.
    number: Number of the round, from 1.
    policies: Pairs (name, folder) of the policies so far, the newest last.
  """
  data = {f'round_{i}': source(arg, arg.project, i) for i in range(1, number + 1)}
  model, name = f'reward_model_{number}', f'ppo_{number}'
  measured = [*dict.fromkeys([SFT, policies[-1]]), (f'round_{number}', f'$workdir/{name}')]
  before = f'reward_model_{number - 1}' if number > 1 else ''
  return {
    f'collect_{number}': collect(arg, arg.project, number, policies, COUNT),
    f'judge_{number}': judge(arg, arg.project, number),
    model: reward_model(data, dict.fromkeys(data, 1.0)),
    name: ppo(model, policies[-1][1], STEPS),
    f'round_{number}': report(arg, measured, model, before, data, (model, name)),
  }


def one_shot(arg):
  """Returns the stages of one-shot RLHF, which adds comparisons of the SFT policy to round 1."""
  project, others = f'{arg.project}_one_shot', arg.rounds - 1
  data, weights, stages = {'round_1': source(arg, arg.project, 1)}, {'round_1': 1.0}, {}
  if others:
    stages['collect_one_shot'] = collect(arg, project, 1, [SFT], others * COUNT)
    stages['judge_one_shot'] = judge(arg, project, 1)
    data['others'], weights['others'] = source(arg, project, 1), float(others)
  model, name = 'reward_model_one_shot', 'ppo_one_shot'
  measured = [SFT, ('one_shot', f'$workdir/{name}')]
  return stages | {
    model: reward_model(data, weights),
    name: ppo(model, SFT[1], arg.rounds * STEPS),
    'one_shot': report(arg, measured, model, '', data, (model, name)),
  }


def evaluation(arg, policies):
  """Returns the stages that rank all policies; see `one_round` for the arguments."""
  project, model = f'{arg.project}_evaluation', '$workdir/reward_model_{}/model'.format
  stages = {
    'collect_evaluation': collect(arg, project, arg.rounds, policies, 100),
    'judge_evaluation': judge(arg, project, None),
    'page': ml_collections.ConfigDict(
      {
        'function': 'rlhf_jax.evaluation.online:run',
        'workdir': '$workdir',
        'store': arg.store,
        'project': project,
        'rounds': arg.rounds,
        'reward_models': tuple(model(i + 1) for i in range(arg.rounds)),
        'one_shot': model('one_shot') if arg.one_shot else '',
      }
    ),
  }
  stages['collect_evaluation'].update(
    {
      'function': 'rlhf_jax.feedback.rounds:evaluate',
      'rounds': arg.rounds,
      'prompts': EVAL_PROMPTS,
      'rankings': 200 if arg.people else 1000,
    }
  )
  del stages['collect_evaluation'].round, stages['collect_evaluation'].newest
  return stages


def source(arg, project, number):
  """Returns the data set of the comparisons of a round in the store."""
  return f'feedback:{arg.store}#{project}?round={number}&form=rankings'


def samples():
  """Returns the stage that samples the responses on which all reward models are normalized."""
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.collect:sample',
      'policy': SFT[1],
      'prompts': PROMPTS,
      'count': 512,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'seed': None,
    }
  )


def collect(arg, project, number, policies, count):
  """Returns the stage that samples responses and adds their comparisons to the store.

  Args:
    arg: Arguments of the config.
    project: Name of the project.
    number: Number of the round.
    policies: Pairs (name, folder), the newest last.
    count: Number of rankings.
  """
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.rounds:collect',
      'store': arg.store,
      'project': project,
      'round': number,
      'policies': tuple(policies),
      'prompts': PROMPTS,
      'count': count,
      'responses': RESPONSES,
      'newest': NEWEST,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'seed': None,
    }
  )


def judge(arg, project, number):
  """Returns the stage that simulates the answers to the tasks of a round, or waits for them.

  Args:
    arg: Arguments of the config.
    project: Name of the project.
    number: Number of the round; None for all.
  """
  stage = {'store': arg.store, 'project': project}
  if arg.people:
    return ml_collections.ConfigDict(
      {'function': 'rlhf_jax.feedback.rounds:wait', 'round': number} | stage
    )
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.feedback.simulate:run',
      'gold': 'rlhf_jax.tasks.reviews:gold_score',
      'annotator_count': 5,
      'annotator_temperature': 0.5,
      'label_noise': 0.05,
      'disagreement': 0.3,
      'seed': None,
    }
    | stage
  )


def reward_model(data, weights):
  """Returns a reward model stage, from the SFT model.

  Args:
    data: {name: data set}.
    weights: {name: weight in the mixture}.
  """
  stage = quickstart.base(reward_model_lib.config(), '$workdir/sft/model')
  stage.data.mixture = ml_collections.ConfigDict(
    {name: {'path': path, 'weight': weights[name]} for name, path in data.items()}
  )
  stage.data.max_length, stage.data.epochs, stage.batch_size = 48, 4.0, 8
  stage.preference.update(
    {'normalize': 'gain_bias', 'normalize_path': '$workdir/samples/samples.jsonl'}
  )
  stage.optim.update({'learning_rate': 5e-4, 'schedule': 'cosine', 'warmup_steps': 5})
  return stage


def ppo(model, start, steps):
  """Returns a PPO stage against a reward model, with the KL penalty to the SFT model.

  Args:
    model: Stage of the reward model.
    start: Folder of the policy to start from.
    steps: Number of steps.
  """
  stage = quickstart.base(ppo_lib.config(), f'{start}/model')
  stage.reference = '$workdir/sft/model'
  stage.data.update({'path': PROMPTS, 'max_prompt_length': 12})
  stage.reward.model = f'$workdir/{model}/model'
  stage.sampling.max_new_tokens = TOKENS
  stage.critic.kind = 'trunk'
  stage.batch_size, stage.steps = 64, steps
  stage.rl.update(
    {
      'epochs': 2,
      'minibatches': 2,
      'kl_coef': 0.02,
      'missing_eos': 'replace',
      'missing_eos_value': -2.0,
    }
  )
  stage.optim.update({'learning_rate': 3e-4, 'schedule': 'linear'})
  stage.samples_every = STEPS // 2
  return stage


def report(arg, policies, model, before, data, curves):
  """Returns the stage that reports a round.

  Args:
    arg: Arguments of the config.
    policies: Pairs (name, folder), the SFT policy first and that of the round last.
    model: Stage of its reward model.
    before: Stage of the reward model of the round before, or ''.
    data: {name: data set} of the reward model, that of the round last.
    curves: Names of the stages whose learning curves the report shows.
  """
  folder = lambda stage: f'$workdir/{stage}/model' if stage else ''
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.online:report',
      'workdir': '$workdir',
      'policies': tuple(policies),
      'reward_model': folder(model),
      'before': folder(before),
      'data': tuple(data.values()),
      'curves': curves,
      'prompts': EVAL_PROMPTS,
      'samples': 512,
      'max_new_tokens': TOKENS,
      'temperature': 1.0,
      'gold': '' if arg.people else 'rlhf_jax.tasks.reviews:gold_score',
      'seed': None,
    }
  )


def debug(stages):
  """Shrinks all stages so that the pipeline takes a minute; its results mean nothing."""
  stages['world'].update(
    {'corpus_size': 200, 'demonstration_count': 64, 'prompt_count': 64, 'eval_prompt_count': 32}
  )
  stages['pretrain'].model.init.update(
    {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 1}
  )
  stages['samples'].update({'count': 32, 'max_new_tokens': 12})
  for name, stage in stages.items():
    if 'algorithm' in stage:
      stage.batch_size, stage.steps, stage.data.epochs, stage.optim.warmup_steps = 16, 2, None, 0
    if name.startswith('collect'):
      stage.update({'count': 16, 'max_new_tokens': 12})
    if name.startswith('ppo'):
      stage.sampling.max_new_tokens, stage.samples_every = 12, 1
    if 'samples' in stage:
      stage.update({'samples': 32, 'max_new_tokens': 12})
  stages['collect_evaluation'].rankings = 16

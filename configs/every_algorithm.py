"""Every way to optimize a reward on the quickstart's reviews, with equal numbers of samples.

rlhf run --config=every_algorithm --workdir=/tmp/every
rlhf run --config=every_algorithm:debug --workdir=/tmp/debug
rlhf sweep --config=every_algorithm --workdir=/tmp/every_sweep

The stages of configs/quickstart.py make an SFT policy and a reward model. From these start seven
RL algorithms, each with 5,120 responses (40 iterations of 128), the quickstart's KL penalty where
the algorithm has one, and the pretraining loss of PPO-ptx. Expert iteration samples as many: two
rounds of 4 responses to each of 640 prompts, with SFT on the best one. Best-of-8 trains nothing and
samples 8 responses for each that it gives. The last stage compares all of them by the gold score.
docs/algorithms/comparison.md has the results of three seeds.
"""

import ml_collections
import quickstart

from rlhf_jax import config as c
from rlhf_jax.algorithms import build
from rlhf_jax.rewards import scorers

ROUNDS, SAMPLES = 2, 4  # of expert iteration
# (stage, algorithm, preset, settings in addition to those of quickstart.rl_stage).
CRITIC_FREE = {'sampling.samples': SAMPLES, 'optim.b2': 0.95}
ALGORITHMS = (
  ('rloo', 'rloo', '', CRITIC_FREE),
  ('reinforce_plus_plus', 'reinforce', 'reinforce_plus_plus', {'optim.b2': 0.95}),
  ('a2c', 'a2c', '', {'rl.epochs': 1, 'rl.minibatches': 8, 'rl.gamma': 1.0, 'rl.lam': 0.95}),
  ('online_dpo', 'online_dpo', '', CRITIC_FREE),
  ('rejection_sampling', 'rejection_sampling', '', CRITIC_FREE | {'rl.epochs': 1}),
)


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed."""
  arg = c.parse_arg(arg, debug=False, seed=0)
  config = quickstart.get_config(f'seed={arg.seed}' + (',debug' if arg.debug else ''))
  rl = {'ppo': config.ppo, 'grpo': quickstart.grpo()}
  for name, algorithm, preset, settings in ALGORITHMS:
    rl[name] = quickstart.rl_stage(build.load(algorithm).config(preset))
    rl[name].update_from_flattened_dict(settings)
  expert = expert_iteration()
  evaluate = config.evaluate
  for name, stage in (rl | expert).items():
    config[name] = stage
  policies = (*rl, f'expert_{ROUNDS}')
  evaluate.update(
    {
      'title': 'Every algorithm on product reviews',
      'policies': tuple((name, f'$workdir/{name}') for name in ('sft', *policies)),
      'samples': 2_048,
      'curves': tuple(rl),
    }
  )
  config.stages = (
    *('world', 'pretrain', 'sft', 'compare', 'reward_model'),
    *(*rl, *expert, 'evaluate'),
  )
  if arg.debug:
    debug(config, rl, expert)
  return config


def get_hyper(h):
  """Lists the runs of `rlhf sweep`: three seeds."""
  return h.sweep(':seed', range(3))


def expert_iteration():
  """Returns the stages of expert iteration, which fine-tunes the SFT model anew in each round."""
  stages = {'expert_prompts': quickstart.world()}
  # Prompts are all that is needed of this world.
  sizes = {'corpus_size': 1_000, 'demonstration_count': 1, 'prompt_count': 640}
  stages['expert_prompts'].update(sizes | {'eval_prompt_count': 1})
  policy = '$workdir/sft'
  for i in range(1, ROUNDS + 1):
    stages[f'expert_samples_{i}'] = sample(policy)
    stages[f'expert_{i}'] = quickstart.sft()
    stages[f'expert_{i}'].model.path = '$workdir/sft/model'
    stages[f'expert_{i}'].data.path = f'$workdir/expert_samples_{i}/best.jsonl'
    stages[f'expert_{i}'].data.held_out = None
    policy = f'$workdir/expert_{i}'
  return stages


def sample(policy):
  """Returns the stage that samples from a policy and selects the best response to each prompt."""
  reward = scorers.config()
  reward.model = '$workdir/reward_model/model'
  return ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.best_of_n_stage:run',
      'policy': policy,
      'prompts': '$workdir/expert_prompts/prompts.jsonl',
      'reward': reward,
      'samples': SAMPLES,
      'keep': 1,
      'min_score': ml_collections.config_dict.placeholder(float),
      'max_new_tokens': 36,
      'temperature': 1.0,
      'seed': None,
    }
  )


def debug(config, rl, expert):
  """Shrinks the stages that the quickstart does not have."""
  for name in rl:
    config[name].update({'steps': 2, 'batch_size': 16})
    config[name].sampling.max_new_tokens = 12
    config[name].ptx.batch_size = 8
  for name in expert:
    if name == 'expert_prompts':
      config[name].update({'corpus_size': 100, 'prompt_count': 16})
    elif 'samples' in name:
      config[name].max_new_tokens = 12
    else:
      config[name].update({'steps': 2, 'batch_size': 8})
      config[name].data.epochs, config[name].optim.warmup_steps = None, 0
  config.evaluate.samples = 32

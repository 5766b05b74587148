"""Offline RL on trlX's random walks: a GPT-2 learns short walks from 1,000 recorded random ones.

rlhf run --config=random_walks_offline --workdir=/tmp/offline
rlhf run --config=random_walks_offline:seed=1 --workdir=/tmp/offline_1
rlhf run --config=random_walks_offline:debug --workdir=/tmp/debug
rlhf sweep --config=random_walks_offline --workdir=/tmp/offline_sweep

See rlhf_jax/tasks/random_walks.py for the task. The data are the 1,000 walks of trlX's
examples/randomwalks with their optimality as reward; no walk is sampled while learning. Three
models of its size are trained from scratch, each for 1,000 steps of about 100 walks:

    cloning    imitates all walks
    filtered   imitates the best fifth of them
    ilql       ILQL with trlX's settings for this task

The table at the end has the sampled optimality of 5,000 walks, of ILQL with beta 0, 1 and 100.
`beta_100/score` in the metrics of `ilql` is that of 200 walks while learning. Rows hold several
walks: 18 rows of 43 positions have as many walks as trlX's batches, 100, and less padding.
"""

import ml_collections
import random_walks as walks

from rlhf_jax import config as c
from rlhf_jax.algorithms import ilql as ilql_lib
from rlhf_jax.algorithms import sft
from rlhf_jax.tasks import random_walks

LENGTH = random_walks.MAX_LENGTH - 1
STEPS = 1000
BETAS = {'beta_0': 0.0, 'beta_1': 1.0, 'beta_100': 100.0}


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed."""
  arg = c.parse_arg(arg, debug=False, seed=0)
  stages = ('world', 'cloning', 'filtered', 'ilql', 'evaluate')
  config = ml_collections.ConfigDict({'seed': arg.seed, 'stages': stages})
  config.world = ml_collections.ConfigDict(
    {'function': 'rlhf_jax.tasks.random_walks:write', 'walks': 1, 'seed': None}
  )
  config.cloning = clone('walks')
  config.filtered = clone('best_walks')
  config.ilql = ilql()
  clones = [(name, f'$workdir/{name}') for name in ('cloning', 'filtered')]
  config.evaluate = walks.evaluate(clones + [(name, '$workdir/ilql') for name in BETAS])
  config.evaluate.update(
    {
      'title': 'Random walks from recorded walks',
      'summary': 'Gold is the optimality of the walk. beta_N samples from ILQL with beta N.',
      'betas': tuple((name, beta) for name, beta in BETAS.items() if beta),
      'curves': stages[1:-1],
    }
  )
  if arg.debug:
    debug(config)
  return config


def get_hyper(h):
  """Lists the runs of `rlhf sweep`: five seeds."""
  return h.sweep(':seed', range(5))


def common(stage):
  """Sets what all three models share, and returns the stage."""
  stage.seed = None
  stage.tokenizer = '$workdir/world/tokenizer'
  stage.model.init = ml_collections.ConfigDict(random_walks.MODEL)
  stage.data.path = '$workdir/world/walks.jsonl'
  stage.optim.update({'learning_rate': 2e-4, 'b2': 0.95, 'weight_decay': 1e-6})
  stage.update({'steps': STEPS, 'log_every': 10, 'checkpoint_minutes': None})
  return stage


def clone(data):
  """Returns a stage of SFT on a data set of walks."""
  stage = common(sft.config())
  stage.data.path = f'$workdir/world/{data}.jsonl'
  stage.data.update({'kind': 'completion', 'max_length': LENGTH + 2})
  stage.batch_size = 100
  stage.evals.sampled = evaluator(0.0, every=100)
  return stage


def ilql():
  """Returns the stage of ILQL: trlX's settings, whose targets move every 10 steps."""
  stage = common(ilql_lib.config())
  stage.data.update({'columns': 'reward=rating', 'max_length': 44})
  stage.ilql.update({'tau': 0.8, 'target_alpha': 0.1, 'target_every': 10, 'pack': True})
  stage.batch_size = 18
  for name, beta in BETAS.items():
    stage.evals[name] = evaluator(beta, every=16 if beta == 100 else 100)
  return stage


def evaluator(beta, *, every):
  """Returns the evaluator of the optimality of 200 sampled walks, 10 from each start."""
  return ml_collections.ConfigDict(
    {
      'kind': 'prompts',
      'path': '$workdir/world/starts.jsonl',
      'every': every,
      'batch_size': 200,
      'sampling': {'max_new_tokens': LENGTH, 'top_k': 10, 'beta': beta},
      'reward': {'function': 'rlhf_jax.tasks.random_walks:reward'},
    }
  )


def debug(config):
  """Shrinks all stages so that the pipeline takes seconds; its results mean nothing."""
  for name in ('cloning', 'filtered', 'ilql'):
    config[name].model.init.update({'n_layer': 2, 'n_embd': 48})
    config[name].steps = 2
  config.evaluate.samples = 40

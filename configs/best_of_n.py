"""Best-of-n with your model, prompts and reward: samples, scores, and keeps the best responses.

rlhf run --config=best_of_n:n=16 --workdir=DIR \\
    --config.sample.policy=FOLDER --config.sample.prompts=FILE \\
    --config.sample.reward.model=FOLDER

The reward may be anything that `config.reward` of RL may be: a reward model, an ensemble, a Python
function, a reward server, or a weighted sum of these. DIR/sample/best.jsonl has the best response
to each prompt, as data for SFT; samples.jsonl has all of them with their scores; results.json has
the expected score of best-of-n for n = 1, 2, 4 and so on, an unbiased estimate from all n samples.

Published sizes, with a reward model of human preferences: WebGPT (https://arxiv.org/abs/2112.09332)
has n=4 for its model of 760 M parameters, n=16 for 13 B and n=64 for 175 B; GopherCite
(https://arxiv.org/abs/2203.11147) has n=16 and n=64. Llama 2 (https://arxiv.org/abs/2307.09288)
fine-tunes on the best responses: see configs/expert_iteration.py, or the algorithm
`rejection_sampling`, which does so in one loop.
"""

import ml_collections

from rlhf_jax import config as c
from rlhf_jax.rewards import scorers


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 samples of 8 tokens), seed, n."""
  arg = c.parse_arg(arg, debug=False, seed=0, n=16)
  config = ml_collections.ConfigDict({'seed': arg.seed, 'stages': ('sample',)})
  config.sample = ml_collections.ConfigDict(
    {
      'function': 'rlhf_jax.evaluation.best_of_n_stage:run',
      'policy': '',
      'prompts': '',
      'reward': scorers.config(),
      'samples': arg.n,
      'keep': 1,
      'min_score': ml_collections.config_dict.placeholder(float),
      'max_new_tokens': 256,
      'temperature': 1.0,
      'top_k': 0,
      'top_p': 1.0,
      'stop': (),
      'seed': None,
    }
  )
  if arg.debug:
    config.sample.update({'samples': 2, 'max_new_tokens': 8})
  return config

"""ILQL with your model and rewarded data: nothing is sampled, and Q functions guide the sampler.

rlhf run --config=ilql --workdir=DIR --config.model.path=FOLDER --config.data.path=FILE
rlhf generate --model=DIR --beta=1 --top_k=20 --prompt=TEXT

The data have lines {"prompt", "completion", "reward"}, where the reward is a number or a list of
one number per token; or {"messages", "reward"} with a number, or one per message of the assistant.
If they have no rewards, `--config.reward.function=module:function` or
`--config.reward.model=FOLDER` rewards them once. Presets: sea_snell, lmrl_gym; see
rlhf_jax/algorithms/ilql.py. Watch `held_out/q_loss` and `v/mean`. To sample while training:

    --config.evals.sampled="{'kind': 'prompts', 'path': FILE, 'every': 100, \\
        'sampling': {'beta': 1.0, 'top_k': 20}, 'reward': {'function': 'module:function'}}"
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import ilql


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = ilql.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_length': 256, 'held_out': 0.05})
  config.steps = 1000
  config.evals.held_out.every = 100
  config.checkpoint_every = 200
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 16, 'microbatch_size': None})
  return config

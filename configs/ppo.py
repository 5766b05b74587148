"""PPO with your model, prompts and reward.

rlhf run --config=ppo:preset=n_plus --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE --config.reward.model=FOLDER

To use a Python function instead of the reward model, pass
`--config.reward.function=module:function`; see rlhf_jax/rewards/functions.py. Presets: openai2019,
n_plus, trl, trlx, instructgpt; see docs/presets.md. `instructgpt` also needs
`--config.ptx.path=FILE`. Watch `objective/scores` and `objective/kl`; samples.jsonl has responses.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import ppo


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps of 16 prompts, no warmup), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='n_plus')
  config = ppo.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_prompt_length': 256, 'on_long': 'truncate_left'})
  config.sampling.max_new_tokens = 64
  config.steps = 1000
  config.optim.clip_norm = 1.0
  config.update({'samples_every': 20, 'checkpoint_every': 50})
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 16})
    config.optim.update({'warmup_steps': 0, 'warmup_from': 0.0})
    config.ptx.batch_size = config.ptx.batch_size and 16
  return config

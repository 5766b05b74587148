"""A2C with your model, prompts and reward: the policy gradient with a critic, without clips.

rlhf run --config=a2c --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE --config.reward.function=module:function

To use a reward model instead of the function, pass `--config.reward.model=FOLDER`. Preset: rl4lms;
see rlhf_jax/algorithms/a2c.py. Watch `objective/scores` and `objective/kl`; samples.jsonl has
responses.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import a2c


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps of 16 prompts), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = a2c.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_prompt_length': 256, 'on_long': 'truncate_left'})
  config.sampling.max_new_tokens = 64
  config.steps = 1000
  config.update({'samples_every': 20, 'checkpoint_every': 50})
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 16})
  return config

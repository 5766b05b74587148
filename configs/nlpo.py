"""NLPO with your model, prompts and reward: PPO that samples only among likely tokens.

rlhf run --config=nlpo --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE --config.reward.function=module:function

To use a reward model instead of the function, pass `--config.reward.model=FOLDER`. A masking
policy, a copy of the policy that is refreshed every `config.rl.mask_every` iterations, allows the
tokens within the probability `config.rl.mask_top_p`. Presets: rl4lms_imdb, rl4lms_numbers; see
rlhf_jax/algorithms/nlpo.py. Watch `objective/scores` and `policy/masked_share`.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import nlpo


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps of 16 prompts), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = nlpo.config(arg.preset)
  config.seed = arg.seed
  config.data.on_long = 'truncate_left'
  if not arg.preset:
    config.data.max_prompt_length, config.sampling.max_new_tokens = 256, 64
    config.optim.clip_norm = 1.0
  config.steps = 1000
  config.update({'samples_every': 20, 'checkpoint_every': 50})
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 16})
  return config

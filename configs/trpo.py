"""TRPO with your model, prompts and reward: natural-gradient steps with a bound on the KL.

rlhf run --config=trpo --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE --config.reward.function=module:function

To use a reward model instead of the function, pass `--config.reward.model=FOLDER`.
`config.rl.max_kl` bounds each step of the policy; the learning rate is the critic's. An iteration
costs about as much as 20 epochs of PPO. Preset: rl4lms; see rlhf_jax/algorithms/trpo.py. Watch
`objective/scores` and `trust_region/accepted`; samples.jsonl has responses.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import trpo


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps of 16 prompts), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = trpo.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_prompt_length': 256, 'on_long': 'truncate_left'})
  config.sampling.max_new_tokens = 64
  config.steps = 500
  config.update({'samples_every': 20, 'checkpoint_every': 50})
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 16})
  return config

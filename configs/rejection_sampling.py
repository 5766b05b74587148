"""Rejection sampling with your model, prompts and reward: fine-tuning on the best responses.

rlhf run --config=rejection_sampling --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE --config.reward.function=module:function

To use a reward model instead of the function, pass `--config.reward.model=FOLDER`. Each iteration
samples 8 responses to each prompt and fine-tunes on the best one. Preset: trlx (32 responses, those
above a rising percentile); see rlhf_jax/algorithms/rejection_sampling.py. Watch `objective/scores`
and `kept/scores`; samples.jsonl has responses.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import rejection_sampling


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = rejection_sampling.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_prompt_length': 256, 'on_long': 'truncate_left'})
  config.sampling.max_new_tokens = 256
  config.batch_size, config.steps = 256, 500
  config.optim.update({'warmup_steps': 10, 'warmup_from': 0.1, 'clip_norm': 1.0})
  config.update({'samples_every': 20, 'checkpoint_every': 50})
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 2 * config.sampling.samples})
    config.optim.update({'warmup_steps': 0, 'warmup_from': 0.0})
  return config

"""Online DPO with your model, prompts and reward: the best and the worst response are a pair.

rlhf run --config=online_dpo --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE --config.reward.function=module:function

To use a reward model instead of the function, pass `--config.reward.model=FOLDER`.
`config.batch_size` counts responses, `config.sampling.samples` responses per prompt. Presets: trl,
ipo; see rlhf_jax/algorithms/online_dpo.py. Watch `objective/scores` and `rewards/accuracies`;
samples.jsonl has responses.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import online_dpo


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = online_dpo.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_prompt_length': 256, 'on_long': 'truncate_left'})
  config.sampling.max_new_tokens = 64
  config.batch_size, config.steps = 128, 500
  config.optim.update({'warmup_steps': 10, 'warmup_from': 0.1, 'clip_norm': 1.0})
  config.update({'samples_every': 20, 'checkpoint_every': 50})
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 16})
    config.optim.update({'warmup_steps': 0, 'warmup_from': 0.0})
  return config

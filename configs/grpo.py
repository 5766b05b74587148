"""GRPO of your model against your reward: no critic, a group of responses to each prompt.

rlhf run --config=grpo:preset=dr_grpo --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE --config.reward.function=module:function

`--config.reward.model=FOLDER` takes a reward model in place of the function. `config.batch_size`
counts responses, `config.sampling.samples` those of a prompt. Presets: deepseekmath, dr_grpo, dapo,
gspo; see rlhf_jax/algorithms/grpo.py. Watch `objective/scores`; samples.jsonl has texts.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import grpo


def get_config(arg=None):
  """Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = grpo.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_prompt_length': 256, 'on_long': 'truncate_left'})
  config.sampling.max_new_tokens = 256
  config.batch_size, config.steps = 128, 500
  config.optim.update(
    {'learning_rate': 1e-6, 'warmup_steps': 10, 'warmup_from': 0.1, 'clip_norm': 1.0}
  )
  config.update({'samples_every': 20, 'checkpoint_every': 50})
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 2 * config.sampling.samples})
    config.optim.update({'warmup_steps': 0, 'warmup_from': 0.0})
  return config

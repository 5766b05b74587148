"""A reward model from your comparisons.

rlhf run --config=reward_model --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE

Trains for one epoch, as in InstructGPT (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155),
because more epochs overfit. `held_out/accuracy` is the accuracy on held-out pairs.
`--config.preference.loss` is 'pairwise', 'pick_best' or 'rating'; the last two need
`--config.preference.centering=0`. docs/data.md lists the record formats.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import reward_model


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = reward_model.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_length': 512, 'epochs': 1.0, 'held_out': 0.1})
  config.batch_size = 32
  config.preference.centering = 0.01
  config.optim.update(
    {'learning_rate': 1e-5, 'schedule': 'cosine', 'warmup_steps': 10, 'b2': 0.95, 'clip_norm': 1.0}
  )
  config.evals.held_out.every, config.checkpoint_every = 100, 200
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 8})
    config.data.epochs, config.optim.warmup_steps = None, 0
  return config

"""Supervised fine-tuning of your model on your data.

rlhf run --config=sft --workdir=DIR \\
    --config.model.path=FOLDER --config.data.path=FILE

Trains on the completions of prompts. `--config.data.kind=text` trains on full texts instead, packed
into sequences of equal length. docs/data.md lists the record formats. `--config.data.epochs=X` sets
the length of the run.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import sft


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = sft.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'kind': 'completion', 'max_length': 512, 'epochs': 2.0, 'held_out': 0.05})
  config.batch_size = 32
  config.optim.update(
    {'learning_rate': 2e-5, 'schedule': 'cosine', 'warmup_steps': 10, 'b2': 0.95, 'clip_norm': 1.0}
  )
  config.evals.held_out.every, config.checkpoint_every = 100, 200
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 8})
    config.data.epochs, config.optim.warmup_steps = None, 0
  return config

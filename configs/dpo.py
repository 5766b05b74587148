"""DPO, or one of its relatives, from your comparisons: no reward model and no sampling.

rlhf run --config=dpo --workdir=DIR --config.model.path=FOLDER --config.data.path=FILE
rlhf run --config=dpo:preset=kto --workdir=DIR --config.model.path=FOLDER --config.data.path=FILE

Start from an SFT model whose responses are like those compared. Presets: cdpo, robust, hinge, ipo,
kto (completions with a label), orpo, simpo, rpo, tulu3; see rlhf_jax/algorithms/dpo.py. Watch
`held_out/accuracy` and `logps/chosen`. docs/data.md lists the record formats.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import dpo


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = dpo.config(arg.preset)
  config.seed = arg.seed
  config.data.update({'max_length': 512, 'epochs': 1.0, 'held_out': 0.05})
  config.batch_size = 32
  config.optim.update({'schedule': 'linear', 'warmup_steps': 10, 'clip_norm': 1.0})
  config.evals.held_out.every, config.checkpoint_every = 100, 200
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 8})
    config.data.epochs, config.optim.warmup_steps = None, 0
  return config

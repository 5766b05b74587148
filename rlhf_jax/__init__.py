"""RLHF for language models in JAX: pretraining, SFT, reward models, PPO and GRPO.

`import rlhf_jax as rl` gives `rl.load`, `rl.train`, `rl.compare` and `rl.Run`; see api.py.
"""

import importlib
import os

# Only the tokenizers of transformers are used, so its advice to install PyTorch does not apply.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

__all__ = ['Run', 'compare', 'load', 'train']


def __getattr__(name):
  """Imports the API at its first use, so that `import rlhf_jax` is fast."""
  if name in __all__:
    return getattr(importlib.import_module('rlhf_jax.api'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

"""RLHF for language models in JAX: pretraining, SFT, reward models and PPO."""

import os

# Of transformers only the tokenizers are used; that it finds no torch is as it should be.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

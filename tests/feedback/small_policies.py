"""Random policies for the tests of live policies and of chat."""

import jax

from rlhf_jax import models
from rlhf_jax.models import hf
import tiny

CONTEXT = 96  # tokens
NAMES = 'calm', 'wild'


def write(folder, seed):
  """Writes a model to a subfolder with the name of the seed, and returns its path."""
  path = folder / NAMES[seed]
  model = models.create(tiny.LLAMA | {'max_position_embeddings': CONTEXT, 'initializer_range': 0.3})
  hf.save(path, model, model.init(jax.random.key(seed)), tokenizer=tiny.write_tokenizer(path))
  return path

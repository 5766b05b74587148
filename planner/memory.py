"""Bytes on each chip: arrays that stay between programs, by kind, and temporaries of programs."""

import math
import re

import jax

from rlhf_jax import sharding

# The kind of an array by its path in `Programs.arrays`; the first pattern found applies.
KINDS = (
  (r'^state/opt_state/.*\bmaster/', 'master weights'),
  (r'^state/opt_state/.*\bema/', 'moving average'),
  (r'^state/opt_state/', 'moments'),
  (r'^state/params/policy/|^frozen/policy/', 'policy'),
  (r'^state/params/critic/', 'critic'),
  (r'^frozen/reference/', 'reference'),
  (r'^scored/', 'reward model'),
  (r'', 'scalars'),
)


def on_chip(array):
  """Returns the bytes per chip of a ShapeDtypeStruct with a sharding."""
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def by_kind(arrays):
  """Returns {kind: bytes per chip} of the arrays that stay on the chips.

  Args:
    arrays: Programs.arrays.
  """
  sizes = {}
  for path, array in sharding.paths(arrays).items():
    kind = next(kind for pattern, kind in KINDS if re.search(pattern, path))
    sizes[kind] = sizes.get(kind, 0) + on_chip(array)
  return {kind: size for kind, size in sizes.items() if kind != 'scalars'}


def cache(config, model, mesh):
  """Returns the bytes per chip of a rollout's cache.

  The batch is split over 'data' and 'fsdp', the heads over 'tensor' if it divides them.
  """
  length = config.data.max_prompt_length + config.sampling.max_new_tokens
  shapes = jax.eval_shape(lambda: model.init_cache(config.batch_size, length))
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if model.config.kv_heads % mesh.shape['tensor'] == 0:
    shards *= mesh.shape['tensor']
  return (
    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((shapes['k'], shapes['v'])))
    / shards
  )


def gradients(config, arrays):
  """Returns the bytes per chip of gradients, and of their float32 sums over microbatches."""
  leaves = jax.tree.leaves(arrays['state'].params)
  own = sum(on_chip(leaf) for leaf in leaves)
  rows = config.batch_size // config.rl.minibatches
  if not config.microbatch_size or config.microbatch_size >= rows:
    return own
  return own + sum(on_chip(leaf) * 4 // leaf.dtype.itemsize for leaf in leaves)

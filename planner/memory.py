"""Bytes on each chip: what stays between programs, by kind, and what a program adds."""

import math
import re

import jax

from rlhf_jax import sharding

# What an array is by its path in `Programs.arrays`; the first pattern found counts.
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
  """Bytes of one chip's part of a ShapeDtypeStruct with a sharding."""
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def by_kind(arrays):
  """{kind: bytes per chip} of the arrays that stay on the chips.

  Args:
    arrays: Programs.arrays.
  """
  sizes = {}
  for path, array in sharding.paths(arrays).items():
    kind = next(kind for pattern, kind in KINDS if re.search(pattern, path))
    sizes[kind] = sizes.get(kind, 0) + on_chip(array)
  return {kind: size for kind, size in sizes.items() if kind != 'scalars'}


def cache(config, model, mesh):
  """Bytes of a rollout's cache per chip: split over 'data' and 'fsdp', its heads over 'tensor'."""
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
  """Bytes per chip of the gradients, and of their float32 sums where there are microbatches."""
  leaves = jax.tree.leaves(arrays['state'].params)
  own = sum(on_chip(leaf) for leaf in leaves)
  rows = config.batch_size // config.rl.minibatches
  if not config.microbatch_size or config.microbatch_size >= rows:
    return own
  return own + sum(on_chip(leaf) * 4 // leaf.dtype.itemsize for leaf in leaves)

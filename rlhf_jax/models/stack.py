"""Stacked blocks under one scan, and Flax modules as functions of a dict of parameters.

Letters: B batch, T tokens of this call, S cache length, L layers, D width, K key/value heads, H
head width.

Each Flax module is split once into a static graph and a dict of parameters. `build` merges the
two inside traced functions: one layer at a time in the scan, so compile time does not grow with
depth.
"""

import functools
import itertools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.models import lora as lora_lib

# What a block saves for its backward pass: everything, its input only, or its input and the
# outputs of its matmuls.
REMAT = {
  'none': None,
  'block': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Depth up to which stacks are unrolled by default. Steps then take 0.5 to 0.9 of the time;
# compiling PPO takes 3 seconds longer with 12 layers, and 30 seconds longer with 24.
MAX_UNROLLED = 12


@functools.cache
def _split(cls, config, dtype, lora, prefix):
  """Returns the graph of a module, and its parameters as a dict of ShapeDtypeStructs."""

  def build():
    module = cls(config, dtype=dtype, rngs=nnx.Rngs(0))
    if lora is not None:
      lora_lib.attach(module, lora, prefix=prefix)
    return module

  graph, state = nnx.split(nnx.eval_shape(build))
  return graph, nnx.to_pure_dict(state)


def build(cls, config, dtype, params, *, lora=None, prefix=''):
  """Builds a module with given parameters.

  Args:
    cls: nnx.Module class, called as cls(config, dtype=dtype, rngs=rngs).
    config: Config of the family, hashable.
    dtype: Compute dtype.
    params: Dict with the module's parameters, and possibly others.
    lora: lora.Lora whose patterns choose the maps that have adapters, or None.
    prefix: Path of the module in the model, which these patterns match.

  Returns:
    An instance of `cls`.
  """
  graph, state = _split(cls, config, dtype, lora, prefix)
  return nnx.merge(graph, {name: params[name] for name in state})


def build_embedder(cls, config, dtype, params, *, lora=None):
  """Builds the module outside of the blocks; it has no adapters if only top blocks are trained."""
  return build(cls, config, dtype, params, lora=None if 'top' in params else lora)


def shapes(cls, config, *, depth=None):
  """Returns a module's parameters as float32 ShapeDtypeStructs.

  Args:
    cls, config: See `build`.
    depth: Size of a leading axis of layers; None for no such axis.
  """
  leading = () if depth is None else (depth,)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leading + leaf.shape, jnp.float32),
    _split(cls, config, 'float32', None, '')[1],
  )


def init_params(key, tree, std):
  """Initializes parameters: kernels and embeddings normal, scales 1, biases and offsets 0.

  Args:
    key: Random key.
    tree: Tree of ShapeDtypeStructs.
    std: Function from a parameter's path to its standard deviation.

  Returns:
    Tree of float32 arrays.
  """
  sizes = {
    name: math.prod(leaf.shape)
    for name, leaf in sharding.paths(tree).items()
    if not name.endswith(('scale', 'bias', 'offset'))
  }
  # One draw for all, because compiling a draw per parameter would take half a second each.
  normal = jax.random.normal(key, (sum(sizes.values()),))
  starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0)))

  def fill(name, leaf):
    if name not in sizes:
      return jnp.ones(leaf.shape) if name.endswith('scale') else jnp.zeros(leaf.shape)
    values = normal[starts[name] : starts[name] + sizes[name]]
    return values.reshape(leaf.shape) * std(name)

  return sharding.map_with_path(fill, tree)


def unstack(params):
  """Splits stacked parameters into a tuple of layers, which `scan` then unrolls."""
  leaves, structure = jax.tree.flatten(params)
  # The gradient of a split is one concatenation; that of slices is a sum of padded layers.
  split = [[x[0] for x in jax.lax.split(leaf, [1] * leaf.shape[0])] for leaf in leaves]
  return tuple(structure.unflatten(layer) for layer in zip(*split))


def default_unroll(depth):
  """Returns the default `unroll`: on CPUs the depth if it is at most `MAX_UNROLLED`, else 1."""
  return depth if sharding.platform() == 'cpu' and depth <= MAX_UNROLLED else 1


def scan(build_block, params, apply, carry, *, first=0, remat='none', unroll=1):
  """Applies blocks one after another.

  Args:
    build_block: Function from the parameters of one layer to its block.
    params: Dict of parameters, each with a leading axis of layers; or a tuple from `unstack`.
    apply: Function (block, layer, x, kv_cache) -> (x, kv_cache). `layer` is the index of the layer,
      an int for parameters from `unstack`, else an int32 scalar.
    carry: (x [B, T, D], kv_cache); see `update_cache`.
    first: Index of the first of these layers in the model.
    remat: Name in REMAT.
    unroll: Layers unrolled in the scan, or None for `default_unroll`.

  Returns:
    The carry after the last block.
  """
  if isinstance(params, tuple):
    for layer, layer_params in enumerate(params, first):
      x, kv_cache = apply(build_block(layer_params), layer, *carry)
      carry = sharding.split_rows(x), kv_cache
    return carry
  depth = jax.tree.leaves(params)[0].shape[0]
  if not depth:
    return carry

  def block(carry, layer_and_params):
    layer, params = layer_and_params
    x, kv_cache = apply(build_block(params), layer, *carry)
    return (sharding.split_rows(x), kv_cache), None

  unroll = min(unroll or default_unroll(depth), depth)
  if remat != 'none':
    block = jax.checkpoint(block, policy=REMAT[remat], prevent_cse=False)
    # Without a loop, XLA would merge the recomputation with the forward pass.
    unroll = min(unroll, max(depth // 2, 1))
  return jax.lax.scan(
    block, carry, (first + jnp.arange(depth), params), unroll=processes.must_unroll() or unroll
  )[0]


def update_cache(kv_cache, layer, keys, values):
  """Writes a layer's new keys and values into the cache.

  The cache of all layers is carried through the scan and written in place. As an output of the
  scan, it would be copied every step.

  Args:
    kv_cache: () without a cache, or (keys, values [L, B, K, S, H], index of the first slot to
      write). If `layer` is an int, keys and values may be tuples of L arrays [B, K, S, H].
    layer: Index of the layer, an int or an int32 scalar.
    keys, values: [B, T, K, H].

  Returns:
    All keys and values of the layer, [B, K, S, H] (S = T without a cache), and the new
    kv_cache.
  """
  keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
  if not kv_cache:
    return keys, values, kv_cache
  all_keys, all_values, index = kv_cache
  if isinstance(all_keys, tuple):
    keys = jax.lax.dynamic_update_slice(all_keys[layer], keys, (0, 0, index, 0))
    values = jax.lax.dynamic_update_slice(all_values[layer], values, (0, 0, index, 0))
    return (
      keys,
      values,
      (_set_layer(all_keys, layer, keys), _set_layer(all_values, layer, values), index),
    )
  start = (layer, 0, 0, index, 0)
  all_keys = jax.lax.dynamic_update_slice(all_keys, keys[None], start)
  all_values = jax.lax.dynamic_update_slice(all_values, values[None], start)
  keys = jax.lax.dynamic_index_in_dim(all_keys, layer, keepdims=False)
  values = jax.lax.dynamic_index_in_dim(all_values, layer, keepdims=False)
  return keys, values, (all_keys, all_values, index)


def _set_layer(layers, layer, x):
  return layers[:layer] + (x,) + layers[layer + 1 :]

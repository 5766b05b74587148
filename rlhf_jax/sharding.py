"""Meshes, and the sharding of every array on them by one table of rules per model family.

A mesh has three axes: 'data' shards the batch, 'fsdp' shards the batch and one dimension of the
parameters, and 'tensor' shards another dimension of the parameters. Data parallelism, FSDP and
tensor parallelism are shapes of the mesh, not different code.

A row is an entry along the batch axis of an array.
"""

import math
import re

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))


def make_mesh(shape, *, devices=None):
  """Makes a mesh over all devices of all processes.

  Args:
    shape: {'data': n, 'fsdp': n, 'tensor': n}. A missing axis has size 1. One size may be -1, for
      the remaining devices.
    devices: List of devices; None for all devices.

  Returns:
    Mesh with the three axes in this order.

  Raises:
    UserError: An axis is unknown, more than one size is -1, or the sizes do not use all devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  unknown = sorted(set(shape) - set(AXES))
  if unknown:
    raise UserError(f'mesh: unknown axes {unknown}; the axes are {list(AXES)}')
  sizes = [shape.get(axis, 1) for axis in AXES]
  if sizes.count(-1) > 1 or any(
    not isinstance(size, int) or size < 1 and size != -1 for size in sizes
  ):
    raise UserError(
      f'mesh: {dict(zip(AXES, sizes))}: sizes must be positive whole numbers, '
      'and at most one may be -1 (the remaining devices)'
    )
  known = math.prod(size for size in sizes if size != -1)
  sizes = [max(count // known, 1) if size == -1 else size for size in sizes]
  if math.prod(sizes) != count:
    raise UserError(
      f'mesh: {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices, but there are {count}'
    )
  # Unlike jax.make_mesh, this can split a dimension of a v5p's or v6e's grid over two mesh axes.
  grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh):
  """Returns the sharding of an array that every device holds in full."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh):
  """Returns the sharding of an array whose axis 0 is split over 'data' and 'fsdp'."""
  return NamedSharding(mesh, BATCH)


def split_rows(x, *, axis=0):
  """Inside jit: constrains the batch axis of `x` to 'data' and 'fsdp' of the current mesh.

  Otherwise XLA may follow the sharding of the parameters: it splits activations along their width,
  and every device works on every row. Returns `x` unchanged without a mesh, or if the shards do not
  divide the rows: XLA would pad them, and the padding would reach the gradients of parameters split
  over 'tensor'.

  Args:
    x: Array with rows on `axis`.
    axis: Index of the batch axis.
  """
  if shards() == (1, 1) or x.shape[axis] % shards()[0]:
    return x
  return jax.lax.with_sharding_constraint(x, P(*[None] * axis, *row_spec()))


def row_spec():
  """Returns the PartitionSpec of a batch axis on the current mesh; P(None) inside `map_shards`."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return P(tuple(axis for axis in BATCH[0] if axis not in manual) or None)


def shards():
  """Returns the number of batch shards and of 'tensor' shards of the current mesh.

  Without a mesh both are 1. Inside `map_shards` the number of batch shards is 1.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(AXES) <= set(mesh.axis_names):
    return 1, 1
  data, fsdp, tensor = (1 if axis in mesh.manual_axes else mesh.shape[axis] for axis in AXES)
  return data * fsdp, tensor


def map_shards(function, shared, batch):
  """Inside jit: applies a function to each shard of a batch independently.

  No shard waits for another, so a loop runs only as many iterations as its own shard needs. XLA
  still splits the work over 'tensor' as it does outside.

  Args:
    function: (shared, rows of one shard, index of the shard) -> tree of arrays [rows, ...].
    shared: Tree of arrays that every shard reads; arrays split over 'fsdp' are gathered first.
    batch: Tree of arrays [rows, ...]; the number of shards must divide the rows.

  Returns:
    Tree of arrays with the rows of all shards.
  """
  count, tensor = shards()
  if count == 1:
    return function(shared, batch, 0)
  # Pallas kernels need every axis of the mesh to be manual, even an axis of size 1.
  axes = set(AXES if tensor == 1 else BATCH[0])
  call = jax.shard_map(
    lambda shared, batch, number: function(shared, batch, number[0]),
    axis_names=axes,
    in_specs=(P(), BATCH, BATCH),
    out_specs=BATCH,
    check_vma=False,
  )
  return call(shared, batch, jnp.arange(count))


def platform():
  """Returns 'cpu', 'gpu' or 'tpu': the platform of the current mesh, or JAX's default without one.

  The mesh may be abstract, of devices that this machine does not have.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device else jax.default_backend()


def gather(tree, rules, axis):
  """Inside jit: gathers parameters along one mesh axis; the other axes stay sharded by `rules`.

  Returns the parameters unchanged without a mesh.

  Args:
    tree: Parameters.
    rules: See `shardings`.
    axis: Name of the mesh axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree

  def spec(sharding):
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec]
    return P(*[tuple(name for name in entry if name != axis) or None for entry in entries])

  return jax.tree.map(
    lambda x, sharding: jax.lax.with_sharding_constraint(x, spec(sharding)),
    tree,
    shardings(tree, rules, mesh),
  )


def path_name(path):
  """Formats a key path of jax.tree_util as 'blocks/mlp/up/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def paths(tree):
  """Returns {path name: leaf} of a tree, in the tree's order."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(function, tree, *other_trees):
  """Maps `function(path name, leaf, *other leaves)` over trees of the same structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: function(path_name(path), *leaves), tree, *other_trees
  )


def shardings(tree, rules, mesh):
  """Returns the sharding of every leaf of a tree.

  The first rule whose regex is found in a leaf's path applies. Rules end with '$'. The path of an
  optimizer moment ends with the path of its parameter, so both have the same sharding.

  Args:
    tree: Tree of arrays or ShapeDtypeStructs: parameters, optimizer state, or a TrainState.
    rules: [(regex on the '/'-joined path, PartitionSpec)].
    mesh: Mesh, see `make_mesh`.

  Returns:
    Tree of NamedShardings. Scalars that match no rule are replicated.

  Raises:
    UserError: A leaf that is not a scalar matches no rule, or mesh axes do not divide a dimension.
  """
  compiled = [(re.compile(pattern), spec) for pattern, spec in rules]

  def place(name, leaf):
    spec = next((spec for pattern, spec in compiled if pattern.search(name)), None)
    if spec is None and leaf.ndim == 0:
      spec = P()
    if spec is None:
      raise UserError(
        f'sharding: no rule for {name!r} of shape {leaf.shape}; '
        'add one to the rules (P() to replicate it)'
      )
    _check(name, leaf.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return map_with_path(place, tree)


def _check(name, shape, spec, mesh):
  """Raises UserError unless the axes of `spec` divide the dimensions of `shape`."""
  if len(spec) > len(shape):
    raise UserError(f'sharding: {name!r} has shape {shape}, too few dimensions for {spec}')
  for dimension, (size, axes) in enumerate(zip(shape, spec)):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    parts = int(np.prod([mesh.shape[axis] for axis in axes]))
    if size % parts:
      raise UserError(
        f'sharding: {name!r} has shape {shape}; dimension {dimension} ({size}) does not divide by '
        f'mesh axes {list(axes)} of size {parts}; choose another mesh'
      )


def shard_rows(tree):
  """Applies `split_rows` to every array of a tree."""
  return jax.tree.map(split_rows, tree)


def local_rows(rows):
  """Returns a mask, bool [rows], of the rows that `put_rows` reads from this process.

  If the 'tensor' axis spans several processes, these read the same rows. Without a current mesh, or
  if the shards do not divide the rows, the process reads all rows.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty or rows % (mesh.shape['data'] * mesh.shape['fsdp']):
    return np.ones(rows, bool)
  local = np.zeros(rows, bool)
  for (index,) in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
    local[index] = True
  return local


def put_rows(tree, mesh):
  """Puts a batch on the devices, split over 'data' and 'fsdp'.

  Every process passes arrays of the global shape, of which it needs only the rows of its devices;
  see `local_rows`. Other rows are not read.

  Args:
    tree: Tree of NumPy arrays [rows, ...].
    mesh: Mesh, see `make_mesh`.

  Returns:
    Tree of JAX arrays of the same shapes.
  """
  place = batch_sharding(mesh)

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

  return jax.tree.map(put, tree)


def compiler_options(platform):
  """Returns options of jax.jit for programs whose numbers must agree: round bfloat16 as written.

  By default XLA omits roundings, and which ones depends on the program and its shapes. In bfloat16
  on the CPU, the log-probabilities of the sampler, of a pass over the batch and of a pass over a
  minibatch then differ by 6e-3 per token; with this option they differ by 1e-5. Both are equally
  close to float32. The cost on other platforms is unknown, so they keep XLA's default.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'.

  Returns:
    `compiler_options` of jax.jit.
  """
  return {'xla_allow_excess_precision': False} if platform == 'cpu' else None

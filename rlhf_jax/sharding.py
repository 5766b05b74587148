"""Meshes, and where every array lies on them: one table of rules per model family.

A mesh has the axes 'data' (rows of the batch), 'fsdp' (rows of the batch, and parameters split
along one dimension) and 'tensor' (parameters split along the other). Data parallel, FSDP and
tensor parallel are shapes of the mesh, not different code.
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
  """A mesh over all devices (of all processes).

  Args:
    shape: {'data': n, 'fsdp': n, 'tensor': n}; an axis left out has size 1, one may be -1: the
      devices that are left.
    devices: list of devices; None: all of them.

  Returns:
    Mesh with the three axes in this order.

  Raises:
    UserError: unknown axis, more than one -1, or sizes that do not use all devices.
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
      f'mesh: {dict(zip(AXES, sizes))}: sizes are positive whole numbers, at most one is -1 (the rest)'
    )
  known = math.prod(size for size in sizes if size != -1)
  sizes = [max(count // known, 1) if size == -1 else size for size in sizes]
  if math.prod(sizes) != count:
    raise UserError(
      f'mesh: {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices, but there are {count}'
    )
  # jax.make_mesh would refuse to share a dimension of a v5p's or v6e's grid among two axes.
  grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh):
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh):
  """Rows (axis 0) are split over 'data' and 'fsdp'; other axes are whole."""
  return NamedSharding(mesh, BATCH)


def split_rows(x, *, axis=0):
  """Keeps the rows of an activation split over 'data' and 'fsdp', inside jit under `jax.set_mesh`.

  Without it XLA may follow the parameters instead: activations split along their width, and
  every device at work on every row. Does nothing without a mesh, or where the rows do not divide:
  XLA would pad them, and the padding reaches the gradients of parameters split over 'tensor'.

  Args:
    x: an array with rows on `axis`.
    axis: index of the axis of rows.

  Returns:
    x.
  """
  if shards() == (1, 1) or x.shape[axis] % shards()[0]:
    return x
  return jax.lax.with_sharding_constraint(x, P(*[None] * axis, *row_spec()))


def row_spec():
  """PartitionSpec of an axis of rows on the mesh that is set: BATCH, but inside `map_shards` P(None)."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return P(tuple(axis for axis in BATCH[0] if axis not in manual) or None)


def shards():
  """Parts of the rows and parts over 'tensor' that the mesh which is set makes; (1, 1) without one.

  Inside `map_shards` rows have one part: they are those of one shard.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(AXES) <= set(mesh.axis_names):
    return 1, 1
  data, fsdp, tensor = (1 if axis in mesh.manual_axes else mesh.shape[axis] for axis in AXES)
  return data * fsdp, tensor


def map_shards(function, shared, batch):
  """Inside jit: what a function gives for the rows of each data shard, as if there were no other shards.

  Nothing inside waits for other shards, so a loop has as many rounds as its shard needs. Over 'tensor'
  XLA splits the work as it does outside.

  Args:
    function: (whole, rows of one shard, number of the shard) -> tree of arrays with rows first.
    shared: tree of arrays that every shard reads; whatever of it is split over 'fsdp' is gathered first.
    batch: tree of arrays with rows first, which divide over the shards.

  Returns:
    Tree of arrays with the rows of all shards.
  """
  count, tensor = shards()
  if count == 1:
    return function(shared, batch, 0)
  # Pallas kernels want every axis of the mesh here, even one of size 1.
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
  """'cpu', 'gpu' or 'tpu': of the devices of the mesh that is set, which need not be here; else JAX's default."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device else jax.default_backend()


def gather(tree, rules, axis):
  """Inside jit: parameters as `rules` split them, but whole along one axis of the mesh, where a mesh is set.

  Args:
    tree: parameters.
    rules: see `shardings`.
    axis: name of the axis.
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
  """A key path of jax.tree_util as 'blocks/mlp/up/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def paths(tree):
  """Leaves of a tree by the name of their path, in the tree's order."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(function, tree, *rest):
  """Maps `function(path name, leaf, *leaves of the rest)` over trees of one structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
  )


def shardings(tree, rules, mesh):
  """The sharding of every leaf of a tree.

  The first rule whose regex is found in the leaf's path counts. Rules end with '$', so the
  moments of an optimizer, whose paths end with a parameter's path, lie where the parameter lies.

  Args:
    tree: of arrays or ShapeDtypeStructs: parameters, optimizer state, a whole TrainState.
    rules: [(regex on the '/'-joined path, PartitionSpec)].
    mesh: from `make_mesh`.

  Returns:
    Tree of NamedShardings. Scalars that no rule names are replicated.

  Raises:
    UserError: a leaf of one or more dimensions that no rule names, or a dimension that its mesh
      axes do not divide; with the path.
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
  """`split_rows` of every array of a tree."""
  return jax.tree.map(split_rows, tree)


def local_rows(rows):
  """Which of the rows of a batch `put_rows` takes from this process, on the mesh that is set; bool [rows].

  Where 'tensor' crosses processes several of them give the same rows. Without a mesh, or where the
  rows do not divide, all.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty or rows % (mesh.shape['data'] * mesh.shape['fsdp']):
    return np.ones(rows, bool)
  local = np.zeros(rows, bool)
  for (index,) in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
    local[index] = True
  return local


def put_rows(tree, mesh):
  """Rows of a batch to arrays split over the data axes.

  Every process has a batch of this shape on its host and gives the rows that its devices hold, see
  `local_rows`: the others are not read.

  Args:
    tree: of NumPy arrays [rows, ...].
    mesh: from `make_mesh`.

  Returns:
    Tree of jax arrays of the same shapes.
  """
  place = batch_sharding(mesh)

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

  return jax.tree.map(put, tree)


def compiler_options(platform):
  """Options of jax.jit for programs whose numbers must agree: bfloat16 is rounded as written.

  XLA leaves roundings out where it likes, in each program and shape elsewhere: in bfloat16 the
  log-probabilities of the sampler, of a pass over the whole batch and of one over a minibatch differ
  by 6e-3 a token on the CPU, and by 1e-5 with this option. They are as near to those of float32
  with it as without. On other platforms its price is not known, and they keep XLA's choice.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'.

  Returns:
    `compiler_options` of jax.jit.
  """
  return {'xla_allow_excess_precision': False} if platform == 'cpu' else None

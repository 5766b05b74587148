"""Low-rank adapters: y = x W + s x A B beside a frozen W (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Adapters are parameters 'lora/a' and 'lora/b' beside the 'kernel' they adapt, so a tree with
adapters is the model's tree with leaves added, and the model with its adapters off is the same
tree without them. There is no dropout: in RL the same tokens are evaluated several times and the
ratio of their probabilities has to be 1 at the start.

Letters: L layers, I inputs and O outputs of a linear map, r rank.
"""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which linear maps have adapters.

  Attributes:
    targets: ((regex, rank, alpha), ...); the first whose regex is found in a map's path, like
      'blocks/attention/query', counts.
    rslora: s = alpha / sqrt(rank) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) instead
      of alpha / rank.
  """

  targets: tuple[tuple[str, int, float], ...]
  rslora: bool = False

  def find(self, path):
    """(rank, s) of the map at a path, or None."""
    for pattern, rank, alpha in self.targets:
      if re.search(pattern, path):
        return rank, alpha / (rank**0.5 if self.rslora else rank)
    return None

  def apply(self, path, adapter, x):
    """s x A B of the map at `path`, [..., O] float32, for x [..., I]."""
    low = layers.matmul(x, adapter['a'].astype(x.dtype))
    return (
      layers.matmul(low, adapter['b'].astype(x.dtype), preferred_element_type=jnp.float32)
      * self.find(path)[1]
    )


def attach(module, lora, *, prefix):
  """Gives the linear maps of a module the adapters that `lora` names, in place."""
  for path, part in nnx.iter_modules(module):
    found = lora.find('/'.join([*filter(None, [prefix]), *map(str, path)]))
    if found and isinstance(part, layers.Linear):
      part.lora = layers.LowRank(part.in_features, part.out_features, *found, dtype=part.dtype)


def rules(base):
  """Sharding of adapters: A is split like its kernel's inputs, B like its outputs.

  Args:
    base: a family's rules, ((regex, PartitionSpec), ...).
  """
  kernels = [
    (pattern.removesuffix('kernel$'), spec)
    for pattern, spec in base
    if pattern.endswith('/kernel$')
  ]
  return tuple(
    rule
    for pattern, spec in kernels
    for rule in (
      (f'{pattern}lora/a$', P(*spec[:-1], None)),
      (f'{pattern}lora/b$', P(*spec[:-2], None, spec[-1])),
    )
  )


def init(key, params, lora):
  """New adapters: A uniform in +-1 / sqrt(I), as PEFT has it, and B zero, so that nothing changes yet.

  Args:
    key: random key.
    params: the model's parameters (or ShapeDtypeStructs).
    lora: Lora.

  Returns:
    Tree of float32 'lora/a' [L, I, r] and 'lora/b' [L, r, O] (without L outside the blocks).

  Raises:
    UserError: a pattern of `lora` that finds no linear map.
  """
  kernels = {
    name.removesuffix('/kernel'): leaf
    for name, leaf in sharding.paths(params).items()
    if name.endswith('/kernel')
  }
  for pattern, *_ in lora.targets:
    if not any(re.search(pattern, path) for path in kernels):
      raise UserError(
        f'config.model.lora.targets: {pattern!r} is found in no linear map of this model; '
        f'it has {", ".join(sorted(kernels))}'
      )
  adapters = {}
  for number, (path, kernel) in enumerate(kernels.items()):
    found = lora.find(path)
    if found is None:
      continue
    *stack, inputs, outputs = kernel.shape
    bound = inputs**-0.5
    a = jax.random.uniform(
      jax.random.fold_in(key, number), (*stack, inputs, found[0]), minval=-bound, maxval=bound
    )
    insert(adapters, path, {'lora': {'a': a, 'b': jnp.zeros((*stack, found[0], outputs))}})
  return adapters


def insert(tree, path, value):
  """Puts `value` into a nested dict at 'a/b/c', in place."""
  *parents, last = path.split('/')
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = value


def merge(params, adapters, lora, *, sign=1):
  """W + s A B for every adapted kernel, in the kernel's dtype.

  Args:
    params: the model's parameters, without adapters.
    adapters: from `init`, trained.
    lora: Lora.
    sign: -1 takes the adapters out again.

  Returns:
    Parameters of the same structure.
  """
  leaves = sharding.paths(adapters)

  def add(name, kernel):
    path = name.removesuffix('/kernel')
    if f'{path}/lora/a' not in leaves or path == name:
      return kernel
    scale = sign * lora.find(path)[1]
    update = leaves[f'{path}/lora/a'].astype(jnp.float32) @ leaves[f'{path}/lora/b'].astype(
      jnp.float32
    )
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

  return sharding.map_with_path(add, params)

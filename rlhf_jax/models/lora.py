"""Low-rank adapters: y = x W + s x A B with a frozen W.

See Hu et al. 2021 (https://arxiv.org/abs/2106.09685). Adapters are leaves 'lora/a' and 'lora/b'
next to the 'kernel' that they adapt. Removing these leaves from the tree turns the adapters off.
There is no dropout: RL evaluates the same tokens several times, and the ratio of their
probabilities must be 1 before the first update.

Letters: L layers, I inputs and O outputs of a linear map, r rank.
"""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Lora:
  """The linear maps that have adapters.

  Attributes:
    targets: ((regex, rank, alpha), ...). The first entry whose regex is found in the path of a
      linear map, like 'blocks/attention/query', applies to it.
    rslora: Whether s is alpha / sqrt(rank) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)
      instead of alpha / rank.
  """

  targets: tuple[tuple[str, int, float], ...]
  rslora: bool = False

  def find(self, path):
    """Returns (rank, s) of the linear map at a path, or None if it has no adapter."""
    for pattern, rank, alpha in self.targets:
      if re.search(pattern, path):
        return rank, alpha / (rank**0.5 if self.rslora else rank)
    return None

  def apply(self, path, adapter, x):
    """Computes s x A B of the linear map at `path`: x [..., I] to [..., O] float32."""
    low = layers.matmul(x, adapter['a'].astype(x.dtype))
    return (
      layers.matmul(low, adapter['b'].astype(x.dtype), preferred_element_type=jnp.float32)
      * self.find(path)[1]
    )


def attach(module, lora, *, prefix):
  """Adds the adapters of `lora` to the linear maps of a module, in place."""
  for path, part in nnx.iter_modules(module):
    setting = lora.find('/'.join([*filter(None, [prefix]), *map(str, path)]))
    if setting and isinstance(part, layers.Linear):
      part.lora = layers.LowRank(part.in_features, part.out_features, *setting, dtype=part.dtype)


def rules(base):
  """Returns sharding rules of adapters: A is sharded like the kernel's inputs, B like its outputs.

  Args:
    base: Rules of a family, ((regex, PartitionSpec), ...).
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
  """Returns new adapters without effect: A is uniform in +-1 / sqrt(I), as in PEFT, and B is 0.

  Args:
    key: Random key.
    params: Parameters of the model, or ShapeDtypeStructs.
    lora: Lora.

  Returns:
    Tree of float32 'lora/a' [L, I, r] and 'lora/b' [L, r, O] (without L outside the blocks).

  Raises:
    UserError: A regex of `lora` matches no linear map.
  """
  kernels = {
    name.removesuffix('/kernel'): leaf
    for name, leaf in sharding.paths(params).items()
    if name.endswith('/kernel')
  }
  for pattern, *_ in lora.targets:
    if not any(re.search(pattern, path) for path in kernels):
      raise UserError(
        f'config.model.lora.targets: {pattern!r} matches no linear map of this model; '
        f'it has {", ".join(sorted(kernels))}'
      )
  adapters = {}
  for number, (path, kernel) in enumerate(kernels.items()):
    setting = lora.find(path)
    if setting is None:
      continue
    rank, _ = setting
    *stack, inputs, outputs = kernel.shape
    bound = inputs**-0.5
    a = jax.random.uniform(
      jax.random.fold_in(key, number), (*stack, inputs, rank), minval=-bound, maxval=bound
    )
    insert(adapters, path, {'lora': {'a': a, 'b': jnp.zeros((*stack, rank, outputs))}})
  return adapters


def insert(tree, path, value):
  """Sets the value of a nested dict at a path like 'a/b/c', in place."""
  *parents, last = path.split('/')
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = value


def merge(params, adapters, lora):
  """Computes W + s A B for every adapted kernel, in the kernel's dtype.

  Args:
    params: Parameters of the model, without adapters.
    adapters: Adapters, in the structure that `init` returns.
    lora: Lora.

  Returns:
    Parameters of the same structure.
  """
  leaves = sharding.paths(adapters)

  def add(name, kernel):
    path = name.removesuffix('/kernel')
    if f'{path}/lora/a' not in leaves or path == name:
      return kernel
    scale = lora.find(path)[1]
    update = leaves[f'{path}/lora/a'].astype(jnp.float32) @ leaves[f'{path}/lora/b'].astype(
      jnp.float32
    )
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

  return sharding.map_with_path(add, params)


def weighted_sum(parts):
  """Combines adapters into one, which computes the weighted sum of what each adds to W x.

  The ranks are put side by side, so the sum is exact: with A = [A_1 A_2 ...] and B the stack of
  w_i s_i B_i, A B = w_1 s_1 A_1 B_1 + w_2 s_2 A_2 B_2 + ... In PEFT it is add_weighted_adapter with
  combination_type='cat'. The weighted mean of the A_i and of the B_i would be another function.

  Args:
    parts: (Lora, adapters, weight) of each; they may adapt different linear maps.

  Returns:
    (Lora, adapters), whose s is 1 and whose ranks are the sums of the ranks.
  """
  factors = {}
  for lora, adapters, weight in parts:
    leaves = sharding.paths(adapters)
    for path in (name.removesuffix('/lora/a') for name in leaves if name.endswith('/lora/a')):
      a, b = (np.asarray(leaves[f'{path}/lora/{letter}'], np.float32) for letter in 'ab')
      factors.setdefault(path, []).append((a, weight * lora.find(path)[1] * b))
  targets, combined = [], {}
  for path, pairs in factors.items():
    a = np.concatenate([a for a, _ in pairs], axis=-1)
    b = np.concatenate([b for _, b in pairs], axis=-2)
    targets.append((f'^{re.escape(path)}$', a.shape[-1], float(a.shape[-1])))
    insert(combined, path, {'lora': {'a': a, 'b': b}})
  return Lora(tuple(targets)), combined

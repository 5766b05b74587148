"""Splits parameters into trainable ones, and frozen ones that policy, critic and reference share.

There are three modes. Each gives a tree of trainable parameters and a tree of frozen parameters,
which `merge` combines without copying an array.

  all          Everything is trainable and nothing is shared. The reference is a copy.
  top layers   The last k blocks and what follows them (final norm and unembedding, or an encoder's
               pooler) are trainable. The frozen layers are computed once for policy and reference
               (as in the "hydra" models of trlX, https://github.com/CarperAI/trlx).
  adapters     Low-rank adapters (lora.py) are trainable. The reference is the same weights without
               adapters, or with the adapters that training started from.

Top layers and adapters can be combined: then the adapters of the last k blocks are trainable.

If only the top layers are trained, an embedding that is also the unembedding stays frozen. trlX
trains it, so the lower layers of its policy and reference drift apart although it treats them as
the same.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import keys
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import peft


def merge(*trees):
  """Merges trees without copying arrays; a later tree replaces leaves of earlier ones."""
  merged = {}
  for tree in trees:
    for name, value in tree.items():
      both = name in merged and isinstance(value, dict)
      merged[name] = merge(merged[name], value) if both else value
  return merged


def split_trainable(model, params, *, unfrozen_layers=None, seed=0):
  """Splits a model's parameters into trainable and frozen ones.

  Args:
    model: Model; `model.lora` defines its adapters.
    params: All of its parameters, without adapters. If the blocks are split, the original arrays
      are deleted.
    unfrozen_layers: k, the number of trainable blocks at the top; None trains everything.
    seed: Random seed of new adapters.

  Returns:
    (trained, frozen): trees whose `merge` is the argument of the model's functions.

  Raises:
    UserError: k exceeds the depth, or the model has no single stack of blocks.
  """
  trained, frozen = (
    (params, {}) if unfrozen_layers is None else _split_layers(model, params, unfrozen_layers)
  )
  if model.lora is None:
    return trained, frozen
  frozen = merge(frozen, trained)
  return new_adapters(model, frozen, key=keys.for_purpose(seed, keys.ADAPTERS)), frozen


def set_up(model, params, *, unfrozen_layers, targets, rslora, path, seed):
  """Adds the adapters of a config to a model, and splits its parameters.

  Args:
    model: Model without adapters.
    params, unfrozen_layers, seed: See `split_trainable`.
    targets, rslora: See lora.Lora; empty targets add no adapters.
    path: PEFT folder from which to load adapters and their targets, or None.

  Returns:
    (model, trained, frozen).
  """
  if path:
    lora, adapters = peft.load(path, model)
    return dataclasses.replace(model, lora=lora), adapters, params
  if targets:
    model = dataclasses.replace(
      model, lora=lora_lib.Lora(tuple(map(tuple, targets)), rslora=rslora)
    )
  return model, *split_trainable(model, params, unfrozen_layers=unfrozen_layers, seed=seed)


def new_adapters(model, frozen, *, key):
  """Returns new adapters: on the top layers if these are split off, else on all layers."""
  if 'top' in frozen:
    return {'top': lora_lib.init(key, frozen['top'], model.lora)}
  return lora_lib.init(key, frozen, model.lora)


def has_adapters(params):
  """Returns whether a tree of parameters has adapters."""
  return any(name.endswith('lora/a') for name in sharding.paths(params))


def _split_layers(model, params, unfrozen_layers):
  """Splits parameters into (the last `unfrozen_layers` blocks and what follows, the rest)."""
  if 'blocks' not in params:
    raise UserError(
      f'config.model.unfrozen_layers={unfrozen_layers}: a {model.family} model has no single stack '
      'of layers, so its lower layers cannot be frozen; set it to None'
    )
  depth = model.config.depth
  if unfrozen_layers > depth:
    raise UserError(f'config.model.unfrozen_layers={unfrozen_layers}: the model has {depth} layers')
  frozen_layers = depth - unfrozen_layers

  def split(stack):
    # The planner traces this function, and a tracer has no sharding and no buffer to delete.
    if isinstance(stack, jax.core.Tracer):
      return stack[:frozen_layers], stack[frozen_layers:]
    shardings = (stack.sharding, stack.sharding)
    cut = lambda x: (x[:frozen_layers], x[frozen_layers:])
    parts = jax.jit(cut, out_shardings=shardings)(stack)
    stack.delete()
    return parts

  leaves, structure = jax.tree.flatten(params['blocks'])
  lower, upper = map(structure.unflatten, zip(*map(split, leaves)))
  after = {name: params[name] for name in params if name in model.after_blocks}
  before = {name: params[name] for name in params if name not in model.after_blocks | {'blocks'}}
  return {'top': {'blocks': upper}, **after}, {'blocks': lower, **before}


def merge_lora(model, trained, frozen):
  """Returns all parameters of a model, with blocks in one stack and adapters merged, for `hf.save`.

  Args:
    model: Model.
    trained, frozen: Trees in the structure that `split_trainable` returns.

  Returns:
    Parameters without adapters; unchanged arrays are not copied.
  """
  if model.lora is None:
    params = merge(frozen, trained)
  elif 'top' in trained:
    params = frozen | {'top': lora_lib.merge(frozen['top'], trained['top'], model.lora)}
  else:
    params = lora_lib.merge(frozen, trained, model.lora)
  if 'top' not in params:
    return params
  stacked = jax.tree.map(
    lambda *parts: jnp.concatenate(parts), params['blocks'], params['top']['blocks']
  )
  return {name: value for name, value in params.items() if name != 'top'} | {'blocks': stacked}

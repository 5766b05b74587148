"""Which parameters are trained, and which are frozen and shared by policy, critic and reference.

Three ways, one shape: a tree of trained parameters and a tree of frozen ones that `merge` puts
together again without copying an array.

  all          everything is trained, nothing is shared; the reference is a copy
  top layers   the last k blocks and what follows them (final norm and unembedding, or an encoder's
               pooler) are trained; what lies below is computed once for policy and reference
               (trlX's "hydra" models, https://github.com/CarperAI/trlx)
  adapters     low-rank ones (lora.py); the reference is the same weights without them, or with those
               that training started from

Top layers and adapters go together: then the adapters of the last k blocks are trained.

An embedding that is also the unembedding stays frozen with the trunk. trlX goes on training it,
so that the trunks of policy and reference drift apart while one is taken for the other.
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
  """One tree of several; nothing is copied. Of two leaves with one path the later tree's counts."""
  merged = {}
  for tree in trees:
    for name, value in tree.items():
      both = name in merged and isinstance(value, dict)
      merged[name] = merge(merged[name], value) if both else value
  return merged


def split_trainable(model, params, *, unfrozen_layers=None, seed=0):
  """Divides a model's parameters into trained and frozen ones.

  Args:
    model: Model; its `lora` says which adapters there are.
    params: all of its parameters, without adapters. Where blocks are cut in two the uncut arrays
      are deleted.
    unfrozen_layers: k, blocks at the top that are trained; None trains everything.
    seed: of new adapters.

  Returns:
    (trained, frozen): trees of which `merge` makes what the model's functions take.

  Raises:
    UserError: k is larger than the depth, or the model has no single stack of blocks.
  """
  trained, frozen = (
    (params, {}) if unfrozen_layers is None else _split_layers(model, params, unfrozen_layers)
  )
  if model.lora is None:
    return trained, frozen
  frozen = merge(frozen, trained)
  return new_adapters(model, frozen, key=keys.for_purpose(seed, keys.ADAPTERS)), frozen


def start(model, params, *, unfrozen_layers, targets, rslora, path, seed):
  """Gives a model the adapters that a config asks for, and divides its parameters.

  Args:
    model: Model without adapters.
    params, unfrozen_layers, seed: see `split_trainable`.
    targets, rslora: of lora.Lora; no targets, no adapters.
    path: folder of PEFT to take trained adapters and their targets from, or None.

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
  """Adapters on frozen parameters: on the top layers only, where those are apart; see lora.init."""
  if 'top' in frozen:
    return {'top': lora_lib.init(key, frozen['top'], model.lora)}
  return lora_lib.init(key, frozen, model.lora)


def has_adapters(params):
  """Whether a tree of parameters holds adapters."""
  return any(name.endswith('lora/a') for name in sharding.paths(params))


def _split_layers(model, params, unfrozen_layers):
  """Splits off the last `unfrozen_layers` blocks and what follows them: (trained, frozen)."""
  if 'blocks' not in params:
    raise UserError(
      f'config.model.unfrozen_layers={unfrozen_layers}: a {model.family} model has no single stack '
      'of layers to freeze the bottom of; set it to None'
    )
  depth = model.config.depth
  if unfrozen_layers > depth:
    raise UserError(f'config.model.unfrozen_layers={unfrozen_layers}: the model has {depth} layers')
  number = depth - unfrozen_layers  # of frozen layers

  def split(stack):
    # Of the shapes of a plan there is nothing to place or to delete.
    if isinstance(stack, jax.core.Tracer):
      return stack[:number], stack[number:]
    shardings = (stack.sharding, stack.sharding)
    parts = jax.jit(lambda x: (x[:number], x[number:]), out_shardings=shardings)(stack)
    stack.delete()
    return parts

  leaves, structure = jax.tree.flatten(params['blocks'])
  lower, upper = map(structure.unflatten, zip(*map(split, leaves)))
  after = {name: params[name] for name in params if name in model.after_blocks}
  before = {name: params[name] for name in params if name not in model.after_blocks | {'blocks'}}
  return {'top': {'blocks': upper}, **after}, {'blocks': lower, **before}


def merge_lora(model, trained, frozen):
  """All parameters of a model as `hf.save` writes them: blocks in one stack, adapters merged.

  Args:
    model: Model.
    trained, frozen: as from `split_trainable`.

  Returns:
    Parameters without adapters; arrays that nothing was done to are not copied.
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

"""Functions of arrays have annotations, which are checked while the tests run."""

import importlib
import inspect
import pkgutil

import annotated
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from rlhf_jax import losses
from rlhf_jax import types

CONFIG_READERS = (
  'rewards.functions',
  'rewards.scorers',
)  # these also have functions of configs


def checked():
  """Returns the modules whose public functions take arrays or make functions that do."""
  for name in sorted(set(annotated.MODULES) - set(CONFIG_READERS)):
    module = importlib.import_module(f'rlhf_jax.{name}')
    yield module
    for info in pkgutil.iter_modules(getattr(module, '__path__', ()), f'{module.__name__}.'):
      yield importlib.import_module(info.name)


@pytest.mark.parametrize('module', checked(), ids=lambda module: module.__name__)
def test_every_public_function_is_annotated(module):
  functions = [
    value
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != '_'
  ]
  for function in functions:
    signature = inspect.signature(function)
    types_of = [p.annotation for p in signature.parameters.values()]
    assert inspect.Signature.empty not in [*types_of, signature.return_annotation], function


def test_a_wrong_shape_is_an_error():
  values = jnp.zeros((2, 3))
  with pytest.raises(jaxtyping.TypeCheckError, match='returns'):
    losses.ppo_value_loss(values, values, jnp.zeros((2, 1)), clip=None)
  with pytest.raises(jaxtyping.TypeCheckError, match='old_values'):
    jax.jit(losses.ppo_value_loss, static_argnames='clip')(
      values, values.astype(int), values, clip=None
    )


def test_trees_accept_any_leaves():
  """JAX replaces arrays by shapes and shardings, and adds axes."""
  prompts = types.Prompts(tokens=jnp.zeros((2, 3), int), mask=jnp.ones((2, 3), bool))
  shapes = jax.eval_shape(lambda x: jax.tree.map(lambda y: y[None], x), prompts)
  assert shapes.tokens.shape == (1, 2, 3)
  assert jax.tree.map(lambda x: 'name', prompts).mask == 'name'

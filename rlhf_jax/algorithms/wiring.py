"""Builds the policy, reference and critic of an on-policy run: arrays, or shapes if traced."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import optax

from rlhf_jax import errors
from rlhf_jax import forward as forward_lib
from rlhf_jax import keys
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import setup
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import trainable


class Wiring(NamedTuple):
  """The models of a run, their parameters and optimizers; shapes instead of arrays if traced.

  Attributes:
    models: forward.Models.
    params: {'policy': trained parameters, 'critic': ... if there is one}.
    frozen: parameters that are not trained; see forward.Forward.
    optimizers: {name of params: optax optimizer}.
  """

  models: forward_lib.Models
  params: dict[str, PyTree]
  frozen: dict[str, PyTree]
  optimizers: dict[str, optax.GradientTransformation | None]


def wire(config, mesh, base, *, reference=True, critic=None, steps, policy_optimizer=None):
  """Builds the policy, reference and critic of a config.

  Args:
    config: Config of the run.
    mesh: Device mesh for the parameters.
    base: (Model, all its parameters) of the initial policy.
    reference: All parameters of `config.reference`; True for the initial policy, with the adapters
      of `config.model.lora.path`; False for no reference.
    critic: (Model, params {'backbone', 'head'}) that a separate critic starts from; None for the
      policy's backbone with a new head. Ignored if the config has no critic.
    steps: Train steps of the run.
    policy_optimizer: Optax optimizer of the policy; None for that of `config.optim`.

  Returns:
    Wiring.
  """
  model, policy, frozen_policy = setup.split_trainable(config, *base, mesh)
  frozen, models, params = {'policy': frozen_policy}, forward_lib.Models(model), {'policy': policy}
  if reference is True:
    # New adapters have no effect yet, so the frozen weights alone are the initial policy.
    new = model.lora is not None and not config.model.lora.path
    frozen['reference'] = {} if new else jax.tree.map(jnp.copy, policy)
  elif reference is not False:
    frozen['reference'] = reference
  updates = config.rl.epochs * config.rl.minibatches
  optimizers = {
    'policy': policy_optimizer or setup.make_optimizer(config.optim, steps, updates=updates)
  }
  if 'critic' in config:
    critic_model, params['critic'] = make_critic(config, mesh, model, policy, frozen_policy, critic)
    models = models._replace(critic=critic_model, critic_shared=config.critic.kind == 'adapters')
    optimizers['critic'] = setup.make_optimizer(
      config.optim,
      steps,
      updates=updates,
      learning_rate=config.critic.learning_rate,
      exported=False,
    )
  return Wiring(models, params, frozen, optimizers)


def make_critic(config, mesh, model, trained, frozen_policy, start):
  """Creates the critic of `config.critic`.

  Args:
    config: Config of the run.
    mesh: Device mesh.
    model: Model of the policy.
    trained: Trained parameters of the policy.
    frozen_policy: Frozen parameters of the policy.
    start: Argument `critic` of `wire`.

  Returns:
    Model, or None for a head on the policy's hidden states, and trained parameters.
  """
  head = lambda: setup.new_head(model, mesh, config.seed, 'zero')
  if config.critic.kind == 'trunk':
    return None, {'head': head()}
  if config.critic.kind == 'adapters':
    if config.model.lora.path:  # New adapters would lack the training of the ones in that folder.
      return model, {'backbone': jax.tree.map(jnp.copy, trained), 'head': head()}
    adapters = trainable.new_adapters(
      model, frozen_policy, key=keys.for_purpose(config.seed, keys.CRITIC_ADAPTERS)
    )
    return model, {'backbone': setup.place(adapters, model, mesh), 'head': head()}
  if start is not None:
    return start[0], jax.tree.map(jnp.copy, start[1])
  policy = jax.tree.map(jnp.copy, trainable.merge_lora(model, trained, frozen_policy))
  return dataclasses.replace(model, lora=None), {'backbone': policy, 'head': head()}


def load_reference(config, mesh, model):
  """Returns all parameters of `config.reference`, or True if it is None.

  Raises:
    UserError: The architecture differs from the policy's, whose Model the reference uses.
  """
  if not config.reference:
    return True
  other, params = hf.load(config.reference, mesh=mesh, **setup.load_settings(config.model))
  theirs, ours = other.config.to_hf(), model.config.to_hf()
  differ = [
    f'{name} ({theirs.get(name)} and {ours.get(name)})'
    for name in sorted(theirs | ours)
    if theirs.get(name) != ours.get(name) and not name.endswith('token_id')
  ]
  if differ:
    raise errors.UserError(
      f'config.reference={config.reference!r} differs from the policy in {", ".join(differ)}: '
      'use a model of the same architecture'
    )
  return params


def load_critic(config, tokenizer, mesh, reward_model):
  """Returns the initial (Model, params) of the critic: `config.critic.path` or the reward model.

  Args:
    config: Config of the run.
    tokenizer: Tokenizer of the policy.
    mesh: Device mesh.
    reward_model: (Model, params) of the reward model, or None; see scorers.make.
  """
  if not config.critic.path:
    return reward_model
  config_model = config.model.copy_and_resolve_references()
  config_model.path = config.critic.path
  critic, params = setup.load_scalar(config_model, tokenizer, mesh, config.seed, head_scale='zero')
  on_policy_config.check_length(config, critic)
  return critic, params | {'head': heads.mean(params['head'])}


def first_extra(settings):
  """Returns the initial TrainState.extra: the KL coefficient and the moments of the scores."""
  return {'kl_coef': jnp.float32(settings.kl_coef), 'reward_moments': jnp.zeros(3)}

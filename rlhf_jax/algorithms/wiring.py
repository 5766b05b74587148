"""Puts policy, reference and critic of an on-policy run together: arrays for a run, shapes for a plan."""

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
from rlhf_jax.models import hf
from rlhf_jax.models import trainable


class Wiring(NamedTuple):
  """The models of a run and how they are trained; arrays, or shapes where it is traced.

  Attributes:
    models: forward.Models.
    params: {'policy': trained parameters, 'critic': ... where there is one}.
    frozen: see forward.Forward.
    optimizers: {name of params: optax optimizer}.
  """

  models: forward_lib.Models
  params: dict[str, PyTree]
  frozen: dict[str, PyTree]
  optimizers: dict[str, optax.GradientTransformation]


def wire(config, mesh, base, *, reference=True, critic=None, steps):
  """Puts policy, reference and critic together as a config says.

  Args:
    config: of a run.
    mesh: where parameters go.
    base: (Model, all its parameters) of the policy as it starts.
    reference: all parameters of `config.reference`; True for the policy as it starts, with the
      adapters of `config.model.lora.path`; False for no reference.
    critic: (Model, params {'backbone', 'head'}) that a separate critic starts from; None for the
      policy's backbone with a new head. Without effect where the config has no critic.
    steps: train steps of the run.

  Returns:
    Wiring.
  """
  model, policy, frozen_policy = setup.split_trainable(config, *base, mesh)
  frozen, models, params = {'policy': frozen_policy}, forward_lib.Models(model), {'policy': policy}
  if reference is True:
    # New adapters change nothing yet: without them the frozen weights are the policy as it starts.
    new = model.lora is not None and not config.model.lora.path
    frozen['reference'] = {} if new else jax.tree.map(jnp.copy, policy)
  elif reference is not False:
    frozen['reference'] = reference
  updates = config.rl.epochs * config.rl.minibatches
  optimizers = {'policy': setup.make_optimizer(config.optim, steps, updates=updates)}
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
  """The critic `config.critic` asks for.

  Args:
    config: of a run.
    mesh: device mesh.
    model: the policy's Model.
    trained: its trained parameters.
    frozen_policy: its other parameters.
    start: see `critic` of `wire`.

  Returns:
    Model, or None for a head on the policy's hidden states, and trained params.
  """
  head = lambda: setup.new_head(model, mesh, config.seed, 'zero')
  if config.critic.kind == 'trunk':
    return None, {'head': head()}
  if config.critic.kind == 'adapters':
    if config.model.lora.path:  # new ones would be on the weights before that training
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
  """All parameters of `config.reference`; True where that is None.

  Raises:
    UserError: it is another architecture than the policy, as whose parameters it is used.
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
      'name a model of the same architecture'
    )
  return params


def load_critic(config, tokenizer, mesh, scored):
  """(Model, params) that the critic starts from: `config.critic.path`, or else the reward model."""
  if not config.critic.path:
    return scored
  config_model = config.model.copy_and_resolve_references()
  config_model.path = config.critic.path
  critic, params = setup.load_scalar(config_model, tokenizer, mesh, config.seed, head_scale='zero')
  on_policy_config.check_length(config, critic)
  return critic, params


def first_extra(settings):
  """TrainState.extra of an on-policy algorithm: the KL coefficient, and the moments of the scores."""
  return {'kl_coef': jnp.float32(settings.kl_coef), 'reward_moments': jnp.zeros(3)}


def start_of(config, policy, frozen):
  """The policy's trained parameters before the first step: the reference's where it is the same."""
  if frozen.get('reference') and not config.reference:
    return frozen['reference']
  return jax.tree.map(jnp.copy, policy)

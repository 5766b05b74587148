"""Implicit Q-learning on episodes of a language model: outputs of the heads, and the loss.

See algorithms/ilql.py for the formula.

Letters: B rows, T tokens, R actions (T in a decoder), D width, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Num, PyTree

from rlhf_jax import advantages as adv
from rlhf_jax import logprobs
from rlhf_jax import losses
from rlhf_jax import types
from rlhf_jax.models import heads
from rlhf_jax.models import trainable

HEADS = ('v', 'q1', 'q2')
Metrics = dict[str, Num[ArrayLike, '']]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Static settings of a train step; algorithms/ilql.py describes them beside the keys."""

  gamma: float
  tau: float
  td_coef: float
  cql_coef: float
  awac_coef: float
  awac_beta: float
  awac_mean: str
  target_alpha: float
  target_every: int
  pack: bool


class Outputs(NamedTuple):
  """Outputs of policy and heads at the actions.

  Attributes:
    nll: -log pi(a); None if the policy is not trained.
    values: V.
    q: (Q1, Q2) at the action.
    cql: (CE(Q1, a), CE(Q2, a)).
    target_q: the smaller target at the action.
  """

  nll: Float[Array, 'B R'] | None
  values: Float[Array, 'B R']
  q: tuple[Float[Array, 'B R'], Float[Array, 'B R']]
  cql: tuple[Float[Array, 'B R'], Float[Array, 'B R']]
  target_q: Float[Array, 'B R']


def states(model: Any, params: PyTree, batch: types.Episodes, pack: bool) -> Float[Array, 'B R D']:
  """Returns the hidden states [B, R, D] before the actions of Episodes."""
  mask = batch.segments > 0
  if model.encoder_decoder:
    return model.response_states(params, batch.tokens, mask, batch.actions.shape[1])
  return model.forward(params, batch.tokens, batch.positions, batch.segments if pack else mask)[0]


def outputs(
  params: dict[str, PyTree],
  target: dict[str, PyTree],
  frozen: PyTree,
  batch: types.Episodes,
  *,
  model: Any,
  settings: Settings,
) -> Outputs:
  """Runs policy, heads and targets on Episodes, with one forward pass for each backbone.

  Args:
    params: {'policy': trained parameters, 'critic': {'v', 'q1', 'q2' and, if it is separate,
      'backbone'}}.
    target: {'q1', 'q2' and, if the targets have one, 'backbone'}.
    frozen: Parameters that are not trained, of every backbone.
    batch: Episodes.
    model: Model of all backbones.
    settings: Settings.
  """
  read = lambda tree: states(model, trainable.merge(frozen, tree), batch, settings.pack)
  critic, nll = params['critic'], None
  hidden = read(critic.get('backbone', params['policy']))
  if settings.awac_coef:
    policy_hidden = read(params['policy']) if 'backbone' in critic else hidden
    unembed = functools.partial(model.unembed, trainable.merge(frozen, params['policy']))
    nll = logprobs.cross_entropy(unembed, policy_hidden, batch.actions)
  features = {name: heads.mlp_features(critic[name], hidden) for name in HEADS}
  values = heads.mlp_outputs(critic['v'], features['v'])[..., 0]
  of_action = lambda name: logprobs.picked_and_logsumexp(
    functools.partial(heads.mlp_outputs, critic[name]), features[name], batch.actions
  )
  (q1, sum1), (q2, sum2) = of_action('q1'), of_action('q2')
  target_hidden = jax.lax.stop_gradient(
    read(target['backbone']) if 'backbone' in target else hidden
  )
  targets = [
    heads.mlp_output_at(
      target[name], heads.mlp_features(target[name], target_hidden), batch.actions
    )
    for name in ('q1', 'q2')
  ]
  return Outputs(nll, values, (q1, q2), (sum1 - q1, sum2 - q2), jnp.minimum(*targets))


def loss_sums(outputs: Outputs, batch: types.Episodes, settings: Settings) -> Metrics:
  """Sums the parts of the loss, and other quantities, over the actions of Episodes.

  Returns:
    {metric: sum}; divided by the number of actions they are the metrics.
  """
  total = lambda x: adv.masked_sum(x, batch.mask)
  next_values = adv.next_action_values(outputs.values, batch.mask, batch.last)
  td_target = jax.lax.stop_gradient(batch.rewards + settings.gamma * next_values)
  target_q = jax.lax.stop_gradient(outputs.target_q)
  sums = {
    'v/loss': total(losses.expectile_loss(outputs.values, target_q, tau=settings.tau)),
    'q/loss': sum(total(jnp.square(q - td_target)) for q in outputs.q),
    'q/cql_loss': sum(total(cql) for cql in outputs.cql),
    'v/mean': total(outputs.values),
    'q/mean': total(sum(outputs.q) / 2),
    'q/target_mean': total(target_q),
  }
  if settings.awac_coef:
    weight = jnp.exp(settings.awac_beta * (target_q - jax.lax.stop_gradient(outputs.values)))
    sums |= {
      'policy/awac_loss': total(weight * outputs.nll),
      'policy/awac_weight': total(weight),
    }
  return sums


def means(
  sums: Metrics, actions: Num[ArrayLike, ''], tokens: Num[ArrayLike, ''], settings: Settings
) -> tuple[Num[ArrayLike, ''], Metrics]:
  """Returns the loss, and the means of `loss_sums`.

  Args:
    sums: Sums over some actions.
    actions: Number of actions to divide by, at least 1.
    tokens: Number of tokens that are predicted, prompts included, at least 1.
    settings: Settings.
  """
  metrics = {name: value / actions for name, value in sums.items()}
  if settings.awac_coef and settings.awac_mean == 'token':
    metrics['policy/awac_loss'] = sums['policy/awac_loss'] / tokens
  loss = settings.td_coef * (metrics['v/loss'] + metrics['q/loss'])
  loss += settings.cql_coef * metrics['q/cql_loss']
  if settings.awac_coef:
    loss += settings.awac_coef * metrics['policy/awac_loss']
  return loss, metrics | {'loss': loss}


def counts(batch: types.Episodes) -> tuple[Int[Array, ''], Int[Array, '']]:
  """Returns the numbers of actions, and of predicted tokens of the rows with actions."""
  # Copies that fill a batch have no actions; see pipelines.episode_batches.
  real = (batch.segments > 0) & jnp.any(batch.mask, axis=1, keepdims=True)
  return jnp.sum(batch.mask), jnp.sum(real)


def target_of(params: dict[str, PyTree], backbone: bool) -> dict[str, PyTree]:
  """Returns what the targets follow: Q1, Q2 and, if `backbone`, the backbone that they read."""
  critic = params['critic']
  target = {name: critic[name] for name in ('q1', 'q2')}
  if backbone:
    target['backbone'] = critic.get('backbone', params['policy'])
  return target


def move_targets(
  target: dict[str, PyTree], params: dict[str, PyTree], rate: Float[ArrayLike, '']
) -> dict[str, PyTree]:
  """Returns targets that have moved by a fraction `rate` of the way to what they follow."""
  move = lambda old, new: old + rate * (new.astype(old.dtype) - old)
  return jax.tree.map(move, target, target_of(params, 'backbone' in target))

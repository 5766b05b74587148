"""The trust-region step of a policy: natural gradient, and a line search with a bound on the KL.

See Schulman et al. 2015, appendix C (https://arxiv.org/abs/1502.05477), and the TRPO of
stable-baselines3-contrib (https://github.com/Stable-Baselines-Team/stable-baselines3-contrib).
Vectors are trees like the policy's trained parameters, in float32 and sharded like them.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from rlhf_jax import advantages as adv
from rlhf_jax import forward as forward_lib
from rlhf_jax import processes
from rlhf_jax import types
from rlhf_jax import update


@dataclasses.dataclass(frozen=True)
class Region:
  """Settings of a trust-region step.

  Attributes:
    max_kl: bound of the mean KL from the old policy to the new one, in nats per token.
    cg_steps: products with the Fisher matrix, at most.
    cg_damping: multiple of the identity that is added to the Fisher matrix.
    shrink: factor of the step after each failed attempt of the line search.
    attempts: attempts of the line search.
  """

  max_kl: float = 0.01
  cg_steps: int = 15
  cg_damping: float = 0.1
  shrink: float = 0.8
  attempts: int = 10


def policy_step(
  params: PyTree,
  opt_state: PyTree,
  experience: types.Experience,
  *,
  forward: forward_lib.Forward,
  optimizer: optax.GradientTransformation,
  schedule: update.Schedule,
  region: Region,
) -> tuple[PyTree, PyTree, update.Metrics]:
  """Takes one trust-region step on a whole batch, one microbatch at a time.

  Args:
    params: trained parameters of the policy.
    opt_state: state of `optimizer`.
    experience: Experience with advantages.
    forward: forward.Forward.
    optimizer: optim.direct, which adds the step to master weights.
    schedule: update.Schedule, for its microbatches.
    region: Region.

  Returns:
    New parameters and optimizer state, both unchanged to the last bit if the line search fails, and
    metrics.
  """
  batch = update.sort_by_length(experience, schedule)
  tokens = jnp.maximum(jnp.sum(batch.response_mask), 1)
  total = lambda function, args: update.sum_over_microbatches(function, args, batch, schedule)
  value = functools.partial(surrogate, forward=forward, tokens=tokens)
  before, gradient = total(jax.value_and_grad(value), {'policy': params})
  gradient = jax.tree.map(lambda x: x.astype(jnp.float32), gradient['policy'])

  def fisher_part(vector, rows):
    weights = rows.response_mask / tokens
    return forward.fisher_product({'policy': params}, vector, rows, weights, rows.frozen_states)

  def product(vector):
    image = total(fisher_part, {'policy': vector})['policy']
    return jax.tree.map(lambda y, v: y.astype(v.dtype) + region.cg_damping * v, image, vector)

  direction, residual = conjugate_gradient(product, gradient, steps=region.cg_steps)

  def attempt(size):
    step = jax.tree.map(lambda x: size * x, direction)
    updates, next_state = optimizer.update(step, opt_state, params)
    return optax.apply_updates(params, updates), next_state

  def surrogate_and_kl(new, rows):
    kl = forward.policy_kl({'policy': params}, new, rows, rows.frozen_states)
    return value(new, rows), adv.masked_sum(kl, rows.response_mask) / tokens

  (new, new_state), metrics = line_search(
    attempt,
    lambda result: total(surrogate_and_kl, {'policy': result[0]}),
    (params, opt_state),
    step_size(direction, gradient, max_kl=region.max_kl),
    before,
    region=region,
  )
  return (
    new,
    new_state,
    metrics
    | {
      'trust_region/residual': residual,
      'policy/grad_norm': optax.global_norm(gradient),
      'policy/update_norm': optax.global_norm(jax.tree.map(jnp.subtract, new, params)),
      'policy/param_norm': optax.global_norm(new),
    },
  )


def surrogate(
  params: dict[str, PyTree],
  rows: types.Experience,
  *,
  forward: forward_lib.Forward,
  tokens: Int[Array, ''],
) -> Float[Array, '']:
  """Computes a microbatch's part of the mean of ratio * advantage over `tokens`.

  See the paper, eq. 14, with the sampling policy as q.
  """
  logprobs = forward.outputs(params, rows, rows.frozen_states).logprobs
  ratio = jnp.exp(jnp.where(rows.response_mask, logprobs - rows.logprobs, 0.0))
  return adv.masked_sum(ratio * rows.advantages, rows.response_mask) / tokens


def conjugate_gradient(
  product: Callable[[PyTree], PyTree], b: PyTree, *, steps: int, tolerance: float = 1e-5
) -> tuple[PyTree, Float[Array, '']]:
  """Solves A x = b for a symmetric positive definite A, starting from x = 0.

  `jax.scipy.sparse.linalg.cg` gives the same result, but it multiplies A by 0 first, and so
  compiles `product` twice and calls it once more.

  Args:
    product: function from a tree v to A v.
    b: tree of float32 arrays.
    steps: products, at most.
    tolerance: stop if the norm of the residual is at most this multiple of the norm of b.

  Returns:
    x, and |b - A x| / |b| (0 if b is 0).
  """
  dot = optax.tree.vdot
  norm = dot(b, b)

  def unfinished(carry):
    k, _, _, _, square = carry
    return (k < steps) & (square > tolerance**2 * norm)

  def step(carry):
    k, x, residual, direction, square = carry
    image = product(direction)
    rate = square / dot(direction, image)
    x = jax.tree.map(lambda x, d: x + rate * d, x, direction)
    residual = jax.tree.map(lambda r, y: r - rate * y, residual, image)
    next_square = dot(residual, residual)
    momentum = next_square / square
    direction = jax.tree.map(lambda r, d: r + momentum * d, residual, direction)
    return k + 1, x, residual, direction, next_square

  # With several processes on CPUs, nothing else may communicate during the loop.
  k = processes.sequence_after(jnp.int32(0), norm)
  first = (k, jax.tree.map(jnp.zeros_like, b), b, b, norm)
  _, x, _, _, square = jax.lax.while_loop(unfinished, step, first)
  return x, jnp.sqrt(square / jnp.where(norm > 0, norm, 1.0))


def step_size(direction: PyTree, gradient: PyTree, *, max_kl: float) -> Float[Array, '']:
  """Returns the factor of a direction at which the quadratic model of the KL reaches its bound.

      sqrt(2 max_kl / x^T A x),   x^T A x = x^T g

  where x is the direction, g the gradient and A the damped Fisher matrix. The second equation holds
  for every iterate of conjugate gradients that starts from 0, because the residual g - A x is
  orthogonal to x. See the paper, appendix C.

  Args:
    direction: x, from `conjugate_gradient`.
    gradient: g.
    max_kl: bound of the KL, in nats.

  Returns:
    float32 scalar, 0 if the gradient is 0.
  """
  slope = optax.tree.vdot(direction, gradient)
  return jnp.where(slope > 0, jnp.sqrt(2.0 * max_kl / jnp.where(slope > 0, slope, 1.0)), 0.0)


def line_search(
  attempt: Callable[[Float[Array, '']], PyTree],
  evaluate: Callable[[PyTree], tuple[Float[Array, ''], Float[Array, '']]],
  start: PyTree,
  size: Float[Array, ''],
  before: Float[Array, ''],
  *,
  region: Region,
) -> tuple[PyTree, update.Metrics]:
  """Shrinks a step until it improves the surrogate and respects the bound on the KL.

  Args:
    attempt: function from the size of a step to what `start` is after it.
    evaluate: function of that: its surrogate, and the mean KL from the old policy.
    start: what is returned, to the last bit, if no attempt is accepted: parameters and the like.
    size: size of the first attempt; at 0 there is none.
    before: surrogate of `start`.
    region: Region.

  Returns:
    A tree like `start`, and metrics.
  """

  def unfinished(carry):
    k, accepted, *_ = carry
    return ~accepted & (k < region.attempts) & (size > 0)

  def try_size(carry):
    k, *_ = carry
    result = attempt(size * region.shrink ** k.astype(jnp.float32))
    surrogate, kl = evaluate(result)
    accepted = (surrogate > before) & (kl < region.max_kl)
    return k + 1, accepted, result, surrogate, kl

  first = (jnp.int32(0), jnp.bool_(False), start, before, jnp.float32(0.0))
  k, accepted, result, surrogate, kl = jax.lax.while_loop(unfinished, try_size, first)
  keep = lambda new, old: jnp.where(accepted, new, old)
  taken = size * region.shrink ** (k - 1).astype(jnp.float32)
  return jax.tree.map(keep, result, start), {
    'trust_region/accepted': accepted.astype(jnp.float32),
    'trust_region/attempts': k,
    'trust_region/step_size': keep(taken, 0.0),
    'trust_region/kl': keep(kl, 0.0),
    'trust_region/improvement': keep(surrogate - before, 0.0),
  }

"""Optimizers from a few scalars: schedules, Adam as torch and as TensorFlow define it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import errors
from rlhf_jax import processes

SCHEDULES = ('constant', 'linear', 'cosine')
OPTIMIZERS = ('adam', 'tf_adam')


class TFAdamState(NamedTuple):
  """Moments of `scale_by_tf_adam`."""

  count: jax.Array
  mu: optax.Updates
  nu: optax.Updates


def scale_by_tf_adam(b1, b2, eps, moment_dtype='float32'):
  """Adam as TensorFlow 1 has it: sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).

  The epsilon is added to the uncorrected sqrt(v), as in the first listing's efficient form
  (Kingma & Ba 2015, end of §2, https://arxiv.org/abs/1412.6980). With eps = 1e-5 it differs
  from optax and torch for about a thousand steps. lm-human-preferences was trained with it.
  """

  def init(params):
    zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    return TFAdamState(jnp.zeros([], jnp.int32), zeros(moment_dtype), zeros(jnp.float32))

  def update(updates, state, params=None):
    del params
    count = state.count + 1
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
    scale = jnp.sqrt(1.0 - b2**count) / (1.0 - b1**count)
    updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
    return updates, TFAdamState(count, optax.tree.cast(mu, moment_dtype), nu)

  return optax.GradientTransformation(init, update)


class MasterState(NamedTuple):
  """The weights of `keep_master` in its dtype, None where the parameters have it; and the inner state."""

  master: optax.Params
  inner: optax.OptState


def keep_master(inner, dtype):
  """Updates parameters of low precision in a copy of higher precision (Micikevicius et al. 2018, §3.1).

  https://arxiv.org/abs/1710.03740. In bfloat16 alone an update below 1 / 256 of a weight is lost.

  Args:
    inner: optax optimizer, which sees the copy and gradients of its dtype.
    dtype: of the copy; parameters that have it already get none.
  """

  def init(params):
    master = jax.tree.map(lambda p: None if p.dtype == dtype else p.astype(dtype), params)
    return MasterState(master, inner.init(_of(master, params)))

  def update(grads, state, params):
    current = _of(state.master, params)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, current)
    updates, inner_state = inner.update(grads, state.inner, current)
    new = optax.apply_updates(current, updates)
    # What, added to the parameters in float32 and rounded, gives the rounded copy.
    updates = jax.tree.map(
      lambda n, u, p, old: u if n.dtype == old.dtype else n - old.astype(n.dtype),
      new,
      updates,
      current,
      params,
    )
    master = jax.tree.map(
      lambda old, n: None if old is None else n, state.master, new, is_leaf=lambda x: x is None
    )
    return updates, MasterState(master, inner_state)

  return optax.GradientTransformation(init, update)


def _of(master, params):
  """The copy where there is one, else the parameter."""
  return jax.tree.map(
    lambda m, p: p if m is None else m, master, params, is_leaf=lambda x: x is None
  )


class AverageState(NamedTuple):
  """The moving average of `average`, the updates it is over, and the inner state."""

  ema: optax.Params
  count: jax.Array
  inner: optax.OptState


def average(inner, decay):
  """Keeps an exponential moving average of the parameters, in float32, beside an optimizer.

      ema_t = sum_i decay^(t - i) params_i / sum_i decay^(t - i),  i = 1 .. t

  Polyak & Juditsky 1992 (https://doi.org/10.1137/0330046). The weights sum to 1 from the first
  update on, as with Adam's bias correction: the parameters before training are no part of it.

  Each array is averaged by itself, the A and B of an adapter too. So the adapter that is exported
  is A_ema B_ema, of their rank, and not the average of the products A_i B_i; docs/models.md says how
  far apart the two are.

  Args:
    inner: optax optimizer.
    decay: in (0, 1).
  """

  def init(params):
    # A copy: the parameters are donated with the rest of the state, and a buffer only once.
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return AverageState(ema, jnp.zeros([], jnp.int32), inner.init(params))

  def update(grads, state, params):
    updates, inner_state = inner.update(grads, state.inner, params)
    new = optax.apply_updates(params, updates)
    count = state.count + 1
    # Of the newest parameters: (1 - decay) / (1 - decay^t), 1 at the first update.
    share = (decay - 1) / jnp.expm1(count * math.log(decay))
    ema = jax.tree.map(lambda e, p: e + share * (p.astype(jnp.float32) - e), state.ema, new)
    return updates, AverageState(ema, count, inner_state)

  return optax.GradientTransformation(init, update)


def moving_average(opt_state):
  """The moving average in the state of an optimizer made by `make`, or None."""
  return opt_state.ema if isinstance(opt_state, AverageState) else None


def schedule(learning_rate, *, kind, warmup_steps, steps, warmup_from=0.0, updates=1):
  """Learning rate by optimizer step: linear warmup, then constant, or down to 0 at `steps`.

  It counts train steps and stays the same within one, as lm-human-preferences, N+ and TRL set it
  once an iteration.

  Args:
    learning_rate: the peak.
    kind: 'constant', 'linear' or 'cosine'.
    warmup_steps: train steps of linear growth to the peak; 0 for none.
    steps: train steps of the whole run.
    warmup_from: share of the peak that warmup starts from.
    updates: optimizer steps of a train step.

  Returns:
    A function from the optimizer step to the rate.
  """
  rest = max(steps - warmup_steps, 1)
  if kind == 'constant':
    main = optax.constant_schedule(learning_rate)
  elif kind == 'linear':
    main = optax.linear_schedule(learning_rate, 0.0, rest)
  elif kind == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, rest)
  else:
    raise errors.UserError(f'optim.schedule={kind!r} is not one of {SCHEDULES}')
  if warmup_steps:
    warmup = optax.linear_schedule(warmup_from * learning_rate, learning_rate, warmup_steps)
    main = optax.join_schedules([warmup, main], [warmup_steps])
  return lambda count: main(count // updates)


def make(
  *,
  name,
  learning_rate,
  schedule_kind,
  warmup_steps,
  steps,
  b1,
  b2,
  eps,
  weight_decay,
  clip_norm,
  warmup_from=0.0,
  updates=1,
  master_dtype='float32',
  moment_dtype='float32',
  ema=0.0,
):
  """An optax optimizer.

  Args:
    name: 'adam' or 'tf_adam' (see `scale_by_tf_adam`).
    learning_rate: peak rate.
    schedule_kind: see `schedule`.
    warmup_steps: see `schedule`.
    steps: see `schedule`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: Adam's epsilon.
    weight_decay: decoupled (AdamW), on arrays of at least two dimensions per layer.
    clip_norm: global gradient norm above which gradients are scaled down; 0 for none.
    warmup_from: see `schedule`.
    updates: see `schedule`.
    master_dtype: of the weights that updates add up in; see `keep_master`.
    moment_dtype: of the first moment. The second is of the master's: in bfloat16 its decay of
      1 - b2 would round to nothing.
    ema: decay of the moving average of the weights; 0 keeps none. See `average`.

  Returns:
    optax.GradientTransformation.
  """
  if name == 'adam':
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=moment_dtype)
  elif name == 'tf_adam':
    scale = scale_by_tf_adam(b1, b2, eps, moment_dtype)
  else:
    raise errors.UserError(f'optim.name={name!r} is not one of {OPTIMIZERS}')
  rate = schedule(
    learning_rate,
    kind=schedule_kind,
    warmup_steps=warmup_steps,
    steps=steps,
    warmup_from=warmup_from,
    updates=updates,
  )
  # The same structure whatever the figures, so that a run can go on with another one of them.
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  optimizer = optax.chain(
    clip,
    scale,
    optax.add_decayed_weights(weight_decay, mask=decayed),
    optax.scale_by_learning_rate(rate),
  )
  optimizer = keep_master(optimizer, jnp.dtype(master_dtype))
  return average(optimizer, ema) if ema else optimizer


def decayed(params):
  """True for matrices, adapters' too. Norm scales and biases are not decayed, stacked by layer or not."""

  def matrix(path, _):
    return str(getattr(path[-1], 'key', path[-1])) in ('kernel', 'embedding', 'a', 'b')

  return jax.tree_util.tree_map_with_path(matrix, params)


def apply(params, opt_state, grads, optimizers):
  """One step of each optimizer.

  Args:
    params: {name: parameters}.
    opt_state: {name: optimizer state}; nothing for parameters that stay.
    grads: {name: gradients}.
    optimizers: {name: optax optimizer, or None for parameters that stay as they are}.

  Returns:
    New params, new opt_state, and the norms of gradients, updates and parameters.

  Raises:
    ValueError: parameters that `optimizers` does not name.
  """
  if params.keys() != optimizers.keys():
    raise ValueError(
      f'parameters {sorted(params)} need an optimizer or None each; there are {sorted(optimizers)}'
    )
  new_params, new_opt_state, metrics = dict(params), {}, {}
  for name, optimizer in optimizers.items():
    if optimizer is None:
      continue
    updates, new_opt_state[name] = optimizer.update(grads[name], opt_state[name], params[name])
    new_params[name] = optax.apply_updates(params[name], updates)
    metrics[f'{name}/grad_norm'] = optax.global_norm(grads[name])
    metrics[f'{name}/update_norm'] = optax.global_norm(updates)
    metrics[f'{name}/param_norm'] = optax.global_norm(new_params[name])
  return new_params, new_opt_state, metrics


def accumulate(grad_fn, params, rows, size):
  """Gradients of a minibatch, summed over microbatches of `size` rows; 0 takes it whole.

  Args:
    grad_fn: (params, rows) -> (grads, metrics), both shares of the minibatch's mean.
    params: parameters.
    rows: pytree of [B, ...] arrays.
    size: rows of a microbatch; divides B.

  Returns:
    grads and metrics.
  """
  batch = jax.tree.leaves(rows)[0].shape[0]
  if not size or size >= batch:
    return grad_fn(params, rows)
  split = jax.tree.map(lambda x: x.reshape((-1, size) + x.shape[1:]), rows)
  # Sums of low precision would lose the last microbatches.
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
    jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], split)),
  )
  add = lambda total, part: (jax.tree.map(jnp.add, total, grad_fn(params, part)), None)
  return processes.scan(add, zeros, split)[0]

"""Optimizers and schedules from a few scalars: Adam and RMSProp of torch or of TensorFlow 1."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import errors
from rlhf_jax import processes

SCHEDULES = ('constant', 'linear', 'cosine')
OPTIMIZERS = ('adam', 'tf_adam', 'rmsprop', 'tf_rmsprop')


class TFAdamState(NamedTuple):
  """State of `scale_by_tf_adam`: step count, first and second moments."""

  count: jax.Array
  mu: optax.Updates
  nu: optax.Updates


def scale_by_tf_adam(b1, b2, eps, moment_dtype='float32'):
  """Scales updates as Adam in TensorFlow 1: sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).

  The epsilon is added to sqrt(v) without bias correction, as in the efficient form of Kingma & Ba
  2015 (end of §2, https://arxiv.org/abs/1412.6980). With eps = 1e-5 it differs from optax and torch
  for about a thousand steps. lm-human-preferences was trained with it.
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


def scale_by_rmsprop(decay, eps, *, tensorflow):
  """Scales updates as RMSProp of torch or of TensorFlow 1; Mnih et al. 2016 trained A3C with it.

      v <- decay v + (1 - decay) g^2
      torch:       g / (sqrt(v) + eps),  v starts at 0
      TensorFlow:  g / sqrt(v + eps),    v starts at 1

  See §5.2.2 of the paper (https://arxiv.org/abs/1602.01783), torch.optim.RMSprop, and
  RMSpropTFLike of Stable-Baselines3. The first steps of the TensorFlow form are those of gradient
  descent.

  Args:
    decay: Decay of the second moment v.
    eps: Epsilon.
    tensorflow: Whether to use the form of TensorFlow.
  """
  return optax.scale_by_rms(
    decay=decay, eps=eps, initial_scale=float(tensorflow), eps_in_sqrt=tensorflow
  )


class MasterState(NamedTuple):
  """State of `keep_master`: master weights (None for parameters without them), inner state."""

  master: optax.Params
  inner: optax.OptState


def keep_master(inner, dtype):
  """Applies updates to master weights, a copy of the parameters in higher precision.

  See Micikevicius et al. 2018, §3.1 (https://arxiv.org/abs/1710.03740). In bfloat16 alone an update
  below 1 / 256 of a weight is lost.

  Args:
    inner: Optax optimizer; it receives the master weights, and gradients of their dtype.
    dtype: Dtype of the master weights; parameters of this dtype get no copy.
  """

  def init(params):
    master = jax.tree.map(lambda p: None if p.dtype == dtype else p.astype(dtype), params)
    return MasterState(master, inner.init(_of(master, params)))

  def update(grads, state, params):
    current = _of(state.master, params)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, current)
    updates, inner_state = inner.update(grads, state.inner, current)
    new = optax.apply_updates(current, updates)
    # optax.apply_updates adds these updates to the parameters in float32 and rounds the sum to
    # their dtype: the result is the rounded master weights.
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
  """Returns the master weights, or the parameters that have no master weights."""
  return jax.tree.map(
    lambda m, p: p if m is None else m, master, params, is_leaf=lambda x: x is None
  )


def direct(*, master_dtype='float32', ema=0.0):
  """Makes an optimizer that adds what it gets: for steps whose size is decided elsewhere.

  Args:
    master_dtype: See `make`.
    ema: See `make`.

  Returns:
    optax.GradientTransformation.
  """
  optimizer = keep_master(optax.identity(), jnp.dtype(master_dtype))
  return average(optimizer, ema) if ema else optimizer


class AverageState(NamedTuple):
  """State of `average`: moving average, number of updates, and the inner state."""

  ema: optax.Params
  count: jax.Array
  inner: optax.OptState


def average(inner, decay):
  """Adds an exponential moving average of the parameters, in float32, to an optimizer.

      ema_t = sum_i decay^(t - i) params_i / sum_i decay^(t - i),  i = 1 .. t

  Polyak & Juditsky 1992 (https://doi.org/10.1137/0330046). The weights sum to 1 from the first
  update on, as with Adam's bias correction. The parameters before training have no weight.

  Each array is averaged separately, including A and B of an adapter. The exported adapter is thus
  A_ema B_ema, which keeps the rank, and not the average of the products A_i B_i; docs/models.md
  compares the two.

  Args:
    inner: Optax optimizer.
    decay: Decay per update, in (0, 1).
  """

  def init(params):
    # Copy, because the same buffer cannot be donated twice, in the parameters and in this state.
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return AverageState(ema, jnp.zeros([], jnp.int32), inner.init(params))

  def update(grads, state, params):
    updates, inner_state = inner.update(grads, state.inner, params)
    new = optax.apply_updates(params, updates)
    count = state.count + 1
    # The weight of the newest parameters: (1 - decay) / (1 - decay^t), 1 at the first update.
    weight = (decay - 1) / jnp.expm1(count * math.log(decay))
    ema = jax.tree.map(lambda e, p: e + weight * (p.astype(jnp.float32) - e), state.ema, new)
    return updates, AverageState(ema, count, inner_state)

  return optax.GradientTransformation(init, update)


def moving_average(opt_state):
  """Returns the moving average in the state of an optimizer from `make`, or None."""
  return opt_state.ema if isinstance(opt_state, AverageState) else None


def schedule(learning_rate, *, kind, warmup_steps, steps, warmup_from=0.0, updates=1):
  """Returns a learning-rate schedule: linear warmup, then constant or decay to 0 at `steps`.

  The rate changes once per train step, not per optimizer step, as in lm-human-preferences, N+ and
  TRL.

  Args:
    learning_rate: Peak rate.
    kind: 'constant', 'linear' or 'cosine'.
    warmup_steps: Train steps of linear warmup; 0 for none.
    steps: Train steps of the whole run.
    warmup_from: Initial rate of the warmup, as a fraction of the peak.
    updates: Optimizer steps per train step.

  Returns:
    Function from the optimizer step to the rate.
  """
  decay_steps = max(steps - warmup_steps, 1)
  if kind == 'constant':
    main = optax.constant_schedule(learning_rate)
  elif kind == 'linear':
    main = optax.linear_schedule(learning_rate, 0.0, decay_steps)
  elif kind == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, decay_steps)
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
  """Makes an optax optimizer.

  Args:
    name: 'adam', 'tf_adam' (see `scale_by_tf_adam`), 'rmsprop' or 'tf_rmsprop' (see
      `scale_by_rmsprop`).
    learning_rate: Peak rate.
    schedule_kind: See `schedule`.
    warmup_steps: See `schedule`.
    steps: See `schedule`.
    b1: Decay of the first moment; RMSProp has none.
    b2: Decay of the second moment.
    eps: Epsilon of Adam or RMSProp.
    weight_decay: Decoupled weight decay (AdamW), applied to matrices only; see `decayed`.
    clip_norm: Global gradient norm above which gradients are scaled down; 0 for no clipping.
    warmup_from: See `schedule`.
    updates: See `schedule`.
    master_dtype: Dtype of the master weights; see `keep_master`.
    moment_dtype: Dtype of the first moment. The second moment has the dtype of the master weights,
      because in bfloat16 changes by a factor of 1 - b2 would be rounded away.
    ema: Decay of the moving average of the weights; 0 for none. See `average`.

  Returns:
    optax.GradientTransformation.
  """
  if name == 'adam':
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=moment_dtype)
  elif name == 'tf_adam':
    scale = scale_by_tf_adam(b1, b2, eps, moment_dtype)
  elif name in ('rmsprop', 'tf_rmsprop'):
    scale = scale_by_rmsprop(b2, eps, tensorflow=name == 'tf_rmsprop')
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
  # The structure of the state does not depend on clip_norm, so a run can resume with another one.
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
  """Returns the tree of bools that is True for matrices, including adapters: these are decayed.

  Norm scales and biases are not decayed, although stacking by layer gives them two dimensions.
  """

  def matrix(path, _):
    return str(getattr(path[-1], 'key', path[-1])) in ('kernel', 'embedding', 'a', 'b')

  return jax.tree_util.tree_map_with_path(matrix, params)


def apply(params, opt_state, grads, optimizers):
  """Applies one step of each optimizer.

  Args:
    params: {name: parameters}.
    opt_state: {name: optimizer state}, without frozen parameters.
    grads: {name: gradients}.
    optimizers: {name: optax optimizer, or None for frozen parameters}.

  Returns:
    New params, new opt_state, and the norms of gradients, updates and parameters.

  Raises:
    ValueError: `params` and `optimizers` have different names.
  """
  if params.keys() != optimizers.keys():
    raise ValueError(
      f'parameters {sorted(params)} need an optimizer or None each, but optimizers has '
      f'{sorted(optimizers)}'
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
  """Computes gradients of a minibatch as the sum over its microbatches.

  Args:
    grad_fn: (params, microbatch) -> (grads, metrics), both scaled so that the sum over microbatches
      is the mean over the minibatch.
    params: Parameters.
    rows: Minibatch, a pytree of arrays [B, ...].
    size: Rows per microbatch, which must divide B; 0 for a single pass over the minibatch.

  Returns:
    (grads, metrics) of the minibatch.
  """
  batch = jax.tree.leaves(rows)[0].shape[0]
  if not size or size >= batch:
    return grad_fn(params, rows)
  split = jax.tree.map(lambda x: x.reshape((-1, size) + x.shape[1:]), rows)
  # Sums in low precision would round the later microbatches away.
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
    jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], split)),
  )
  add = lambda total, part: (jax.tree.map(jnp.add, total, grad_fn(params, part)), None)
  return processes.scan(add, zeros, split)[0]

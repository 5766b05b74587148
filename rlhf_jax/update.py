"""The update: epochs, minibatches and microbatches of any loss.

`run` learns from a rollout, `step` from a batch of data. The optimizations are here, for every
algorithm: the forward pass of the first epoch also gives the behaviour policy's log-probabilities,
microbatches hold sequences of similar length, and frozen layers run once.

Letters: B batch, R response length.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree
import optax

from rlhf_jax import forward as forward_lib
from rlhf_jax import lengths
from rlhf_jax import optim
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How the update divides a rollout.

  Attributes:
    epochs: passes over each rollout.
    minibatches: optimizer steps of an epoch; must divide the batch.
    microbatch_size: sequences of one forward and backward pass; 0 for the whole minibatch.
    length_buckets: microbatches hold sequences of similar length, truncated to one of this many
      lengths, each of which is compiled; see lengths.run_bucketed. 1 turns this off.
    before_like_first: whether the forward passes before the update use the minibatches and
      microbatches of the first epoch, in the same shapes, instead of the whole rollout or
      microbatches of similar length. In bfloat16 other shapes may give other log-probabilities.
    group_size: number of consecutive sequences that form a group, such as the responses to one
      prompt, which stays together and in order in each minibatch and microbatch. It must divide
      both.
  """

  epochs: int = 1
  minibatches: int = 1
  microbatch_size: int = 0
  length_buckets: int = 1
  before_like_first: bool = False
  group_size: int = 1

  def has_microbatches(self, batch: types.Rollout | types.Experience) -> bool:
    """Returns whether a pass over this batch is split into microbatches."""
    return 0 < self.microbatch_size < batch.tokens.shape[0]

  def is_full_batch(self, rollout: types.Rollout) -> bool:
    """Returns whether an epoch is one forward and backward pass over all sequences."""
    return self.minibatches == 1 and not self.has_microbatches(rollout)


class Counts(NamedTuple):
  """Sizes of a minibatch, each at least 1: the divisors of its means.

  Attributes:
    tokens: positions with a policy loss.
    steps: positions with a value loss.
    sequences: sequences with a policy loss.
  """

  tokens: Int[Array, '']
  steps: Int[Array, '']
  sequences: Int[Array, '']


Metrics = dict[str, Num[Array, '...']]
Optimizers = dict[str, optax.GradientTransformation | None]


class Objective(NamedTuple):
  """The parts of the update in which on-policy algorithms differ.

  Attributes:
    prepare: (Outputs, Fixed) before the update -> (Experience, extra of the next TrainState,
      metrics), for the whole batch.
    step_mask: [B, R] bool, positions that any loss reads.
    loss: (Outputs, Experience, Counts) of a microbatch -> (its part of the minibatch's mean loss,
      metrics that add up over microbatches).
    minibatch: Experience -> Experience, applied to each minibatch before it is split.
    extra_batch: pytree [n, ...], divided among the minibatches; None for none.
    extra_gradients: (params, part of `extra_batch`) -> ({name: gradients}, metrics), added to those
      of the minibatch.
  """

  prepare: Callable[..., tuple[types.Experience, PyTree, Metrics]]
  step_mask: Bool[Array, 'B R']
  loss: Callable[..., tuple[Float[Array, ''], Metrics]]
  minibatch: Callable[[types.Experience], types.Experience] = lambda experience: experience
  extra_batch: PyTree[Array] = None
  extra_gradients: Callable[..., tuple[dict[str, PyTree], Metrics]] | None = None


def run(
  state: types.TrainState,
  rollout: types.Rollout,
  *,
  forward: forward_lib.Forward,
  objective: Objective,
  optimizers: Optimizers,
  schedule: Schedule,
) -> tuple[types.TrainState, Metrics]:
  """Updates the parameters from one rollout.

  Args:
    state: TrainState before the update.
    rollout: Rollout of B sequences.
    forward: forward.Forward.
    objective: Objective.
    optimizers: see optim.apply.
    schedule: Schedule.

  Returns:
    The next TrainState and metrics: means over all minibatches, and those of `objective.prepare`.
  """
  orders = minibatch_orders(types.step_keys(state)[1], rollout.tokens.shape[0], schedule)
  if schedule.is_full_batch(rollout):
    gradients, memory = _full_batch_gradients(state, rollout, forward, objective)
  else:
    gradients, memory = _minibatch_gradients(state, rollout, orders, forward, objective, schedule)

  def minibatch(carry, xs):
    params, opt_state, memory = carry
    grads, metrics, memory = gradients(params, memory, xs)
    if objective.extra_batch is not None:
      extra, extra_metrics = objective.extra_gradients(
        params, _part(objective.extra_batch, schedule, xs['step'])
      )
      grads |= {name: jax.tree.map(jnp.add, grads[name], extra[name]) for name in extra}
      metrics |= extra_metrics
    params, opt_state, norms = optim.apply(params, opt_state, grads, optimizers)
    return (params, opt_state, memory), metrics | norms

  xs = processes.sequence_after({'step': jnp.arange(len(orders)), 'order': orders}, memory)
  (params, opt_state, (_, (extra, summary))), metrics = jax.lax.scan(
    minibatch, (state.params, state.opt_state, memory), xs
  )
  first = {'policy/first_ratio': metrics['policy/ratio'][0]} if 'policy/ratio' in metrics else {}
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
  return state, jax.tree.map(jnp.mean, metrics) | summary | first


def minibatch_orders(
  key: Key[Array, ''], batch: int, schedule: Schedule
) -> Int[Array, 'steps minibatch']:
  """Shuffles the sequences of a rollout into the minibatches of all epochs.

  Args:
    key: random key.
    batch: number of sequences.
    schedule: Schedule.

  Returns:
    [epochs * minibatches, batch / minibatches] int32, the sequences of each optimizer step.
  """
  keys = jax.random.split(key, schedule.epochs)
  groups = batch // schedule.group_size
  orders = jax.lax.map(lambda key: jax.random.permutation(key, groups), keys)
  orders = orders.reshape(schedule.epochs * schedule.minibatches, -1)
  return lengths.group_members(orders, schedule.group_size)


def _part(batch, schedule, step):
  """Returns the part of a batch, such as of pretraining examples, that goes with a minibatch.

  `step` counts the minibatches of all epochs; every epoch uses the same parts.
  """
  part = lambda x: x.reshape((schedule.minibatches, -1) + x.shape[1:])[step % schedule.minibatches]
  return jax.tree.map(part, batch)


def _counts(experience):
  count = lambda mask: jnp.maximum(jnp.sum(mask), 1)
  return Counts(
    count(experience.response_mask),
    count(experience.step_mask),
    count(jnp.any(experience.response_mask, axis=1)),
  )


def _full_batch_gradients(state, rollout, forward, objective):
  """Returns a function that computes gradients if each epoch is one step on the whole batch.

  The first epoch starts from the parameters that sampled the rollout, so its forward pass also
  gives the log-probabilities of the behaviour policy.

  Returns:
    (params, memory, xs) -> (gradients, metrics, memory), and the initial memory: outputs that the
    first epoch keeps for the later ones, and (extra, metrics) of `objective.prepare`.
  """
  fixed = forward.fixed(state.params, rollout)

  def gradients(params, memory, xs):
    def loss(params):
      outputs = forward.outputs(params, rollout, fixed.frozen_states)
      before = jax.tree.map(
        lambda new, old: jnp.where(xs['step'] == 0, new, old),
        jax.lax.stop_gradient(outputs),
        memory[0],
      )
      experience, *prepared = objective.prepare(before, fixed)
      experience = objective.minibatch(experience)
      total, metrics = objective.loss(outputs, experience, _counts(experience))
      return total, (metrics, (before, tuple(prepared)))

    grads, (metrics, memory) = jax.grad(loss, has_aux=True)(params)
    return grads, metrics, memory

  outputs = jax.eval_shape(forward.outputs, state.params, rollout, fixed.frozen_states)
  prepared = jax.eval_shape(objective.prepare, outputs, fixed)[1:]
  memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (outputs, prepared))
  return gradients, memory


def _minibatch_gradients(state, rollout, orders, forward, objective, schedule):
  """Returns what `_full_batch_gradients` does, for shuffled minibatches split into microbatches."""
  fixed, outputs = before_update(
    state.params,
    rollout,
    objective.step_mask,
    forward=forward,
    schedule=schedule,
    first=orders[: schedule.minibatches],
  )
  experience, *prepared = objective.prepare(outputs, fixed)
  if schedule.before_like_first:  # `prepare` may leave sequences out, which changes their order
    experience = experience.replace(step_mask=objective.step_mask)

  def gradients(params, memory, xs):
    rows = sharding.shard_rows(jax.tree.map(lambda x: x[xs['order']], experience))
    return *minibatch_gradients(
      params, rows, forward=forward, objective=objective, schedule=schedule
    ), memory

  return gradients, ((), tuple(prepared))


def before_update(
  params: dict[str, PyTree],
  rollout: types.Rollout,
  step_mask: Bool[Array, 'B R'],
  *,
  forward: forward_lib.Forward,
  schedule: Schedule,
  first: Int[Array, 'M n'] | None = None,
) -> tuple[forward_lib.Fixed, forward_lib.Outputs]:
  """Runs the forward passes over a rollout before its update, one microbatch at a time.

  Args:
    params, rollout, forward, schedule: see `run`.
    step_mask: see Objective.
    first: [minibatches, B / minibatches] int32, sequences of each minibatch of the first epoch, for
      `schedule.before_like_first`.

  Returns:
    Fixed and Outputs.
  """
  batch, length = rollout.response_mask.shape

  def passes(rows):
    fixed = forward.fixed(params, rows)
    outputs = forward.outputs(params, rows, fixed.frozen_states)
    return lengths.pad_response((fixed, outputs), length - rows.response_mask.shape[1])

  rollout = rollout.replace(
    ended=None
  )  # the passes do not read it, and it has no position axis to truncate
  pieces = _microbatches_before(step_mask, schedule, first)
  if pieces is None:
    return passes(rollout)
  order, buckets = pieces
  split = jax.tree.map(lambda x: x[order], (rollout, step_mask))
  cut = lambda _, part: (None, lengths.run_bucketed(passes, *part, buckets))
  out = processes.scan(cut, None, split)[1]
  back = jnp.argsort(order.reshape(-1))
  return jax.tree.map(lambda x: x.reshape((batch,) + x.shape[2:])[back], out)


def _microbatches_before(step_mask, schedule, first):
  """Returns the microbatches of the passes before an update; see `before_update`.

  Returns:
    Indices [microbatches, sequences] int32 and the number of length buckets; None for the whole
    batch at once.
  """
  size = schedule.microbatch_size
  if not schedule.before_like_first:
    if not size or size >= len(step_mask):
      return None
    return lengths.order_by_length(step_mask).reshape(-1, size), schedule.length_buckets
  if not size or size >= first.shape[1]:
    return first, 1
  by_length = lambda rows: rows[lengths.order_by_length(step_mask[rows], schedule.group_size)]
  order = jax.vmap(by_length)(first)
  return order.reshape(-1, size), schedule.length_buckets


def minibatch_gradients(
  params: dict[str, PyTree],
  experience: types.Experience,
  *,
  forward: forward_lib.Forward,
  objective: Objective,
  schedule: Schedule,
) -> tuple[dict[str, PyTree], Metrics]:
  """Computes the gradients of one minibatch, summed over its microbatches.

  Args:
    params, forward, objective, schedule: see `run`.
    experience: Experience of the minibatch.

  Returns:
    Gradients shaped like `params`, and metrics.
  """
  experience = objective.minibatch(experience)
  counts = _counts(experience)

  def loss(params, rows):
    return objective.loss(forward.outputs(params, rows, rows.frozen_states), rows, counts)

  return sum_over_microbatches(
    jax.grad(loss, has_aux=True), params, sort_by_length(experience, schedule), schedule
  )


def sort_by_length(experience: types.Experience, schedule: Schedule) -> types.Experience:
  """Sorts sequences from short to long if there are microbatches."""
  if not schedule.has_microbatches(experience):
    return experience
  order = lengths.order_by_length(experience.step_mask, schedule.group_size)
  return sharding.shard_rows(jax.tree.map(lambda x: x[order], experience))


def sum_over_microbatches(
  function: Callable[[PyTree, types.Experience], PyTree],
  params: PyTree,
  experience: types.Experience,
  schedule: Schedule,
) -> PyTree:
  """Sums `function(params, microbatch)` over the microbatches of a minibatch.

  Args:
    function: function whose results, a pytree of arrays, add up over microbatches.
    params: its first argument.
    experience: Experience of the minibatch, from `sort_by_length`.
    schedule: Schedule.
  """
  if not schedule.has_microbatches(experience):
    return function(params, experience)

  def cut(params, rows):
    return lengths.run_bucketed(
      lambda rows: function(params, rows), rows, rows.step_mask, schedule.length_buckets
    )

  return optim.accumulate(cut, params, experience, schedule.microbatch_size)


def step(
  state: types.TrainState,
  loss: Callable[..., tuple[Float[Array, ''], Metrics]],
  batch: PyTree[Array],
  *,
  optimizers: Optimizers,
  microbatch_size: int,
) -> tuple[types.TrainState, Metrics]:
  """Takes one optimizer step on a batch of data.

  Args:
    state: TrainState.
    loss: (params, microbatch) -> (its part of the batch's mean loss, metrics that add up).
    batch: pytree of [B, ...] arrays.
    optimizers: see optim.apply.
    microbatch_size: examples of one forward and backward pass; 0 for all.

  Returns:
    The next TrainState and metrics.
  """
  grads, metrics = optim.accumulate(
    jax.grad(loss, has_aux=True), state.params, batch, microbatch_size
  )
  params, opt_state, norms = optim.apply(state.params, state.opt_state, grads, optimizers)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics | norms

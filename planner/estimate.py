"""Lower bounds on a program's time from its FLOPs, memory traffic and interconnect traffic.

The largest of the three times, each at the published peak, is the roofline. A compiled program also
has the compiler's own estimate. Before compilation the traffic is estimated from the shapes, per
layer and pass:

  weights          are gathered over 'fsdp' and read from memory; gradients are reduced over 'fsdp'
  activations      are reduced over 'tensor' after attention and after the MLP
  keys and values  are read once for every token
"""

from typing import NamedTuple

import numpy as np

# Latency in seconds of each hop of a collective; https://jax-ml.github.io/scaling-book.
HOP = 1e-6


class Time(NamedTuple):
  """Seconds by FLOPs, memory, interconnect, and the compiler's estimate (0 if there is none)."""

  flops: float
  memory: float
  interconnect: float
  compiler: float = 0.0

  @property
  def roofline(self):
    """The largest of the first three."""
    return max(self[:3])

  @property
  def seconds(self):
    """The predicted seconds: the roofline, or the compiler's estimate if it is higher."""
    return max(self)

  @property
  def limit(self):
    """The resource that determines the roofline."""
    return ('FLOPs', 'HBM', 'interconnect')[int(np.argmax(self[:3]))]


class Traffic(NamedTuple):
  """The traffic of one chip.

  Attributes:
    memory: Bytes read from and written to memory.
    sent: [(mesh axis, bytes sent, number of collectives, hops per collective), ...].
    held: Peak bytes of temporaries.
  """

  memory: float
  sent: list[tuple[str, float, float, int]]
  held: float


def bandwidths(mesh, chip, extents):
  """Computes the bytes/s that a chip can send, by mesh axis and by the size of a group of chips.

  A group that spans a dimension of the grid uses two links per chip if the dimension closes to a
  ring, else one.

  Args:
    mesh: Mesh of a topology's devices.
    chip: chips.Chip.
    extents: Extents of the topology's grid.

  Returns:
    {axis: bytes/s} and {chips per group: bytes/s}.
  """
  coords = np.array([device.coords for device in mesh.devices.flat]).reshape(
    *mesh.devices.shape, -1
  )
  by_axis, by_size = {}, {}
  names = mesh.axis_names
  for axes in [(i,) for i in range(3)] + [(0, 1), (1, 2), (0, 2), (0, 1, 2)]:
    line = coords[tuple(slice(None) if i in axes else 0 for i in range(3))].reshape(
      -1, coords.shape[-1]
    )
    links = 0
    for dimension in range(line.shape[1]):
      span = len(set(line[:, dimension]))
      if span > 1:
        ring = span == extents[dimension] and span >= chip.torus
        links += 2 if ring else 1
    if not links:
      continue
    if len(axes) == 1:
      by_axis[names[axes[0]]] = links * chip.link
    by_size[len(line)] = min(by_size.get(len(line), np.inf), links * chip.link)
  return by_axis, by_size


def time_of(compiled, flops, traffic, *, chips, chip, by_size):
  """Computes the Time of a compiled program.

  Args:
    compiled: compiler.Compiled.
    flops: FLOPs over all chips.
    traffic: Traffic, of which only `memory` is used.
    chips: Number of chips.
    chip: chips.Chip.
    by_size: {chips per group: bytes/s}, see `bandwidths`; other groups get one link.
  """
  sending = sum(amount / by_size.get(size, chip.link) for _, size, amount, _ in compiled.sent)
  return Time(
    flops / chips / chip.flops,
    traffic.memory / chip.bandwidth,
    sending,
    compiled.cycles / chip.clock,
  )


def time_before(flops, traffic, *, chips, chip, by_axis):
  """Computes the Time of a program before compilation, from its Traffic; see `time_of`."""
  sending = sum(
    amount / by_axis[axis] + rounds * hops * HOP for axis, amount, rounds, hops in traffic.sent
  )
  return Time(flops / chips / chip.flops, traffic.memory / chip.bandwidth, sending)


class Shape(NamedTuple):
  """The sizes of a run that determine its traffic.

  Attributes:
    weights: Bytes of the policy's weights.
    trained: Bytes of the trained weights of policy and critic.
    state: Bytes per chip that an update reads and writes: weights, moments, master weights.
    cache: Bytes per chip of a rollout's keys and values.
    data, fsdp, tensor: Sizes of the mesh axes.
    rows, minibatch, microbatch: Sequences per batch, per update and per backward pass.
    prompt, response: Lengths in tokens.
    layers, width, inner, heads, vocab: Dimensions of the policy.
    models: Number of models with a backward pass: 2 if the critic is a separate model, else 1.
    epochs: Passes over the batch.
    remat: See transformer.Model.
    gather: Whether a rollout gathers the weights once instead of for every token.
    splash: Whether a kernel computes attention without writing the scores to memory.
    itemsize: Bytes per number in the computation.
  """

  weights: float
  trained: float
  state: float
  cache: float
  data: int
  fsdp: int
  tensor: int
  rows: int
  minibatch: int
  microbatch: int
  prompt: int
  response: int
  layers: int
  width: int
  inner: int
  heads: int
  vocab: int
  models: int
  epochs: int
  remat: str
  gather: bool
  splash: bool
  itemsize: int


def rollout(s):
  """Estimates the Traffic of a rollout: each token reads the cache and the weights."""
  rows = s.rows / (s.data * s.fsdp)
  held, steps = s.weights / s.tensor, s.response
  per_token = s.fsdp > 1 and not s.gather
  sent = _gathers(s, steps if per_token else 1) + _reductions(
    s, rows * (s.prompt + steps), 2, steps
  )
  # Gathered weights are written to memory and read again.
  memory = steps * (held * (2 if per_token else 1) + s.cache)
  scores = 2 * _scores(s, rows, s.prompt)
  weights = 2 * held / s.layers if per_token else held if s.fsdp > 1 else 0.0
  return Traffic(memory, sent, s.cache + weights + scores + 3 * 4 * rows * s.vocab)


def scoring(s):
  """Estimates the Traffic of one forward pass over the batch."""
  return _passes(s, rows=s.rows, forward=1, backward=0, recompute=0, count=1)


def update(s):
  """Estimates the Traffic of a train step.

  It has a forward pass of policy, critic and reference, then forward and backward passes of policy
  and critic.
  """
  first = _passes(
    s,
    rows=s.microbatch,
    forward=s.models + 1,
    backward=0,
    recompute=0,
    count=s.rows // s.microbatch,
  )
  count = s.epochs * s.rows // s.microbatch
  then = _passes(
    s,
    rows=s.microbatch,
    forward=s.models,
    backward=s.models,
    recompute=s.models if s.remat == 'block' else 0,
    count=count,
  )
  grads = s.trained / s.tensor
  sent = first.sent + then.sent
  if s.fsdp > 1:
    sent.append(('fsdp', count * grads * (s.fsdp - 1) / s.fsdp, count * s.layers, s.fsdp // 2))
  if s.data > 1:
    sent.append(
      ('data', 2 * count * grads / s.fsdp * (s.data - 1) / s.data, count * s.layers, s.data // 2)
    )
  memory = first.memory + then.memory + 2 * s.state * s.epochs * s.rows // s.minibatch
  return Traffic(memory, sent, max(first.held, then.held))


def _scores(s, rows, length):
  """Returns the bytes of one layer's attention scores in memory."""
  return 0.0 if s.splash else 4 * rows * s.heads / s.tensor * length * length


def _gathers(s, passes):
  """Returns `Traffic.sent` of gathering all weights `passes` times."""
  if s.fsdp == 1:
    return []
  held = s.weights / s.tensor
  return [('fsdp', passes * held * (s.fsdp - 1) / s.fsdp, passes * s.layers * 7, s.fsdp // 2)]


def _reductions(s, tokens, per_layer, passes):
  """Returns `Traffic.sent` of reducing activations over 'tensor' `per_layer` times per layer."""
  if s.tensor == 1:
    return []
  amount = 2 * per_layer * s.layers * tokens * s.width * s.itemsize * (s.tensor - 1) / s.tensor
  return [('tensor', amount, per_layer * s.layers * passes, s.tensor // 2)]


def _passes(s, *, rows, forward, backward, recompute, count):
  """Estimates the Traffic of `count` microbatches, given the number of passes of each kind."""
  local = rows / (s.data * s.fsdp)
  length = s.prompt + s.response
  tokens = local * length
  held = s.weights / s.tensor
  passes = forward + backward + recompute
  sent = _gathers(s, passes * count) + _reductions(s, tokens * count, 2 * passes, passes * count)
  # Bytes that a layer writes and reads per token.
  token = (10 * s.width + 4 * s.inner / s.tensor) * s.itemsize
  scores = _scores(s, local, length)
  layer = tokens * token + 4 * scores
  weights = (forward + recompute + 2 * backward) * held * (2 if s.fsdp > 1 else 1)
  memory = count * (weights + (forward + recompute + 2 * backward) * s.layers * layer)
  saved = {
    'block': tokens * s.width * s.itemsize,
    'dots': tokens * (5 * s.width + 3 * s.inner / s.tensor) * s.itemsize,
    'none': tokens * (10 * s.width + 5 * s.inner / s.tensor) * s.itemsize + 2.5 * scores,
  }[s.remat]
  logits = 3 * 2048 * s.vocab * 4 / s.tensor
  activations = s.models * s.layers * saved if backward else 0
  peak = layer + scores + 2 * held / s.layers + logits + activations
  return Traffic(memory, sent, peak)

"""Lower bounds of a program's time: operations, memory and interconnect at their published peaks.

The greatest of the three is the roofline; the compiler's own estimate, where there is one, stands
beside it. Before a program is compiled its traffic is estimated from the shapes, per layer and
pass:

  weights          gathered over 'fsdp', read from memory; their gradients reduced the other way
  activations      reduced over 'tensor' after attention and after the MLP
  keys and values  read once for every token

Letters: B rows, T tokens, R response tokens, L layers, D width, F feed-forward width, N heads, V
vocabulary.
"""

from typing import NamedTuple

import numpy as np

# A reduction or gather over a group waits for this at each step of its way;
# https://jax-ml.github.io/scaling-book.
HOP = 1e-6


class Time(NamedTuple):
  """Lower bounds in seconds: operations, memory, interconnect; and the compiler's estimate or 0."""

  flops: float
  memory: float
  interconnect: float
  compiler: float = 0.0

  @property
  def roofline(self):
    """The greatest of the first three."""
    return max(self[:3])

  @property
  def seconds(self):
    """The predicted seconds: the roofline, or the compiler's estimate if it is higher."""
    return max(self)

  @property
  def limit(self):
    """What the roofline is limited by."""
    return ('FLOPs', 'HBM', 'interconnect')[int(np.argmax(self[:3]))]


class Traffic(NamedTuple):
  """A chip's traffic: bytes of memory; [(mesh axis, bytes sent, collectives)]; most bytes held."""

  memory: float
  sent: list[tuple[str, float, float]]
  held: float


def bandwidths(mesh, chip, extents):
  """Bytes/s that a chip can send along each mesh axis, and by the size of a group of chips.

  A group that spans a dimension of the grid uses both of its links there if it closes to a ring,
  else one. A group of another size than any axis is given one link.

  Args:
    mesh: of a topology's devices.
    chip: chips.Chip.
    extents: of the topology's grid.

  Returns:
    {axis: bytes/s} and {chips: bytes/s}.
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
  """Time of a compiled program.

  Args:
    compiled: compiler.Compiled.
    flops: of all chips together.
    traffic: Traffic, of which the memory's part is used.
    chips: their number.
    chip: chips.Chip.
    by_size: see `bandwidths`.
  """
  sending = sum(amount / by_size.get(size, chip.link) for _, size, amount, _ in compiled.sent)
  return Time(
    flops / chips / chip.flops,
    traffic.memory / chip.bandwidth,
    sending,
    compiled.cycles / chip.clock,
  )


def time_before(flops, traffic, *, chips, chip, by_axis):
  """Time of a program not compiled yet, from its estimated Traffic; arguments as in `time_of`."""
  sending = sum(
    amount / by_axis[axis] + rounds * hops * HOP for axis, amount, rounds, hops in traffic.sent
  )
  return Time(flops / chips / chip.flops, traffic.memory / chip.bandwidth, sending)


class Shape(NamedTuple):
  """What the estimates know of a run.

  Attributes:
    weights, trained: bytes of the policy's weights, and of what is trained, policy and critic.
    state: bytes per chip that an update reads and writes: weights, moments, master weights.
    cache: bytes per chip of a rollout's keys and values.
    data, fsdp, tensor: the mesh.
    rows, minibatch, microbatch: of the batch, of an update, of one backward pass.
    prompt, response: tokens.
    layers, width, inner, heads, vocab: of the policy.
    models: with a backward pass of their own: the policy, and the critic if it is no head on it.
    epochs: passes over the batch.
    remat: see transformer.Model.
    gather: whether a rollout gathers the weights once, not for every token.
    splash: whether a kernel keeps the scores of attention to itself.
    itemsize: bytes of a number in the computation.
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
  """Traffic of a rollout: a token reads cache and weights, gathered for each token or once."""
  rows = s.rows / (s.data * s.fsdp)
  held, steps = s.weights / s.tensor, s.response
  each = s.fsdp > 1 and not s.gather
  sent = _gathers(s, steps if each else 1) + _reductions(s, rows * (s.prompt + steps), 2, steps)
  memory = steps * (held * (2 if each else 1) + s.cache)  # what is gathered is written first
  scores = 2 * _scores(s, rows, s.prompt)
  weights = 2 * held / s.layers if each else held if s.fsdp > 1 else 0.0
  return Traffic(memory, sent, s.cache + weights + scores + 3 * 4 * rows * s.vocab)


def scoring(s):
  """Traffic of one forward pass over the batch."""
  return _passes(s, rows=s.rows, forward=1, backward=0, recompute=0, count=1)


def update(s):
  """Traffic of a train step: three models forward, then policy and critic forward and backward."""
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
  """Bytes of a layer's attention scores in memory."""
  return 0.0 if s.splash else 4 * rows * s.heads / s.tensor * length * length


def _gathers(s, passes):
  """Weights that every chip receives in passes over all layers."""
  if s.fsdp == 1:
    return []
  held = s.weights / s.tensor
  return [('fsdp', passes * held * (s.fsdp - 1) / s.fsdp, passes * s.layers * 7, s.fsdp // 2)]


def _reductions(s, tokens, each, passes):
  """Activations reduced over 'tensor', `each` times a layer."""
  if s.tensor == 1:
    return []
  amount = 2 * each * s.layers * tokens * s.width * s.itemsize * (s.tensor - 1) / s.tensor
  return [('tensor', amount, each * s.layers * passes, s.tensor // 2)]


def _passes(s, *, rows, forward, backward, recompute, count):
  """Traffic of `count` microbatches of `rows` rows, with so many passes of each kind over each."""
  local = rows / (s.data * s.fsdp)
  length = s.prompt + s.response
  tokens = local * length
  held = s.weights / s.tensor
  both = forward + backward + recompute
  sent = _gathers(s, both * count) + _reductions(s, tokens * count, 2 * both, both * count)
  token = (
    10 * s.width + 4 * s.inner / s.tensor
  ) * s.itemsize  # what a layer writes and reads of each token
  scores = _scores(s, local, length)
  layer = tokens * token + 4 * scores
  weights = (forward + recompute + 2 * backward) * held * (2 if s.fsdp > 1 else 1)
  memory = count * (weights + (forward + recompute + 2 * backward) * s.layers * layer)
  kept = {
    'block': tokens * s.width * s.itemsize,
    'dots': tokens * (5 * s.width + 3 * s.inner / s.tensor) * s.itemsize,
    'none': tokens * (10 * s.width + 5 * s.inner / s.tensor) * s.itemsize + 2.5 * scores,
  }[s.remat]
  logits = 3 * 2048 * s.vocab * 4 / s.tensor
  most = (
    layer + scores + 2 * held / s.layers + logits + (s.models * s.layers * kept if backward else 0)
  )
  return Traffic(memory, sent, most)

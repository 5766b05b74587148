"""Searches the meshes, microbatch sizes and remat settings that fit in memory for the fastest.

All candidates are estimated from shapes. The most promising ones are then compiled, until enough of
them fit.
"""

import dataclasses
import itertools

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
import ml_collections

from planner import compiler
from planner import estimate
from planner import flops
from planner import memory
from planner import programs
from rlhf_jax import errors
from rlhf_jax import sharding
from rlhf_jax.models import attention
from rlhf_jax.models import stack

ESTIMATES = {'rollout': estimate.rollout, 'scoring': estimate.scoring, 'update': estimate.update}


@dataclasses.dataclass
class Candidate:
  """A variant of a config with its estimated or compiled memory and time.

  Attributes:
    config: Config with this mesh, microbatch size and remat setting.
    kinds: {kind: bytes per chip} of arrays that stay on the chips.
    extra: {program: additional bytes per chip while it runs}.
    times: {program: estimate.Time}.
    compiled: {program: compiler.Compiled}; empty if nothing is compiled.
    capacity: Bytes of memory per chip.
  """

  config: ml_collections.ConfigDict
  kinds: dict[str, float]
  extra: dict[str, float]
  times: dict[str, estimate.Time]
  compiled: dict[str, compiler.Compiled]
  capacity: float

  @property
  def bytes(self):
    """Peak bytes per chip."""
    return sum(self.kinds.values()) + max(self.extra.values())

  @property
  def fits(self):
    """Whether the peak fits into a chip's memory."""
    return self.bytes <= self.capacity

  @property
  def seconds(self):
    """Seconds per iteration."""
    return sum(time.seconds for time in self.times.values())

  @property
  def tokens_per_second(self):
    """Tokens generated per second of rollout, if every response has full length."""
    return (
      self.config.batch_size * self.config.sampling.max_new_tokens / self.times['rollout'].seconds
    )

  @property
  def name(self):
    """Short name: mesh, microbatch size, remat, and whether rollouts gather the weights."""
    mesh = ' x '.join(str(self.config.mesh[axis]) for axis in sharding.AXES)
    gather = ', gathered' if self.config.sampling.gather_weights else ''
    return f'{mesh}, {self.config.microbatch_size or "all"}, {self.config.model.remat}{gather}'


def variants(config, chips):
  """Yields configs with all meshes that divide the model, and microbatch sizes and remat to try.

  Args:
    config: Config to vary.
    chips: Number of chips.
  """
  minibatch = config.batch_size // config.rl.minibatches
  divisors = [size for size in range(1, chips + 1) if chips % size == 0]
  fields = config.model.init
  gathers = (False,) if config.sampling.max_concurrent else (False, True)
  heads = fields.get(
    'num_key_value_heads', fields.get('num_attention_heads', fields.get('n_head', 1))
  )
  for tensor, fsdp in itertools.product(divisors, divisors):
    shards = chips // tensor
    if (
      chips % (tensor * fsdp)
      or heads % tensor
      or minibatch % shards
      or (config.sampling.max_concurrent or 0) % shards
    ):
      continue
    for factor, remat, gather in itertools.product(
      (1, 2, 4, 8), stack.REMAT, gathers[: 1 + (fsdp > 1)]
    ):
      microbatch = shards * factor
      if minibatch % microbatch:
        continue
      varied = config.copy_and_resolve_references()
      varied.mesh = {'data': shards // fsdp, 'fsdp': fsdp, 'tensor': tensor}
      varied.microbatch_size = None if microbatch == minibatch else microbatch
      varied.model.remat = remat
      varied.sampling.gather_weights = gather
      yield varied


def abstract_mesh(config):
  """Returns the mesh of a config without concrete devices."""
  return AbstractMesh(
    tuple(config.mesh[axis] for axis in sharding.AXES),
    sharding.AXES,
    axis_types=(AxisType.Auto,) * len(sharding.AXES),
    abstract_device=AbstractDevice('TPU', None, 'tpu'),
  )


def operations(built, mesh):
  """Returns {program: FLOPs} of Programs, over all chips."""
  with jax.set_mesh(mesh):
    counts = {
      name: flops.of(function.trace(*arguments))
      for name, (function, arguments) in built.calls.items()
    }
  return {name: count.flops for name, count in counts.items()}


def shape(config, built, mesh):
  """Returns the estimate.Shape of a config.

  Args:
    config: Config.
    built: Programs of this config, or of a variant with another mesh, microbatch size and remat.
    mesh: Mesh or AbstractMesh of this config.
  """
  model, state, frozen_policy = built.model, built.arrays['state'], built.arrays['frozen']['policy']
  bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  kinds = resident_bytes(built, mesh)
  fields = model.config.to_hf()
  inner = fields.get('intermediate_size') or fields.get('n_inner') or 4 * model.width
  minibatch = config.batch_size // config.rl.minibatches
  trained = bytes_of(state.params['policy']) + bytes_of(state.params['critic'])
  frozen = bytes_of(frozen_policy)
  microbatch = config.microbatch_size or minibatch
  length = config.data.max_prompt_length + config.sampling.max_new_tokens
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    impl = attention.attention_impl(
      model.config, model.dtype, microbatch, length, length, index=0, single_segment=True
    )
  trained_fraction = trained / (trained + frozen)
  return estimate.Shape(
    weights=bytes_of(state.params['policy']) + frozen,
    trained=trained,
    state=kinds.get('moments', 0)
    + kinds.get('master weights', 0)
    + trained_fraction * (kinds['policy'] + kinds['critic']),
    cache=memory.cache(config, model, mesh),
    **dict(config.mesh),
    rows=config.batch_size,
    minibatch=minibatch,
    microbatch=microbatch,
    prompt=config.data.max_prompt_length,
    response=config.sampling.max_new_tokens,
    layers=model.config.depth,
    width=model.width,
    inner=inner,
    heads=model.config.heads,
    vocab=model.vocab_size,
    models=1 if config.critic.kind == 'trunk' else 2,
    epochs=config.rl.epochs,
    remat=config.model.remat,
    splash=impl == 'splash',
    gather=bool(config.sampling.gather_weights or config.sampling.max_concurrent),
    itemsize=2 if config.model.dtype == 'bfloat16' else 4,
  )


def resident_bytes(built, mesh):
  """Returns {kind: bytes per chip} of the arrays that stay on the chips, on any mesh.

  Raises:
    UserError: The mesh does not divide a dimension.
  """
  arrays = built.arrays
  rules = programs.SMALL + built.model.rules
  return memory.by_kind(programs.place(arrays, sharding.shardings(arrays, rules, mesh)))


def estimated(config, built, work, *, chip, chips, by_axis):
  """Estimates a Candidate from shapes; returns None if the mesh does not divide the parameters.

  Args:
    config: Config of the candidate.
    built: Programs on any mesh.
    work: {program: FLOPs} with this remat setting.
    chip: chips.Chip.
    chips: Number of chips.
    by_axis: See estimate.bandwidths.
  """
  mesh = abstract_mesh(config)
  try:
    kinds = resident_bytes(built, mesh)
    of_run = shape(config, built, mesh)
  except errors.UserError:
    return None
  arrays = programs.place(
    built.arrays, sharding.shardings(built.arrays, programs.SMALL + built.model.rules, mesh)
  )
  traffic = {name: ESTIMATES[name](of_run) for name in built.calls}
  extra = {name: found.held for name, found in traffic.items()}
  extra['update'] += memory.gradients(config, arrays)
  times = {
    name: estimate.time_before(work[name], found, chips=chips, chip=chip, by_axis=by_axis)
    for name, found in traffic.items()
  }
  return Candidate(config, kinds, extra, times, {}, chip.memory)


def ranked(candidates):
  """Sorts candidates: those that fit, fastest first; then those that do not, smallest first."""
  return sorted(candidates, key=lambda c: (not c.fits, c.seconds if c.fits else c.bytes))

"""Which mesh, microbatch and recomputation fit in memory, and which of them are fastest.

All are estimated from shapes; the compiler then confirms the most promising, until enough of them
fit.
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
  """One way to run a config, and what is known of it.

  Attributes:
    config: the config with this mesh, microbatch and recomputation.
    kinds: {kind: bytes per chip} of what stays.
    extra: {program: bytes per chip beside that}.
    times: {program: estimate.Time}.
    compiled: {program: compiler.Compiled}; empty before the compiler was asked.
    capacity: bytes that a chip has.
  """

  config: ml_collections.ConfigDict
  kinds: dict[str, float]
  extra: dict[str, float]
  times: dict[str, estimate.Time]
  compiled: dict[str, compiler.Compiled]
  capacity: float

  @property
  def bytes(self):
    """The most that a chip holds at once."""
    return sum(self.kinds.values()) + max(self.extra.values())

  @property
  def fits(self):
    """Whether a chip has that much, as far as is known."""
    return self.bytes <= self.capacity

  @property
  def seconds(self):
    """Of an iteration."""
    return sum(time.seconds for time in self.times.values())

  @property
  def tokens_per_second(self):
    """Generated, while the rollout runs and every response is of full length."""
    return (
      self.config.batch_size * self.config.sampling.max_new_tokens / self.times['rollout'].seconds
    )

  @property
  def name(self):
    """Mesh, microbatch, recomputation and whether rollouts gather weights, in a few characters."""
    mesh = ' x '.join(str(self.config.mesh[axis]) for axis in sharding.AXES)
    gather = ', gathered' if self.config.sampling.gather_weights else ''
    return f'{mesh}, {self.config.microbatch_size or "all"}, {self.config.model.remat}{gather}'


def variants(config, chips):
  """Configs of all meshes that divide the model, with the microbatches and recomputations to try.

  Args:
    config: the config to vary.
    chips: their number.
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
  """A mesh of no TPUs in particular."""
  return AbstractMesh(
    tuple(config.mesh[axis] for axis in sharding.AXES),
    sharding.AXES,
    axis_types=(AxisType.Auto,) * len(sharding.AXES),
    abstract_device=AbstractDevice('TPU', None, 'tpu'),
  )


def operations(made, mesh):
  """{program: FLOPs} of Programs, over all chips."""
  with jax.set_mesh(mesh):
    counts = {
      name: flops.of(function.trace(*arguments))
      for name, (function, arguments) in made.calls.items()
    }
  return {name: count.flops for name, count in counts.items()}


def shape(config, made, mesh):
  """estimate.Shape of a config.

  Args:
    config: the config.
    made: Programs of it, or of one that differs in mesh, microbatch and recomputation.
    mesh: Mesh or AbstractMesh of this config.
  """
  model, state, frozen_policy = made.model, made.arrays['state'], made.arrays['frozen']['policy']
  whole = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  kinds = stays(made, mesh)
  fields = model.config.to_hf()
  inner = fields.get('intermediate_size') or fields.get('n_inner') or 4 * model.width
  minibatch = config.batch_size // config.rl.minibatches
  owned = {'policy': whole(state.params['policy']), 'critic': whole(state.params['critic'])}
  microbatch = config.microbatch_size or minibatch
  length = config.data.max_prompt_length + config.sampling.max_new_tokens
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    impl = attention.attention_impl(
      model.config, model.dtype, microbatch, length, length, index=0, single_segment=True
    )
  share = sum(owned.values()) / (sum(owned.values()) + whole(frozen_policy))
  return estimate.Shape(
    weights=owned['policy'] + whole(frozen_policy),
    trained=sum(owned.values()),
    state=kinds.get('moments', 0)
    + kinds.get('master weights', 0)
    + share * (kinds['policy'] + kinds['critic']),
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


def stays(made, mesh):
  """{kind: bytes per chip} of what stays, on another mesh than it was made for.

  Raises:
    UserError: a dimension does not divide.
  """
  arrays = made.arrays
  rules = programs.SMALL + made.model.rules
  return memory.by_kind(programs.place(arrays, sharding.shardings(arrays, rules, mesh)))


def estimated(config, made, work, *, chip, chips, by_axis):
  """Candidate from shapes alone, or None where the mesh does not divide the parameters.

  Args:
    config: of the candidate.
    made: Programs on any mesh.
    work: {program: FLOPs} with this recomputation.
    chip, chips: chips.Chip and their number.
    by_axis: see estimate.bandwidths.
  """
  mesh = abstract_mesh(config)
  try:
    kinds = stays(made, mesh)
    of_run = shape(config, made, mesh)
  except errors.UserError:
    return None
  arrays = programs.place(
    made.arrays, sharding.shardings(made.arrays, programs.SMALL + made.model.rules, mesh)
  )
  traffic = {name: ESTIMATES[name](of_run) for name in made.calls}
  extra = {name: found.held for name, found in traffic.items()}
  extra['update'] += memory.gradients(config, arrays)
  times = {
    name: estimate.time_before(work[name], found, chips=chips, chip=chip, by_axis=by_axis)
    for name, found in traffic.items()
  }
  return Candidate(config, kinds, extra, times, {}, chip.memory)


def ranked(candidates):
  """Candidates that fit, fastest first; then those that do not, smallest first."""
  return sorted(candidates, key=lambda c: (not c.fits, c.seconds if c.fits else c.bytes))

"""A config planned as it is, or the best way to run it searched for."""

import functools
import os
import pathlib

import rich.progress

from planner import chips as chips_lib
from planner import compiler
from planner import estimate
from planner import memory
from planner import programs
from planner import report
from planner import search
from rlhf_jax import errors
from rlhf_jax import sharding
from rlhf_jax.algorithms import build

ORDER = ('update', 'rollout', 'scoring')  # what may not fit comes first


class Planner:
  """A topology, the compiler for it, and where its results are kept. For variants of one config."""

  def __init__(self, topology, effort):
    self.chip, self.extents = chips_lib.of_topology(topology)
    self.devices = compiler.devices(topology)
    self.chips = len(self.devices)
    self.effort = effort
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache'))
    self.folder = cache / 'rlhf_jax' / 'plan'
    self._made = {}

  def mesh(self, config):
    """The mesh of a config."""
    return sharding.make_mesh(dict(config.mesh), devices=self.devices)

  def work(self, config):
    """Programs, on any mesh, and {program: FLOPs}: they depend on a config's recomputation only."""
    remat = config.model.remat
    if remat not in self._made:
      mesh = self.mesh(config)
      built = programs.make(config, mesh)
      self._made[remat] = built, search.operations(built, mesh)
    return self._made[remat]

  def estimate(self, config):
    """Candidate of a config from shapes, or None; see search.estimated."""
    made, work = self.work(config)
    by_axis, _ = self.bandwidths(tuple(config.mesh[axis] for axis in sharding.AXES))
    return search.estimated(config, made, work, chip=self.chip, chips=self.chips, by_axis=by_axis)

  @functools.cache  # noqa: B019
  def bandwidths(self, sizes):
    """See estimate.bandwidths."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices=self.devices)
    return estimate.bandwidths(mesh, self.chip, self.extents)

  def confirm(self, config, progress):
    """Returns a config's compiled Candidate and {program: FLOPs}; stops if a program does not fit.

    Args:
      config: from ppo.config.
      progress: (name of a program) -> None, called before each is compiled.
    """
    mesh = self.mesh(config)
    built = programs.make(config, mesh)
    work = self.work(config)[1]
    traffic = search.shape(config, built, mesh)
    _, by_size = self.bandwidths(tuple(config.mesh[axis] for axis in sharding.AXES))
    candidate = search.Candidate(config, memory.by_kind(built.arrays), {}, {}, {}, self.chip.memory)
    for name in sorted(built.calls, key=ORDER.index):
      progress(name)
      function, arguments = built.calls[name]
      compiled = compiler.compile(function, arguments, mesh, effort=self.effort, folder=self.folder)
      candidate.compiled[name] = compiled
      candidate.extra[name] = compiled.needed or compiled.temporaries + compiled.results
      candidate.times[name] = estimate.time_of(
        # Of code that the compiler took little trouble with, its cycles say nothing about a run.
        compiled._replace(cycles=compiled.cycles if self.effort >= 0 else 0.0),
        work[name],
        search.ESTIMATES[name](traffic),
        chips=self.chips,
        chip=self.chip,
        by_size=by_size,
      )
      if not candidate.fits:
        break
    return candidate, work


def plan(planner, config):
  """The config as it is: Candidate and tables.

  Raises:
    UserError: it is not valid, or its mesh does not divide the model or the batch.
  """
  build.validate(config, planner.chips)
  config = config.copy_and_resolve_references()
  config.mesh = dict(zip(sharding.AXES, planner.mesh(config).devices.shape))
  candidate, work = _confirmed(planner, config)
  return candidate, tables_of(planner, candidate, work)


def _confirmed(planner, config):
  with rich.progress.Progress(
    rich.progress.SpinnerColumn(),
    '{task.description}',
    rich.progress.TimeElapsedColumn(),
    transient=True,
  ) as bar:
    task = bar.add_task('', total=None)
    return planner.confirm(
      config, lambda name: bar.update(task, description=f'compiling the {name}')
    )


def tables_of(planner, candidate, work):
  """All tables of one Candidate."""
  made_on = planner.mesh(candidate.config)
  built = programs.make(candidate.config, made_on)
  first = report.memory_table(
    candidate,
    memory.cache(candidate.config, built.model, made_on),
    memory.gradients(candidate.config, built.arrays),
    planner.chip,
  )
  if len(candidate.times) < len(built.calls):
    return [first]
  return [
    first,
    report.programs_table(candidate, work, planner.chip, planner.chips),
    report.collectives_table(candidate),
  ]


def find(planner, config, confirm):
  """Searches: the best Candidate that fits, and tables.

  Args:
    planner: Planner.
    config: what to vary.
    confirm: ways that fit to find with the compiler.

  Raises:
    UserError: nothing fits.
  """
  found = [
    planner.estimate(varied)
    for varied in rich.progress.track(
      list(search.variants(config, planner.chips)), 'estimating', transient=True
    )
  ]
  found = search.ranked([candidate for candidate in found if candidate is not None])
  if not found or not found[0].fits:
    raise errors.UserError(
      f'no mesh of {planner.chips} chips fits this config into '
      f'{report.size(planner.chip.memory)} GiB a chip: take more chips, a smaller batch_size, '
      'or adapters'
    )
  best, asked = [], []
  for candidate in found:
    if len(best) == confirm or not candidate.fits:
      break
    print(
      f'{candidate.name}: {report.seconds(candidate.seconds)} s an iteration from its shapes',
      flush=True,
    )
    confirmed, work = _confirmed(planner, candidate.config)
    asked.append(confirmed)
    if confirmed.fits:
      best.append((confirmed, work))
  if not best:
    raise errors.UserError(
      'what seemed to fit does not, says the compiler: take more chips or a smaller batch_size'
    )
  chosen, work = min(best, key=lambda pair: pair[0].seconds)
  asked = search.ranked(
    [candidate for candidate in asked if len(candidate.times) == len(chosen.times)]
  )
  tables = [
    report.candidates_table(found[:10], f'the fastest of {len(found)}, from their shapes'),
    report.candidates_table(asked, 'compiled'),
  ]
  return chosen, tables + tables_of(planner, chosen, work)

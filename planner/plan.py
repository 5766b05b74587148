"""Plans a config as it is, or searches for its best variant."""

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

ORDER = ('update', 'rollout', 'scoring')  # the program most likely not to fit comes first


class Planner:
  """Estimates and compiles variants of one config for one topology, with a cache on disk."""

  def __init__(self, topology, effort):
    self.chip, self.extents = chips_lib.of_topology(topology)
    self.devices = compiler.devices(topology)
    self.chips = len(self.devices)
    self.effort = effort
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache'))
    self.folder = cache / 'rlhf_jax' / 'plan'
    self._work = {}

  def mesh(self, config):
    """Returns the mesh of a config."""
    return sharding.make_mesh(dict(config.mesh), devices=self.devices)

  def work(self, config):
    """Returns Programs on some mesh and {program: FLOPs}, which depend on remat only."""
    remat = config.model.remat
    if remat not in self._work:
      mesh = self.mesh(config)
      built = programs.make(config, mesh)
      self._work[remat] = built, search.operations(built, mesh)
    return self._work[remat]

  def estimate(self, config):
    """Returns the Candidate of a config estimated from shapes, or None; see search.estimated."""
    built, work = self.work(config)
    by_axis, _ = self.bandwidths(tuple(config.mesh[axis] for axis in sharding.AXES))
    return search.estimated(config, built, work, chip=self.chip, chips=self.chips, by_axis=by_axis)

  @functools.cache  # noqa: B019
  def bandwidths(self, sizes):
    """See estimate.bandwidths."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices=self.devices)
    return estimate.bandwidths(mesh, self.chip, self.extents)

  def confirm(self, config, progress):
    """Returns a config's compiled Candidate and {program: FLOPs}; stops if a program does not fit.

    Args:
      config: Config of PPO.
      progress: (name of a program) -> None, called before each compilation.
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
        # With low effort the compiler makes slower code, so its cycles do not predict a run.
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
  """Plans a config as it is: returns its Candidate and tables.

  Raises:
    UserError: The config is not valid, or its mesh does not divide the model or the batch.
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
  """Returns all tables of one Candidate."""
  mesh = planner.mesh(candidate.config)
  built = programs.make(candidate.config, mesh)
  first = report.memory_table(
    candidate,
    memory.cache(candidate.config, built.model, mesh),
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
  """Searches the variants of a config: returns the best Candidate that fits, and tables.

  Args:
    planner: Planner.
    config: Config to vary.
    confirm: Number of candidates that must fit when compiled before the search stops.

  Raises:
    UserError: No candidate fits.
  """
  candidates = [
    planner.estimate(varied)
    for varied in rich.progress.track(
      list(search.variants(config, planner.chips)), 'estimating', transient=True
    )
  ]
  candidates = search.ranked([candidate for candidate in candidates if candidate is not None])
  if not candidates or not candidates[0].fits:
    raise errors.UserError(
      f'no mesh of {planner.chips} chips fits this config into '
      f'{report.size(planner.chip.memory)} GiB per chip: use more chips, a smaller batch_size, '
      'or adapters'
    )
  fitting, compiled = [], []
  for candidate in candidates:
    if len(fitting) == confirm or not candidate.fits:
      break
    print(
      f'{candidate.name}: {report.seconds(candidate.seconds)} s per iteration, from shapes',
      flush=True,
    )
    confirmed, work = _confirmed(planner, candidate.config)
    compiled.append(confirmed)
    if confirmed.fits:
      fitting.append((confirmed, work))
  if not fitting:
    raise errors.UserError(
      'no candidate fits when compiled: use more chips or a smaller batch_size'
    )
  chosen, work = min(fitting, key=lambda pair: pair[0].seconds)
  compiled = search.ranked(
    [candidate for candidate in compiled if len(candidate.times) == len(chosen.times)]
  )
  tables = [
    report.candidates_table(
      candidates[:10], f'the fastest of {len(candidates)}, from their shapes'
    ),
    report.candidates_table(compiled, 'compiled'),
  ]
  return chosen, tables + tables_of(planner, chosen, work)

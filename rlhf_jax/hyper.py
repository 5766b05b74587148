"""Sweeps: `get_hyper(h)` of a config file uses this module to list the runs of an ablation.

    def get_hyper(h):
      return h.product([h.sweep(':algorithm', ('ppo', 'grpo')), h.sweep('rl.kl_coef', (0.0, 0.1)),
                        h.sweep('seed', range(3))])

A run is a dict from keys to values. A key is a dotted key of the config, or ':NAME' for an argument
of get_config: `h.sweep(':algorithm', ...)` stands for `--config=FILE:algorithm=...`. The functions
are named as in the configs of big_vision and XManager.
"""

import builtins
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import re
from typing import Any

import numpy as np

from rlhf_jax import errors

Sweep = list[dict[str, Any]]
SEEDS = ('seed', ':seed')


def sweep(key: str, values: Iterable[Any]) -> Sweep:
  """Returns one run for each value of a key."""
  return [{key: value} for value in values]


def product(sweeps: Sequence[Sweep]) -> Sweep:
  """Returns the runs of all combinations of the sweeps; the last sweep varies fastest."""
  return [_merged(runs) for runs in itertools.product(*sweeps)]


def zip(sweeps: Sequence[Sweep]) -> Sweep:  # noqa: A001  the name in XManager
  """Returns the first runs of all sweeps as one run, then the second runs, and so on.

  Raises:
    UserError: The sweeps have different lengths.
  """
  counts = [len(runs) for runs in sweeps]
  errors.need(len(set(counts)) < 2, f'h.zip needs sweeps of equal length, not of {counts}')
  return [_merged(runs) for runs in builtins.zip(*sweeps, strict=True)]


def _merged(runs):
  merged = {}
  for run in runs:
    twice = merged.keys() & run.keys()
    errors.need(not twice, f'a sweep sets {", ".join(sorted(twice))} twice')
    merged |= run
  return merged


def check(runs: Any, where: str) -> Sweep:
  """Returns the runs that get_hyper listed, as plain dicts without NumPy's scalars.

  Raises:
    UserError: They are not a list of different dicts; the message begins with `where`.
  """
  form = "a list of dicts, such as h.sweep('seed', range(3))"
  errors.need(
    isinstance(runs, (list, tuple)) and all(isinstance(run, Mapping) for run in runs),
    f'{where}: get_hyper(h) must return {form}',
  )
  errors.need(runs, f'{where}: get_hyper(h) lists no runs: it must return {form}')
  plain = lambda value: value.item() if isinstance(value, np.generic) else value
  runs = [{key: plain(value) for key, value in run.items()} for run in runs]
  names = [name(run, runs) for run in runs]
  twice = sorted({label for label in names if names.count(label) > 1})
  errors.need(not twice, f'{where}: get_hyper(h) lists the run {", ".join(twice)} twice')
  return runs


def name(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns the name of a run of a sweep, which is the name of its folder.

  Args:
    run: One of the runs.
    runs: All runs of the sweep. The name has only the last part of a dotted key, unless two keys
      end with the same part.

  Returns:
    Text such as 'algorithm=ppo-kl_coef=0.1-seed=0'.
  """
  keys = list(dict.fromkeys(key for other in runs for key in other))
  last = lambda key: key.rpartition('.')[2].lstrip(':')
  counts = [last(key) for key in keys]
  parts = [
    f'{last(key) if counts.count(last(key)) == 1 else key.lstrip(":")}={_text(run[key])}'
    for key in keys
    if key in run
  ]
  return '-'.join(parts) or 'run'


def group(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns the name of a run without its seed, which all runs that differ in the seed share.

  If the runs differ in one other key only, the name is the value of that key.
  """
  without = lambda each: {key: value for key, value in each.items() if key not in SEEDS}
  own, others = without(run), [without(other) for other in runs]
  keys = {key for other in others for key in other}
  return _text(*own.values()) if len(keys) == len(own) == 1 else name(own, others)


def _text(value):
  return re.sub(r'[^\w.+-]+', '_', str(value)).strip('_') or 'empty'

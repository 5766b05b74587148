"""What the loop in loop.py asks of an algorithm."""

from collections.abc import Callable
import dataclasses
from typing import Any


@dataclasses.dataclass
class Learner:
  """An algorithm, ready to run: the functions that the loop calls.

  Attributes:
    steps: train steps of the whole run.
    iterators: {name: grain iterator}, all the data it reads; saved with every checkpoint.
    next_batch: (state, timed=bool) -> (batch, metrics): the arguments of `train_step` after
      the state, read from the data or sampled from the policy, and host-side metrics, with
      times if it may wait for the device to take them.
    train_step: jitted (state, *batch) -> (state, metrics), `state` donated. Metrics are scalars, and
      under 'samples/NAME' [B] for the samples of the batch.
    export: (state, path) writes the result of the run to a folder.
    describe: (workdir) writes what a reader of the checkpoints needs, before the first step.
    evaluators: {name in config.evals: (state) -> metrics}; see evaluation/evaluators.py.
    samples: (metrics of the last step) -> the texts of its batch as dicts with prompt, response, score
      and postprocessed_score (after the rules of config.rl), for samples.jsonl; empty if the
      algorithm samples none.
    warnings: (metrics of a step, as numbers) -> {kind: line}; each kind is logged once a run.
    set_by: {name in TrainState.extra: dotted keys of the config that set its first value}; a fork in
      which one of them differs starts with its own.
  """

  steps: int
  iterators: dict[str, Any]
  next_batch: Callable[..., Any]
  train_step: Callable[..., Any]
  export: Callable[..., None]
  describe: Callable[..., None]
  evaluators: dict[str, Callable[..., dict]] = dataclasses.field(default_factory=dict)
  samples: Callable[[dict], list[dict]] = lambda metrics: []
  warnings: Callable[[dict], dict[str, str]] = lambda metrics: {}
  set_by: dict[str, tuple] = dataclasses.field(default_factory=dict)

"""The interface between the training loop (loop.py) and an algorithm."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import pathlib

from jaxtyping import Array

from rlhf_jax import types

# Name in `Learner.iterators` of a rollout that was sampled ahead. A fork, whose data, sampling and
# rewards may differ, samples a new one.
SAMPLED_AHEAD = 'sampled_ahead'


@dataclasses.dataclass
class Learner:
  """The functions of an algorithm that the loop calls.

  Attributes:
    steps: Number of train steps of the run.
    iterators: Dict from a name to a Grain iterator, for all data that the algorithm reads, or to
      another object with `get_state` and `set_state`; saved in every checkpoint.
    next_batch: Function (state, timed=bool) -> (batch, metrics). `batch` is a tuple of the
      arguments of `train_step` after the state, read from the data or sampled from the policy.
      `metrics` are computed on the host. If `timed`, it may wait for the device to measure times.
    train_step: Jitted function (state, *batch) -> (state, metrics) that donates `state`. Metrics
      are scalars, or arrays [B] under 'samples/NAME' for `samples`.
    export: Function of (state, path) that writes the result of the run to a folder.
    describe: Function of (workdir) that writes, before the first step, the files needed to read
      the checkpoints.
    evaluators: Dict from a name in config.evals to a function (state) -> metrics; see
      evaluation/evaluators.py.
    samples: Function of the metrics of the last step that returns its batch for samples.jsonl: a
      list of dicts with prompt, response, score and postprocessed_score (the score after the rules
      of config.rl). The list is empty if the algorithm does not sample.
    warnings: Function of the metrics of a step, as numbers, that returns a dict from the kind of a
      warning to its text; each kind is logged once a run.
    prepare: Function of (workdir) that computes what the algorithm keeps on disk, before the state
      is restored; all processes call it.
    check_fork: Function of the folder of a run that raises UserError, before its state is restored
      for a fork, if it does not fit this learner.
    set_by: Dict from a name in TrainState.extra to the dotted config keys that set its initial
      value. If one of these keys differs in a fork, the fork starts with the new initial value.
  """

  steps: int
  iterators: dict[str, Iterator]
  next_batch: Callable[..., tuple[tuple, dict[str, float]]]
  train_step: Callable[..., tuple[types.TrainState, dict[str, Array]]]
  export: Callable[..., None]
  describe: Callable[..., None]
  evaluators: dict[str, Callable[..., dict]] = dataclasses.field(default_factory=dict)
  samples: Callable[[dict], list[dict]] = lambda metrics: []
  warnings: Callable[[dict], dict[str, str]] = lambda metrics: {}
  prepare: Callable[[pathlib.Path], None] = lambda workdir: None
  check_fork: Callable[[pathlib.Path], None] = lambda source: None
  set_by: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

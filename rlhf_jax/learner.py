"""What the loop in train.py asks of an algorithm."""

from collections.abc import Callable
import dataclasses
from typing import Any

from rlhf_jax import types


@dataclasses.dataclass
class Learner:
  """An algorithm, ready to run: its first state and the functions the loop calls.

  Attributes:
    state: TrainState to start from, sharded.
    steps: train steps of the whole run.
    iterators: {name: grain iterator}, all the data it reads; saved with every checkpoint.
    next_batch: (state, timed=bool) -> (batch, metrics): the arguments of `train_step` after
      the state, read from the data or sampled from the policy, and host-side metrics, with
      times if it may wait for the device to take them.
    train_step: jitted (state, *batch) -> (state, metrics), `state` donated.
    evaluate: (state) -> metrics on held-out data; empty where there is none.
    export: (state, path) writes a Hugging Face folder.
    model: Model of what is exported, so that a checkpoint can be read by itself.
    model_name: its name within `state.params`.
    tokenizer: the tokenizer its texts are encoded with.
    samples: () -> the texts of the last batch as dicts with prompt, response and score (before any
      rule on it), for samples.jsonl; empty where the algorithm samples none.
  """
  state: types.TrainState
  steps: int
  iterators: dict[str, Any]
  next_batch: Callable[..., Any]
  train_step: Callable[..., Any]
  evaluate: Callable[..., dict]
  export: Callable[..., None]
  model: Any
  model_name: str
  tokenizer: Any
  samples: Callable[[], list[dict]] = list

"""Config, arrays and compiled train step of a workload's PPO update, without data or files.

The benchmarks lengths.py, memory.py and shared_weights.py compile it, and peers/ours.py runs its
config.
"""

from collections.abc import Callable
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import wiring


def make_config(w, changes, device='cpu'):
  """Returns the config of a workload, without data, tokenizer and reward.

  Args:
    w: Workload.
    changes: {key: value} to change, such as workloads.Variant.config. 'half' is half of the layers.
    device: 'cpu', 'gpu' or 'tpu'.
  """
  config = ppo.config()
  config.batch_size = w.batch
  config.microbatch_size = w.rows or None
  config.data.max_prompt_length = w.prompt
  config.sampling.max_new_tokens = w.response
  config.sampling.temperature = 1.0
  config.model.init = {'family': 'gpt2', **w.gpt2}
  config.model.dtype = 'float32' if device == 'cpu' else 'bfloat16'
  config.optim.learning_rate = workloads.LEARNING_RATE
  config.rl.update(
    {
      'epochs': workloads.EPOCHS,
      'minibatches': 1,
      'kl_coef': workloads.KL_COEF,
      'gamma': workloads.GAMMA,
      'lam': workloads.LAM,
      'clip_low': workloads.CLIP,
      'clip_high': workloads.CLIP,
      'value_clip': workloads.VALUE_CLIP,
      'vf_coef': workloads.VALUE_COEF,
    }
  )
  config.update_from_flattened_dict(
    {key: w.layers // 2 if value == 'half' else value for key, value in changes.items()}
  )
  return config


class Update(NamedTuple):
  """A compiled update with its arguments.

  Attributes:
    step: Compiled function (state, *arguments) -> (state, metrics). `state` is donated.
    state: TrainState.
    arguments: Other arguments: frozen parameters, a rollout of random tokens, scores, and None in
      place of a pretraining batch.
  """

  step: Callable
  state: types.TrainState
  arguments: tuple


def prepare(config, mesh):
  """Creates random models and compiles their update.

  Args:
    config: Config from `make_config`.
    mesh: Device mesh.

  Returns:
    Update.
  """
  model = models.create(config.model.init.to_dict(), **setup.model_settings(config.model))
  place = sharding.shardings(model.shapes(), model.rules, mesh)
  policy = jax.jit(model.init, out_shardings=place)(jax.random.key(0))
  wired = wiring.wire(config, mesh, (model, policy), steps=100)
  settings = ppo.Settings.of(config, ())
  state = setup.new_state(
    config.seed,
    wired.params,
    wired.optimizers,
    mesh,
    model.rules,
    extra=wiring.first_extra(settings),
  )
  step = setup.jit_step(
    ppo.train_step,
    state,
    models=wired.models,
    optimizers=wired.optimizers,
    settings=settings,
  )
  arguments = wired.frozen, *episode(config), None
  return Update(step.lower(state, *arguments).compile(), state, arguments)


def seconds(update, count):
  """Runs `count` + 1 updates, and returns the state and the median time of all but the first."""
  state, times = update.state, []
  for _ in range(count + 1):
    started = time.perf_counter()
    state, metrics = update.step(state, *update.arguments)
    jax.block_until_ready((state, metrics))
    times.append(time.perf_counter() - started)
  return state, round(statistics.median(times[1:]), 2)


def episode(config):
  """Returns a rollout of random tokens without padding, and random scores."""
  rng = np.random.default_rng(0)
  batch, prompt, response = (
    config.batch_size,
    config.data.max_prompt_length,
    config.sampling.max_new_tokens,
  )
  shape = batch, prompt + response
  real = np.ones(shape, bool)
  tokens = rng.integers(0, config.model.init.vocab_size, shape, dtype=np.int32)
  rollout = types.Rollout(tokens, real, real[:, prompt:], np.zeros((batch, response), np.float32))
  return jax.tree.map(jnp.asarray, (rollout, rng.normal(size=batch).astype(np.float32)))

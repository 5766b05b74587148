"""The programs of a PPO iteration, and their arguments as ShapeDtypeStructs on a mesh.

The functions that make the state of a real run make it here under `jax.eval_shape`, with the same
sharding rules. Reward model and critic are assumed to have the policy's shapes.

Letters: B batch, P prompt length, R response length, T = P + R.
"""

from collections.abc import Callable
import dataclasses
import functools
import types as python_types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import wiring
from rlhf_jax.models import base
from rlhf_jax.models import heads
from rlhf_jax.models import trainable
from rlhf_jax.rewards import scoring
from rlhf_jax.rollout import sampler

# Rules for the small arrays of the state, which every chip holds.
SMALL = tuple(
  (rf'^state/{name}$', PartitionSpec())
  for name in ('step', 'key', 'extra/kl_coef', 'extra/reward_moments')
)
STEPS = 1000  # steps of the learning-rate schedule; no shape depends on it


class Programs(NamedTuple):
  """The programs of an iteration of PPO.

  Attributes:
    model: Model of the policy.
    arrays: All arrays that stay on the chips: {'state': TrainState, 'frozen': see forward.Forward,
      'scored': parameters of the reward model, {} if the reward is a function}.
    calls: {name: (jitted function, its arguments)} of 'rollout', 'scoring' and 'update'.
  """

  model: base.LanguageModel
  arrays: dict[str, PyTree]
  calls: dict[str, tuple[Callable, tuple]]


def make(config, mesh):
  """Makes the Programs of a config.

  Args:
    config: Config of PPO whose `model.init` has the fields of a config.json.
    mesh: Mesh of real or described devices.

  Raises:
    UserError: The config is not of PPO with a decoder, or the mesh does not divide its arrays.
  """
  check(config)
  found = []

  def start(params):
    scored = {}
    if config.reward.model:
      scored = {
        'backbone': {name: tree for name, tree in params.items() if name != 'unembed'},
        'head': jax.tree.map(
          lambda x: x.astype(config.model.param_dtype),
          heads.init_scalar(None, base.width, scale='zero'),
        ),
      }
    wired = wiring.wire(
      config,
      mesh,
      (base, params),
      reference=params if config.reference else True,
      critic=(base, scored) if scored else None,
      steps=STEPS,
    )
    state = setup.new_state(
      config.seed,
      wired.params,
      wired.optimizers,
      mesh,
      wired.models.policy.rules,
      extra=wiring.first_extra(settings),
    )
    found.append(wired._replace(params=None, frozen=None))
    return {'state': state, 'frozen': wired.frozen, 'scored': scored}

  algorithm = build.load(config.algorithm)
  # Assumes that every response has full length.
  settings = dataclasses.replace(algorithm.Settings.of(config, (0,)), length_buckets=1)
  base = models.create(config.model.init.to_dict(), **setup.model_settings(config.model))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, config.model.param_dtype), base.shapes()
  )
  with jax.set_mesh(mesh):
    arrays = jax.eval_shape(start, params)
  (wired,) = found
  arrays = place(arrays, sharding.shardings(arrays, SMALL + wired.models.policy.rules, mesh))
  step = setup.jit_step(
    algorithm.train_step,
    arrays['state'],
    models=wired.models,
    optimizers=wired.optimizers,
    settings=settings,
  )
  return Programs(wired.models.policy, arrays, calls(config, mesh, wired.models, step, arrays))


def check(config):
  """Raises UserError if a config cannot be planned."""
  if config.get('algorithm') != 'ppo':
    raise errors.UserError(
      f'planner plans single runs of PPO; this config has algorithm={config.get("algorithm")!r}'
    )
  if not config.model.init:
    raise errors.UserError(
      'config.model.init is empty, and planner reads no folder; set it to the fields of config.json'
    )
  if config.reward.models or config.reward.parts:
    raise errors.UserError(
      'config.reward.models and config.reward.parts: planner supports a single '
      'reward model or function only; leave them empty'
    )
  if config.model.lora.path or config.critic.path:
    raise errors.UserError(
      'config.model.lora.path and config.critic.path: planner reads no folder; leave them empty'
    )


def calls(config, mesh, handles, step, arrays):
  """Returns the jitted programs of an iteration with their arguments; see Programs."""
  rows = sharding.batch_sharding(mesh)
  array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  batch, prompt, response = (
    config.batch_size,
    config.data.max_prompt_length,
    config.sampling.max_new_tokens,
  )
  length = prompt + response
  state, frozen, scored = arrays['state'], arrays['frozen'], arrays['scored']
  count = batch // config.sampling.samples
  prompts = types.Prompts(array(count, prompt, dtype=jnp.int32), array(count, prompt, dtype=bool))
  rollout = types.Rollout(
    array(batch, length, dtype=jnp.int32),
    array(batch, length, dtype=bool),
    array(batch, response, dtype=bool),
    array(batch, response, dtype=jnp.float32),
  )
  # The values of these ids have no effect on memory and time.
  tokenizer = python_types.SimpleNamespace(eos_token_id=0, pad_token_id=0)
  sampling = on_policy_config.make_sampling(config, tokenizer)
  generate = sampler.make(
    handles.policy,
    sampling,
    samples=config.sampling.samples,
    max_concurrent=config.sampling.max_concurrent or 0,
    gather=config.sampling.gather_weights,
  )
  programs = {
    'rollout': (
      generate,
      (trainable.merge(frozen['policy'], state.params['policy']), prompts, state.key),
    )
  }
  if scored:
    score = functools.partial(scoring.score, model=dataclasses.replace(handles.policy, lora=None))
    programs['scoring'] = jax.jit(score), (scored, rollout.tokens, rollout.mask)
  ptx = None
  if config.ptx.batch_size:
    ptx_array = functools.partial(array, config.ptx.batch_size, config.ptx.max_length)
    ptx = types.LMBatch(
      ptx_array(dtype=jnp.int32),
      ptx_array(dtype=jnp.int32),
      ptx_array(dtype=jnp.int32),
      ptx_array(dtype=bool),
    )
  programs['update'] = step, (state, frozen, rollout, array(batch, dtype=jnp.float32), ptx)
  return programs


def place(tree, shardings):
  """Returns ShapeDtypeStructs of a tree with the shardings of another tree."""
  return jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec), tree, shardings
  )

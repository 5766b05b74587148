"""The sampler of training: responses to a batch of prompts on the mesh, in one jitted program.

The tokens depend on the parameters, the prompts and the key alone. Sample j of prompt i is response
i n + j of the batch and draws from the key folded with that number, so neither the number of data
shards, nor continuous batching, nor the number of responses decoded at a time changes them.

Letters: B prompts, n samples of each, P prompt length, R response length, T = P + R.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Key, PyTree

from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.models import base
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import engine
from rlhf_jax.rollout import sampling as sampling_lib


def make(
  model: base.LanguageModel,
  sampling: sampling_lib.Sampling,
  *,
  samples: int = 1,
  max_concurrent: int = 0,
  gather: bool = False,
) -> Callable[[PyTree, types.Prompts, Key[Array, '']], types.Rollout]:
  """Makes the function that samples responses.

  Args:
    model: the policy's Model.
    sampling: Sampling; `max_new_tokens` is R.
    samples: n, responses to each prompt, which is read once for all of them.
    max_concurrent: responses decoded at a time, over all data shards, by continuous batching
      (`engine.generate`); every data shard has its part of them and a queue of its own. 0 decodes
      all of them together (`decode.generate`).
    gather: whether every device holds what it else gathers over 'fsdp' for each token: its part of
      the weights along 'tensor', whole. Continuous batching always does.

  Returns:
    Jitted (params, prompts, key) -> Rollout [B n, T], the responses to a prompt side by side, for
    Prompts [B, P] whose B divides over the data shards.

  Raises:
    UserError: now, or when called under another mesh: with `max_concurrent`, the mesh cannot do it.
  """

  def generate(params, prompts, key):
    check_mesh(model, max_concurrent)
    settings = dict(model=model, sampling=sampling, samples=samples)
    params = sharding.gather(params, model.rules, 'fsdp') if gather or max_concurrent else params
    if not max_concurrent:
      return decode.generate(params, prompts, key, **settings)
    shards, _ = sharding.shards()

    def generate_shard(replicated, prompts, shard):
      params, key = replicated
      return engine.generate(
        params,
        prompts,
        key,
        **settings,
        max_concurrent=max_concurrent // shards,
        first=shard * prompts.tokens.shape[0] * samples,
      )

    return sharding.map_shards(generate_shard, (params, key), prompts)

  check_mesh(model, max_concurrent)
  return jax.jit(generate, compiler_options=sharding.compiler_options(sharding.platform()))


def check_mesh(model: base.LanguageModel, max_concurrent: int) -> None:
  """Checks that the mesh which is set can decode `max_concurrent` responses at a time.

  Raises:
    UserError: they do not divide over the data shards; there are several of these, and the model's
      heads do not divide over 'tensor'; or 'tensor' is above 1 on CPU devices of several processes.
  """
  shards, tensor = sharding.shards()
  name = f'config.sampling.max_concurrent={max_concurrent}'
  if max_concurrent % shards:
    raise errors.UserError(
      f'{name} does not divide over the {shards} data shards of config.mesh: choose a '
      f'multiple of {shards}, or None'
    )
  # Parts of heads would go from device to device inside the loops; see `engine` on drawing tokens.
  if (
    max_concurrent
    and shards > 1
    and (model.config.heads % tensor or model.config.kv_heads % tensor)
  ):
    raise errors.UserError(
      f'{name} on {shards} data shards: the {model.config.heads} attention heads and '
      f'{model.config.kv_heads} of keys and values must divide over the {tensor} parts of '
      'config.mesh.tensor; choose another mesh, or set config.sampling.max_concurrent to None'
    )
  if max_concurrent and tensor > 1 and processes.must_unroll():
    raise errors.UserError(
      f'{name} with {tensor} parts of config.mesh.tensor: between CPU devices of several processes '
      'loops of unknown length cannot have collectives in them; set config.sampling.max_concurrent '
      'to None'
    )

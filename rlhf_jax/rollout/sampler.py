"""The sampler for training: samples responses on the mesh, in one jitted program.

The tokens depend only on the parameters, the prompts and the key. Sample j of prompt i is response
k = i n + j of the batch; its key is fold_in(key, k). The number of data shards, continuous
batching and the number of responses decoded at a time do not change the tokens.

Letters: B prompts, n samples per prompt, P prompt length, R response length, T = P + R.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Key, PyTree

from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import engine
from rlhf_jax.rollout import masking
from rlhf_jax.rollout import sampling as sampling_lib


def make(
  model: masking.Decodable,
  sampling: sampling_lib.Sampling,
  *,
  samples: int = 1,
  max_concurrent: int = 0,
  gather: bool = False,
) -> Callable[[PyTree, types.Prompts, Key[Array, '']], types.Rollout]:
  """Returns the function that samples responses.

  Args:
    model: Model of the policy, or masking.MaskedModel.
    sampling: Sampling; `max_new_tokens` is R.
    samples: n, number of responses per prompt. A prompt is prefilled once for all of them.
    max_concurrent: Number of responses decoded at a time, over all data shards, with continuous
      batching (`engine.generate`). Each data shard has its own queue and an equal part of this
      number. 0 decodes all responses together (`decode.generate`).
    gather: Whether to all-gather the weights over 'fsdp' once, before sampling, instead of for each
      token. Needs memory on each device for all weights of its part along 'tensor'. Continuous
      batching always gathers.

  Returns:
    Jitted (params, prompts, key) -> Rollout [B n, T], with the responses to a prompt adjacent, for
    Prompts [B, P]. B must be divisible by the number of data shards.

  Raises:
    UserError: `check_mesh` fails. The returned function checks its mesh too.
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


def check_mesh(model: masking.Decodable, max_concurrent: int) -> None:
  """Checks that `max_concurrent` responses can be decoded at a time on the current mesh.

  Raises:
    UserError: `max_concurrent` is not divisible by the number of data shards; there are several
      data shards, and the number of heads is not divisible by 'tensor'; or 'tensor' is above 1 on
      CPU devices of several processes.
  """
  shards, tensor = sharding.shards()
  name = f'config.sampling.max_concurrent={max_concurrent}'
  if max_concurrent % shards:
    raise errors.UserError(
      f'{name} does not divide over the {shards} data shards of config.mesh: choose a '
      f'multiple of {shards}, or None'
    )
  # The loops would need collectives for parts of heads; see `Scheduler.sample_token` in `engine`.
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
      f'{name} with {tensor} parts of config.mesh.tensor: loops of unknown length cannot contain '
      'collectives between CPU devices of several processes; set config.sampling.max_concurrent to '
      'None'
    )

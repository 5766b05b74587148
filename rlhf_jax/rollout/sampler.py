"""Rollouts as one jitted program: the plain loop, or continuous batching on each data shard.

Letters: n responses of a prompt.
"""

import jax

from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import engine


def make(model, sampling, *, samples=1, max_concurrent=0, gather=False):
  """A jitted function (params, prompts, key) -> Rollout; its tokens do not depend on how they are made.

  Args:
    model: the policy's Model.
    sampling: Sampling.
    samples: n, responses to each prompt, side by side in the rollout.
    max_concurrent: responses sampled at a time, by continuous batching; every data shard has its
      part of them, and a queue of its own. 0 for the plain loop over all of them.
    gather: whether every device holds what it else gathers over 'fsdp' for each token: its part
      of the weights along 'tensor', whole. With `max_concurrent` it always does.

  Raises:
    UserError: when called, with `max_concurrent`: there are several data shards, and the model's heads do not divide
      over 'tensor'; or 'tensor' is above 1 on CPU devices of several processes.
  """
  def generate(params, prompts, key):
    params = sharding.gathered(params, model.rules, 'fsdp') if gather or max_concurrent else params
    if not max_concurrent:
      return decode.generate(params, prompts, key, model=model, sampling=sampling, samples=samples)
    shards, tensor = sharding.shards()
    # Parts of heads would go from device to device inside the loops: as in `engine`, where tokens are drawn.
    if shards > 1 and (model.config.heads % tensor or model.config.kv_heads % tensor):
      raise errors.UserError(
          f'config.sampling.max_concurrent={max_concurrent} on {shards} data shards: the {model.config.heads} attention heads and '
          f'{model.config.kv_heads} of keys and values have to divide over the {tensor} parts of config.mesh.tensor; '
          'choose another mesh, or set config.sampling.max_concurrent to None')

    if tensor > 1 and processes.unrolled():
      raise errors.UserError(
          f'config.sampling.max_concurrent={max_concurrent} with {tensor} parts of config.mesh.tensor: between CPU devices of several '
          'processes loops of unknown length cannot have collectives in them; set config.sampling.max_concurrent to None')

    def refill(whole, prompts, shard):
      params, key = whole
      return engine.generate(params, prompts, key, model=model, sampling=sampling, rows=max_concurrent // shards,
                             samples=samples,
                             first=shard * prompts.tokens.shape[0] * samples)

    return sharding.each_shard(refill, (params, key), prompts)
  return jax.jit(generate)

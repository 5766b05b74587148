"""The decode loop: prefill, then one token per step with a key/value cache updated in place.

A step reads all slots of the cache, even empty ones. The loop therefore has stages, and each stage
enlarges the cache.

Letters: B batch, n samples of a prompt, P prompt length, R response length, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Key, PyTree

from rlhf_jax import lengths
from rlhf_jax import types
from rlhf_jax.rollout import cache as cache_lib
from rlhf_jax.rollout import masking
from rlhf_jax.rollout import sampling as sampling_lib

STAGES = 4  # maximum; each stage is compiled separately


def generate(
  params: PyTree,
  prompts: types.Prompts,
  key: Key[Array, ''],
  *,
  model: masking.Decodable,
  sampling: sampling_lib.Sampling,
  samples: int = 1,
  first: Int[ArrayLike, ''] = 0,
) -> types.Rollout:
  """Samples a response to each prompt.

  The loop ends on the device as soon as all responses have ended. Response i has its own random
  key, which is folded with the index of the token. Jit this function with `model`, `sampling` and
  `samples` static.

  Args:
    params: Parameters of the policy, or of masking.MaskedModel.
    prompts: Prompts, left-padded to P.
    key: Random key of this rollout.
    model: Model. If a masking policy restricts it, the allowed tokens are recorded.
    sampling: Sampling; `max_new_tokens` is R.
    samples: n, number of responses per prompt. A prompt is prefilled once for all of them.
    first: Number of the first response, if the prompts are a part of a larger batch; may be traced.

  Returns:
    Rollout of B n responses, those to a prompt adjacent, with sequences of length P + R.
  """
  batch = prompts.tokens.shape[0] * samples
  response_length = sampling.max_new_tokens
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(batch))

  def append_token(s, hidden):
    """Samples token t of all unfinished responses. The EOS or a stop token finishes a response."""
    logits, t, alive = model.unembed(params, hidden), s['t'], ~s['done']
    token, logprob = sampling_lib.sample(
      jax.vmap(jax.random.fold_in, (0, None))(keys, t), logits, sampling, t
    )
    token = jnp.where(alive, token, sampling.pad_id)
    columns = {'tokens': token, 'mask': alive, 'logprobs': jnp.where(alive, logprob, 0.0)}
    if masked:
      columns['allowed'] = jnp.where(alive[:, None], sampling_lib.allowed(logits, sampling, t), 0)
    out = {
      name: jax.lax.dynamic_update_slice_in_dim(s[name], column[:, None], s['t'], axis=1)
      for name, column in columns.items()
    }
    done = s['done'] | sampling_lib.ends_response(token, sampling)
    return s | out | {'token': token, 'done': done, 't': s['t'] + 1}

  def step(s):
    hidden, cache = model.step(params, s['token'], ~s['done'], s['cache'])
    return append_token(s | {'cache': cache}, hidden)

  masked = isinstance(model, masking.MaskedModel)
  params = model.unstack(params)
  model = model.with_max_length(prompts.tokens.shape[1] + response_length)
  stages = lengths.bucket_lengths(response_length, STAGES)
  hidden, cache = model.prefill(params, prompts.tokens, prompts.mask, stages[0])
  if samples > 1:
    repeat = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), tree)
    hidden, prompts, cache = repeat(hidden), repeat(prompts), cache_lib.repeat(cache, samples)
  state = {
    'cache': cache,
    't': jnp.int32(0),
    'token': jnp.zeros([batch], jnp.int32),
    'done': jnp.zeros([batch], bool),
    'tokens': jnp.full([batch, response_length], sampling.pad_id, jnp.int32),
    'mask': jnp.zeros([batch, response_length], bool),
    'logprobs': jnp.zeros([batch, response_length], jnp.float32),
  }
  if masked:
    state['allowed'] = jnp.zeros([batch, response_length, model.mask_bytes], jnp.uint8)
  state = append_token(state, hidden)
  for before, stage in zip([stages[0]] + stages, stages):
    state['cache'] = cache_lib.grow(state['cache'], stage - before)
    state = jax.lax.while_loop(lambda s: (s['t'] < stage) & ~jnp.all(s['done']), step, state)
    # If all responses have ended, t is smaller. A constant makes the steps of the next stage known.
    state['t'] = jnp.int32(stage)
  return types.Rollout(
    tokens=jnp.concatenate([prompts.tokens, state['tokens']], axis=1),
    mask=jnp.concatenate([prompts.mask, state['mask']], axis=1),
    response_mask=state['mask'],
    logprobs=state['logprobs'],
    allowed=state.get('allowed'),
  )

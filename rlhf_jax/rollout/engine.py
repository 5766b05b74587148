"""Continuous batching on the device: when a response finishes, its row is refilled.

`decode.generate` runs until the longest response of the batch ends. Here, prompts wait in a queue.
Groups of prompts are prefilled into a small cache, and each row of a larger cache that becomes free
gets the next prompt, all inside one jitted program. All rows of a cache share one write index: a
prompt is copied to the slots before the index, and then decoded as in the plain loop. When a cache
is full, its contents are moved to the left.

The cost of a step depends on the length of the cache. Rows therefore start in a short cache, with
room for a part of the longest response, and the few that outgrow it move to a long cache. A step
decodes the rows of one of the two caches. When the queue is empty, the remaining rows are decoded
in smaller batches.

Letters: U prompts, n samples per prompt, N = U n responses, B rows (responses decoded at a time), P
prompt length, R response length, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Key, PyTree

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.rollout import cache as cache_lib
from rlhf_jax.rollout import masking
from rlhf_jax.rollout import sampling as sampling_lib

# The short cache has room for responses of R / SHORT tokens. It is used if R is at least LONG.
SHORT, LONG = 4, 64
# Slots by which the contents of a full cache are moved. On the CPU, 16 take 10 % less time than 32.
MARGIN = 16
# When few responses are left, they are decoded in batches of B / 2, and then B / 4.
DRAIN_DIVISORS = (2, 4)


def generate(
  params: PyTree,
  prompts: types.Prompts,
  key: Key[Array, ''],
  *,
  model: masking.Decodable,
  sampling: sampling_lib.Sampling,
  max_concurrent: int,
  samples: int = 1,
  first: Int[ArrayLike, ''] = 0,
) -> types.Rollout:
  """Samples the same responses as `decode.generate`, token for token.

  Jit this function with `model`, `sampling`, `max_concurrent` and `samples` static. Needs memory
  for caches of B rows of P + R tokens, B rows of P + R / 4 tokens, and B / 4 prompts.

  Args:
    params: Parameters of the policy, or of masking.MaskedModel.
    prompts: Prompts [U, P], left-padded.
    key: Random key. Response i has its own key, which is folded with the index of the token.
    model: Model. If a masking policy restricts it, the allowed tokens are recorded.
    sampling: Sampling; `max_new_tokens` is R.
    max_concurrent: B, number of responses decoded at a time.
    samples: n, number of responses per prompt. A prompt is prefilled once for all of them.
    first: Number of the first response, if the prompts are a part of a larger batch; may be traced.

  Returns:
    Rollout of N responses, those to a prompt adjacent, with sequences of length P + R.
  """
  model = model.with_max_length(prompts.tokens.shape[1] + sampling.max_new_tokens)
  scheduler = Scheduler(params, prompts, key, model, sampling, max_concurrent, samples, first)
  s = jax.lax.while_loop(scheduler.has_work, scheduler.step_until_event, scheduler.init_state())
  s = scheduler.drain(s)
  tokens, logprobs, lengths = (
    s[name][: scheduler.num_responses] for name in ('tokens', 'logprobs', 'lengths')
  )
  mask = jnp.arange(sampling.max_new_tokens)[None] < lengths[:, None]
  prompts = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
  return types.Rollout(
    tokens=jnp.concatenate([prompts.tokens, tokens], axis=1),
    mask=jnp.concatenate([prompts.mask, mask], axis=1),
    response_mask=mask,
    logprobs=logprobs,
    allowed=s['allowed'][: scheduler.num_responses] if scheduler.masked else None,
  )


class Scheduler:
  """The constants of the loop, and its parts as functions of the state `s`, a dict.

  The state contains

  - tokens, logprobs, lengths: results, [M, R] and [M]; M is N rounded up to full groups. If a
    masking policy restricts the model, also allowed, [M, R, ceil(V / 8)].
  - next: number of the next response to start.
  - group: number of the group of prompts that was prefilled last.
  - cache: cache of the group.
  - token, ended: first token of each response of the group, and whether it ended the response.
  - short, long: pools of B rows; if R is small there is only `short`. A pool contains a cache and,
    for each row, the response (its number, or `no_response` if the row is free), token (the last
    one) and count (of its tokens).
  """

  def __init__(self, params, prompts, key, model, sampling, max_concurrent, samples, first):
    self.params, self.model, self.sampling, self.samples = (
      model.unstack(params),
      model,
      sampling,
      samples,
    )
    self.masked = isinstance(model, masking.MaskedModel)
    number, length = prompts.tokens.shape
    self.num_responses = number * samples
    self.batch = min(max_concurrent, self.num_responses)
    self.group_prompts = max(self.batch // (4 * samples), 1)
    self.group_responses = self.group_prompts * samples
    padding = -number % self.group_prompts
    self.prompts = jax.tree.map(lambda x: jnp.pad(x, ((0, padding), (0, 0))), prompts)
    self.no_response = (number + padding) * samples
    self.keys = jax.vmap(jax.random.fold_in, (None, 0))(
      key, first + jnp.arange(self.no_response + 1)
    )
    self.response_length = sampling.max_new_tokens
    self.margin = MARGIN
    self.capacities = (
      {'short': self.response_length // SHORT, 'long': self.response_length}
      if self.response_length >= LONG
      else {'short': self.response_length}
    )
    self.last_pool = list(self.capacities)[-1]
    # Slots of a prompt, and slots that are copied when a row moves to the long cache. In an
    # encoder-decoder, the slots hold only the response, which begins with a start token.
    self.prompt_length = 1 if model.encoder_decoder else length
    self.moved_length = self.prompt_length + self.capacities['short']

  # The state.

  def init_state(self):
    """Returns the state before the first prefill, with all rows free."""
    results = (self.no_response, self.response_length)
    allowed = (
      {'allowed': jnp.zeros((*results, self.model.mask_bytes), jnp.uint8)} if self.masked else {}
    )
    return (
      allowed
      | {
        'next': jnp.int32(0),
        'group': jnp.int32(-1),
        'cache': self.empty(self.group_prompts, 0, self.prompt_length),
        'token': jnp.zeros(self.group_responses, jnp.int32),
        'ended': jnp.zeros(self.group_responses, bool),
        'tokens': jnp.full(results, self.sampling.pad_id, jnp.int32),
        'logprobs': jnp.zeros(results, jnp.float32),
        'lengths': jnp.zeros(self.no_response, jnp.int32),
      }
      | {
        name: {
          'cache': self.empty(self.batch, capacity + self.margin, self.moved_length),
          'response': jnp.full(self.batch, self.no_response, jnp.int32),
          'token': jnp.zeros(self.batch, jnp.int32),
          'count': jnp.zeros(self.batch, jnp.int32),
        }
        for name, capacity in self.capacities.items()
      }
    )

  def empty(self, rows, capacity, index):
    """Returns an empty cache with room for a prompt and `capacity` more tokens."""
    like = jax.ShapeDtypeStruct((rows, self.prompts.tokens.shape[1]), jnp.int32)
    prefill = functools.partial(
      self.model.prefill, response_length=capacity + int(self.model.encoder_decoder)
    )
    _, shapes = jax.eval_shape(prefill, self.params, like, like.update(dtype=bool))
    return cache_lib.empty(shapes, index)

  def active(self, s, name):
    """Returns whether each row of a pool has a response, [B] bool."""
    return s[name]['response'] < self.no_response

  def num_active(self, s, name):
    """Returns the number of active rows of a pool, 0 if there is no such pool."""
    return jnp.sum(self.active(s, name)) if name in s else 0

  # Between steps.

  def refillable(self, s):
    """Returns whether there is a response to start and a free row for it."""
    return (s['next'] < self.num_responses) & ~jnp.all(self.active(s, 'short'))

  def refill(self, s):
    """Starts the next response in a free row, unless its first token has ended it."""
    s = jax.lax.while_loop(
      lambda s: s['group'] != s['next'] // self.group_responses, self.prefill, s
    )
    i, pool = s['next'] % self.group_responses, s['short']
    row = jnp.argmin(self.active(s, 'short'))
    pool = {
      'cache': cache_lib.put(pool['cache'], row, s['cache'], i // self.samples, self.prompt_length),
      'response': pool['response']
      .at[row]
      .set(jnp.where(s['ended'][i], self.no_response, s['next'])),
      'token': pool['token'].at[row].set(s['token'][i]),
      'count': pool['count'].at[row].set(1),
    }
    return s | {'next': s['next'] + 1, 'short': pool}

  def prefill(self, s):
    """Prefills the prompts of the next group and samples the first token of each response."""
    # Computed from `group`, not from `next`: `next` is constant in the loop that calls this, so XLA
    # would move the prefill out of the loop and execute it every time.
    group = s['group'] + 1
    prompts = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, group * self.group_prompts, self.group_prompts),
      self.prompts,
    )
    hidden, cache = self.model.prefill(
      self.params, prompts.tokens, prompts.mask, int(self.model.encoder_decoder)
    )
    hidden = jax.tree.map(lambda x: jnp.repeat(x, self.samples, axis=0), hidden)
    responses = group * self.group_responses + jnp.arange(self.group_responses)
    s, token, ended = self.sample_token(
      s, hidden, responses, jnp.zeros(self.group_responses, jnp.int32)
    )
    return s | {'group': group, 'cache': cache, 'token': token, 'ended': ended}

  def outgrown(self, s):
    """Returns which rows have no room for another token in the short cache."""
    return self.active(s, 'short') & (s['short']['count'] > self.capacities['short'])

  def movable(self, s):
    """Returns whether a row should move to the long cache, and the cache has a free row.

    When the queue is empty, all rows should move if the long cache has enough free rows.
    """
    short, long = self.num_active(s, 'short'), self.num_active(s, 'long')
    merge_pools = (s['next'] >= self.num_responses) & (short > 0) & (short + long <= self.batch)
    return (jnp.any(self.outgrown(s)) | merge_pools) & (long < self.batch)

  def move(self, s):
    """Moves the row with the most tokens from the short cache to the long cache."""
    short, long = s['short'], s['long']
    row = jnp.argmax(jnp.where(self.active(s, 'short'), short['count'], 0))
    free = jnp.argmin(self.active(s, 'long'))
    moved = {
      name: long[name].at[free].set(short[name][row]) for name in ('response', 'token', 'count')
    }
    moved['cache'] = cache_lib.put(long['cache'], free, short['cache'], row, self.moved_length)
    return s | {
      'long': moved,
      'short': short | {'response': short['response'].at[row].set(self.no_response)},
    }

  # Steps.

  def sample_token(self, s, hidden, responses, index):
    """Samples the next token of some responses.

    Args:
      s: State.
      hidden: Last hidden states, one per response.
      responses: int32 numbers of the responses; `no_response` for free rows.
      index: int32 number of tokens that each response already has.

    Returns:
      (state with the tokens written, tokens, whether each response has ended).
    """
    keys = jax.vmap(jax.random.fold_in)(self.keys[responses], index)
    # Not sharded over 'tensor': sums over parts of the vocabulary use collective permutes, which on
    # CPUs also wait for the devices of other data shards, and these may have left the loop.
    logits = sharding.split_rows(self.model.unembed(self.params, hidden))
    token, logprob = sampling_lib.sample(keys, logits, self.sampling, index)
    columns = {'tokens': token, 'logprobs': logprob}
    if self.masked:
      columns['allowed'] = sampling_lib.allowed(logits, self.sampling, index)
    written = {
      name: s[name].at[responses, index].set(column, mode='drop')
      for name, column in columns.items()
    }
    written['lengths'] = s['lengths'].at[responses].set(index + 1, mode='drop')
    ended = (index + 1 == self.response_length) | sampling_lib.ends_response(token, self.sampling)
    return s | written, token, ended

  def step(self, s, name):
    """Decodes one token of each active row of a pool."""

    def has_margin(cache):
      # Moving a row copies `moved_length` slots before the index, even if it has fewer tokens.
      longest = jnp.max(
        jnp.where(self.active(s, name), self.prompt_length + s[name]['count'], 0),
        initial=self.moved_length,
      )
      return cache['index'] - longest >= self.margin

    pool = s[name]
    cache = jax.lax.while_loop(
      has_margin, lambda cache: cache_lib.shift(cache, self.margin), pool['cache']
    )
    hidden, cache = self.model.step(self.params, pool['token'], self.active(s, name), cache)
    s, token, ended = self.sample_token(s, hidden, pool['response'], pool['count'])
    return s | {
      name: {
        'cache': cache,
        'token': token,
        'count': pool['count'] + 1,
        'response': jnp.where(ended, self.no_response, pool['response']),
      }
    }

  def step_until_event(self, s):
    """Moves and refills rows, then decodes until a row can be moved or refilled."""
    if 'long' not in s:
      s = jax.lax.while_loop(self.refillable, self.refill, s)
      return jax.lax.while_loop(
        lambda s: self.has_work(s) & ~self.refillable(s), lambda s: self.step(s, 'short'), s
      )

    def step_long_first(s):
      # If a row waits for a free row of the long cache, or the long cache has more active rows.
      return jnp.any(self.outgrown(s)) | (self.num_active(s, 'long') > self.num_active(s, 'short'))

    def no_event(s):
      return self.has_work(s) & ~self.movable(s) & ~self.refillable(s)

    s = jax.lax.while_loop(self.movable, self.move, s)
    s = jax.lax.while_loop(self.refillable, self.refill, s)
    s = jax.lax.while_loop(
      lambda s: no_event(s) & ~step_long_first(s), lambda s: self.step(s, 'short'), s
    )
    return jax.lax.while_loop(
      lambda s: no_event(s) & step_long_first(s), lambda s: self.step(s, 'long'), s
    )

  # The end.

  def has_work(self, s):
    """Returns whether the main loop must continue.

    It ends when the queue is empty, at most B / 2 rows of the last pool are active, and no row of
    another pool is.
    """
    remaining = self.num_active(s, self.last_pool) > (self.batch // DRAIN_DIVISORS[0])
    if self.last_pool == 'long':
      remaining |= self.num_active(s, 'short') > 0
    return (s['next'] < self.num_responses) | remaining

  def drain(self, s):
    """Decodes the last rows, at most B / 2 of the last pool, in smaller batches."""
    sizes = [self.batch // part for part in DRAIN_DIVISORS if self.batch >= part]
    for size, remaining in zip(sizes, sizes[1:] + [0]):
      order = jnp.argsort(~self.active(s, self.last_pool), stable=True)[:size]
      pool = s[self.last_pool]
      s = s | {
        self.last_pool: {name: x[order] for name, x in pool.items() if name != 'cache'}
        | {'cache': cache_lib.take(pool['cache'], order)}
      }
      s = jax.lax.while_loop(
        lambda s: self.num_active(s, self.last_pool) > remaining,
        lambda s: self.step(s, self.last_pool),
        s,
      )
    return s

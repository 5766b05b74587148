"""Continuous batching on the device: a finished response's row of the cache is refilled at once.

A batch of `decode.generate` runs as long as its longest response. Here prompts wait in a queue. A
group of them is prefilled at a time into a small cache, and they are handed out one by one to rows
that become free, all inside one jitted program. All rows of a cache share one write index: a prompt
is copied to the slots before it, and decoding is that of the plain loop. When a cache is full, its
contents move towards the first slot.

The cost of a step depends on the longest row. So rows start in a short cache, with room for a part
of the longest response, and the few that outgrow it move to a long one; a step decodes the rows of
one of the two. When the queue is empty, the remaining rows are decoded in smaller batches.

Letters: U prompts, n samples of each, N = U n responses, B of them decoded at a time, P prompt
length, R response length, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Key, PyTree

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.models import base
from rlhf_jax.rollout import cache as cache_lib
from rlhf_jax.rollout import sampling as sampling_lib

# Rows start with room for R / SHORT tokens, where R is at least LONG.
SHORT, LONG = 4, 64
# Slots that everything moves by when a cache is full: on the CPU 16 cost 10 % less time than 32.
MARGIN = 16
# The last rows go on in batches of B / 2 and then B / 4.
DRAIN_DIVISORS = (2, 4)


def generate(
  params: PyTree,
  prompts: types.Prompts,
  key: Key[Array, ''],
  *,
  model: base.LanguageModel,
  sampling: sampling_lib.Sampling,
  max_concurrent: int,
  samples: int = 1,
  first: Int[ArrayLike, ''] = 0,
) -> types.Rollout:
  """Samples responses as `decode.generate` does for all prompts at once, token for token.

  To be jitted with `model`, `sampling`, `max_concurrent` and `samples` static. Needs caches for B
  rows of P + R tokens, as many of P + R / 4, and B / 4 prompts.

  Args:
    params: the policy's parameters.
    prompts: Prompts [U, P], left-padded.
    key: random key; response i draws from its own, folded with the token's index.
    model: Model.
    sampling: Sampling; `max_new_tokens` is R.
    max_concurrent: B, responses decoded at a time.
    samples: n; a prompt is read once for all of them.
    first: number of the first response, where the prompts are a part of many; may be traced.

  Returns:
    Rollout of N rows, the n of a prompt side by side, with T = P + R.
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
  )


class Scheduler:
  """What stays the same, and the parts of the loop as functions of its state `s`, a dict.

  Of the responses, whose number is N rounded up to whole groups, it holds 'tokens' and 'logprobs'
  [., R], 'lengths' and the 'next' one to hand out; of the 'group' prefilled last its 'cache', the
  first 'token' of each response, and which have 'ended' with it. 'short' and 'long' are the pools
  of active rows: a 'cache', and of each row which 'response' it is (`no_response` if it is free),
  its last 'token' and their number 'count'. If R is small there is no 'long'.
  """

  def __init__(self, params, prompts, key, model, sampling, max_concurrent, samples, first):
    self.params, self.model, self.sampling, self.samples = (
      model.unstack(params),
      model,
      sampling,
      samples,
    )
    number, length = prompts.tokens.shape
    self.num_responses = number * samples
    self.batch = min(max_concurrent, self.num_responses)
    self.group_prompts = max(self.batch // (4 * samples), 1)  # prompts
    self.group_responses = self.group_prompts * samples  # responses
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
    # Slots that a prompt takes, and that a row has when it moves to another cache. Of an
    # encoder-decoder only the start token of the response is in slots.
    self.prompt_length = 1 if model.encoder_decoder else length
    self.moved_length = self.prompt_length + self.capacities['short']

  # The state

  def init_state(self):
    """Nothing is prefilled, and all rows are free."""
    return {
      'next': jnp.int32(0),
      'group': jnp.int32(-1),
      'cache': self.empty(self.group_prompts, 0, self.prompt_length),
      'token': jnp.zeros(self.group_responses, jnp.int32),
      'ended': jnp.zeros(self.group_responses, bool),
      'tokens': jnp.full((self.no_response, self.response_length), self.sampling.pad_id, jnp.int32),
      'logprobs': jnp.zeros((self.no_response, self.response_length), jnp.float32),
      'lengths': jnp.zeros(self.no_response, jnp.int32),
    } | {
      name: {
        'cache': self.empty(self.batch, capacity + self.margin, self.moved_length),
        'response': jnp.full(self.batch, self.no_response, jnp.int32),
        'token': jnp.zeros(self.batch, jnp.int32),
        'count': jnp.zeros(self.batch, jnp.int32),
      }
      for name, capacity in self.capacities.items()
    }

  def empty(self, rows, capacity, index):
    """A cache without tokens, with room for a prompt and some more slots."""
    like = jax.ShapeDtypeStruct((rows, self.prompts.tokens.shape[1]), jnp.int32)
    prefill = functools.partial(
      self.model.prefill, response_length=capacity + int(self.model.encoder_decoder)
    )
    _, shapes = jax.eval_shape(prefill, self.params, like, like.update(dtype=bool))
    return cache_lib.empty(shapes, index)

  def active(self, s, name):
    """Which rows are at work, [B] bool."""
    return s[name]['response'] < self.no_response

  def num_active(self, s, name):
    """Of rows at work."""
    return jnp.sum(self.active(s, name)) if name in s else 0

  # What happens between steps

  def refillable(self, s):
    return (s['next'] < self.num_responses) & ~jnp.all(self.active(s, 'short'))

  def refill(self, s):
    """Hands the next response to a free row, which stays free if it has ended already."""
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
    """Reads the prompts of the next group and draws the first token of each response."""
    # Of `next` alone, which the loop around this leaves as it is, XLA would do all of it outside,
    # every time.
    group = s['group'] + 1
    prompts = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, group * self.group_prompts, self.group_prompts),
      self.prompts,
    )
    hidden, cache = self.model.prefill(
      self.params, prompts.tokens, prompts.mask, int(self.model.encoder_decoder)
    )
    hidden = jnp.repeat(hidden, self.samples, axis=0)
    responses = group * self.group_responses + jnp.arange(self.group_responses)
    s, token, ended = self.sample_token(
      s, hidden, responses, jnp.zeros(self.group_responses, jnp.int32)
    )
    return s | {'group': group, 'cache': cache, 'token': token, 'ended': ended}

  def outgrown(self, s):
    """Which rows have no room for another token in the short cache."""
    return self.active(s, 'short') & (s['short']['count'] > self.capacities['short'])

  def movable(self, s):
    """Whether a row should go to the long cache, and can; if the queue is empty all do that fit."""
    short, long = self.num_active(s, 'short'), self.num_active(s, 'long')
    merge_pools = (s['next'] >= self.num_responses) & (short > 0) & (short + long <= self.batch)
    return (jnp.any(self.outgrown(s)) | merge_pools) & (long < self.batch)

  def move(self, s):
    """Moves the row with the most tokens from the short cache to the long one."""
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

  # Steps

  def sample_token(self, s, hidden, responses, index):
    """Samples a token of each of some responses; also returns the tokens and which are the last."""
    keys = jax.vmap(jax.random.fold_in)(self.keys[responses], index)
    # Whole along 'tensor': sums along parts of the vocabulary take permutations, which on CPUs wait
    # for the devices of other data shards too, and those may have left the loop.
    logits = sharding.split_rows(self.model.unembed(self.params, hidden))
    token, logprob = sampling_lib.sample(keys, logits, self.sampling, index)
    written = {
      name: s[name].at[responses, index].set(column, mode='drop')
      for name, column in (('tokens', token), ('logprobs', logprob))
    }
    written['lengths'] = s['lengths'].at[responses].set(index + 1, mode='drop')
    ended = (index + 1 == self.response_length) | sampling_lib.ends_response(token, self.sampling)
    return s | written, token, ended

  def step(self, s, name):
    """One more token of each row in a cache."""

    def movable(cache):
      # A row that moves takes `moved_length` slots before the index along, however few of them
      # are its tokens.
      longest = jnp.max(
        jnp.where(self.active(s, name), self.prompt_length + s[name]['count'], 0),
        initial=self.moved_length,
      )
      return cache['index'] - longest >= self.margin

    pool = s[name]
    cache = jax.lax.while_loop(
      movable, lambda cache: cache_lib.shift(cache, self.margin), pool['cache']
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
    """Moves and refills rows, and makes steps until there is something to move or to refill."""
    if 'long' not in s:
      s = jax.lax.while_loop(self.refillable, self.refill, s)
      return jax.lax.while_loop(
        lambda s: self.has_work(s) & ~self.refillable(s), lambda s: self.step(s, 'short'), s
      )

    def step_long_first(s):
      # Where a row waits for a place there, or where more rows are at work.
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

  # The end

  def has_work(self, s):
    """Whether there is work for more than half of the rows of one cache."""
    remaining = self.num_active(s, self.last_pool) > (self.batch // DRAIN_DIVISORS[0])
    if self.last_pool == 'long':
      remaining |= self.num_active(s, 'short') > 0
    return (s['next'] < self.num_responses) | remaining

  def drain(self, s):
    """The last rows, at most B / 2 of one cache, in smaller batches."""
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

"""Continuous batching from the host: prompts arrive at any time, and texts are returned in pieces.

`engine.generate` samples a known batch of prompts in one program. Here requests join while others
are decoded, as in Orca (Yu et al. 2022, https://www.usenix.org/conference/osdi22/presentation/yu):

- `join` prefills one prompt and puts it into a free row of the cache. It is compiled once per
  length of padded prompts.
- `decode` decodes a few tokens of all active rows. It is compiled once.

As in `engine`, all rows share one write index: a prompt is copied to the slots before it, and the
contents move to the left when the cache is full. A token depends on the prompt, the settings and
the seed of its request alone; it is the one that `decode.generate` samples for the only prompt of a
batch. The exception is rotary positions that depend on the sequence length (models/rope.py): they
are those of the longest sequence.

Letters: B rows (requests decoded at a time), P padded prompt length, K tokens of one call of
`decode`, V vocabulary, M longest sequence.
"""

import collections
from collections.abc import Sequence
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32
import numpy as np
import transformers

from rlhf_jax import errors
from rlhf_jax import types
from rlhf_jax.data import tokenizers
from rlhf_jax.models import base
from rlhf_jax.rollout import cache as cache_lib
from rlhf_jax.rollout import detokenizer
from rlhf_jax.rollout import engine
from rlhf_jax.rollout import sampling as sampling_lib
from rlhf_jax.rollout import stops

MIN_BUCKET = 32  # shortest padded prompt; the others are twice as long each
CHUNK = 4  # K; more cost less per token, and a new request waits longer
DEFAULT_NEW_TOKENS = 128  # longest response by default, in tokens
MAX_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the jitted functions are compiled for.

  Attributes:
    model: Model of the policy; its parameters are an argument.
    rows: B.
    max_length: M, longest prompt and response together, in tokens.
    sampling: Sampling, except for the temperature and the length of a response, which each request
      chooses.
  """

  model: base.LanguageModel
  rows: int
  max_length: int
  sampling: sampling_lib.Sampling

  @property
  def buckets(self) -> list[int]:
    """Lengths of padded prompts, ascending. An encoder's states have a single length."""
    lengths = [self.max_length]
    while not self.model.encoder_decoder and lengths[0] // 2 >= MIN_BUCKET:
      lengths.insert(0, lengths[0] // 2)
    return lengths

  @property
  def first_index(self) -> int:
    """Smallest write index: the slots that `join` may copy, which hold the longest prompt."""
    return 1 if self.model.encoder_decoder else self.max_length


@struct.dataclass
class State:
  """The rows on the device.

  Attributes:
    cache: Cache of B rows and M + engine.MARGIN slots.
    active: [B] bool, whether a row has a response that is not finished.
    token: [B] int32, last token.
    count: [B] int32, number of tokens of the response.
    used: [B] int32, number of slots in use.
    limit: [B] int32, longest response.
    temperature: [B] float32; 0 selects the most likely token.
    seed: [B] uint32.
  """

  cache: PyTree
  active: Bool[Array, ' B']
  token: Int[Array, ' B']
  count: Int[Array, ' B']
  used: Int[Array, ' B']
  limit: Int[Array, ' B']
  temperature: Float[Array, ' B']
  seed: UInt32[Array, ' B']


@functools.partial(jax.jit, static_argnames='settings')
def init_state(params: PyTree, *, settings: Settings) -> State:
  """Returns the state with all rows free."""
  model, rows, slots = settings.model, settings.rows, settings.max_length + engine.MARGIN
  length = settings.max_length if model.encoder_decoder else 1
  like = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  prefill = functools.partial(
    model.prefill, response_length=slots if model.encoder_decoder else slots - length
  )
  _, shapes = jax.eval_shape(prefill, params, like, like.update(dtype=bool))
  zeros = jnp.zeros(rows, jnp.int32)
  return State(
    cache=cache_lib.empty(shapes, settings.first_index),
    active=jnp.zeros(rows, bool),
    token=zeros,
    count=zeros,
    used=zeros,
    limit=zeros,
    temperature=jnp.zeros(rows, jnp.float32),
    seed=jnp.zeros(rows, jnp.uint32),
  )


@functools.partial(jax.jit, static_argnames='settings', donate_argnames='state')
def join(
  params: PyTree, state: State, prompt: types.Prompts, request: dict[str, Array], *, settings
) -> tuple[State, Int[Array, ' 1']]:
  """Prefills a prompt, puts it into a row and samples its first token.

  Args:
    params: Parameters, from `model.unstack`.
    state: State; its buffers are reused.
    prompt: One prompt [1, P], left-padded.
    request: {'row', 'limit', 'temperature', 'seed'}, scalars.
    settings: Settings.

  Returns:
    The state and the first token.
  """
  model, row = settings.model, request['row']
  hidden, cache = model.prefill(params, prompt.tokens, prompt.mask, int(model.encoder_decoder))
  length = 1 if model.encoder_decoder else prompt.tokens.shape[1]
  settle = lambda name, value: getattr(state, name).at[row].set(value)
  state = state.replace(
    cache=cache_lib.put(state.cache, row, cache, 0, length),
    count=settle('count', 0),
    used=settle('used', 1 if model.encoder_decoder else jnp.sum(prompt.mask, dtype=jnp.int32)),
    **{name: settle(name, request[name]) for name in ('limit', 'temperature', 'seed')},
  )
  one = jax.tree.map(lambda x: x[row][None], state.replace(cache=None))
  token, ended = _sample(params, hidden, one, settings)
  return state.replace(
    token=state.token.at[row].set(token[0]),
    count=state.count.at[row].set(1),
    active=state.active.at[row].set(~ended[0]),
  ), token


@functools.partial(jax.jit, static_argnames=('settings', 'chunk'), donate_argnames='state')
def decode(
  params: PyTree, state: State, keep: Bool[Array, ' B'], *, settings, chunk
) -> tuple[State, Int[Array, 'K B'], Bool[Array, 'K B']]:
  """Decodes up to K tokens of each active row.

  Args:
    params: Parameters, from `model.unstack`.
    state: State; its buffers are reused.
    keep: [B] bool, False for rows whose request was cancelled.
    settings: Settings.
    chunk: K.

  Returns:
    The state; tokens [K, B]; and which of them were sampled [K, B].
  """

  def overfull(s):
    longest = jnp.max(jnp.where(s.active, s.used, 0), initial=settings.first_index)
    return s.cache['index'] - longest >= engine.MARGIN

  def step(carry):
    i, s, tokens, sampled = carry
    s = jax.lax.while_loop(
      overfull, lambda s: s.replace(cache=cache_lib.shift(s.cache, engine.MARGIN)), s
    )
    hidden, cache = settings.model.step(params, s.token, s.active, s.cache)
    token, ended = _sample(params, hidden, s, settings)
    tokens, sampled = tokens.at[i].set(token), sampled.at[i].set(s.active)
    s = s.replace(
      cache=cache, token=token, count=s.count + 1, used=s.used + 1, active=s.active & ~ended
    )
    return i + 1, s, tokens, sampled

  state = state.replace(active=state.active & keep)
  shape = (chunk, settings.rows)
  carry = (jnp.int32(0), state, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
  carry = jax.lax.while_loop(lambda c: (c[0] < chunk) & jnp.any(c[1].active), step, carry)
  return carry[1:]


def _sample(params, hidden, s, settings):
  """Samples the next token of each row; returns (tokens, whether their responses have ended)."""

  def key(seed, index):  # that of the first response of a batch, as in decode.generate
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), index)

  logits = settings.model.unembed(params, hidden)
  greedy = s.temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, s.temperature)[:, None]
  token, _ = sampling_lib.sample(jax.vmap(key)(s.seed, s.count), scaled, settings.sampling, s.count)
  token = jnp.where(greedy, jnp.argmax(logits, axis=-1).astype(jnp.int32), token)
  ended = sampling_lib.ends_response(token, settings.sampling) | (s.count + 1 >= s.limit)
  return token, ended


@dataclasses.dataclass(eq=False)
class Request:
  """A prompt and its response so far.

  Attributes:
    prompt: Token ids.
    max_new_tokens: Longest response.
    temperature: Temperature; 0 selects the most likely token.
    seed: Seed; the response depends on it, on the prompt and on the settings alone.
    text: Detokenizer with the tokens and the text.
    finish: None while the response is not finished; then 'end' (by the EOS, a stop token or a stop
      string), 'length' or 'cancelled'.
  """

  prompt: np.ndarray
  max_new_tokens: int
  temperature: float
  seed: int
  text: detokenizer.Detokenizer
  finish: str | None = None


class Streams:
  """Serves one set of parameters. Not thread-safe: one thread calls `submit`, `cancel`, `step`."""

  def __init__(
    self,
    model: base.LanguageModel,
    params: PyTree,
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    rows: int = 8,
    max_length: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
  ):
    """Makes the cache; nothing is compiled for the prompts yet.

    Args:
      model: Model.
      params: Its parameters.
      tokenizer: Its tokenizer.
      rows: B, number of requests decoded at a time; others wait.
      max_length: M; None for the context of the model.
      top_k: See sampling.Sampling.
      top_p: See sampling.Sampling.
      stop: Strings that end a response and are not part of its text.
    """
    max_length = min(max_length or model.max_length, model.max_length)
    sampling = stops.sampling_of(
      tokenizer, stop=stop, max_new_tokens=max_length, top_k=top_k, top_p=top_p
    )
    self.settings = Settings(model.with_max_length(max_length), rows, max_length, sampling)
    self.tokenizer, self.stop = tokenizer, tuple(stop)
    self._params = model.unstack(params)
    # On the device of the parameters from the start; otherwise the second call compiles again.
    [device] = jax.tree.leaves(params)[0].devices()
    self._state = jax.device_put(init_state(self._params, settings=self.settings), device)
    self._rows: list[Request | None] = [None] * rows
    self._waiting: collections.deque[Request] = collections.deque()

  @property
  def busy(self) -> bool:
    """Whether a request is not finished."""
    return bool(self._waiting) or any(row and not row.finish for row in self._rows)

  def submit(
    self, prompt: str, *, max_new_tokens: int | None = None, temperature: float = 1.0, seed: int = 0
  ) -> Request:
    """Adds a request, which joins as soon as a row is free.

    Args:
      prompt: Text.
      max_new_tokens: Longest response in tokens; None for a quarter of M, at most 128, or less if
        there is no room.
      temperature: Temperature of sampling; 0 takes the most likely token.
      seed: From 0 to 2^31 - 1.

    Raises:
      UserError: The prompt has no tokens, prompt and response exceed M, or a setting is invalid.
    """
    ids = tokenizers.encode(self.tokenizer, [prompt])[0]
    longest = self.settings.max_length
    errors.need(len(ids), 'the prompt is empty and this tokenizer has no BOS: write a text')
    room = longest - len(ids)
    if max_new_tokens is None:
      max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, longest // 4, room))
    errors.need(max_new_tokens >= 1, f'max_new_tokens={max_new_tokens} must be at least 1')
    errors.need(
      max_new_tokens <= room,
      f'the prompt has {len(ids)} tokens; with {max_new_tokens} new ones it exceeds the context of '
      f'{longest}: shorten it',
    )
    errors.need(temperature >= 0, f'temperature={temperature} must be 0 or positive')
    errors.need(0 <= seed < MAX_SEED, f'seed={seed} must be from 0 to 2^31 - 1')
    text = detokenizer.Detokenizer(self.tokenizer, self.stop)
    request = Request(ids, max_new_tokens, temperature, seed, text)
    self._waiting.append(request)
    return request

  def cancel(self, request: Request) -> None:
    """Ends a request, whose row becomes free; `step` does not return it any more."""
    if request.finish is None:
      request.finish = 'cancelled'
    if request in self._waiting:
      self._waiting.remove(request)

  def step(self) -> list[tuple[Request, str]]:
    """Lets waiting requests join, and decodes up to K tokens of each.

    Returns:
      (request, new text) of each request that has new text or has finished.
    """
    first = {}
    for row, request in enumerate(self._rows):
      if request is None or request.finish:
        self._rows[row] = None
        if self._waiting:
          self._rows[row] = self._waiting.popleft()
          first[row] = self._join(row, self._rows[row])
    keep = np.array([request is not None for request in self._rows])
    self._state, tokens, sampled = decode(
      self._params, self._state, keep, settings=self.settings, chunk=CHUNK
    )
    tokens, sampled, first = jax.device_get((tokens, sampled, first))
    results = []
    for row, request in enumerate(self._rows):
      if request is not None:
        new = [*first.get(row, ()), *tokens[sampled[:, row], row]]
        piece = self._advance(request, [int(token) for token in new])
        if piece or request.finish:
          results.append((request, piece))
    return results

  def _join(self, row, request):
    """Puts a request into a row; returns its first token, a device array [1]."""
    length = next(n for n in self.settings.buckets if n >= len(request.prompt))
    padding = length - len(request.prompt)
    prompt = types.Prompts(
      np.pad(request.prompt, (padding, 0), constant_values=self.settings.sampling.pad_id)[None],
      (np.arange(length) >= padding)[None],
    )
    settings = {
      'row': np.int32(row),
      'limit': np.int32(request.max_new_tokens),
      'temperature': np.float32(request.temperature),
      'seed': np.uint32(request.seed),
    }
    self._state, token = join(self._params, self._state, prompt, settings, settings=self.settings)
    return token

  def _advance(self, request, tokens):
    """Adds tokens to a request and finishes it if it has ended; returns the new text."""
    piece = request.text.push(tokens)
    if request.text.stopped or request.text.tokens[-1] in self.settings.sampling.end_tokens:
      request.finish = 'end'
    elif len(request.text.tokens) >= request.max_new_tokens:
      request.finish = 'length'
    return piece + request.text.finish() if request.finish else piece

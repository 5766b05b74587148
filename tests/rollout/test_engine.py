"""Continuous batching against the plain loop, token for token, and its invariances."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from loops import EOS
from loops import FAMILIES
from loops import family
from loops import plain
from loops import prompts
from loops import refill
from loops import same
from loops import sampling
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.models import base


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow) if name in ('gpt2', 'mistral') else name
    for name in FAMILIES
  ],
)
def test_tokens_of_the_plain_loop_in_every_family(name):
  """Two caches, sequences that outgrow the first, several moves of both, and a partial group."""
  model, params = family(name)
  settings = sampling(72, temperature=1.3)
  found = refill(params, prompts(21), jax.random.key(1), model, settings, 8)
  expected = plain(params, prompts(21), jax.random.key(1), model, settings)
  same(found, expected, atol=2e-4 if name == 't5' else 5e-5)  # T5 does not scale its attention
  lengths = np.asarray(expected.response_mask).sum(1)
  assert lengths.min() < 18 and lengths.max() > 40 and len(set(lengths)) > 5


@pytest.mark.parametrize(
  'count, max_concurrent, length', [(11, 3, 9), (5, 8, 9), (7, 1, 64), (4, 4, 1)]
)
def test_any_number_of_prompts_responses_at_a_time_and_tokens(count, max_concurrent, length):
  model, params = family('llama')
  settings = sampling(length)
  same(
    refill(params, prompts(count), jax.random.key(2), model, settings, max_concurrent),
    plain(params, prompts(count), jax.random.key(2), model, settings),
  )


def test_rows_that_all_move_before_they_have_grown():
  """The queue is empty soon after all rows have started, when all are still short."""
  model, params = family('llama')
  settings = sampling(72, temperature=1.3)
  same(
    refill(params, prompts(32), jax.random.key(1), model, settings, 16),
    plain(params, prompts(32), jax.random.key(1), model, settings),
  )


@pytest.mark.parametrize(
  'changes',
  [
    {'eos_id': None},
    {'ignore_eos': True, 'temperature': 0.0},
    {'temperature': 0.7, 'top_k': 12, 'top_p': 0.9, 'pad_id': EOS},
  ],
)
def test_ways_of_sampling(changes):
  model, params = family('llama')
  settings = sampling(20, **changes)
  same(
    refill(params, prompts(9), jax.random.key(3), model, settings, 4),
    plain(params, prompts(9), jax.random.key(3), model, settings),
  )


def biased(model, params, eos):
  """Returns the model with `eos` added to the logit of the EOS."""

  @dataclasses.dataclass(frozen=True)
  class Biased(type(model)):
    def unembed(self, params, hidden):
      return super().unembed(params, hidden).at[..., EOS].add(eos)

  return Biased(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)}), params


@pytest.mark.parametrize('eos, expected', [(1e4, 1), (-1e4, 70)])
def test_all_end_at_once_or_never(eos, expected):
  model, params = biased(*family('llama'), eos)
  found = refill(params, prompts(10), jax.random.key(4), model, sampling(70), 4)
  same(found, plain(params, prompts(10), jax.random.key(4), model, sampling(70)))
  np.testing.assert_array_equal(np.asarray(found.response_mask).sum(1), expected)


@pytest.mark.parametrize('count, samples, max_concurrent', [(5, 3, 4), (9, 2, 16), (2, 5, 1)])
def test_samples_of_a_prompt_are_those_of_the_prompt_repeated(count, samples, max_concurrent):
  model, params = family('gpt2')
  repeated = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts(count))
  expected = plain(params, repeated, jax.random.key(6), model, sampling(20))
  same(
    plain(params, prompts(count), jax.random.key(6), model, sampling(20), samples=samples), expected
  )
  same(
    refill(params, prompts(count), jax.random.key(6), model, sampling(20), max_concurrent, samples),
    expected,
  )
  assert len(np.unique(np.asarray(expected.tokens), axis=0)) > count


def test_samples_of_an_encoder_decoder():
  model, params = family('t5')
  repeated = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), prompts(4))
  expected = plain(params, repeated, jax.random.key(6), model, sampling(20))
  same(plain(params, prompts(4), jax.random.key(6), model, sampling(20), samples=3), expected)
  same(refill(params, prompts(4), jax.random.key(6), model, sampling(20), 5, 3), expected)


def test_batches_of_the_plain_loop_go_on_with_the_number_of_their_first_row():
  model, params = family('llama')
  whole = plain(params, prompts(10), jax.random.key(1), model, sampling(20))
  for first in (0, 4, 8):
    part = jax.tree.map(lambda x: x[first : first + 4], prompts(10))
    same(
      plain(params, part, jax.random.key(1), model, sampling(20), first=first),
      jax.tree.map(lambda x: x[first : first + 4], whole),
    )


def test_contents_of_padding_change_nothing():
  model, params = family('llama')
  clean, dirty = (
    refill(params, prompts(9, garbage=garbage), jax.random.key(1), model, sampling(20), 4)
    for garbage in (False, True)
  )
  np.testing.assert_array_equal(clean.tokens[:, 7:], dirty.tokens[:, 7:])
  np.testing.assert_array_equal(clean.logprobs, dirty.logprobs)


def test_unrolled_layers_have_separate_caches():
  model, params = family('llama', unroll=2)
  same(
    refill(params, prompts(9), jax.random.key(1), model, sampling(70), 4),
    plain(params, prompts(9), jax.random.key(1), *family('llama')[:1], sampling(70)),
  )


@pytest.mark.parametrize('name', FAMILIES)
def test_on_gpus_matrices_are_cast_once_and_layers_apart(monkeypatch, name):
  model, params = family(name, dtype='bfloat16')
  monkeypatch.setattr(sharding, 'platform', lambda: 'gpu')
  ready = model.unstack(params)
  assert name == 't5' or isinstance(ready['blocks'], tuple)
  dtypes = {path: leaf.dtype for path, leaf in sharding.paths(ready).items()}
  small = {path for path, dtype in dtypes.items() if dtype == jnp.bfloat16}
  assert small == {
    path for path in dtypes if path.endswith(('kernel', 'embedding')) and 'distances' not in path
  }
  given = prompts(4)

  @jax.jit
  def run(params):
    hidden, cache = model.prefill(params, given.tokens, given.mask, 3)
    after, _ = model.step(params, given.tokens[:, -1], given.mask[:, -1], cache)
    return [model.unembed(params, state) for state in (hidden, after)]

  for found, expected in zip(run(ready), run(params), strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(
  'generate', [plain, functools.partial(refill, max_concurrent=4)], ids=['plain', 'refill']
)
def test_on_gpus_layers_have_separate_caches(monkeypatch, generate):
  model, params = family('llama')
  expected = plain(params, prompts(9), jax.random.key(1), model, sampling(70))
  monkeypatch.setattr(sharding, 'platform', lambda: 'gpu')
  jax.clear_caches()
  same(
    generate(params, prompts(9), jax.random.key(1), model=model, sampling=sampling(70)), expected
  )
  jax.clear_caches()


def test_other_prompts_do_not_compile_again(compiled):
  model, params = family('gpt2')
  refill(params, prompts(9, seed=1), jax.random.key(1), model, sampling(20), 4)
  before = len(compiled)
  refill(params, prompts(9, seed=2), jax.random.key(2), model, sampling(20), 4)
  assert len(compiled) == before


def test_prompts_are_read_once_and_rows_are_kept_busy():
  """Counts the calls of a model whose prompts determine the length of each response."""
  calls = []

  @dataclasses.dataclass(frozen=True)
  class Counting(base.LanguageModel):
    """A language model that counts down from the prompt's last token to the EOS, 0."""

    family: str = 'counting'
    config: None = None
    shapes = summary = response_states = None  # sampling does not call them

    def unstack(self, params):
      return params

    def prefill(self, params, tokens, mask, response_length):
      jax.debug.callback(lambda: calls.append('prefill'))
      batch, length = tokens.shape
      segments = jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, response_length)))
      return tokens[:, -1:].astype(jnp.float32), {'segments': segments, 'index': jnp.int32(length)}

    def step(self, params, token, alive, cache):
      jax.debug.callback(lambda alive: calls.append(int(alive.sum())), alive)
      segments = jax.lax.dynamic_update_slice(
        cache['segments'], alive[:, None].astype(jnp.int32), (0, cache['index'])
      )
      return token[:, None].astype(jnp.float32), {'segments': segments, 'index': cache['index'] + 1}

    def unembed(self, params, hidden):
      return jax.nn.one_hot(hidden[:, 0].astype(jnp.int32) - 1, 100) * 1e4

  lengths = np.array([1, 40, 2, 3, 1, 5, 8, 60, 2, 2, 9, 4, 30, 7, 1, 6])
  given = types.Prompts(jnp.asarray(lengths)[:, None], jnp.ones((16, 1), bool))
  found = refill({}, given, jax.random.key(0), Counting(), sampling(64, eos_id=0, pad_id=99), 4)
  jax.effects_barrier()
  np.testing.assert_array_equal(np.asarray(found.response_mask).sum(1), lengths)
  for row, length in zip(np.asarray(found.tokens)[:, 1:], lengths):
    np.testing.assert_array_equal(row[:length], np.arange(length)[::-1])
  steps = [call for call in calls if call != 'prefill']
  assert calls.count('prefill') == 16  # groups of one
  assert sum(steps) == (lengths - 1).sum()  # each token is read once, none after the end
  assert len(steps) < 90  # four plain batches take 39 + 59 + 8 + 29 = 135

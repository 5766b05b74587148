"""The decode loop on a Markov chain with known probabilities, and on a small Llama."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import lengths as lengths_lib
from rlhf_jax import logprobs as logprobs_lib
from rlhf_jax import models
from rlhf_jax import types
from rlhf_jax.models import base
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import sampling as sampling_lib
from rlhf_jax.rollout import stops
import tiny

EOS, PAD = 3, 0
# Row i: probabilities of the token after token i. Token 3 is the EOS.
CHAIN = np.array(
  [[0.1, 0.4, 0.3, 0.2], [0.3, 0.1, 0.1, 0.5], [0.25, 0.25, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]]
)
calls = []


@dataclasses.dataclass(frozen=True)
class Markov(base.LanguageModel):
  """A language model that depends on the last token only, and counts its calls."""

  family: str = 'markov'
  config: None = None
  shapes = summary = response_states = None  # decoding does not call them

  def unstack(self, params):
    return params

  def prefill(self, params, tokens, mask, response_length):
    return self.step(
      params, tokens[:, -1], mask[:, -1], {'seen': jnp.zeros((len(tokens), response_length))}
    )

  def step(self, params, token, alive, cache):
    jax.debug.callback(lambda: calls.append(1))
    return token[:, None].astype(jnp.float32), cache

  def unembed(self, params, hidden):
    return params[hidden[..., 0].astype(jnp.int32)]


def ragged(lengths, width, vocab, seed=0, garbage=False):
  """Returns left-padded prompts; padding holds PAD or random ids."""
  rng = np.random.default_rng(seed)
  mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
  tokens = np.full(mask.shape, PAD, np.int32)
  tokens[mask] = np.concatenate(
    [np.random.default_rng([seed, i]).integers(4, vocab, n) for i, n in enumerate(lengths)]
  )
  if garbage:
    tokens = np.where(mask, tokens, rng.integers(0, vocab, mask.shape)).astype(np.int32)
  return types.Prompts(jnp.asarray(tokens), jnp.asarray(mask))


@functools.partial(jax.jit, static_argnames=('model', 'sampling'))
def generate(params, prompts, key, model, sampling):
  return decode.generate(params, prompts, key, model=model, sampling=sampling)


@pytest.fixture(scope='module')
def llama():
  model = models.create(tiny.LLAMA | {'vocab_size': 24, 'initializer_range': 0.4})
  return model, model.init(jax.random.key(5))


def chain(batch, **settings):
  """Returns responses of the Markov chain to the prompt [2]."""
  prompts = types.Prompts(jnp.full((batch, 1), 2), jnp.ones((batch, 1), bool))
  return generate(
    jnp.log(CHAIN),
    prompts,
    jax.random.key(0),
    Markov(),
    sampling_lib.Sampling(pad_id=PAD, **settings),
  )


def test_frequencies_of_whole_responses_are_within_four_sigma():
  """Every response of up to three tokens, with EOS and padding."""
  batch = 20_000
  found = chain(batch, max_new_tokens=3, eos_id=EOS)
  responses = np.asarray(found.tokens[:, 1:])
  exact = {}
  for a in range(4):
    for b in range(4) if a != EOS else [None]:
      for c in range(4) if b not in (EOS, None) else [None]:
        row = [t for t in (a, b, c) if t is not None]
        p = np.prod([CHAIN[i, j] for i, j in zip([2] + row, row)])
        exact[tuple(row + [PAD] * (3 - len(row)))] = (
          exact.get(tuple(row + [PAD] * (3 - len(row))), 0.0) + p
        )
  assert abs(sum(exact.values()) - 1) < 1e-9
  rows, counts = np.unique(responses, axis=0, return_counts=True)
  counts = dict(zip(map(tuple, rows.tolist()), counts))
  assert counts.keys() <= exact.keys()
  for row, p in exact.items():
    assert abs(counts.get(row, 0) - batch * p) <= 4 * np.sqrt(batch * p * (1 - p)), row


def test_masks_and_logprobs_end_at_the_eos():
  found = chain(500, max_new_tokens=5, eos_id=EOS)
  for tokens, mask, whole, logprobs in zip(
    *map(np.asarray, (found.tokens[:, 1:], found.response_mask, found.mask, found.logprobs))
  ):
    ends = np.flatnonzero(tokens == EOS)
    length = ends[0] + 1 if len(ends) else 5
    np.testing.assert_array_equal(mask, np.arange(5) < length)
    np.testing.assert_array_equal(whole, np.append(True, mask))
    assert (tokens[length:] == PAD).all() and (logprobs[length:] == 0).all()
    before = np.append(2, tokens[: length - 1])
    np.testing.assert_allclose(logprobs[:length], np.log(CHAIN[before, tokens[:length]]), atol=1e-6)


def test_padding_that_is_the_eos_does_not_eat_it():
  found = generate(
    jnp.log(CHAIN),
    types.Prompts(jnp.full((200, 1), 2), jnp.ones((200, 1), bool)),
    jax.random.key(0),
    Markov(),
    sampling_lib.Sampling(max_new_tokens=4, eos_id=EOS, pad_id=EOS),
  )
  ended = np.asarray((found.tokens[:, 1:] == EOS) & found.response_mask)
  assert (ended.sum(1) <= 1).all() and ended.any()
  short = np.asarray(found.response_mask).sum(1) < 4
  assert ended[short].any(1).all()


def test_ignoring_the_eos_goes_on_and_truncation_hides_the_rest():
  raw = chain(300, max_new_tokens=5, eos_id=EOS, ignore_eos=True)
  assert np.asarray(raw.response_mask).all()
  stopped = chain(300, max_new_tokens=5, eos_id=EOS)
  seen, has_eos = stops.truncate(raw, tokens=(EOS,), pad_id=PAD)
  for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(stopped)):
    np.testing.assert_array_equal(a, b)  # the same keys draw the same tokens until the end
  np.testing.assert_array_equal(has_eos, (np.asarray(stopped.tokens[:, 1:]) == EOS).any(1))


@pytest.mark.parametrize('ends_after, expected', [(1, 1), (3, 3), (9, 6)])
def test_the_loop_ends_with_the_last_row(ends_after, expected):
  """The chain counts up to the EOS; the model is called once per sampled token."""
  step = np.full((10, 10), -np.inf)
  step[np.arange(9), np.arange(1, 10)] = 0.0
  start = jnp.array([[9 - ends_after], [8]])  # the second row ends at once
  del calls[:]
  found = generate(
    jnp.asarray(step),
    types.Prompts(start, jnp.ones((2, 1), bool)),
    jax.random.key(0),
    Markov(),
    sampling_lib.Sampling(max_new_tokens=6, eos_id=9),
  )
  jax.effects_barrier()
  assert len(calls) == expected
  np.testing.assert_array_equal(np.asarray(found.response_mask).sum(1), [expected, 1])


LENGTHS = (6, 1, 3, 5, 2)
NUCLEUS = sampling_lib.Sampling(
  max_new_tokens=8, temperature=0.7, top_k=12, top_p=0.9, eos_id=EOS, pad_id=PAD
)
PLAIN = dataclasses.replace(NUCLEUS, top_k=0, top_p=1.0)


def full_logits(model, params, rollout):
  """Returns the logits that predict the response, from one forward pass without a cache."""
  hidden, _ = model.forward(
    params, rollout.tokens, types.positions_from_mask(rollout.mask), rollout.mask
  )
  response_length = rollout.response_mask.shape[1]
  return hidden[:, -response_length - 1 : -1], model.unembed(
    params, hidden[:, -response_length - 1 : -1]
  )


@pytest.mark.parametrize('sampling', [PLAIN, NUCLEUS], ids=['plain', 'nucleus'])
def test_logprobs_are_those_of_the_filtered_distribution(llama, sampling):
  """Those recorded while decoding equal those of a forward pass over all tokens."""
  model, params = llama
  found = generate(params, ragged(LENGTHS, 6, 24), jax.random.key(3), model, sampling)
  mask = np.asarray(found.response_mask)
  assert 0 < mask.sum() < mask.size  # some responses end early
  hidden, logits = full_logits(model, params, found)
  filtered = jax.vmap(
    functools.partial(
      sampling_lib.filter_logits, temperature=0.7, top_k=sampling.top_k, top_p=sampling.top_p
    )
  )(logits)
  exact = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(filtered)), np.asarray(found.tokens[:, 6:, None]), axis=-1
  )[..., 0]
  np.testing.assert_allclose(np.asarray(found.logprobs)[mask], exact[mask], rtol=0, atol=1e-5)
  forward, _ = logprobs_lib.token_logprobs(
    functools.partial(model.unembed, params), hidden, found.tokens[:, 6:], temperature=0.7
  )
  gap = np.abs(np.asarray(forward) - np.asarray(found.logprobs))[mask].max()
  assert gap < 1e-5 if sampling is PLAIN else gap > 0.05


@pytest.mark.parametrize(
  'rope', [None, {'rope_type': 'dynamic', 'factor': 4.0}], ids=['rope', 'dynamic']
)
@pytest.mark.parametrize('unroll', [1, 2])
def test_a_cache_that_grows_is_a_forward_pass_over_all_tokens(unroll, rope):
  """With three stages, some rows end in the first and some in the last."""
  lengths = LENGTHS + LENGTHS
  fields = tiny.LLAMA | {'vocab_size': 24, 'initializer_range': 0.4, 'max_position_embeddings': 16}
  model = models.create(fields | ({'rope_scaling': rope} if rope else {}), unroll=unroll)
  params = model.init(jax.random.key(5))
  sampling = sampling_lib.Sampling(max_new_tokens=50, eos_id=EOS, pad_id=PAD)
  assert lengths_lib.bucket_lengths(50, decode.STAGES) == [16, 33, 50]
  found = generate(params, ragged(lengths, 6, 24), jax.random.key(5), model, sampling)
  mask = np.asarray(found.response_mask)
  assert mask.sum(1).min() < 16 and mask.sum(1).max() > 33
  hidden, _ = full_logits(model, params, found)
  forward, _ = logprobs_lib.token_logprobs(
    functools.partial(model.unembed, params), hidden, found.tokens[:, 6:]
  )
  np.testing.assert_allclose(
    np.asarray(found.logprobs)[mask], np.asarray(forward)[mask], rtol=0, atol=5e-5
  )


def test_greedy_is_the_argmax_of_a_loop_without_a_cache(llama):
  model, params = llama
  greedy = sampling_lib.Sampling(max_new_tokens=8, temperature=0.0, eos_id=None)
  prompts = ragged(LENGTHS, 6, 24)
  found = np.asarray(generate(params, prompts, jax.random.key(0), model, greedy).tokens)

  @jax.jit
  def next_token(tokens, length):
    mask = jnp.arange(14)[None] < length
    hidden, _ = model.forward(params, tokens, types.positions_from_mask(mask), mask)
    return jnp.argmax(model.unembed(params, hidden[0, length - 1]))

  for row, length in enumerate(LENGTHS):
    tokens = np.asarray(prompts.tokens)[row, 6 - length :].tolist()
    for _ in range(8):
      padded = np.array([tokens + [0] * (14 - len(tokens))])
      tokens.append(int(next_token(padded, len(tokens))))
    np.testing.assert_array_equal(found[row, 6 - length :], tokens)


def test_left_padding_changes_nothing(llama):
  model, params = llama
  narrow = generate(params, ragged(LENGTHS, 6, 24), jax.random.key(1), model, PLAIN)
  wide = generate(params, ragged(LENGTHS, 11, 24), jax.random.key(1), model, PLAIN)
  np.testing.assert_array_equal(narrow.tokens[:, 6:], wide.tokens[:, 11:])
  np.testing.assert_array_equal(narrow.response_mask, wide.response_mask)
  np.testing.assert_allclose(narrow.logprobs, wide.logprobs, rtol=0, atol=1e-5)


def test_contents_of_padding_change_nothing(llama):
  model, params = llama
  clean = generate(params, ragged(LENGTHS, 6, 24), jax.random.key(1), model, PLAIN)
  dirty = generate(params, ragged(LENGTHS, 6, 24, garbage=True), jax.random.key(1), model, PLAIN)
  np.testing.assert_array_equal(clean.tokens[:, 6:], dirty.tokens[:, 6:])
  np.testing.assert_array_equal(clean.logprobs, dirty.logprobs)


def test_a_row_does_not_depend_on_its_neighbours(llama):
  """The same key and row index, with other prompts in the batch."""
  model, params = llama
  prompts, others = ragged(LENGTHS, 6, 24), ragged((1, 6, 6, 4, 3), 6, 24, seed=9)
  together = generate(params, prompts, jax.random.key(1), model, PLAIN)
  for row in range(len(LENGTHS)):
    mixed = jax.tree.map(lambda a, b: b.at[row].set(a[row]), prompts, others)
    found = generate(params, mixed, jax.random.key(1), model, PLAIN)
    np.testing.assert_array_equal(found.tokens[row], together.tokens[row])
    np.testing.assert_allclose(found.logprobs[row], together.logprobs[row], atol=1e-6)


def test_equal_prompts_and_other_keys_give_other_responses(llama):
  model, params = llama
  prompts = jax.tree.map(lambda x: jnp.repeat(x[:1], 4, axis=0), ragged((6,), 6, 24))
  first = np.asarray(generate(params, prompts, jax.random.key(1), model, PLAIN).tokens)
  second = np.asarray(generate(params, prompts, jax.random.key(2), model, PLAIN).tokens)
  assert len(np.unique(np.concatenate([first, second]), axis=0)) > 6


def test_without_jit_it_is_the_same(llama):
  model, params = llama
  prompts = ragged(LENGTHS, 6, 24)
  plain = decode.generate(params, prompts, jax.random.key(1), model=model, sampling=NUCLEUS)
  jitted = generate(params, prompts, jax.random.key(1), model, NUCLEUS)
  np.testing.assert_array_equal(plain.tokens, jitted.tokens)
  np.testing.assert_allclose(plain.logprobs, jitted.logprobs, rtol=0, atol=1e-5)

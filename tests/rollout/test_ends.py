"""min_new_tokens and stop tokens: which tokens are sampled, their logprobs, and `ended`."""

import dataclasses

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import test_decode
import test_sampling

from rlhf_jax import errors
from rlhf_jax import types
from rlhf_jax.rollout import sampling as sampling_lib

VOCAB, EOS, PAD = loops.VOCAB, loops.EOS, loops.PAD
CASES = {
  'eos late': {'min_new_tokens': 5},
  'stop tokens': {'stop_tokens': (4, 9, 17)},
  'both': {'min_new_tokens': 3, 'stop_tokens': (4, 9, 17)},
  'both filtered': {'min_new_tokens': 3, 'stop_tokens': (4, 9, 17), 'top_k': 9, 'top_p': 0.9},
  'no eos': {'eos_id': None, 'min_new_tokens': 2, 'stop_tokens': (4, 9, 17)},
  'padding is a stop token': {'min_new_tokens': 4, 'stop_tokens': (PAD,), 'pad_id': PAD},
  'ignored': {'min_new_tokens': 3, 'stop_tokens': (4,), 'ignore_eos': True},
}


@pytest.mark.parametrize('changes', CASES.values(), ids=CASES)
def test_responses_and_logprobs_against_loops(changes):
  """Logits from a forward pass; end tokens are excluded before top-k and top-p."""
  model, params = loops.family('llama')
  settings = loops.sampling(12, temperature=0.8, **changes)
  ends = {settings.eos_id, *settings.stop_tokens} - {None}
  found = loops.plain(params, loops.prompts(24), jax.random.key(1), model, settings)
  _, logits = test_decode.full_logits(model, params, found)
  probs = np.asarray(jax.nn.softmax(logits), np.float64)
  tokens, lengths = np.asarray(found.tokens)[:, -12:], []
  for row in range(24):
    length = 0
    for t in range(12):
      early = t < settings.min_new_tokens
      allowed = np.array([0.0 if early and token in ends else 1.0 for token in range(VOCAB)])
      target = test_sampling.expected(
        probs[row, t] * allowed / np.sum(probs[row, t] * allowed),
        temperature=0.8,
        top_k=settings.top_k,
        top_p=settings.top_p,
      )
      token = tokens[row, t]
      np.testing.assert_allclose(found.logprobs[row, t], np.log(target[token]), rtol=0, atol=2e-5)
      length += 1
      if token in ends:
        assert not early
        if not settings.ignore_eos:
          break
    np.testing.assert_array_equal(found.response_mask[row], np.arange(12) < length)
    assert (tokens[row, length:] == settings.pad_id).all()
    ended = any(token in ends for token in tokens[row, :length])
    assert sampling_lib.ended(found, settings)[row] == ended
    lengths.append(length)
  if not settings.ignore_eos:
    assert (
      len(set(lengths)) > 3 and settings.min_new_tokens < min(lengths) < 7 and max(lengths) == 12
    )


@pytest.mark.parametrize('changes', CASES.values(), ids=CASES)
def test_continuous_batching_ends_them_the_same(changes):
  model, params = loops.family('llama')
  settings = loops.sampling(12, temperature=0.8, **changes)
  loops.same(
    loops.refill(params, loops.prompts(14), jax.random.key(1), model, settings, 4),
    loops.plain(params, loops.prompts(14), jax.random.key(1), model, settings),
  )


def test_frequencies_of_first_tokens_are_within_four_sigma():
  """A Markov chain whose stop token and EOS are first forbidden, then likely."""
  batch, row = 20_000, test_decode.CHAIN[2]
  found = test_decode.chain(batch, max_new_tokens=2, eos_id=3, stop_tokens=(1,), min_new_tokens=1)
  first, second = np.asarray(found.tokens[:, 1:]).T
  assert np.asarray(found.response_mask).all()
  start = np.array([row[0], 0, row[2], 0]) / (row[0] + row[2])
  exact = np.outer(start, np.ones(4)) * test_decode.CHAIN
  counts = np.zeros((4, 4))
  np.add.at(counts, (first, second), 1)
  assert (np.abs(counts - batch * exact) <= 4 * np.sqrt(batch * exact * (1 - exact))).all()
  np.testing.assert_allclose(found.logprobs[:, 0], np.log(start[first]), atol=1e-6)
  np.testing.assert_allclose(
    found.logprobs[:, 1], np.log(test_decode.CHAIN[first, second]), atol=1e-6
  )


def test_greedy_takes_the_likeliest_that_is_allowed():
  logits = jnp.array([[0.0, 2.0, 5.0, 3.0]] * 3)
  settings = sampling_lib.Sampling(
    max_new_tokens=9, temperature=0.0, eos_id=2, stop_tokens=(3,), min_new_tokens=4
  )
  tokens, _ = sampling_lib.sample(
    jax.random.split(jax.random.key(0), 3), logits, settings, jnp.array([3, 4, 0])
  )
  np.testing.assert_array_equal(tokens, [1, 2, 1])


@pytest.mark.parametrize('seed', range(5))
def test_ended_against_loops(seed):
  """End tokens in the prompt or in padding do not count."""
  rng = np.random.default_rng(seed)
  tokens, mask = rng.integers(0, 5, (30, 9)), rng.random((30, 6)) < 0.6
  rollout = types.Rollout(
    tokens, np.concatenate([np.ones((30, 3), bool), mask], axis=1), mask, mask * -1.0
  )
  for eos, stops in ((1, ()), (1, (2, 4)), (None, (0,))):
    settings = sampling_lib.Sampling(max_new_tokens=6, eos_id=eos, stop_tokens=stops)
    expected = [
      any(mask[b, t] and tokens[b, 3 + t] in (eos, *stops) for t in range(6)) for b in range(30)
    ]
    np.testing.assert_array_equal(sampling_lib.ended(rollout, settings), expected)
    np.testing.assert_array_equal(
      jax.jit(sampling_lib.ended, static_argnums=1)(rollout, settings), expected
    )
  assert sampling_lib.ended(
    rollout, sampling_lib.Sampling(max_new_tokens=6)
  ).all()  # there are no end tokens


def test_settings_are_checked_and_hashable():
  settings = sampling_lib.Sampling(max_new_tokens=4, eos_id=3, stop_tokens=(5, 3))
  assert settings.end_tokens == (3, 5) and hash(settings) == hash(dataclasses.replace(settings))
  with pytest.raises(errors.UserError, match='min_new_tokens=5 exceeds max_new_tokens=4'):
    dataclasses.replace(settings, min_new_tokens=5)

"""Sampled frequencies and recorded logprobs against distributions computed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rollout import sampling

DRAWS = 20_000
PROBS = np.array([0.30, 0.02, 0.18, 0.10, 0.25, 0.05, 0.08, 0.02])
CASES = {
  'plain': {},
  'temperature 0.5': {'temperature': 0.5},
  'temperature 2': {'temperature': 2.0},
  'top-k 3': {'top_k': 3},
  'top-p 0.7': {'top_p': 0.7},
  'all three': {'temperature': 0.7, 'top_k': 5, 'top_p': 0.8},
}


def expected(probs, *, temperature=1.0, top_k=0, top_p=1.0):
  """Returns the distribution to sample from, by sorting the probabilities."""
  probs = probs ** (1 / temperature)
  probs = probs / probs.sum()
  order = np.argsort(-probs, kind='stable')
  keep = order[: top_k or len(probs)]
  filtered = np.zeros_like(probs)
  filtered[keep] = probs[keep] / probs[keep].sum()
  kept, before = np.zeros_like(probs), 0.0
  for token in keep:
    if before >= top_p:
      break
    kept[token], before = filtered[token], before + filtered[token]
  return kept / kept.sum()


def draw(logits, **settings):
  keys = jax.random.split(jax.random.key(3), len(logits))
  return sampling.sample(keys, logits, sampling.Sampling(max_new_tokens=1, **settings))


@pytest.mark.parametrize('settings', CASES.values(), ids=CASES)
def test_frequencies_are_within_four_sigma(settings):
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBS, jnp.float32)) + 3.0, (DRAWS, 8))
  tokens, logprobs = draw(logits, **settings)
  target = expected(PROBS, **settings)
  counts = np.bincount(tokens, minlength=8)
  assert (counts[target == 0] == 0).all()
  sigma = np.sqrt(DRAWS * target * (1 - target))
  assert (np.abs(counts - DRAWS * target) <= 4 * sigma).all(), counts / DRAWS - target
  with np.errstate(divide='ignore'):
    np.testing.assert_allclose(logprobs, np.log(target)[tokens], rtol=0, atol=2e-6)


def test_a_vocabulary_of_several_blocks_is_drawn_from_evenly():
  """A chi-squared test over 300 tokens, a third of which is excluded; the last block is partial."""
  rng = np.random.default_rng(0)
  target = rng.dirichlet(np.full(300, 0.7))
  target[rng.permutation(300)[:100]] = 0
  target /= target.sum()
  draws = 100_000
  with np.errstate(divide='ignore'):
    logits = jnp.asarray(np.log(target) - 2.0, jnp.float32)
    tokens, logprobs = draw(jnp.broadcast_to(logits, (draws, 300)))
    np.testing.assert_allclose(logprobs, np.log(target)[tokens], rtol=1e-5, atol=2e-6)
  counts = np.bincount(tokens, minlength=300)
  assert (counts[target == 0] == 0).all() and len(counts) == 300
  common = target * draws >= 5
  chi = np.sum(np.square(counts - draws * target)[common] / (draws * target[common]))
  degrees = common.sum() - 1
  assert abs(chi - degrees) < 4 * np.sqrt(2 * degrees)


def test_the_largest_uniform_draws_the_last_token_that_can_be_drawn(monkeypatch):
  """In some rows its cumulative weight is an ulp below the sum and exceeds nothing."""
  rows, vocab, block = 64, 50257, 128
  rng = np.random.default_rng(0)
  logits, lasts = np.full((rows, vocab), -np.inf, np.float32), []
  for row in range(rows):
    # One token in each of some blocks, without the first and the last block.
    tokens = block * np.arange(1, rng.integers(200, 391)) + rng.integers(0, block)
    logits[row, tokens] = np.log(rng.uniform(0.5, 1.5, len(tokens)))
    lasts.append(tokens[-1])
  largest = np.nextafter(np.float32(1), np.float32(0))
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.full(shape, largest))
  tokens, logprobs = draw(jnp.asarray(logits))
  np.testing.assert_array_equal(tokens, lasts)
  weights = np.exp(logits.astype(np.float64))
  wanted = np.log(weights[np.arange(rows), lasts] / weights.sum(1))
  np.testing.assert_allclose(logprobs, wanted, rtol=1e-5)


@pytest.mark.parametrize('seed', range(20))
def test_filters_against_loops(seed):
  rng = np.random.default_rng(seed)
  probs = rng.dirichlet(np.full(13, 0.5), size=6)
  settings = {
    'temperature': float(rng.uniform(0.3, 2)),
    'top_k': int(rng.integers(0, 16)),
    'top_p': float(rng.uniform(0.1, 1)),
  }
  logits = jnp.log(jnp.asarray(probs, jnp.float32))
  found = jax.nn.softmax(sampling.filter_logits(logits, **settings))
  settings['top_k'] = min(settings['top_k'], 13)
  np.testing.assert_allclose(found, [expected(row, **settings) for row in probs], atol=1e-5)


def test_the_likeliest_always_stays():
  logits = jnp.array([[0.0, 2.0, 1.0]])
  for settings in ({'top_k': 1, 'top_p': 1.0}, {'top_k': 0, 'top_p': 1e-6}):
    found = sampling.filter_logits(logits, temperature=1.0, **settings)
    np.testing.assert_array_equal(found, [[-np.inf, 2.0, -np.inf]])


def test_greedy_takes_the_first_of_the_likeliest():
  logits = jnp.array([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0]])
  tokens, logprobs = draw(logits, temperature=0.0)
  np.testing.assert_array_equal(tokens, [1, 0])
  np.testing.assert_array_equal(logprobs, [0.0, 0.0])
  assert tokens.dtype == jnp.int32


def test_a_row_depends_on_its_own_key_and_logits_alone():
  logits = jax.random.normal(jax.random.key(0), (6, 9))
  keys = jax.random.split(jax.random.key(1), 6)
  settings = sampling.Sampling(max_new_tokens=1, temperature=0.8, top_k=6, top_p=0.9)
  together = sampling.sample(keys, logits, settings)
  for row in range(6):
    alone = sampling.sample(keys[row : row + 1], logits[row : row + 1], settings)
    np.testing.assert_array_equal(alone[0], together[0][row : row + 1])
    np.testing.assert_allclose(alone[1], together[1][row : row + 1], atol=1e-6)


def test_weight_zero_is_never_drawn_however_sums_are_rounded():
  """Rounded cumulative sums can increase at weight 0; uniforms that fall on such a step."""
  rng = np.random.default_rng(0)
  weights = rng.uniform(0, 1, (2000, 393)) * (rng.uniform(size=(2000, 393)) < 0.3)
  weights = jnp.asarray(weights, jnp.float32)
  sums = np.asarray(jnp.cumsum(weights, axis=-1))
  before = np.maximum.accumulate(sums, axis=1)
  step = (sums[:, 1:] - before[:, :-1]) * (weights[:, 1:] == 0)
  place = step[:, :350].argmax(axis=1)  # with many weights after it
  uniform = np.take_along_axis(before, place[:, None], axis=1)[:, 0] / sums[:, -1]
  for near in (np.nextafter(uniform, np.float32(0)), uniform, np.nextafter(uniform, np.float32(1))):
    found, _ = sampling._first_above(jnp.asarray(near), weights)
    assert (np.take_along_axis(np.asarray(weights), np.asarray(found)[:, None], axis=1) > 0).all()

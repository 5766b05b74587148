"""Masks of a masking policy: RL4LMs' own, what the sampler records, log-probabilities over them."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from loops import EOS
from loops import family
from loops import plain
from loops import prompts
from loops import refill
from loops import same
from loops import sampling
from loops import VOCAB
import numpy as np
import pytest

from rlhf_jax import logprobs
from rlhf_jax.rollout import masking

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'rl4lms.npz')
SPECIAL = (0, 1, 2, 299)


@pytest.mark.parametrize('kind', ['CasualLM', 'Seq2SeqLM'])
@pytest.mark.parametrize('top_p', [0.5, 0.9, 1.0])
@pytest.mark.parametrize('kept', [1, 100])
def test_masks_of_rl4lms(kind, top_p, kept):
  """Its class for encoder-decoders keeps one token more, unless it keeps one."""
  found = masking.allowed_tokens(
    jnp.asarray(GOLDEN['mask/logits']),
    top_p=top_p,
    min_tokens=kept + (kind == 'Seq2SeqLM' and kept > 1),
    always=SPECIAL,
  )
  np.testing.assert_array_equal(found, GOLDEN[f'mask/{kind}/{top_p}/{kept}'])


def allowed_by_loop(logits, top_p, min_tokens, always):
  """The allowed tokens [V] of one position: from the most likely on, and all that tie."""
  probs = np.exp(np.float64(logits) - np.max(logits))
  probs /= probs.sum()
  allowed, before = np.zeros(len(logits), bool), 0.0
  for rank, token in enumerate(np.argsort(-logits, kind='stable')):
    if rank < min_tokens or before < top_p:
      allowed |= logits >= logits[token]
    before += probs[token]
  allowed[list(always)] = True
  return allowed


def test_masks_by_loop_with_ties():
  rng = np.random.default_rng(1)
  logits = rng.integers(-3, 4, (40, 11)).astype(np.float32)
  for top_p, least in ((0.3, 1), (0.8, 4), (0.8, 20)):
    found = masking.allowed_tokens(
      jnp.asarray(logits), top_p=top_p, min_tokens=least, always=(2, 10)
    )
    expected = [allowed_by_loop(row, top_p, least, (2, 10)) for row in logits]
    np.testing.assert_array_equal(found, expected)
  assert 0 < np.mean(expected)


def test_masked_distribution_of_rl4lms():
  """With logits as states. Its log_prob is not divided by the mass Z of the allowed tokens.

  It is log p, at least log 2^-23, and its entropy -sum (p / Z) log p = H - log Z.
  """
  logits, mask = GOLDEN['mask/logits'], GOLDEN['mask/CasualLM/0.9/1']
  masked, entropy, raw = logprobs.masked_token_logprobs(
    lambda x: x,
    jnp.asarray(logits)[None],
    jnp.asarray(GOLDEN['masked/tokens'])[None],
    jnp.packbits(jnp.asarray(mask), axis=-1)[None],
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(raw[0], GOLDEN['masked/raw'])
  close(np.maximum(raw[0], -23 * np.log(2)), GOLDEN['masked/logprobs'])
  probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  mass = np.log(np.sum(np.where(mask, probs, 0.0), axis=1))
  close(masked[0], raw[0] - mass)
  close(entropy[0] - mass, GOLDEN['masked/entropy'])


def test_masked_logprobs_and_gradients_by_loop_in_any_chunks():
  """Masks with holes, positions without a mask, and masked logits that would overflow exp."""
  rng = np.random.default_rng(2)
  B, T, V, D = 2, 4, 13, 4
  states, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, V)))
  kernel[:, 5] *= 50
  mask = rng.random((B, T, V)) < 0.4
  targets = rng.integers(0, V, (B, T))
  np.put_along_axis(mask, targets[..., None], True, axis=-1)
  mask[..., 5] &= targets == 5
  mask[1, 2:] = False
  assert (states @ kernel / 0.7)[~mask].max() > 89
  weights = rng.normal(size=(3, B, T)).astype(np.float32)

  def by_loop(kernel, states):
    """Log-probability and entropy over the allowed tokens only, and log-probability over all."""
    found = []
    for b, t in np.ndindex(B, T):
      logits = states[b, t] @ kernel / 0.7
      kept = np.flatnonzero(mask[b, t]) if mask[b, t].any() else np.arange(V)
      logp, raw = jax.nn.log_softmax(logits[kept]), jax.nn.log_softmax(logits)[targets[b, t]]
      found.append((logp[list(kept).index(targets[b, t])], -jnp.sum(jnp.exp(logp) * logp), raw))
    return jnp.array(found).T.reshape(3, B, T)

  def ours(kernel, states, chunk):
    return logprobs.masked_token_logprobs(
      lambda x: x @ kernel,
      states,
      jnp.asarray(targets),
      jnp.packbits(jnp.asarray(mask), axis=-1),
      temperature=0.7,
      chunk=chunk,
    )

  def results(function, *rest):
    """Values, and gradients of a weighted sum."""
    total = lambda k, s: jnp.sum(weights * jnp.stack(list(function(k, s, *rest))))
    inputs = jnp.asarray(kernel), jnp.asarray(states)
    both = lambda *inputs: (*function(*inputs, *rest), *jax.grad(total, (0, 1))(*inputs))
    return jax.jit(both)(*inputs)

  expected = results(by_loop)
  for chunk in (10**6, 2 * B * V):
    for x, y in zip(results(ours, chunk), expected, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)


def test_a_target_that_is_not_allowed_has_no_probability():
  bits = jnp.packbits(jnp.array([[[True, True, False]]]), axis=-1)
  found, *_ = logprobs.masked_token_logprobs(
    lambda x: x, jnp.zeros((1, 1, 3)), jnp.full((1, 1), 2), bits
  )
  assert found[0, 0] == -jnp.inf


def masked_family(name, **settings):
  """A MaskedModel, parameters of which the masking policy's differ, and those two."""
  model, policy = family(name)
  other = model.init(jax.random.key(9))
  masked = masking.MaskedModel(model, always=(EOS,), **{'top_p': 0.5, 'min_tokens': 3} | settings)
  return masked, {'policy': policy, 'masking': other}


@pytest.mark.parametrize('name', ['llama', 't5'])
def test_the_sampler_draws_and_records_what_the_masking_policy_allows(name):
  """Against full forward passes of both models, with filters of the sampler's own on top."""
  masked, params = masked_family(name)
  settings = sampling(9, temperature=0.8, top_k=6, min_new_tokens=2)
  rollout = plain(params, prompts(8), jax.random.key(3), masked, settings, samples=2)
  mask, tokens = np.asarray(rollout.response_mask), np.asarray(rollout.tokens)[:, -9:]
  raw, masking_logits = (
    masked.model.unembed(
      params[which],
      masked.model.response_states(params[which], rollout.tokens, rollout.mask, 9),
    )
    for which in ('policy', 'masking')
  )
  found = np.unpackbits(np.asarray(rollout.allowed), axis=-1, count=VOCAB).astype(bool)
  sizes = []
  for b, t in np.ndindex(mask.shape):
    if not mask[b, t]:
      assert not found[b, t].any()
      continue
    expected = allowed_by_loop(np.asarray(masking_logits[b, t]), 0.5, 3, (EOS,))
    expected[EOS] &= t >= 2
    logits = np.where(expected, raw[b, t] / 0.8, -np.inf)
    expected &= logits >= np.sort(logits)[-6]  # top_k
    np.testing.assert_array_equal(found[b, t], expected)
    assert found[b, t, tokens[b, t]]
    logp = logits[tokens[b, t]] - np.log(np.sum(np.exp(logits[expected])))
    np.testing.assert_allclose(rollout.logprobs[b, t], logp, rtol=1e-4, atol=1e-4)
    sizes.append(expected.sum())
  assert 1 < min(sizes) < max(sizes) <= 6


@pytest.mark.parametrize(
  'name, length', [pytest.param('llama', 72, marks=pytest.mark.slow), ('t5', 9)]
)
def test_continuous_batching_records_the_same(name, length):
  masked, params = masked_family(name)
  settings = sampling(length, temperature=1.3)
  found = refill(params, prompts(11), jax.random.key(1), masked, settings, 4)
  expected = plain(params, prompts(11), jax.random.key(1), masked, settings)
  same(found, expected)
  np.testing.assert_array_equal(found.allowed, expected.allowed)
  assert expected.allowed.shape == (11, length, 3) and np.asarray(expected.allowed).any()

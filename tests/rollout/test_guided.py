"""Decoding in favour of high Q: by hand, against full forward passes, and in both loops."""

import functools

import jax
import jax.numpy as jnp
from loops import family
from loops import plain
from loops import prompts
from loops import refill
from loops import same
from loops import sampling
from loops import VOCAB
import numpy as np
import pytest

from rlhf_jax.models import heads
from rlhf_jax.rollout import guided

BETA = 3.0


def test_guided_logits_by_hand():
  # The minimum is (1, -2, 0); minus its maximum (0, -3, -1); added: (1, -1, 4).
  found = guided.guided_logits(
    jnp.array([[1.0, 2.0, 5.0]]),
    jnp.array([[4.0, -2.0, 0.0]]),
    jnp.array([[1.0, 7.0, 0.0]]),
  )
  np.testing.assert_array_equal(found, [[1.0, -1.0, 4.0]])


def guided_family(name, separate):
  """A GuidedModel and its parameters, with another backbone for the Q functions if `separate`."""
  model, policy = family(name)
  keys = jax.random.split(jax.random.key(3), 3)
  params = {'policy': policy} | {
    name: heads.init_mlp(key, model.width, VOCAB) for name, key in zip(('q1', 'q2'), keys)
  }
  if separate:
    params['backbone'] = model.init(keys[2])
  return guided.GuidedModel(model, BETA, separate), params


def mlp(head, hidden):
  """relu(hidden up + bias) down + bias, in NumPy."""
  head = jax.tree.map(np.asarray, head)
  hidden = np.maximum(hidden @ head['up']['kernel'] + head['up']['bias'], 0)
  return hidden @ head['down']['kernel'] + head['down']['bias']


def logprobs_of_full_passes(guided_model, params, rollout, temperature, top_k):
  """Log-probabilities [B, R] of the sampled tokens, from full passes and a loop over positions."""
  model, length = guided_model.model, rollout.response_mask.shape[1]
  states = lambda tree: np.asarray(
    model.response_states(tree, rollout.tokens, rollout.mask, length), np.float64
  )
  hidden = states(params['policy'])
  of_q = states(params['backbone']) if guided_model.separate else hidden
  logits = np.asarray(model.unembed(params['policy'], jnp.asarray(hidden, jnp.float32)), np.float64)
  q = np.minimum(mlp(params['q1'], of_q), mlp(params['q2'], of_q))
  tokens = np.asarray(rollout.tokens)[:, -length:]
  found = np.zeros(tokens.shape)
  for b, t in zip(*np.nonzero(np.asarray(rollout.response_mask))):
    row = (logits[b, t] + BETA * q[b, t]) / temperature
    kept = np.sort(row)[-top_k:] if top_k else row
    assert row[tokens[b, t]] >= kept.min() - 1e-4
    found[b, t] = row[tokens[b, t]] - np.log(np.sum(np.exp(kept)))
  return found


@pytest.mark.parametrize(
  'name, separate',
  [pytest.param('gpt2', False, marks=pytest.mark.slow), ('llama', True), ('t5', False)],
)
def test_both_loops_sample_the_guided_distribution(name, separate):
  model, params = guided_family(name, separate)
  settings = sampling(6, temperature=1.3, top_k=5)
  rollout = plain(params, prompts(8), jax.random.key(1), model, settings)
  same(refill(params, prompts(8), jax.random.key(1), model, settings, 4), rollout)
  expected = logprobs_of_full_passes(model, params, rollout, 1.3, 5)
  np.testing.assert_allclose(rollout.logprobs, expected, rtol=1e-5, atol=5e-5)


def test_a_large_beta_chooses_the_highest_q():
  model, params = guided_family('gpt2', False)
  model = guided.GuidedModel(model.model, 1e6)
  rollout = plain(params, prompts(6), jax.random.key(0), model, sampling(4))
  states = functools.partial(model.model.response_states, params['policy'])
  hidden = np.asarray(states(rollout.tokens, rollout.mask, 4), np.float64)
  best = np.argmax(np.minimum(mlp(params['q1'], hidden), mlp(params['q2'], hidden)), axis=-1)
  mask = np.asarray(rollout.response_mask)
  np.testing.assert_array_equal(np.asarray(rollout.tokens)[:, -4:][mask], best[mask])

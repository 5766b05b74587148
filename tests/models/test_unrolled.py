"""Unrolled layers, the last of which computes only the states that are read, against a scan."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.models import stack
from rlhf_jax.models import trainable
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import sampling
from rlhf_jax.types import Prompts

B, P, R, VOCAB, DEPTH = 3, 6, 4, 29, 3
LLAMA = {
  'vocab_size': VOCAB,
  'hidden_size': 12,
  'intermediate_size': 20,
  'num_hidden_layers': DEPTH,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
  'max_position_embeddings': 32,
  'initializer_range': 0.3,
}
NEOX = {
  'family': 'gpt_neox',
  'vocab_size': VOCAB,
  'hidden_size': 12,
  'intermediate_size': 20,
  'num_hidden_layers': DEPTH,
  'num_attention_heads': 3,
  'max_position_embeddings': 32,
  'initializer_range': 0.3,
}
FIELDS = {
  'gpt2': {
    'family': 'gpt2',
    'vocab_size': VOCAB,
    'n_positions': 32,
    'n_embd': 12,
    'n_layer': DEPTH,
    'n_head': 3,
    'scale_attn_by_inverse_layer_idx': True,
    'initializer_range': 0.3,
  },
  'neox, parallel': NEOX | {'use_parallel_residual': True},
  'neox, one after another': NEOX | {'use_parallel_residual': False},
  'opt': {
    'family': 'opt',
    'vocab_size': VOCAB,
    'hidden_size': 12,
    'ffn_dim': 20,
    'num_hidden_layers': DEPTH,
    'num_attention_heads': 3,
    'max_position_embeddings': 32,
    'word_embed_proj_dim': 12,
    'init_std': 0.3,
  },
  'llama': LLAMA | {'family': 'llama'},
  'gemma2, windows': LLAMA | {'family': 'gemma2', 'sliding_window': 4, 'query_pre_attn_scalar': 6},
}


@pytest.fixture(scope='module', params=FIELDS)
def built(request):
  model = models.create(FIELDS[request.param])
  return model, dataclasses.replace(model, unroll=DEPTH), model.init(jax.random.key(1))


def ragged():
  """Returns left-padded prompts of 6, 3 and 1 tokens, and right-padded responses of 4, 2 and 3."""
  at = np.arange(P + R)
  mask = (at >= P - np.array([6, 3, 1])[:, None]) & (at < P + np.array([4, 2, 3])[:, None])
  return jnp.asarray(
    np.random.default_rng(0).integers(0, VOCAB, mask.shape), jnp.int32
  ), jnp.asarray(mask)


def states(model, params, frozen=None):
  tokens, mask = ragged()
  return (
    model.response_states(trainable.merge(frozen or {}, params), tokens, mask, R)
    * mask[:, P:, None]
  )


def agree(found, wanted):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), found, wanted)


def test_states_and_gradients(built):
  scanned, unrolled, params = built
  weights = jax.random.normal(jax.random.key(2), (B, R, scanned.width))

  def value(params, model):
    return jnp.sum(states(model, params) * weights)

  agree(jax.jit(states, static_argnums=0)(unrolled, params), states(scanned, params))
  gradient = jax.jit(jax.grad(value), static_argnums=1)
  agree(gradient(params, unrolled), gradient(params, scanned))


@pytest.mark.parametrize('top', [0, 1, DEPTH])
def test_top_layers(built, top):
  scanned, unrolled, params = built
  wanted = states(scanned, params)
  _, trained, frozen = trainable.set_up(
    unrolled,
    jax.tree.map(jnp.copy, params),
    unfrozen_layers=top,
    targets=(),
    rslora=False,
    path='',
    seed=0,
  )
  agree(jax.jit(states, static_argnums=0)(unrolled, trained, frozen), wanted)


@pytest.mark.parametrize('top', [-1, 0, 1])
def test_rollouts(built, top):
  scanned, unrolled, params = built
  tokens, mask = (x[:, :P] for x in ragged())
  generate = jax.jit(
    functools.partial(decode.generate, sampling=sampling.Sampling(max_new_tokens=R)),
    static_argnames='model',
  )
  wanted = generate(params, Prompts(tokens, mask), jax.random.key(3), model=scanned)
  if top >= 0:
    _, trained, frozen = trainable.set_up(
      unrolled,
      jax.tree.map(jnp.copy, params),
      unfrozen_layers=top,
      targets=(),
      rslora=False,
      path='',
      seed=0,
    )
    params = trainable.merge(frozen, trained)
  found = generate(params, Prompts(tokens, mask), jax.random.key(3), model=unrolled)
  np.testing.assert_array_equal(found.tokens, wanted.tokens)
  agree(found.logprobs, wanted.logprobs)


@pytest.mark.parametrize(
  'platform, depth, layers',
  [
    ('cpu', 2, 2),
    ('cpu', stack.MAX_UNROLLED, stack.MAX_UNROLLED),
    ('cpu', stack.MAX_UNROLLED + 1, 1),
    ('tpu', 2, 1),
    ('gpu', 2, 1),
  ],
)
def test_layers_are_unrolled_by_platform_and_depth(platform, depth, layers, monkeypatch):
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  model = models.create(FIELDS['llama'] | {'num_hidden_layers': depth}, unroll=None)
  loops = re.findall(
    r'scan\[|while\[', str(jax.make_jaxpr(lambda params: states(model, params))(model.shapes()))
  )
  assert len(loops) == (layers == 1)

"""Small models, ragged prompts and the two decode loops, for the tests of rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax import types
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import engine
from rlhf_jax.rollout import sampling as sampling_lib
import tiny

VOCAB, EOS, PAD = 24, 3, 0
SPREAD = {'vocab_size': VOCAB, 'initializer_range': 0.4}
LLAMA = tiny.LLAMA | SPREAD
FAMILIES = {
  'gpt2': {'family': 'gpt2', 'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_positions': 128} | SPREAD,
  'llama': LLAMA,
  # Windows shorter than prompts, and windows that end inside responses.
  'mistral': LLAMA | {'family': 'mistral', 'sliding_window': 5},
  'gemma2': LLAMA | {'family': 'gemma2', 'sliding_window': 9, 'head_dim': 8},
  # Rotary positions that depend on the length of the cache.
  'dynamic': LLAMA
  | {'max_position_embeddings': 16, 'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0}},
  't5': {
    'family': 't5',
    'd_model': 16,
    'd_kv': 4,
    'd_ff': 32,
    'num_layers': 2,
    'num_heads': 4,
    'initializer_factor': 4.0,
    'decoder_start_token_id': 0,
    'vocab_size': VOCAB,
  },
}


def prompts(count, width=7, seed=0, garbage=False):
  """Returns left-padded prompts of 1 to `width` tokens; padding holds PAD or random ids."""
  rng = np.random.default_rng(seed)
  mask = np.arange(width)[None] >= width - rng.integers(1, width + 1, (count, 1))
  tokens = np.where(mask, rng.integers(4, VOCAB, mask.shape), PAD)
  if garbage:
    tokens = np.where(mask, tokens, rng.integers(0, VOCAB, mask.shape))
  return types.Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))


def sampling(length, **changes):
  return sampling_lib.Sampling(max_new_tokens=length, **{'eos_id': EOS, 'pad_id': PAD} | changes)


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'samples'))
def plain(params, prompts, key, model, sampling, samples=1, first=0):
  return decode.generate(
    params, prompts, key, model=model, sampling=sampling, samples=samples, first=first
  )


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'max_concurrent', 'samples'))
def refill(params, prompts, key, model, sampling, max_concurrent, samples=1):
  return engine.generate(
    params,
    prompts,
    key,
    model=model,
    sampling=sampling,
    max_concurrent=max_concurrent,
    samples=samples,
  )


@functools.cache
def family(name, **settings):
  model = models.create(FAMILIES[name], **settings)
  return model, model.init(jax.random.key(5))


def same(found, expected, *, atol=5e-5):
  """Asserts equal tokens and masks, and log-probabilities that are equal up to rounding."""
  for name in ('tokens', 'mask', 'response_mask'):
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
  np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5, atol=atol)

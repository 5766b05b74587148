"""Scores of reward models: on the rollout's tokens, or on texts in a tokenizer of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import errors
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.rewards import learned

TEXTS = [('w1 w2', 'w3'), ('w4', 'w5 w6 w7'), ('w8 w9 w10', 'w11 w12'), ('w13', '')]
ENDED = [True, False, True, True]


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh({}, devices=jax.devices()[:1])


def ids(text):
  return [4 + int(word[1:]) for word in text.split()]


def test_both_give_the_same_score(world, mesh):
  """A rollout that is left-padded, and the same texts that are right-padded."""
  model, params = hf.load_reward(world / 'reward', mesh=mesh)
  tokenizer = tokenizers.load(world / 'reward')
  tokens, mask = np.full((4, 9), tiny.PAD, np.int32), np.zeros((4, 9), bool)
  for row, ((prompt, response), end) in enumerate(zip(TEXTS, ENDED)):
    first, rest = [tiny.BOS, *ids(prompt)], ids(response) + [tiny.EOS] * end
    tokens[row, 4 - len(first):4 + len(rest)] = first + rest
    mask[row, 4 - len(first):4 + len(rest)] = True
  rollout = types.Rollout(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(mask[:, 4:]), None)
  on_tokens = learned.of_tokens(model, params)(rollout)
  on_texts = learned.of_texts(model, params, tokenizer, max_length=12, mesh=mesh)(
      *zip(*TEXTS), ENDED)
  np.testing.assert_allclose(on_texts, on_tokens, rtol=0, atol=1e-5)
  assert np.ptp(on_texts) > 0.01


def test_texts_beyond_its_context_are_refused(world, mesh):
  model, params = hf.load_reward(world / 'reward', mesh=mesh)
  score = learned.of_texts(model, params, tokenizers.load(world / 'reward'), max_length=5, mesh=mesh)
  with pytest.raises(errors.UserError, match=r'reads 5 tokens, but .* number 2 have 7 .*max_length'):
    score(*zip(*TEXTS), ENDED)


def test_which_tokenizers_are_the_same(world, tmp_path):
  ours = tokenizers.load(world / 'tokenizer')
  assert learned.same_tokenizer(ours, tokenizers.load(world / 'reward'))
  assert not learned.same_tokenizer(ours, tiny.write_tokenizer(tmp_path / 'more', words=61))

"""Algorithms without a critic with the parts of a run that PPO can have: few combinations."""

import jax
import numpy as np

from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms import reinforce
from rlhf_jax.algorithms import rloo
from rlhf_jax.models import trainable
import tiny

T5 = tiny.T5 | {'pad_token_id': tiny.PAD, 'eos_token_id': tiny.EOS, 'n_positions': 32}


def long_words(prompts, responses, *, response_tokens, metadata):
  """One reward for each token: its id over 100."""
  return [[token / 100 for token in tokens] for tokens in response_tokens]


def first_token_is_even(prompts, responses, *, response_tokens, metadata):
  """1 or 0."""
  return [float(tokens[0] % 2 == 0) for tokens in response_tokens]


def train(algorithm, config):
  """Two steps; the trained parameters before and after, and the metrics."""
  _, state, history, _ = tiny.train(algorithm, config, 2)
  assert set(state.params) == {'policy'}
  for metrics in history:
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(metrics))
  np.testing.assert_allclose(history[0]['policy/first_ratio'], 1.0, rtol=0, atol=1e-6)
  return state, history


def test_adapters_pretraining_examples_and_reward_models(world):
  config = tiny.on_policy(reinforce.config('reinforce_plus_plus'), world)
  config.rl.minibatches = 2
  config.model.lora.targets = (('attention/', 2, 4.0),)
  tiny.mix_in_pretraining(config, world)
  config.reward.update({'function': None, 'models': (f'{world}/reward',) * 2, 'ensemble': 'min'})
  state, history = train(reinforce, config)
  assert trainable.has_adapters(state.params['policy'])
  assert history[0]['ptx/loss'] > 0


def test_frozen_layers_and_a_sum_with_rewards_per_token(world):
  config = tiny.on_policy(rloo.config(), world)
  config.model.unfrozen_layers, config.microbatch_size = 1, 8
  config.reward.function = None
  config.reward.parts = {
    'good': {'function': 'tiny:good_words', 'weight': 2.0},
    'long': {'function': 'test_without_critic:long_words'},
  }
  state, history = train(rloo, config)
  assert state.params['policy']['top']
  assert abs(history[0]['objective/scores']) > 0.1


def test_encoder_decoders_and_dynamic_sampling(world, tmp_path):
  """About half of the groups have equal scores, and none is left."""
  tiny.write_model(tmp_path / 't5', T5)
  config = tiny.grpo(world, 'cispo')
  config.model.path, config.data.max_prompt_length = f'{tmp_path}/t5', 8
  config.sampling.samples, config.rl.minibatches = 2, 2
  config.reward.function = 'test_without_critic:first_token_is_even'
  _, history = train(grpo, config)
  assert [metrics['groups/equal'] for metrics in history] == [0.0, 0.0]

"""RLOO: TRL's advantages, losses and gradients through our `prepare` and `loss`, and learning."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import experience
from rlhf_jax import forward
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import rloo
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'trl_rloo.npz')
CASES = json.loads(str(GOLDEN['settings']))


def settings_of(case):
  """Our settings for TRL's."""
  low, high = case['reward_clip_range'] or (None, None)
  assert low is None or low == -high
  return rloo.Settings(
    microbatch_size=0,
    temperature=1.0,
    samples=case['num_generations'],
    max_new_tokens=case['max_completion_length'],
    end_tokens=(),
    end_after=0,
    kl_coef=case['beta'],
    clip_low=case['epsilon'],
    clip_high=case['epsilon_high'] or case['epsilon'],
    clip_scores=high,
    normalize_advantages=case['normalize_advantages'],
  )


def prepared(settings):
  """Our Experience of TRL's batch."""
  mask, old = GOLDEN['mask'], jnp.asarray(GOLDEN['old_logprobs'])
  rollout = types.Rollout(
    np.full(mask.shape, 9), mask, mask, np.where(mask, -1.0, 0.0).astype(np.float32)
  )
  scores = jnp.asarray(GOLDEN['scores'])
  rollout, skipped = experience.skip_nan(rollout, scores, rules=settings.rules)
  assert skipped == 1
  extra = {'kl_coef': settings.kl_coef, 'reward_moments': jnp.zeros(3)}
  return rloo.prepare(
    forward.Outputs(old, jnp.zeros_like(old)),
    forward.Fixed(None, jnp.asarray(GOLDEN['ref_logprobs']), None),
    state=types.TrainState(0, None, {}, {}, extra),
    rollout=rollout,
    scores=scores,
    settings=settings,
  )[0]


@pytest.mark.parametrize('name', CASES)
def test_advantages_losses_and_gradients_are_those_of_trl(name):
  settings, mask = settings_of(CASES[name]), GOLDEN['mask']
  ours = prepared(settings)
  expected = np.where(mask, GOLDEN[f'{name}/advantages'][:, None], 0)
  np.testing.assert_allclose(ours.advantages, expected, rtol=1e-5, atol=1e-5)
  for i, rows in enumerate(GOLDEN[f'{name}/rows']):
    batch = jax.tree.map(lambda x: x[rows], ours)
    counts = update.Counts(mask[rows].sum(), 1, len(rows))  # TRL counts those without a score

    def loss(logprobs):
      return rloo.loss(
        forward.Outputs(logprobs, jnp.zeros_like(logprobs)), batch, counts, settings=settings
      )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
      jnp.asarray(GOLDEN[f'{name}/logprobs'][i])
    )
    np.testing.assert_allclose(value, GOLDEN[f'{name}/loss'][i], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f'{name}/gradients'][i], rtol=1e-5, atol=1e-6)
    clipped = GOLDEN[f'{name}/clip_low'][i] + GOLDEN[f'{name}/clip_high'][i]
    assert (metrics['policy/clipfrac'] > 0) == (clipped > 0)


def test_it_learns_to_use_good_words(world):
  config = tiny.on_policy(rloo.config(), world)
  config.update({'batch_size': 64})
  config.sampling.samples, config.optim.learning_rate, config.rl.kl_coef = 4, 0.01, 0.01
  _, state, history, _ = tiny.train(rloo, config, 20)
  assert set(state.params) == {'policy'}
  scores = [float(metrics['objective/scores']) for metrics in history]
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores
  for metrics in history:
    np.testing.assert_allclose(metrics['policy/ratio'], 1.0, rtol=0, atol=1e-5)

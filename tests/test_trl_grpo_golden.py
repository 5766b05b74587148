"""Group advantages and clipped losses from the arrays of TRL 1.12's GRPOTrainer.

The numbers are in golden/trl_grpo.npz. golden/make_trl_grpo.py wrote them and describes TRL's
conventions. Every microbatch's loss, and its gradient with respect to the log-probabilities, must
equal TRL's.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages as adv
from rlhf_jax import losses

GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'trl_grpo.npz')
NORMALIZE = {'grpo': 'sequence', 'bnpo': 'token', 'dapo': 'token', 'dr_grpo': 'constant'}
SETTINGS = {  # those with a clip; tests/algorithms/test_grpo.py has the others too
  name: settings
  for name, settings in json.loads(str(GOLDEN['settings'])).items()
  if settings['loss_type'] in NORMALIZE
}
MASK = GOLDEN['mask']
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def advantages_of(settings):
  """Returns our advantages [B, R] for TRL's scores, on every token of a response."""
  advantages = adv.group_advantages(
    jnp.asarray(GOLDEN['scores']), settings['num_generations'], scale=settings['scale_rewards']
  )
  return np.repeat(advantages[:, None], MASK.shape[1], axis=1)


def counts_of(settings, mask):
  """Returns the tokens and sequences by which TRL divides a microbatch's loss.

  A minibatch is `accumulation` microbatches of equally many sequences. 'dapo' uses the mean number
  of tokens per minibatch; 'bnpo' treats every microbatch as a minibatch and then averages.
  """
  accumulation = settings['gradient_accumulation_steps']
  sequences = len(mask) * accumulation
  if settings['loss_type'] == 'dapo':
    return MASK.sum() * sequences / len(MASK), sequences
  return mask.sum() * accumulation, sequences


def loss(logprobs, batch, counts, settings):
  """Returns the microbatch's part of the loss, and metrics, by our functions alone."""
  mask = batch['mask']
  logprobs = jnp.where(mask, logprobs, 0.0)
  ratios = losses.log_ratio(
    logprobs, batch['old_logprobs'], mask, level=settings['importance_sampling_level']
  )
  per_token, clipped, ratio = losses.clipped_policy_loss(
    ratios,
    batch['advantages'],
    clip_low=settings['epsilon'],
    clip_high=settings['epsilon_high'],
    dual_clip=settings['delta'] or 0.0,
  )
  kl = adv.kl_estimate(logprobs, jnp.where(mask, batch['ref_logprobs'], 0.0), 'k3')
  if settings['use_bias_correction_kl']:
    kl *= ratio
  weights = losses.token_weights(
    mask,
    *counts,
    normalize=NORMALIZE[settings['loss_type']],
    max_length=settings['max_completion_length'],
  )
  total = jnp.sum(weights * (per_token + settings['beta'] * kl))
  return total, (kl, clipped)


def calls(name):
  """Returns the inputs of each call of `_compute_loss`, our value and gradient, and our metrics."""
  settings = SETTINGS[name]
  advantages = advantages_of(settings)
  step = jax.jit(jax.value_and_grad(functools.partial(loss, settings=settings), has_aux=True))
  for i, rows in enumerate(GOLDEN[f'{name}/rows']):
    batch = {
      'mask': MASK[rows],
      'advantages': advantages[rows],
      'old_logprobs': GOLDEN['old_logprobs'][rows],
      'ref_logprobs': GOLDEN['ref_logprobs'][rows],
    }
    counts = counts_of(settings, MASK[rows])
    yield i, batch, *step(jnp.asarray(GOLDEN[f'{name}/logprobs'][i]), batch, counts)


@pytest.mark.parametrize('scale', adv.GROUP_SCALES)
def test_advantages_agree(scale):
  n = next(iter(SETTINGS.values()))['num_generations']
  scores = jnp.asarray(GOLDEN['scores'])
  close(adv.group_advantages(scores, n, scale=scale), GOLDEN[f'advantages_{scale}'])
  equal = adv.equal_groups(scores, n)
  assert np.flatnonzero(equal).tolist() == list(range(n, 2 * n))
  close(GOLDEN[f'advantages_{scale}'][equal], np.zeros(n))


@pytest.mark.parametrize('name', SETTINGS)
def test_loss_and_gradient_agree(name):
  for i, batch, (value, _), gradient in calls(name):
    close(value, GOLDEN[f'{name}/loss'][i])
    close(gradient, GOLDEN[f'{name}/gradients'][i])
    assert not np.asarray(gradient)[~batch['mask']].any()


@pytest.mark.parametrize('name', SETTINGS)
def test_clip_fractions_and_kl_agree(name):
  settings = SETTINGS[name]
  seen = dict(low=0.0, high=0.0)
  for i, batch, (_, (kl, clipped)), _ in calls(name):
    mask, clipped = batch['mask'], np.asarray(clipped) * batch['mask']
    for side, signed in (('low', batch['advantages'] < 0), ('high', batch['advantages'] > 0)):
      if settings['importance_sampling_level'] == 'sequence':
        fraction = np.mean(np.any(clipped * signed, axis=1))
      else:
        fraction = np.sum(clipped * signed) / mask.sum()
      close(fraction, GOLDEN[f'{name}/clip_{side}'][i])
      seen[side] += fraction
    if settings['beta']:
      close(adv.masked_mean(kl, jnp.asarray(mask)), GOLDEN[f'{name}/kl'][i])
  assert min(seen.values()) > 0, 'both clips have to act'


@pytest.mark.parametrize('loss_type', ['grpo', 'dr_grpo', 'dapo'])
def test_microbatches_of_trl_add_up_to_one(loss_type):
  """Before the first step, the sum of TRL's two microbatches is the loss of all their rows."""
  name = f'{loss_type}-token-split'
  settings = SETTINGS[name] | {'gradient_accumulation_steps': 1}
  rows = GOLDEN[f'{name}/rows'][:2].ravel()
  logprobs = GOLDEN[f'{name}/logprobs'][:2].reshape(len(rows), -1)
  batch = {
    'mask': MASK[rows],
    'advantages': advantages_of(settings)[rows],
    'old_logprobs': GOLDEN['old_logprobs'][rows],
    'ref_logprobs': GOLDEN['ref_logprobs'][rows],
  }
  batch = jax.tree.map(jnp.asarray, batch)
  value, _ = loss(jnp.asarray(logprobs), batch, counts_of(settings, MASK[rows]), settings)
  close(value, GOLDEN[f'{name}/loss'][:2].sum())


def test_overlong_penalty_agrees():
  settings = json.loads(str(GOLDEN['overlong_settings']))
  close(
    adv.overlong_penalty(
      jnp.asarray(GOLDEN['overlong_lengths']),
      max_length=settings['max_completion_len'],
      cache=settings['soft_punish_cache'],
    ),
    GOLDEN['overlong_penalty'],
  )

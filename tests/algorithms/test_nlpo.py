"""NLPO: PPO if nothing is masked, the masking policy in time, KL over all tokens, its errors."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages as adv
from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import nlpo
from rlhf_jax.algorithms import ppo
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'rl4lms.npz')


def test_the_kl_controller_of_rl4lms():
  """The demo in its kl_controllers.py: 0.1 (1 - 0.02), then twice (1 + 0.02)."""
  coef, mask = 0.1, jnp.array([[True, True, False], [True, False, True]])
  for kl, expected in zip(GOLDEN['controller/kl'], GOLDEN['controller/coefs'], strict=True):
    per_token = jnp.where(mask, jnp.float32(kl), 9.0)
    coef = adv.next_kl_coef(
      coef, per_token, mask, controller='adaptive_per_token', target=0.1, horizon=1.0
    )
    np.testing.assert_allclose(coef, expected, rtol=1e-6)
  np.testing.assert_allclose(GOLDEN['controller/coefs'], [0.098, 0.09996, 0.1019592], rtol=1e-8)


def run(algorithm, config):
  """Metrics of two steps, and the parameters."""
  config.optim.eps = 1e-4
  _, state, history, _ = tiny.train(algorithm, config, 2)
  return history, state.params


@pytest.fixture(scope='module')
def of_ppo(world):
  return run(ppo, tiny.ppo(world))


@pytest.mark.parametrize(
  'setting, tolerance',
  [({'mask_top_p': 1.0}, 0.0), ({'mask_min_tokens': tiny.VOCAB}, 1e-6)],
  ids=['no masks, to the last bit', 'masks of all tokens, to rounding'],
)
def test_if_all_tokens_are_allowed_it_is_ppo(setting, tolerance, world, of_ppo):
  config = tiny.nlpo(world)
  config.rl.update(setting)
  history, params = run(nlpo, config)
  assert [metrics.pop('policy/masked_share') for metrics in history] == [0, 0]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=10 * tolerance, atol=tolerance),
    (history, params),
    of_ppo,
  )


@pytest.fixture(scope='module')
def steps(world):
  """(learner, [(state, batch, metrics)] of three steps, the last state)."""
  mesh, taken = sharding.make_mesh({}, devices=jax.devices()[:1]), []
  with jax.set_mesh(mesh):
    learner, state = nlpo.create(tiny.nlpo(world), mesh)
    for _ in range(3):
      batch, _ = learner.next_batch(state, timed=False)
      copy = jax.tree.map(jnp.copy, state)
      state, metrics = learner.train_step(state, *batch)
      taken.append((copy, batch, jax.device_get(metrics)))
  return taken, state


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b)))


def test_the_masking_policy_is_a_copy_of_every_second_policy(steps):
  taken, last = steps
  states = [state for state, *_ in taken] + [last]
  policies = [state.params['policy'] for state in states]
  masking = [state.extra['masking_policy'] for state in states]
  assert not any(equal(a, b) for a, b in zip(policies, policies[1:]))
  for found, expected in zip(masking, [policies[0], policies[0], policies[2], policies[2]]):
    assert equal(found, expected)


def test_metrics_are_of_the_masked_ratio_and_the_raw_kl(steps):
  """Log-probabilities from one softmax for each token, over its allowed tokens or over all."""
  for state, (frozen, rollout, *_), metrics in steps[0]:
    assert metrics['policy/first_ratio'] == pytest.approx(1.0, abs=1e-6)
    assert metrics['policy/sampler_gap'] < 1e-5
    mask = np.asarray(rollout.response_mask)
    allowed = np.unpackbits(np.asarray(rollout.allowed), axis=-1, count=tiny.VOCAB).astype(bool)
    share = 1 - np.mean(allowed[mask].sum(-1) / tiny.VOCAB)
    assert metrics['policy/masked_share'] == pytest.approx(share, abs=1e-6)
    assert 0.2 < share < 0.9
    assert allowed[mask][:, [tiny.PAD, tiny.BOS, tiny.EOS, tiny.UNK]].all()
    model = models.create(tiny.LLAMA)

    def logits(params):
      states = model.response_states(params, rollout.tokens, rollout.mask, mask.shape[1])
      return np.asarray(model.unembed(params, states), np.float64)

    policy, reference = logits(state.params['policy']), logits(frozen['reference'])
    targets = np.asarray(rollout.tokens)[:, -mask.shape[1] :]
    kl, masked = 0.0, np.zeros(mask.shape)
    for b, t in zip(*np.nonzero(mask)):
      logp = lambda x, kept: x[targets[b, t]] - np.log(np.sum(np.exp(x[kept])))
      all_tokens = np.ones(tiny.VOCAB, bool)
      kl += logp(policy[b, t], all_tokens) - logp(reference[b, t], all_tokens)
      masked[b, t] = logp(policy[b, t], allowed[b, t])
    np.testing.assert_allclose(metrics['objective/kl'], kl / len(mask), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rollout.logprobs, masked, rtol=1e-5, atol=1e-5)


def test_settings_that_cannot_work_are_errors(world):
  def message(**changes):
    config = tiny.nlpo(world)
    config.update_from_flattened_dict(changes)
    with pytest.raises(errors.UserError) as error:
      build.validate(config, 1)
    return str(error.value)

  assert 'config.rl.mask_top_p=0.0 must be in (0, 1]' in message(**{'rl.mask_top_p': 0.0})
  assert 'config.rl.mask_every=0 must be positive' in message(**{'rl.mask_every': 0})
  few = {'rl.mask_min_tokens': 1, 'sampling.min_new_tokens': 3}
  assert 'config.rl.mask_min_tokens=1 must be at least 2' in message(**few)
  in_loss = {'rl.kl_in': 'loss', 'rl.kl_estimator': 'k3'}
  assert "config.rl.kl_in='loss' must be 'reward'" in message(**in_loss)
  of_sampler = {'rl.behaviour': 'sampler', 'rl.mask_update': False}
  assert "config.rl.behaviour='sampler' needs config.rl.mask_update=True" in message(**of_sampler)


def test_the_update_of_rl4lms_has_no_masks(world):
  """Its ratio is of log-probabilities over all tokens, from which the sampler's differ."""
  config = tiny.nlpo(world)
  config.rl.update({'mask_update': False, 'epochs': 1, 'minibatches': 1})
  _, _, history, _ = tiny.train(nlpo, config, 1)
  assert history[0]['policy/sampler_gap'] > 0.1
  assert history[0]['policy/first_ratio'] == pytest.approx(1.0, abs=1e-6)
  assert 0.2 < history[0]['policy/masked_share'] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields, settings',
  [
    (tiny.T5, {'data.max_prompt_length': 8, 'sampling.max_concurrent': 4, 'rl.ptx_coef': 0.5}),
    (tiny.LLAMA, {'model.lora.targets': (('attention/', 2, 4.0),), 'critic.kind': 'adapters'}),
    (tiny.LLAMA, {'model.unfrozen_layers': 1, 'critic.kind': 'trunk', 'microbatch_size': 2}),
    (tiny.LLAMA, {'sampling.stop': ('w5 w', 'w7'), 'sampling.top_k': 20, 'microbatch_size': 4}),
  ],
  ids=['T5, continuous batching, ptx', 'LoRA', 'frozen layers', 'stop strings'],
)
def test_with_models_and_settings_of_ppo(fields, settings, world, tmp_path):
  tiny.write_model(tmp_path / 'model', fields)
  config = tiny.nlpo(world)
  config.model.path = f'{tmp_path}/model'
  if 'rl.ptx_coef' in settings:
    tiny.mix_in_pretraining(config, world)
  config.update_from_flattened_dict(settings)
  build.validate(config, 1)
  _, state, history, _ = tiny.train(nlpo, config, 2)
  assert equal(state.extra['masking_policy'], state.params['policy'])
  for metrics in history:
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert metrics['policy/first_ratio'] == pytest.approx(1.0, abs=1e-6)
    assert metrics['policy/sampler_gap'] < 1e-5 and 0.2 < metrics['policy/masked_share'] < 1

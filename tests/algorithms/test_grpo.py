"""GRPO from its config: TRL's numbers through its own loss, presets, microbatches, learning."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import forward
from rlhf_jax import losses
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import grpo
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'trl_grpo.npz')
CASES = {
  name: case
  for name, case in json.loads(str(GOLDEN['settings'])).items()
  if not (case['beta'] and case['use_bias_correction_kl'])
}
NORMALIZE = {
  'grpo': 'sequence',
  'bnpo': 'token',
  'dapo': 'token',
  'dr_grpo': 'constant',
  'cispo': 'token',
  'sapo': 'sequence',
  'luspo': 'constant',
}
BASE = dict(
  microbatch_size=0,
  temperature=1.0,
  samples=2,
  max_new_tokens=6,
  end_tokens=(tiny.EOS,),
  end_after=0,
)


def settings_of(case):
  """Returns our settings for TRL's."""
  cispo = case['loss_type'] == 'cispo'
  return grpo.Settings(
    **BASE | {'samples': case['num_generations'], 'max_new_tokens': case['max_completion_length']},
    kl_coef=case['beta'],
    scale=case['scale_rewards'],
    normalize=NORMALIZE[case['loss_type']],
    ratio=case['importance_sampling_level'],
    loss=case['loss_type'] if case['loss_type'] in losses.POLICY_LOSSES else 'clip',
    tau_negative=case.get('sapo_temperature_neg', 1.05),
    clip_low=1.0 if cispo else case['epsilon'],
    clip_high=case['epsilon_high'] - cispo,  # TRL's is the largest ratio for 'cispo'
    dual_clip=case['delta'],
  )


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient_are_those_of_trl(name):
  settings, mask = settings_of(CASES[name]), GOLDEN['mask']
  _, advantages, _ = prepared(settings)
  accumulation = CASES[name]['gradient_accumulation_steps']
  for i, rows in enumerate(GOLDEN[f'{name}/rows']):
    tokens = mask[rows].sum() * accumulation
    if CASES[name]['loss_type'] in ('dapo', 'cispo'):
      tokens = mask.sum() * len(rows) * accumulation / len(mask)
    batch = types.Experience(
      tokens=None,
      mask=None,
      response_mask=mask[rows],
      step_mask=mask[rows],
      logprobs=GOLDEN['old_logprobs'][rows],
      ref_logprobs=np.where(mask[rows], GOLDEN['ref_logprobs'][rows], 0),
      advantages=advantages[rows],
    )
    counts = update.Counts(tokens, tokens, len(rows) * accumulation)

    def loss(logprobs):
      outputs = forward.Outputs(logprobs, jnp.zeros_like(logprobs))
      return grpo.loss(outputs, batch, counts, settings=settings)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(GOLDEN[f'{name}/logprobs'][i]))
    if (
      CASES[name]['loss_type'] == 'luspo'
    ):  # a sum over tokens, where ours is divided by a constant
      value, gradient = value * settings.max_new_tokens, gradient * settings.max_new_tokens
    np.testing.assert_allclose(value, GOLDEN[f'{name}/loss'][i], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f'{name}/gradients'][i], rtol=1e-5, atol=1e-6)


def prepared(settings, scores=None):
  """Returns the response mask, advantages and metrics of the golden responses."""
  mask = GOLDEN['mask']
  rollout = types.Rollout(
    np.full(mask.shape, 9), mask, mask, np.where(mask, -1.0, 0.0).astype(np.float32)
  )
  outputs = forward.Outputs(*[jnp.asarray(rollout.logprobs)] * 2)
  state = types.TrainState(
    0, None, {}, {}, {'kl_coef': settings.kl_coef, 'reward_moments': jnp.zeros(3)}
  )
  experience, _, metrics = grpo.prepare(
    outputs,
    forward.Fixed(None, jnp.asarray(rollout.logprobs) - 0.5 * mask, None),
    state=state,
    rollout=rollout,
    scores=jnp.asarray(GOLDEN['scores'] if scores is None else scores),
    settings=settings,
  )
  return np.asarray(experience.response_mask), np.asarray(experience.advantages), metrics


def test_groups_of_equal_scores_are_left_out():
  n = next(iter(CASES.values()))['num_generations']
  settings = grpo.Settings(**BASE | {'samples': n}, drop_equal_groups=True, kl_coef=0.0)
  mask, advantages, metrics = prepared(settings)
  equal = np.zeros(len(mask), bool)
  equal[n : 2 * n] = True  # the golden scores of the second group are equal
  np.testing.assert_array_equal(mask, GOLDEN['mask'] & ~equal[:, None])
  assert not advantages[equal].any() and advantages[~equal].any()
  assert metrics['groups/equal'] == pytest.approx(equal.mean())


def test_a_penalty_in_the_reward_is_the_kl_of_the_response():
  """log p - log p_ref is 0.5 per token, so with coefficient 2 a score falls by the length."""
  n, lengths = 2, GOLDEN['mask'].sum(1)
  settings = grpo.Settings(**BASE, kl_coef=2.0, kl_in='reward', kl_estimator='k1', scale='none')
  scores = np.asarray(GOLDEN['scores'])
  postprocessed = (scores - lengths).reshape(-1, n)
  expected = (postprocessed - postprocessed.mean(1, keepdims=True)).reshape(-1, 1) * GOLDEN['mask']
  np.testing.assert_allclose(prepared(settings)[1], expected, rtol=1e-5, atol=1e-5)


def test_overlong_responses_lose_up_to_one():
  """The cache is half of 6 tokens: 0 up to 3 tokens, then a third less for each further token."""
  settings = grpo.Settings(**BASE | {'max_new_tokens': 6}, overlong=0.5, kl_coef=0.0, scale='none')
  lengths = GOLDEN['mask'].sum(1)
  postprocessed = -np.clip((lengths - 3) / 3, 0, 1).reshape(-1, 2)
  expected = (postprocessed - postprocessed.mean(1, keepdims=True)).reshape(-1, 1) * GOLDEN['mask']
  found = prepared(settings, np.zeros(len(lengths), np.float32))[1]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def config_of(world, preset=''):
  config = tiny.grpo(world, preset)
  config.sampling.samples, config.optim.eps = 4, 1e-4
  return config


def run(config, steps):
  return tiny.train(grpo, config, steps)


@pytest.mark.parametrize('preset', grpo.PRESETS)
def test_presets_train(preset, world):
  config = config_of(world, preset)
  config.optim.learning_rate = 1e-3
  learner, state, history, _ = run(config, 2)
  assert set(state.params) == {'policy'}
  for metrics in history:
    assert all(np.isfinite(value).all() for value in metrics.values())
    np.testing.assert_allclose(metrics['policy/first_ratio'], 1.0, rtol=0, atol=1e-6)
    assert (abs(metrics['policy/ratio'] - 1) > 1e-6) == (config.rl.minibatches > 1)
    assert ('objective/kl' in metrics) == (config.rl.kl_coef > 0)


def test_microbatches_truncated_to_their_length_equal_the_minibatch(world):
  config = config_of(world, 'dapo')
  config.rl.update({'epochs': 2, 'minibatches': 2, 'drop_equal_groups': False})
  config.sampling.max_new_tokens = 24
  _, whole, expected, _ = run(config, 2)
  config.microbatch_size = 2
  _, parts, found, _ = run(config, 2)
  same(whole.params, parts.params, atol=2e-6)
  for a, b in zip(expected, found, strict=True):
    same(a, b, rtol=1e-4, atol=2e-5)


def same(a, b, rtol=0.0, atol=0.0):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def test_it_learns_to_use_good_words(world):
  config = config_of(world)
  config.batch_size, config.optim.learning_rate = 64, 0.01
  config.rl.kl_coef = 0.01
  _, _, history, _ = run(config, 20)
  scores = [float(metrics['objective/scores']) for metrics in history]
  assert abs(history[0]['objective/kl']) < 1e-4
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores


def test_stop_strings_with_microbatches(world, tmp_path):
  """Responses truncated on the host at a string are scored, and trained on in microbatches."""
  tiny.write_model(tmp_path / 'model', tiny.LLAMA | {'max_position_embeddings': 64})
  config = tiny.grpo(world)
  config.model.path, config.microbatch_size, config.rl.minibatches = f'{tmp_path}/model', 4, 2
  config.sampling.update({'max_new_tokens': 40, 'stop': ('w5 w', 'w7'), 'temperature': 3.0})
  config.rl.update({'missing_eos': 'replace', 'missing_eos_value': -3.0})
  learner, _, history, _ = run(config, 2)
  assert all(np.isfinite(metrics['policy/loss']) for metrics in history)
  texts = [sample['response'] for sample in learner.samples({})]
  stopped = [text for text in texts if 'w7' in text]
  assert stopped and all(text.count('w7') == 1 and text.endswith('w7') for text in stopped)
  assert 0 < history[-1]['response/eos_rate'] <= 1

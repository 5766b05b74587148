"""Rewards that are NaN: the run stops and names the example, or skips and counts the response."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages as adv
from rlhf_jax import errors
from rlhf_jax import experience
from rlhf_jax import forward
from rlhf_jax import loop
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import models
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import heads
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import scorers
import tiny

B, P, R = 6, 3, 5
NAN = float('nan')


def no_number(prompts, responses, *, response_tokens, metadata):
  """Returns good words, and NaN for one prompt in five."""
  rewards = tiny.good_words(prompts, responses, response_tokens=response_tokens, metadata=metadata)
  return [NAN if entry['number'] % 5 == 0 else reward for reward, entry in zip(rewards, metadata)]


def rollout(lengths=(1, 5, 3, 4, 2, 5)):
  response_mask = np.arange(R)[None] < np.array(lengths)[:, None]
  mask = np.concatenate([np.ones((B, P), bool), response_mask], axis=1)
  tokens = np.random.default_rng(0).integers(4, tiny.VOCAB, mask.shape).astype(np.int32)
  return jax.tree.map(
    jnp.asarray,
    types.Rollout(tokens, mask, response_mask, np.zeros(response_mask.shape, np.float32)),
  )


def test_groups_omit_skipped_responses():
  """If one or all of three responses are NaN, advantages are those of a smaller group."""
  scores = np.array([1, NAN, 4, NAN, NAN, NAN], np.float32)
  kept = ~np.isnan(scores)
  rules = experience.ScoreRules(
    end_tokens=(tiny.EOS,), missing_eos='replace', missing_eos_value=-9.0
  )
  for given in (
    scores,
    np.pad(scores[:, None], ((0, 0), (0, R - 1))),
  ):  # or per token, at the first token
    made, skipped = experience.skip_nan(rollout(), jnp.asarray(given), rules=rules)
    assert skipped == 4
    np.testing.assert_array_equal(made.response_mask.any(axis=1), kept)
    np.testing.assert_array_equal(
      experience.not_skipped(jnp.asarray(given), made.response_mask), kept
    )
    postprocessed, _ = rules.apply(jnp.asarray(given), made, jnp.zeros(3))
    np.testing.assert_array_equal(
      experience.totals(postprocessed, made.response_mask), [-9, 0, -9, 0, 0, 0]
    )
  std = np.std([1, 4], ddof=1) + 1e-4
  for scale, unit in (('none', 1.0), ('group', std), ('batch', std)):
    np.testing.assert_allclose(
      adv.group_advantages(jnp.nan_to_num(scores, nan=7.0), 3, scale=scale, kept=kept),
      np.array([-1.5, 0, 1.5, 0, 0, 0]) / unit,
      rtol=1e-6,
    )
  equal = adv.equal_groups(
    np.array([2, 7, 2, 1, 2, 7], np.float32), 3, np.array([True, False, True, True, True, False])
  )
  np.testing.assert_array_equal(equal, [True] * 3 + [False] * 3)


@pytest.mark.parametrize(
  'dense', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['responses', 'tokens']
)
def test_ppo_learns_as_if_the_response_were_not_there(dense, world):
  """The update on six responses with two NaNs equals that on the other four."""
  config, model = tiny.ppo(world), models.create(tiny.LLAMA)
  config.rl.update(
    {
      'epochs': 1,
      'minibatches': 1,
      'whiten_rewards': True,
      'missing_eos': 'subtract',
      'scale_scores': True,
    }
  )
  config.rl.missing_eos_value = 0.5
  settings = ppo.Settings.of(config, (tiny.EOS,))
  policy = model.init(jax.random.key(1))
  params = {
    'policy': policy,
    'critic': {'head': heads.init_scalar(jax.random.key(2), model.width, scale='normal')},
  }
  frozen = {'policy': {}, 'reference': jax.tree.map(lambda x: 1.1 * x, policy)}
  scores = np.random.default_rng(1).normal(size=(B, R) if dense else B).astype(np.float32)
  kept = np.array([True, False, True, True, False, True])
  scores[~kept] = NAN
  skip = functools.partial(experience.skip_nan, rules=settings.rules)

  def update(rollout, scores):
    step = lambda state, rollout, scores, optimizers: ppo.train_step(
      state,
      frozen,
      skip(rollout, scores)[0],
      scores,
      None,
      models=forward.Models(model),
      optimizers=optimizers,
      settings=settings,
    )
    return tiny.one_step(step, params, rollout, jnp.asarray(scores))

  found, metrics = update(rollout(), scores)
  expected, same = update(jax.tree.map(lambda x: x[kept], rollout()), scores[kept])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
    found.params,
    expected.params,
  )
  for name in same.keys() - {'samples/postprocessed_score'}:
    np.testing.assert_allclose(metrics[name], same[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_run_counts_skipped_responses(world, tmp_path):
  config = tiny.ppo(world)
  config.rl.update({'epochs': 1, 'minibatches': 1})
  config.reward.function, config.critic.kind = None, 'trunk'
  config.reward.parts = {
    'other': {'function': 'tiny:good_words'},
    'mine': {'function': 'test_nan:no_number'},
  }
  config.reward.on_nan = 'skip'
  config.evals.prompts = tiny.evals(world)['prompts'] | {
    'reward': {'function': 'test_nan:no_number', 'on_nan': 'skip'}
  }
  config.steps, config.samples_every = 2, 1
  loop.run(config, tmp_path)
  records = [record for record in metrics_lib.read(tmp_path) if 'objective/skipped' in record]
  samples = metrics_lib.read_samples(tmp_path)
  for step, record in enumerate(records):
    now = [sample for sample in samples if sample['step'] == step]
    skipped = [sample for sample in now if sample['score'] is None]
    assert record['objective/skipped'] == len(skipped)
    assert all(s['parts']['mine'] is None and s['parts']['other'] is not None for s in skipped)
    scores = [sample['score'] for sample in now if sample['score'] is not None]
    assert record['objective/scores'] == pytest.approx(np.mean(scores), abs=1e-5)
    parts = [sample['parts']['mine'] for sample in now if sample['score'] is not None]
    assert record['reward/mine'] == pytest.approx(np.mean(parts), abs=1e-5)
  assert sum(record['objective/skipped'] for record in records) > 0
  (evaluated,) = [record for record in metrics_lib.read(tmp_path) if 'prompts/score' in record]
  assert 0 <= evaluated['prompts/score'] <= 1


def call(reward, **settings):
  return functions.call(
    lambda *_, **__: reward,
    ['p', 'q'],
    ['a', 'b'],
    response_tokens=[[1], [2]],
    metadata=[{}, {}],
    response_length=2,
    **settings,
  )


def test_stop_is_the_default_and_names_the_key(caplog):
  with pytest.raises(
    errors.UserError,
    match="returned nan for example 1, prompt 'q', response 'b': every reward "
    "must be finite; config.reward.on_nan='skip' leaves out",
  ):
    call([0.5, NAN])
  skip = functions.Limit(allow_nan=True)
  np.testing.assert_array_equal(call([0.5, NAN], limit=skip), np.float32([0.5, NAN]))
  np.testing.assert_array_equal(call([[0.5], [NAN]], limit=skip)[1, :1], np.float32([NAN]))
  assert (
    "returned NaN for 1 of 2 responses, which are skipped; the first is example 1, prompt 'q'"
    in caplog.text
  )
  for settings in ({}, {'limit': skip}):
    with pytest.raises(errors.UserError, match='returned inf for example 0.*must be finite. '):
      call([float('inf'), 0.5], **settings)
  reward = scorers.config()
  reward.update({'function': 'test_nan:no_number', 'on_nan': 'zero'})
  with pytest.raises(
    errors.UserError, match="config.reward.on_nan='zero' must be one of stop, skip"
  ):
    scorers.validate(reward)

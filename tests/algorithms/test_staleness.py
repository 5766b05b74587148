"""Rollouts sampled ahead: by which policy, what is saved, and their importance weights."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import advantages
from rlhf_jax import errors
from rlhf_jax import forward
from rlhf_jax import loop
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import setup
from rlhf_jax.rollout import actor as actor_lib
from rlhf_jax.rollout import sampler
import tiny

SLOW = 0.3  # duration of a rollout in seconds


def config_of(world, staleness, **rl):
  config = tiny.grpo(world)
  config.sampling.staleness = staleness
  config.rl.update(rl)
  return config


def assert_close(a, b, **tolerance):
  for x, y in zip(a, b, strict=True):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, **tolerance), x, y)


def test_without_updates_it_changes_nothing(world):
  """With learning rate 0 the older policy is the same, and so are prompts and keys."""
  found = []
  for staleness in (0, 1):
    config = config_of(world, staleness)
    config.optim.learning_rate = 0.0
    found.append(tiny.train(grpo, config, 3)[2])
  assert_close(*found, rtol=0, atol=0)


def test_the_policy_before_the_last_update_samples(world):
  config = config_of(world, 1, kl_coef=0.0)
  tokenizer = setup.load_tokenizer(config)
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  policies, keys, rollouts, indices = [], [], [], []
  with jax.set_mesh(mesh):
    learner, state = grpo.create(config, mesh)
    for _ in range(4):
      policies.append(jax.tree.map(jnp.copy, state.params['policy']))
      keys.append(types.step_keys(state)[0])
      batch, _ = learner.next_batch(state, timed=False)
      rollouts.append(batch[1])
      state, metrics = learner.train_step(state, *batch)
      indices.append([s['prompt'] for s in learner.samples(metrics)])
    model = setup.load_policy(config.model, tokenizer, mesh, config.seed)[0]
    sample = sampler.make(
      model, on_policy_config.make_sampling(config, tokenizer), samples=config.sampling.samples
    )
    _, iterator, _ = on_policy.read_prompts(config, tokenizer, model)
    for step in range(4):
      prompts = sharding.put_rows(next(iterator)[0], mesh)
      expected = sample(policies[max(step - 1, 0)], prompts, keys[step])
      np.testing.assert_array_equal(rollouts[step].tokens, expected.tokens)
      np.testing.assert_array_equal(rollouts[step].logprobs, expected.logprobs)
    newest = sample(policies[3], prompts, keys[3])
    assert (np.asarray(newest.tokens) != rollouts[3].tokens).any()


def test_the_device_samples_while_the_host_scores():
  @jax.jit
  def sample(trips, prompts, key):
    del key
    busy = jax.lax.fori_loop(0, trips, lambda _, x: jnp.tanh(x @ x) + 1e-3, jnp.ones((64, 64)))
    mask = jnp.ones((2, 3), bool) & (busy[0, 0] > -2)
    tokens = jnp.concatenate([prompts.tokens, jnp.ones((2, 3), jnp.int32)], axis=1)
    return types.Rollout(tokens, tokens > 0, mask, jnp.zeros((2, 3)))

  prompts = types.Prompts(np.ones((2, 2), np.int32), np.ones((2, 2), bool))

  def measure(trips):
    started = time.perf_counter()
    jax.block_until_ready(sample(trips, prompts, None))
    return time.perf_counter() - started

  trips = 1000
  measure(trips)  # compiles
  while min(measure(trips) for _ in range(3)) < SLOW:
    trips *= 2
  ready = []

  def score(rollout, examples):
    ready.append((rollout.tokens.is_ready(), actor._ahead[0].tokens.is_ready()))
    return np.ones(len(examples), np.float32)

  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  batches = iter([(prompts, [0, 1])] * 3)
  with jax.set_mesh(mesh):
    actor = actor_lib.Actor(['one', 'two'], batches, sample, score, mesh)
    keys = jax.random.split(jax.random.key(0))
    for _ in range(2):
      _, _, found = actor(trips, keys[0], next_key=keys[1], timed=True)
  assert ready[1] == (True, False)
  assert 'tokens_per_second/rollout' not in found and found['seconds/rollout'] > SLOW / 2


def test_a_fork_samples_anew(world, tmp_path):
  """Its rewards, data and sampling may differ, and the other run may not have sampled ahead."""
  config = config_of(world, 1)
  config.steps, config.checkpoint_every = 2, 2
  loop.run(config, tmp_path / 'run')
  for staleness in (0, 1):
    other = config.copy_and_resolve_references()
    other.sampling.update({'staleness': staleness, 'temperature': 0.5})
    other.steps = 3
    loop.run(other, tmp_path / f'fork{staleness}', fork_of=tmp_path / 'run')
  scores = [
    metrics_lib.read(tmp_path / f'fork{staleness}')[-1]['objective/scores'] for staleness in (0, 1)
  ]
  assert scores[0] == scores[1]


def test_a_saved_rollout_is_the_same_after_json(world):
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  make = lambda: actor_lib.Actor([], iter([]), None, None, mesh)
  rng = np.random.default_rng(0)
  rollout = types.Rollout(
    *(jnp.asarray(rng.integers(0, 9, (3, 5)), dtype) for dtype in (jnp.int32, bool)),
    jnp.asarray(rng.integers(0, 2, (3, 2)), bool),
    jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
  )
  first, second = make(), make()
  assert first.get_state() is None
  first._ahead = rollout, np.arange(3)
  second.set_state(json.loads(json.dumps(first.get_state())))
  jax.tree.map(np.testing.assert_array_equal, second._ahead, first._ahead)
  second.set_state(None)
  assert second.get_state() is None


def random_experience(rng, shape=(4, 7)):
  """Returns ragged responses with holes, their logprobs by three policies, and advantages."""
  mask = rng.random(shape) < 0.7
  draw = lambda scale: np.where(mask, rng.normal(size=shape) * scale - 1, 0).astype(np.float32)
  sampled, old, new = draw(0.5), draw(0.5), draw(0.5)
  rollout = types.Rollout(np.zeros(shape, np.int32), mask, mask, sampled)
  experience = types.Experience(
    tokens=None,
    mask=None,
    response_mask=mask,
    step_mask=mask,
    logprobs=old,
    advantages=np.where(mask, rng.normal(size=shape), 0).astype(np.float32),
    values=draw(1.0),
    returns=draw(1.0),
  )
  outputs = forward.Outputs(jnp.asarray(new), jnp.zeros(shape), jnp.asarray(draw(1.0)))
  return rollout, experience, outputs


@pytest.mark.parametrize('algorithm', [ppo, grpo])
def test_each_token_has_its_importance_weight(algorithm):
  """The policy loss and both metrics against a loop; whitening by minibatch comes before."""
  rollout, experience, outputs = random_experience(np.random.default_rng(1))
  mask, cap = rollout.response_mask, 1.2
  settings = algorithm.Settings(
    microbatch_size=0,
    temperature=1.0,
    samples=2,
    max_new_tokens=7,
    end_tokens=(),
    end_after=0,
    kl_coef=0.0,
    dual_clip=1.5,
    **{'whiten_advantages': 'minibatch'} if algorithm is ppo else {'normalize': 'token'},
  )
  state = types.TrainState(0, None, {}, {}, {'kl_coef': 0.0, 'reward_moments': jnp.zeros(3)})
  goal = algorithm.objective(state, rollout, jnp.zeros(len(mask)), settings=settings)
  goal = goal._replace(prepare=lambda outputs, fixed: (experience, {}, {'other': 1.0}))
  weighted = on_policy.weigh_by_importance(goal, rollout, cap=cap)
  prepared, _, metrics = weighted.prepare(outputs, None)
  counts = update.Counts(mask.sum(), mask.sum(), len(mask))
  _, found = weighted.loss(outputs, weighted.minibatch(prepared), counts)

  values = experience.advantages
  if algorithm is ppo:
    values = references.whiten(values.tolist(), mask.tolist(), shift_mean=True, bessel=False)
  losses, weights = [], []
  for i, t in np.argwhere(mask):
    weights.append(min(np.exp(experience.logprobs[i, t] - rollout.logprobs[i, t]), cap))
    token, *_ = references.policy_loss(
      float(outputs.logprobs[i, t]),
      float(experience.logprobs[i, t]),
      float(values[i][t]),
      clip_low=0.2,
      clip_high=0.2,
      dual_clip=1.5,
    )
    losses.append(weights[-1] * token)
  assert found['policy/loss'] == pytest.approx(np.mean(losses), rel=1e-5)
  assert metrics['policy/importance_weight'] == pytest.approx(np.mean(weights), rel=1e-5)
  assert metrics['policy/importance_capped'] == pytest.approx(np.mean(np.equal(weights, cap)))
  assert 0 < metrics['policy/importance_capped'] < 1 and metrics['other'] == 1.0


def test_the_weights_of_the_sampling_policy_are_one():
  logprobs = jnp.log(jnp.array([[0.5, 0.25], [1e-6, 1.0]]))
  np.testing.assert_array_equal(
    advantages.importance_weights(logprobs, logprobs, cap=2.0), np.ones((2, 2))
  )
  huge = advantages.importance_weights(logprobs, logprobs - 1e3, cap=2.0)
  np.testing.assert_array_equal(huge, np.full((2, 2), 2.0))


@pytest.mark.parametrize('key, value', [('sampling.staleness', 2), ('rl.importance_cap', 0.0)])
def test_a_wrong_value_is_an_error(key, value, world):
  config = tiny.grpo(world)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError, match=f'config.{key}={value}'):
    build.validate(config, 1)

"""The actor's times cover one part each, and it waits for the device only if timed."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import metrics
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import setup
from rlhf_jax.models import hf
from rlhf_jax.rollout import actor as actor_lib
import tiny

SLOW = 0.3  # duration of an update in seconds; other parts take milliseconds
PARAMS = np.ones((64, 64), np.float32)


@jax.jit
def work(params, trips):
  """Returns work that runs asynchronously; XLA runs cheaper programs and callbacks at once."""
  return jax.lax.fori_loop(0, trips, lambda _, x: jnp.tanh(x @ x) + 1e-3, params)


@pytest.fixture(scope='module')
def update():
  """A train step that keeps the device busy for about SLOW seconds."""
  trips, seconds = 1000, 0.0
  while seconds < SLOW:
    trips *= 2
    started = time.perf_counter()
    work(PARAMS, trips).block_until_ready()
    seconds = time.perf_counter() - started

  def step(params, *batch, times=1):
    del batch
    params = work(params, times * trips)
    return params, {'loss': params[0, 0]}

  return step


@pytest.fixture
def actor():
  """Returns an actor that samples two responses of three tokens, and scores them at once."""
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  prompts = types.Prompts(np.ones((2, 2), np.int32), np.ones((2, 2), bool))

  @jax.jit
  def sample(params, prompts, key):
    del key
    mask = jnp.ones((2, 3), bool) & (params[0, 0] > -2)  # depends on the parameters
    tokens = jnp.concatenate([prompts.tokens, jnp.ones((2, 3), jnp.int32)], axis=1)
    return types.Rollout(tokens, tokens > 0, mask, jnp.zeros((2, 3)))

  def batches():
    while True:
      yield prompts, [0, 1]

  score = lambda rollout, examples: np.ones(len(examples), np.float32)
  with jax.set_mesh(mesh):
    made = actor_lib.Actor(['one', 'two'], batches(), sample, score, mesh)
    made(PARAMS, jax.random.key(0), timed=True)  # compiles
    yield made


def test_the_rollouts_time_excludes_the_previous_update(actor, update):
  params, _, seconds = metrics.take_step(update, PARAMS, (), timed=False)
  started = time.perf_counter()
  _, _, found = actor(params, jax.random.key(0), timed=True)
  waited = time.perf_counter() - started
  assert waited > SLOW / 2, 'the update was still running'
  assert (
    seconds == {}
    and found['seconds/rollout'] < waited / 2
    and found['seconds/scoring'] < waited / 2
  )
  assert found['tokens_per_second/rollout'] == pytest.approx(6 / found['seconds/rollout'])


def test_the_updates_time_covers_only_the_update(actor, update):
  started = time.perf_counter()
  params, _ = update(PARAMS, times=5)  # still runs when the next call starts
  rollout, scores, _ = actor(params, jax.random.key(0), timed=False)
  params, _, found = metrics.take_step(update, params, (rollout, scores), timed=True)
  assert params.is_ready()
  # A sixth of the time, up to the noise of a shared machine.
  assert 0 < found['seconds/update'] < (time.perf_counter() - started) / 2


def test_a_step_that_is_not_timed_does_not_wait(actor, update):
  params, _ = update(PARAMS, times=4)
  rollout, _, found = actor(params, jax.random.key(0), timed=False)
  assert not params.is_ready()
  assert found == {} and jax.block_until_ready(rollout) is not None


def test_rewards_see_the_prompts_that_the_policy_sees(world):
  config = tiny.ppo(world)
  config.data.update({'on_long': 'truncate_left', 'max_prompt_length': 3})
  config.sampling.samples = 2
  tokenizer = setup.load_tokenizer(config)
  model, params = hf.load(world / 'model')
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  scored = []

  def score(rollout, examples):
    scored.extend(examples)
    return np.zeros(len(examples), np.float32)

  with jax.set_mesh(mesh):
    examples, iterator, _ = on_policy.read_prompts(config, tokenizer, model)
    act = on_policy.make_actor(config, tokenizer, model, examples, iterator, score, mesh)
    rollout, _, _ = act(params, jax.random.key(0), timed=False)
  read = zip(np.asarray(rollout.tokens)[:, :3], np.asarray(rollout.mask)[:, :3])
  seen = [' '.join(f'w{token - 4}' for token in row[mask][1:]) for row, mask in read]  # without BOS
  assert [example.prompt for example in scored] == seen
  whole = [examples[example.metadata['number']].prompt for example in scored]
  assert all(text.endswith(left) for text, left in zip(whole, seen))
  assert sum(text != left for text, left in zip(whole, seen)) > 4
  assert [s['prompt'] for s in act.samples(tokenizer, {})] == seen

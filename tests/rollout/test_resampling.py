"""Dynamic sampling: against a plain loop over groups, what the reward reads, and its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import grpo
from rlhf_jax.rollout import actor as actor_lib
from rlhf_jax.rollout import resampling

B, N, P, R = 6, 2, 1, 3
PROMPTS = 40


class Reward:
  """Scores by the prompt's number and the response's place in its group; keeps what it read."""

  def __init__(self, equal):
    self.equal, self.read = equal, []

  def __call__(self, rollout, examples):
    self.read += [(number, tuple(row)) for number, row in zip(examples, np.asarray(rollout.tokens))]
    scores = [
      float(number) if number in self.equal else number + 0.5 * (i % N)
      for i, number in enumerate(examples)
    ]
    scores = np.asarray(scores, np.float32)
    return types.Scores(jnp.asarray(scores), {'half': jnp.asarray(scores / 2)})


@jax.jit
def generate(params, prompts, key):
  """The prompt's number, then random tokens."""
  tokens = jnp.repeat(prompts.tokens, N, axis=0)
  new = jax.random.randint(key, (B, R), 0, 1000)
  tokens = jnp.concatenate([tokens, new], axis=1)
  return types.Rollout(tokens, tokens >= 0, jnp.ones((B, R), bool), params * jnp.ones((B, R)))


def make_actor(equal, mesh):
  """An actor whose prompts are the numbers from 0 on, and its reward."""

  def batches():
    for first in range(0, PROMPTS, B // N):
      numbers = np.arange(first, first + B // N)
      yield types.Prompts(numbers[:, None].astype(np.int32), np.ones((B // N, P), bool)), numbers

  reward = Reward(equal)
  return actor_lib.Actor(list(range(PROMPTS)), batches(), generate, reward, mesh, samples=N), reward


def run(equal, limit, *, timed=True):
  """One rollout; returns the actor, its reward, the rollout, the scores and the metrics."""
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  settings = grpo.Settings(
    microbatch_size=0,
    temperature=1.0,
    samples=N,
    max_new_tokens=R,
    end_tokens=(),
    end_after=0,
    drop_equal_groups=True,
    max_resamples=limit,
  )
  with jax.set_mesh(mesh):
    actor, reward = make_actor(equal, mesh)
    out = resampling.sample(
      actor, jnp.float32(-1.0), jax.random.key(3), timed=timed, resampling=settings.resampling
    )
  return actor, reward, *out


def loop(equal, limit):
  """Numbers of the prompts of the final batch, those still equal, and the attempts."""
  prompts = iter(range(PROMPTS))
  batch, attempts = [next(prompts) for _ in range(B // N)], 1
  while any(number in equal for number in batch) and attempts <= limit:
    good = [number for number in [next(prompts) for _ in range(B // N)] if number not in equal]
    for place, number in enumerate(batch):
      if number in equal and good:
        batch[place] = good.pop(0)
    attempts += 1
  return batch, [number for number in batch if number in equal], attempts


CASES = {
  'none equal': (set(), 3),
  'one equal': ({1}, 3),
  'the next is equal too': ({0, 2, 3, 4}, 5),
  'all equal at first': ({0, 1, 2, 3, 4, 5, 7}, 5),
  'the limit': ({0, 2, 3, 4, 5, 6, 7}, 2),
  'always equal': (set(range(PROMPTS)), 3),
}


@pytest.mark.parametrize('name', CASES)
def test_groups_are_those_of_a_loop(name):
  equal, limit = CASES[name]
  actor, reward, rollout, scores, metrics = run(equal, limit)
  batch, left, attempts = loop(equal, limit)
  numbers = [number for number in batch for _ in range(N)]
  np.testing.assert_array_equal(rollout.tokens[:, 0], numbers)
  assert metrics['groups/attempts'] == attempts
  expected = [n if n in equal else n + 0.5 * (i % N) for i, n in enumerate(numbers)]
  np.testing.assert_array_equal(scores, np.float32(expected))
  assert metrics['reward/half'] == pytest.approx(np.mean(expected) / 2)
  assert len(left) == sum(number in equal for number in batch)
  # Examples, responses and scores of a row stay together, and the reward has read each once.
  examples, scored, parts = actor.last_batch
  assert examples == numbers and parts.total is scores
  np.testing.assert_array_equal(scored.tokens, rollout.tokens)
  assert len(reward.read) == attempts * B == len(set(reward.read))
  assert {(n, tuple(row)) for n, row in zip(numbers, np.asarray(rollout.tokens))} <= set(
    reward.read
  )


def test_attempts_have_keys_of_their_own_and_the_same_when_repeated():
  equal = {0, 1, 2}
  first, again = (np.asarray(run(equal, 3, timed=False)[2].tokens) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  expected = jax.random.randint(jax.random.fold_in(jax.random.key(3), 1), (B, R), 0, 1000)
  np.testing.assert_array_equal(first[:, 1:], expected)
  assert run(equal, 3, timed=False)[4] == {}


def test_groups_of_scores_that_are_all_skipped_are_replaced():
  """A NaN leaves one response, whose group has nothing to compare with; two leave none."""
  nan = np.float32(np.nan)
  rollout = types.Rollout(
    jnp.zeros((8, P + R), jnp.int32),
    jnp.ones((8, P + R), bool),
    jnp.ones((8, R), bool),
    jnp.zeros((8, R)),
  )
  settings = grpo.Settings(
    microbatch_size=0, temperature=1.0, samples=2, max_new_tokens=R, end_tokens=(), end_after=0
  )
  scores = jnp.array([1.0, nan, nan, nan, 2.0, 2.0, 1.0, 3.0])
  found = grpo.has_equal_scores(rollout, scores, settings=settings)
  assert found.tolist() == [True] * 6 + [False] * 2

"""In bfloat16, a learning rate of 0 leaves the ratio at 1, for all shapes of the passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import experience as experience_lib
from rlhf_jax import forward as forward_lib
from rlhf_jax import lengths
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import ppo
import tiny

# Large enough that XLA, without compiler options, rounds differently for 32 and for 16 sequences.
WIDE = tiny.LLAMA | {'hidden_size': 64, 'intermediate_size': 64, 'max_position_embeddings': 64}


@pytest.mark.parametrize(
  'minibatches, behaviour',
  [(1, 'forward'), (2, 'forward'), pytest.param(2, 'minibatch', marks=pytest.mark.slow)],
)
def test_nothing_is_learnt_at_a_rate_of_zero(minibatches, behaviour, world, tmp_path):
  """If policy, reference and behaviour policy are equal, the ratio is 1 and the KL is 0."""
  tiny.write_model(tmp_path / 'model', WIDE)
  config = tiny.ppo(world)
  config.model.update({'path': f'{tmp_path}/model', 'dtype': 'bfloat16'})
  config.batch_size, config.sampling.max_new_tokens = 32, 40
  config.optim.learning_rate, config.critic.kind = 0.0, 'trunk'
  config.rl.update({'minibatches': minibatches, 'behaviour': behaviour})
  _, _, (metrics,), _ = tiny.train(ppo, config, 1)
  assert metrics['response/length'] > 20
  for name in ('policy/first_ratio', 'policy/ratio'):
    assert abs(metrics[name] - 1) < 1e-6, name
  assert 2 * metrics['policy/approxkl'] < 1e-10  # the mean squared log-ratio
  assert abs(metrics['objective/kl']) < 1e-5  # nats of a response
  assert metrics['policy/sampler_gap'] < 2e-4  # nats a token


class Pieces(forward_lib.Forward):
  """In place of a model: log-probabilities that identify all sequences of a pass."""

  def __init__(self):
    pass

  def fixed(self, params, rows):
    del params, rows
    return forward_lib.Fixed(None, None, None)

  def outputs(self, params, rows, frozen_states):
    del params, frozen_states
    together = jnp.sum(2.0 ** rows.tokens[:, 0])  # the first token is the sequence's number
    return forward_lib.Outputs(jnp.full(rows.response_mask.shape, together), None)


@pytest.mark.parametrize('microbatch_size', [0, 2, 4])
def test_passes_before_the_update_are_those_of_the_first_epoch(microbatch_size):
  """Minibatches have 4 sequences; microbatches of 2 hold the shorter or the longer ones."""
  rng = np.random.default_rng(0)
  filled = rng.permutation(np.arange(5, 17))
  mask = np.arange(64) < 4 * filled[:, None]
  tokens = np.zeros((12, 70), np.int32) + np.arange(12, dtype=np.int32)[:, None]
  rollout = types.Rollout(
    tokens, np.ones_like(tokens, bool), mask, np.zeros(mask.shape, np.float32)
  )
  first = rng.permutation(12).reshape(3, 4)
  schedule = update.Schedule(
    minibatches=3, microbatch_size=microbatch_size, length_buckets=4, before_like_first=True
  )
  _, outputs = update.before_update(
    {}, rollout, jnp.asarray(mask), forward=Pieces(), schedule=schedule, first=jnp.asarray(first)
  )
  for minibatch in first:
    rows = sorted(minibatch, key=lambda row: filled[row])
    size = microbatch_size or 4
    for piece in (rows[i : i + size] for i in range(0, 4, size)):
      # Cut to what its longest sequence fills of 16, 32, 48 or 64 slots; a whole minibatch is not.
      slots = 64 if size == 4 else 16 * -(-max(filled[row] for row in piece) // 4)
      wanted = np.where(np.arange(64) < slots, sum(2.0**row for row in piece), 0.0)
      for row in piece:
        np.testing.assert_array_equal(outputs.logprobs[row], wanted)
  assert lengths.bucket_lengths(64, 4) == [16, 32, 48, 64]


def test_sequences_that_are_left_out_do_not_change_the_passes_of_the_first_epoch():
  """As in GRPO without groups of equal scores; the passes are told apart by their sequences."""
  rng = np.random.default_rng(0)
  mask = np.arange(64) < 4 * rng.permutation(np.arange(5, 17))[:, None]
  tokens = np.zeros((12, 70), np.int32) + np.arange(12, dtype=np.int32)[:, None]
  rollout = types.Rollout(
    jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.asarray(mask), jnp.zeros(mask.shape)
  )
  keep = jnp.asarray(mask & (np.arange(12) % 3 > 0)[:, None])

  def prepare(outputs, fixed):
    experience = experience_lib.make_experience(outputs, fixed, rollout, keep, behaviour='')
    return experience.replace(response_mask=keep), {}, {}

  def loss(outputs, experience, counts):
    gaps = jnp.where(experience.response_mask, outputs.logprobs - experience.logprobs, 0.0)
    return jnp.zeros(()), {'gap': jnp.sum(jnp.abs(gaps))}

  _, metrics = update.run(
    types.TrainState(jnp.int32(0), jax.random.key(0), {}, {}, {}),
    rollout,
    forward=Pieces(),
    objective=update.Objective(prepare, jnp.asarray(mask), loss),
    optimizers={},
    schedule=update.Schedule(
      minibatches=3, microbatch_size=2, length_buckets=4, before_like_first=True
    ),
  )
  assert metrics['gap'] == 0

"""lengths.py by loops; PPO in microbatches of similar length equals PPO on the full batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import forward
from rlhf_jax import lengths
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import heads
import tiny

B, P, R = 8, 5, 64
LLAMA = tiny.LLAMA | {'max_position_embeddings': P + R}


def test_stages_end_with_the_longest_response():
  for slots in range(1, 200):
    for most in (1, 3, 4):
      buckets = lengths.bucket_lengths(slots, most)
      assert buckets[-1] == slots and len(buckets) <= most and buckets == sorted(set(buckets))
      assert len(buckets) == 1 or buckets[0] >= 16


def test_used_lengths_and_their_order():
  mask = np.random.default_rng(0).random((20, 7)) < 0.3
  expected = [max([slot + 1 for slot in range(7) if row[slot]], default=0) for row in mask]
  assert lengths.used_lengths(jnp.asarray(mask)).tolist() == expected
  assert [expected[i] for i in lengths.order_by_length(jnp.asarray(mask))] == sorted(expected)


@pytest.mark.parametrize('n', [2, 5])
def test_groups_are_sorted_by_their_longest_and_stay_in_order(n):
  mask = np.random.default_rng(1).random((20, 9)) < 0.2
  order = lengths.order_by_length(jnp.asarray(mask), n).tolist()
  used = lengths.used_lengths(jnp.asarray(mask)).tolist()
  groups = [order[i : i + n] for i in range(0, 20, n)]
  for group in groups:
    assert group == list(range(group[0], group[0] + n)) and group[0] % n == 0
  longest = [max(used[i] for i in group) for group in groups]
  assert longest == sorted(longest) and sorted(order) == list(range(20))


def test_members_of_groups():
  groups = jnp.array([[2, 0], [1, 3]])
  assert lengths.group_members(groups, 3).tolist() == [[6, 7, 8, 0, 1, 2], [3, 4, 5, 9, 10, 11]]
  np.testing.assert_array_equal(lengths.group_members(groups, 1), groups)


@pytest.mark.parametrize('length', [0, 1, 15, 16, 17, 32, 47, 63, 64])
def test_rows_are_cut_to_the_next_stage(length):
  mask = jnp.arange(R)[None] < jnp.array([length, length // 2])[:, None]
  rows = {'tokens': jnp.arange(2 * (P + R)).reshape(2, P + R), 'mask': mask}
  seen = []

  def total(rows):
    seen.append(rows['mask'].shape[1])
    assert rows['tokens'].shape[1] == rows['mask'].shape[1] + P
    response = rows['tokens'][:, -rows['mask'].shape[1] :]
    return jnp.int32(rows['mask'].shape[1]), jnp.sum(jnp.where(rows['mask'], response, 0))

  slots, found = jax.jit(lambda rows, mask: lengths.run_bucketed(total, rows, mask, 4))(rows, mask)
  assert sorted(seen) == [16, 32, 48, 64]
  assert slots == next(bucket for bucket in (16, 32, 48, 64) if bucket >= length)
  assert found == np.sum(np.where(mask, rows['tokens'][:, P:], 0))


def episode(seed):
  """Returns a rollout with responses in each of the four buckets, not sorted by length."""
  rng = np.random.default_rng(seed)
  prompt, response = rng.integers(1, P + 1, B), np.array([40, 3, 64, 16, 17, 1, 33, 9])
  place = np.arange(P + R)[None]
  mask = (place >= P - prompt[:, None]) & (place < P + response[:, None])
  tokens = np.where(mask, rng.integers(4, tiny.VOCAB, mask.shape), tiny.PAD)
  tokens[np.arange(B)[::2], P + response[::2] - 1] = tiny.EOS
  rollout = types.Rollout(
    tokens=jnp.asarray(tokens, jnp.int32),
    mask=jnp.asarray(mask),
    response_mask=jnp.asarray(mask[:, P:]),
    logprobs=jnp.where(mask[:, P:], -4.0, 0.0),
  )
  return rollout, jnp.asarray(rng.normal(size=B), jnp.float32)


@pytest.mark.parametrize(
  'position, critic, kl, rope',
  [
    ('after_end', 'separate', 'k1', None),
    ('eos', 'trunk', 'full', None),
    ('eos', 'trunk', 'k1', {'rope_type': 'dynamic', 'factor': 4.0}),
  ],
)
def test_ppo_is_the_same_whatever_is_cut(position, critic, kl, rope, world):
  """Two epochs, two sequences at a time, against all at once."""
  fields = LLAMA | ({'rope_scaling': rope, 'max_position_embeddings': 24} if rope else {})
  model = models.create(fields)
  config = tiny.ppo(world)
  config.rl.update(
    {'minibatches': 1, 'score_position': position, 'kl_estimator': kl, 'entropy_coef': 0.02}
  )
  policy, head = (
    model.init(jax.random.key(1)),
    heads.init_scalar(jax.random.key(2), model.width, scale='normal'),
  )
  value = {'head': head} | (
    {'backbone': model.init(jax.random.key(3))} if critic == 'separate' else {}
  )
  frozen = {'policy': {}, 'reference': jax.tree.map(lambda x: 1.1 * x, policy)}
  params = {'policy': policy, 'critic': value}
  optimizers = {name: optax.sgd(0.1) for name in params}
  state = types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(0),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    extra={'kl_coef': jnp.float32(0.2), 'reward_moments': jnp.zeros(3)},
  )
  handles = forward.Models(model, model if critic == 'separate' else None)
  rollout, scores = episode(4)

  def run(size, buckets):
    config.microbatch_size, config.rl.length_buckets = size, buckets
    return jax.jit(
      functools.partial(
        ppo.train_step,
        models=handles,
        optimizers=optimizers,
        settings=ppo.Settings.of(config, (tiny.EOS,)),
      )
    )(state, frozen, rollout, scores, None)

  whole, expected = run(0, 4)
  assert (
    max(
      float(jnp.max(jnp.abs(a - b)))
      for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(params))
    )
    > 1e-3
  )
  for parts, found in (run(2, 4), run(2, 1)):
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
      np.testing.assert_allclose(b, a, rtol=0, atol=2e-6)
    for name, metric in expected.items():
      np.testing.assert_allclose(found[name], metric, rtol=2e-4, atol=2e-5, err_msg=name)


def test_microbatches_are_cut_on_several_devices_too(world):
  """Sequences over 'data' and 'fsdp', parameters over 'fsdp' and 'tensor'."""
  model = models.create(LLAMA)
  config = tiny.ppo(world)
  config.microbatch_size, config.rl.minibatches = 4, 1
  handles, settings = forward.Models(model), ppo.Settings.of(config, (tiny.EOS,))
  policy, head = (
    model.init(jax.random.key(1)),
    heads.init_scalar(jax.random.key(2), model.width, scale='normal'),
  )
  params = {'policy': policy, 'critic': {'head': head}}
  optimizers = {name: optax.sgd(0.1) for name in params}
  rollout, scores = episode(4)

  def train(mesh):
    place = lambda tree: jax.device_put(tree, sharding.shardings(tree, model.rules, mesh))
    with jax.set_mesh(mesh):
      state = types.TrainState(
        step=jnp.int32(0),
        key=jax.random.key(0),
        params=place(params),
        opt_state={name: optimizers[name].init(params[name]) for name in params},
        extra={'kl_coef': jnp.float32(0.2), 'reward_moments': jnp.zeros(3)},
      )
      frozen = {'policy': {}, 'reference': place(jax.tree.map(lambda x: 1.1 * x, policy))}
      step = functools.partial(
        ppo.train_step, models=handles, optimizers=optimizers, settings=settings
      )
      rows = sharding.put_rows(jax.device_get((rollout, scores)), mesh)
      return jax.device_get(jax.jit(step)(state, frozen, *rows, None))

  one = train(sharding.make_mesh({}, devices=jax.devices()[:1]))
  eight = train(sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
  assert one[1]['policy/ratio'] != 1
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6),
    eight[0].params,
    one[0].params,
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), eight[1], one[1]
  )


def test_truncation_saves_work(world):
  """The compiled update of short responses runs on a quarter of the positions."""
  model = models.create(LLAMA)
  config = tiny.ppo(world)
  config.microbatch_size = 2
  settings = ppo.Settings.of(config, (tiny.EOS,))
  rollout, _ = episode(0)
  policy = model.init(jax.random.key(1))
  frozen = {'policy': {}, 'reference': policy}
  widths = []

  class Counting(type(model)):
    def unembed(self, params, hidden):
      jax.debug.callback(widths.append, hidden.shape[1])
      return super().unembed(params, hidden)

  handles = forward.Models(
    Counting(**{name: getattr(model, name) for name in model.__dataclass_fields__})
  )
  params = {
    'policy': policy,
    'critic': {'head': heads.init_scalar(None, model.width, scale='zero')},
  }
  jax.block_until_ready(
    jax.jit(
      lambda: tiny.before_update(params, frozen, rollout, models=handles, settings=settings)
    )()
  )
  jax.effects_barrier()
  # Sorted: 1 and 3, 9 and 16, 17 and 33, 40 and 64; policy and reference.
  assert sorted(map(int, widths)) == [16] * 4 + [48] * 2 + [64] * 2

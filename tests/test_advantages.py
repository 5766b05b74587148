"""advantages.py against arithmetic by hand and the loops of references.py on ragged rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import advantages as adv

CASES = 200
SHAPES = ((1, 1), (2, 5), (4, 8), (3, 13))  # few, so that few programs are compiled
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def ragged(case, *, least=1):
  """Returns a generator, row lengths [B] and mask [B, R] of a random case."""
  rng = np.random.default_rng(case)
  batch, slots = SHAPES[case % len(SHAPES)]
  lengths = rng.integers(least, slots + 1, batch)
  return rng, lengths, np.arange(slots) < lengths[:, None]


def normal(rng, mask, *, rubbish=np.nan):
  """Returns float32 numbers with garbage outside the mask."""
  scale = 10.0 ** rng.uniform(-1, 0.5)
  return np.where(mask, rng.normal(0, scale, mask.shape), rubbish).astype(np.float32)


@functools.cache
def jitted(fn, **settings):
  return jax.jit(functools.partial(fn, **settings))


# Hand-derived numbers.


def test_whiten_by_hand():
  # Real: 1, 2, 6. Mean 3, squared deviations 4 + 1 + 9 = 14: variance 14/3, or 14/2 = 7.
  x = jnp.array([[1.0, 2.0], [6.0, 99.0]])
  mask = jnp.array([[True, True], [True, False]])
  root = np.sqrt(14 / 3)
  close(adv.whiten(x, mask), [[-2 / root, -1 / root], [3 / root, 0]])
  root = np.sqrt(7)
  close(adv.whiten(x, mask, unbiased=True), [[-2 / root, -1 / root], [3 / root, 0]])
  close(
    adv.whiten(x, mask, unbiased=True, shift_mean=False),
    [[3 - 2 / root, 3 - 1 / root], [3 + 3 / root, 0]],
  )


def test_gae_by_hand():
  # Two tokens, r = (1, 2), V = (0.5, 0.25), gamma 0.5, lambda 0.5.
  # delta_1 = 2 + 0 - 0.25 = 1.75; delta_0 = 1 + 0.5 * 0.25 - 0.5 = 0.625.
  # A_1 = 1.75; A_0 = 0.625 + 0.25 * 1.75 = 1.0625. Returns: + V.
  advantages, returns = adv.gae(
    jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 0.25]]), gamma=0.5, lam=0.5
  )
  close(advantages, [[1.0625, 1.75]])
  close(returns, [[1.5625, 2.0]])


def test_kl_estimators_by_hand():
  # log ratio ln 2: k1 0.693147, k2 0.240227, k3 = 1/2 - 1 + ln 2 = 0.193147.
  p, q = jnp.array([[np.log(0.5)]]), jnp.array([[np.log(0.25)]])
  for estimator, expected in [
    ('k1', 0.69314718),
    ('k2', 0.24022651),
    ('k3', 0.19314718),
    ('abs', 0.69314718),
  ]:
    close(adv.kl_estimate(p, q, estimator), [[expected]])
  # With the sign reversed: k1 -0.693147, k3 = 2 - 1 - ln 2 = 0.306853.
  close(adv.kl_estimate(q, p, 'k1'), [[-0.69314718]])
  close(adv.kl_estimate(q, p, 'k3'), [[0.30685282]])


@pytest.mark.parametrize('controller', ['adaptive', 'adaptive_per_token'])
def test_responses_that_are_skipped_are_no_episodes_of_the_kl(controller):
  kl, mask = jnp.full((4, 2), 3.0), jnp.array([[1, 1], [1, 1], [0, 0], [0, 0]], bool)
  next_coef = functools.partial(
    adv.next_kl_coef, 0.1, controller=controller, target=5.0, horizon=100.0
  )
  assert next_coef(kl, mask) == next_coef(kl[:2], mask[:2]) != 0.1
  assert next_coef(kl, mask & False) == jnp.float32(0.1)


def test_adaptive_kl_by_hand():
  kl = jnp.array([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  # Sums 3 and 4, mean 3.5 nats a sequence. Target 3.2: error 0.09375; 2 episodes of 100.
  sequence = functools.partial(
    adv.next_kl_coef, 0.1, kl, mask, controller='adaptive', horizon=100.0
  )
  close(sequence(target=3.2), 0.1 * (1 + 0.09375 * 2 / 100))
  close(sequence(target=1.0), 0.1 * (1 + 0.2 * 2 / 100))  # error 2.5, clipped to 0.2
  close(sequence(target=35.0), 0.1 * (1 - 0.2 * 2 / 100))  # error -0.9, clipped to -0.2
  # Mean over the 3 tokens 7/3. Target 2: error 1/6.
  close(
    adv.next_kl_coef(0.1, kl, mask, controller='adaptive_per_token', target=2.0, horizon=100.0),
    0.1 * (1 + 0.1 / 6),
  )
  assert adv.next_kl_coef(0.1, kl, mask, controller='fixed', target=2.0, horizon=1.0) == 0.1


def test_score_positions_by_hand():
  mask = jnp.array([[True, False, False], [True, True, False], [True, True, True]])
  for position, slots in [('last', [2, 2, 2]), ('after_end', [1, 2, 2]), ('eos', [0, 1, 2])]:
    np.testing.assert_array_equal(adv.score_index(mask, position), slots)
    rewards = adv.token_rewards(
      jnp.array([5.0, 6.0, 7.0]), jnp.ones((3, 3)), 0.5, mask, position=position
    )
    expected = np.where(mask, -0.5, 0.0)
    for row, (slot, score) in enumerate(zip(slots, [5, 6, 7])):
      expected[row, slot] += score
    close(rewards, expected)
  np.testing.assert_array_equal(
    adv.step_mask(mask, 'after_end'), [[True, True, False], [True, True, True], [True, True, True]]
  )


def test_score_positions_behind_holes():
  mask = jnp.array([[True, False, True, False], [False, True, False, True]])
  for position, slots in [('last', [3, 3]), ('after_end', [3, 3]), ('eos', [2, 3])]:
    np.testing.assert_array_equal(adv.score_index(mask, position), slots)
  empty = jnp.zeros((1, 4), bool)
  for position, slot in [('last', 3), ('after_end', 0), ('eos', 0)]:
    assert adv.score_index(empty, position)[0] == slot


def test_a_fractional_score_is_not_rounded():
  rewards = adv.token_rewards(
    jnp.array([0.75]), jnp.zeros((1, 2)), 0.1, jnp.array([[True, True]]), position='eos'
  )
  assert rewards.dtype == jnp.float32
  close(rewards, [[0.0, 0.75]])
  with pytest.raises((AssertionError, TypeError)):  # integers could be truncated
    adv.token_rewards(
      jnp.array([1]), jnp.zeros((1, 2)), 0.1, jnp.array([[True, True]]), position='eos'
    )


def test_missing_eos_by_hand():
  scores, ended = jnp.array([2.0, 2.0]), jnp.array([True, False])
  close(adv.apply_missing_eos(scores, ended, mode='none', value=-1.0), [2, 2])
  close(adv.apply_missing_eos(scores, ended, mode='replace', value=-1.0), [2, -1])
  close(adv.apply_missing_eos(scores, ended, mode='subtract', value=1.0), [2, 1])


def test_group_advantages_by_hand():
  # Two groups of three: 1, 2, 6 (mean 3, squares 4 + 1 + 9 = 14, variance 14 / 2 = 7) and
  # 0, 0, 3 (mean 1, squares 1 + 1 + 4 = 6, variance 6 / 2 = 3).
  scores = jnp.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
  centred = np.array([-2, -1, 3, -1, -1, 2])
  close(adv.group_advantages(scores, 3, scale='none'), centred)
  root = np.sqrt([7, 7, 7, 3, 3, 3])
  close(adv.group_advantages(scores, 3, scale='group'), centred / (root + 1e-4))
  # The batch: sum 12, mean 2, squares 1 + 0 + 16 + 4 + 4 + 1 = 26, variance 26 / 5 = 5.2. It is
  # the variance of the scores, not of what is left after the groups' means, which is 20 / 5.
  close(adv.group_advantages(scores, 3, scale='batch'), centred / (np.sqrt(5.2) + 1e-4))


def test_equal_groups_by_hand():
  # In float32 the mean of three times 0.1 is not 0.1, so their standard deviation is not 0.
  scores = jnp.array([0.1, 0.1, 0.1, 1.0, 1.0, 0.0, -2.0, -2.0, -2.0])
  assert adv.equal_groups(scores, 3).tolist() == [True] * 3 + [False] * 3 + [True] * 3
  assert np.abs(adv.group_advantages(scores, 3, scale='group')[:3]).max() < 1e-3


def test_best_and_worst_agree_with_loops():
  for case in range(CASES):
    rng = np.random.default_rng(case)
    n, prompts = [(2, 1), (2, 5), (4, 3), (7, 2)][case % 4]
    scores = rng.integers(0, 4, n * prompts).astype(np.float32)  # with ties
    kept = rng.random(n * prompts) < 0.7
    expected = references.best_and_worst(scores, n, kept)
    assert jitted(adv.best_and_worst, n=n)(scores, kept=kept).tolist() == expected
    every = references.best_and_worst(scores, n, np.ones_like(kept))
    assert jitted(adv.best_and_worst, n=n)(scores).tolist() == every


def test_overlong_penalty_by_hand():
  # DAPO's numbers: no penalty up to 16,384 tokens; 18,432 is halfway to 20,480.
  lengths = jnp.array([0, 16384, 18432, 20480, 30000])
  close(adv.overlong_penalty(lengths, max_length=20480, cache=4096), [0, 0, -0.5, -1, -1])
  for cache in (0, 11):
    with pytest.raises(ValueError, match='cache'):
      adv.overlong_penalty(lengths, max_length=10, cache=cache)


@pytest.mark.parametrize('n', [0, 1, 3])
def test_groups_that_do_not_fill_the_batch_are_errors(n):
  with pytest.raises(ValueError, match='divide the batch'):
    adv.group_advantages(jnp.zeros(4), n, scale='none')
  with pytest.raises(ValueError, match='divide the batch'):
    adv.equal_groups(jnp.zeros(4), n)


def test_unknown_names_are_errors():
  mask = jnp.ones((1, 1), bool)
  x = jnp.zeros((1, 1))
  with pytest.raises(ValueError, match='k4'):
    adv.kl_estimate(x, x, 'k4')
  with pytest.raises(ValueError, match='pid'):
    adv.next_kl_coef(0.1, x, mask, controller='pid', target=1.0, horizon=1.0)
  with pytest.raises(ValueError, match='first'):
    adv.score_index(mask, 'first')
  with pytest.raises(ValueError, match='drop'):
    adv.apply_missing_eos(x[0], mask[0], mode='drop', value=0.0)
  with pytest.raises(ValueError, match='prompt'):
    adv.group_advantages(jnp.zeros(4), 2, scale='prompt')


# Against loops, on random ragged rows with NaN behind the masks.


def test_masked_moments_and_whitening_agree_with_loops():
  for case in range(CASES):
    rng, _, mask = ragged(case, least=2 if case % len(SHAPES) else 1)
    x = normal(rng, mask)
    numbers = references.real(x, mask)
    close(jitted(adv.masked_mean)(x, mask), references.mean(numbers))
    for bessel in (False, True):
      if bessel and len(numbers) < 2:
        continue
      close(
        jitted(adv.masked_var, unbiased=bessel)(x, mask),
        references.variance(numbers, bessel=bessel),
      )
      for shift in (False, True):
        close(
          jitted(adv.whiten, shift_mean=shift, unbiased=bessel)(x, mask),
          references.whiten(x, mask, shift_mean=shift, bessel=bessel),
        )


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3', 'abs'])
def test_kl_estimators_agree_with_loops(estimator):
  estimate = jitted(adv.kl_estimate, estimator=estimator)
  for case in range(CASES):
    rng, _, mask = ragged(case)
    p, q = (rng.uniform(-4, 0, mask.shape).astype(np.float32) for _ in range(2))
    expected = np.vectorize(functools.partial(references.kl_estimate, estimator=estimator))
    close(estimate(p, q), expected(p.astype(np.float64), q.astype(np.float64)))


def test_kl_controllers_agree_with_loops():
  clipped = 0
  next_coef = jax.jit(adv.next_kl_coef, static_argnames='controller')
  for case in range(CASES):
    rng, _, mask = ragged(case)
    kl = normal(rng, mask)
    coef, target = np.float32(rng.uniform(0.01, 0.3)), float(rng.uniform(0.1, 3))
    args = (coef, kl, mask)
    found = next_coef(*args, controller='adaptive', target=target, horizon=50.0)
    expected = references.adaptive_kl_per_sequence(*args, target=target, horizon=50.0)
    close(found, expected)
    clipped += abs(abs(expected / coef - 1) - 0.2 * len(kl) / 50) < 1e-7
    close(
      next_coef(*args, controller='adaptive_per_token', target=target, horizon=50.0),
      references.adaptive_kl_per_token(*args, target=target),
    )
  assert 20 < clipped < 199, 'both the clipped and the free error have to be met'


@pytest.mark.parametrize('position', ['last', 'after_end', 'eos', 'dense'])
def test_rewards_agree_with_loops(position):
  place = 'eos' if position == 'dense' else position
  rewards = jitted(adv.token_rewards, position=place)
  for case in range(CASES):
    rng, lengths, mask = ragged(case)
    kl = normal(rng, mask)
    scores = (
      normal(rng, mask) if position == 'dense' else rng.normal(size=len(lengths)).astype(np.float32)
    )
    coef = np.float32(rng.uniform(0, 0.3))
    close(
      rewards(scores, kl, coef, mask),
      references.token_rewards(scores, kl, coef, lengths, position=place),
    )


@pytest.mark.parametrize('mode', adv.MISSING_EOS)
def test_missing_eos_of_rewards_per_token_is_that_of_their_sums(mode):
  """Applied at the last token, by a loop over tokens, whose sums follow the rule of scores."""
  mask, ended = np.arange(4) < np.array([4, 2, 3])[:, None], np.array([False, True, False])
  rewards = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  found = adv.apply_missing_eos(
    jnp.asarray(rewards),
    jnp.asarray(ended),
    mode=mode,
    value=0.7,
    response_mask=jnp.asarray(mask),
  )
  for row, (has_eos, length) in enumerate(zip(ended, (4, 2, 3))):
    expected = list(rewards[row, :length])
    if not has_eos and mode == 'replace':
      expected = [0.0] * (length - 1) + [0.7]
    if not has_eos and mode == 'subtract':
      expected[-1] -= 0.7
    close(found[row, :length], expected)
    close(
      sum(found[row, :length]),
      references.missing_eos(float(rewards[row, :length].sum()), has_eos, mode=mode, value=0.7),
      atol=1e-5,
    )


def test_missing_eos_agrees_with_loops():
  for case in range(CASES):
    rng = np.random.default_rng(case)
    scores = rng.normal(size=5).astype(np.float32)
    ended = rng.random(5) < 0.5
    for mode in ('none', 'replace', 'subtract'):
      expected = [
        references.missing_eos(float(s), e, mode=mode, value=0.7) for s, e in zip(scores, ended)
      ]
      close(jitted(adv.apply_missing_eos, mode=mode, value=0.7)(scores, ended), expected)


@pytest.mark.parametrize('position', ['after_end', 'eos'])
def test_gae_agrees_with_the_double_sum(position):
  for case in range(CASES):
    rng, lengths, mask = ragged(case)
    steps = np.asarray(jitted(adv.step_mask, position=position)(mask))
    ends = [references.score_slot(n, mask.shape[1], position) + 1 for n in lengths]
    np.testing.assert_array_equal(steps.sum(1), ends)
    rewards, values = normal(rng, steps, rubbish=0.0), normal(rng, steps, rubbish=0.0)
    gamma, lam = [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)][case // 4 % 4]
    advantages, returns = jitted(adv.gae, gamma=gamma, lam=lam)(rewards, values)
    expected = references.gae(rewards, values, ends, gamma=gamma, lam=lam)
    scale = max(1.0, np.abs(expected[0]).max())  # a float32 sum of tens rounds at 1e-6 of it
    close(np.where(steps, advantages, 0) / scale, expected[0] / scale)
    close(np.where(steps, returns, 0) / scale, expected[1] / scale)


def test_running_moments_agree_with_keeping_every_score():
  for case in range(CASES):
    rng = np.random.default_rng(case)
    moments, reference = jnp.zeros(3), references.RunningScale()
    assert adv.running_std(moments) == 1.0
    centre, scale = rng.normal(0, 2), rng.uniform(0.5, 2)
    for size in (1, 3, 4):
      scores = rng.normal(centre, scale, size).astype(np.float32)
      moments = jitted(adv.update_moments)(moments, scores)
      close(adv.running_std(moments), reference.update(scores), rtol=2e-6)
    equal = jitted(adv.update_moments)(jnp.zeros(3), np.full(7, centre, np.float32))
    assert adv.running_std(equal) == 1.0  # even if their mean is rounded
    close(moments[0], 8)
    close(moments[1], references.mean(reference.seen))


@pytest.mark.parametrize('scale', adv.GROUP_SCALES)
def test_group_advantages_agree_with_loops(scale):
  for case in range(CASES):
    rng = np.random.default_rng(case)
    n, prompts = [(2, 1), (2, 5), (4, 3), (7, 2)][case % 4]
    scores = rng.normal(rng.normal(), 10.0 ** rng.uniform(-1, 0.5), n * prompts)
    # Multiples of 1/8, so scores are equal or far apart; in every third case they are +1 or -1.
    scores = (np.round(8 * scores) / 8 if case % 3 else np.sign(scores)).astype(np.float32)
    found = jitted(adv.group_advantages, n=n, scale=scale)(scores)
    expected = references.group_advantages(scores, n, scale=scale)
    close(found, expected, rtol=1e-5, atol=1e-5)
    close(found.reshape(-1, n).sum(1), np.zeros(prompts), atol=2e-5)
    equal = jitted(adv.equal_groups, n=n)(scores)
    groups = scores.reshape(-1, n).tolist()
    assert equal.tolist() == [len(set(group)) == 1 for group in groups for _ in group]
    close(found[equal], np.zeros(equal.sum()), atol=1e-3)


def test_group_advantages_ignore_the_order_and_the_offset_of_a_group():
  rng = np.random.default_rng(0)
  scores = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
  order = np.stack([rng.permutation(4) for _ in range(5)])
  take = lambda x: jnp.take_along_axis(jnp.reshape(x, (5, 4)), order, axis=1).ravel()
  for scale in ('group', 'none'):
    advantages = adv.group_advantages(scores.ravel(), 4, scale=scale)
    close(adv.group_advantages(take(scores), 4, scale=scale), take(advantages), atol=1e-5)
    offset = scores + np.arange(5, dtype=np.float32)[:, None]
    close(adv.group_advantages(offset.ravel(), 4, scale=scale), advantages, atol=1e-5)


def test_overlong_penalty_agrees_with_its_three_cases():
  lengths = np.arange(30)
  for max_length, cache in [(20, 5), (20, 20), (20, 1), (7, 3)]:
    close(
      jitted(adv.overlong_penalty, max_length=max_length, cache=cache)(lengths),
      [
        references.overlong_penalty(n, max_length=max_length, cache=cache) for n in lengths.tolist()
      ],
    )


def test_returns_agree_with_the_double_sum():
  """Of masks with holes, which take no time; what stands in them has no effect."""
  for case in range(CASES):
    rng, _, mask = ragged(case)
    mask = mask & (rng.random(mask.shape) < 0.7)
    rewards = normal(rng, mask)
    gamma = (1.0, 0.9, 0.0)[case // 4 % 3]
    found = jitted(adv.discounted_returns, gamma=gamma)(rewards, mask)
    expected = references.discounted_returns(rewards, mask, gamma=gamma)
    scale = max(1.0, np.abs(expected).max())
    close(found / scale, expected / scale)


def test_leave_one_out_agrees_with_loops():
  for case in range(CASES):
    rng = np.random.default_rng(case)
    n, prompts = [(2, 1), (2, 5), (4, 3), (7, 2)][case % 4]
    kept = rng.random(n * prompts) < (1.0 if case % 8 < 4 else 0.6)
    scores = np.where(kept, rng.normal(size=n * prompts), np.nan).astype(np.float32)
    found = jitted(adv.leave_one_out_advantages, n=n)(scores, kept=kept)
    close(found, references.leave_one_out_advantages(scores, n, kept), rtol=1e-5, atol=1e-5)
    if kept.all():  # n / (n - 1) of the distance from the mean of all
      rest = adv.group_advantages(jnp.asarray(scores), n, scale='none')
      close(found, rest * n / (n - 1), rtol=1e-5, atol=1e-5)


def test_the_score_of_a_mask_with_holes_is_at_its_last_token():
  mask = jnp.array([[True, False, True, False], [False, True, False, True], [False] * 4])
  for position, slots in [('last', [3, 3, 3]), ('after_end', [3, 3, 0]), ('eos', [2, 3, 0])]:
    np.testing.assert_array_equal(adv.score_index(mask, position), slots)


def test_next_action_values_by_loop():
  """Masks with holes, rows of several episodes, empty rows; garbage outside the mask."""
  for case in range(CASES):
    rng, _, mask = ragged(case, least=0)
    mask &= rng.random(mask.shape) < 0.7
    last = mask & (rng.random(mask.shape) < 0.3)
    values = normal(rng, mask)
    expected = np.zeros(mask.shape)
    for row in range(len(mask)):
      actions = np.flatnonzero(mask[row])
      for here, following in zip(actions, actions[1:]):
        if not last[row, here]:
          expected[row, here] = values[row, following]
    close(jitted(adv.next_action_values)(values, mask, last), expected)

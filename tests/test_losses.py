"""losses.py and logprobs.py against arithmetic by hand and the loops of references.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import logprobs as logprobs_lib
from rlhf_jax import losses

CASES = 200
SHAPES = ((1, 1), (2, 5), (4, 8), (3, 13))  # few, so that few programs are compiled
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


@functools.cache
def jitted(fn, **settings):
  return jax.jit(functools.partial(fn, **settings))


def tokens(case, *scales):
  """Returns float32 arrays [B, R] with the given scales."""
  rng = np.random.default_rng(case)
  shape = SHAPES[case % len(SHAPES)]
  return [rng.normal(0, scale, shape).astype(np.float32) for scale in scales]


def each(fn, *arrays):
  """Applies a reference for one token to full arrays; returns one array per result."""
  rows = [fn(*(float(x) for x in values)) for values in zip(*(a.ravel() for a in arrays))]
  return [np.reshape(column, arrays[0].shape) for column in zip(*rows)]


# Hand-derived numbers.


def test_policy_loss_by_hand():
  # ratio, advantage -> -min(ratio * A, clip(ratio, 0.8, 1.2) * A)
  ratio = jnp.array([[1.0, 1.5, 1.5, 0.5, 0.5]])
  advantage = jnp.array([[2.0, 2.0, -2.0, 2.0, -2.0]])
  #  1 * 2;  1.2 * 2 clipped;  1.5 * -2 is the smaller;  0.5 * 2 is the smaller;  0.8 * -2
  loss, clipped, found = losses.ppo_policy_loss(
    jnp.log(ratio), jnp.zeros((1, 5)), advantage, clip_low=0.2, clip_high=0.2
  )
  close(loss, [[-2.0, -2.4, 3.0, -1.0, 1.6]])
  close(clipped, [[0, 1, 0, 0, 1]])
  close(found, ratio)


def test_asymmetric_and_dual_clip_by_hand():
  ratio, advantage = jnp.array([[1.5, 4.0, 0.5]]), jnp.array([[2.0, -2.0, -2.0]])
  loss, _, _ = losses.ppo_policy_loss(
    jnp.log(ratio), jnp.zeros((1, 3)), advantage, clip_low=0.1, clip_high=0.3, dual_clip=3.0
  )
  # 1.3 * 2;  4 * 2 = 8 held to 3 * 2 = 6;  0.9 * 2
  close(loss, [[-2.6, 6.0, 1.8]])


def test_log_ratios_by_hand():
  # Two tokens with ratios 2 and 8 and a hole between: the sequence's ratio is sqrt(16) = 4.
  mask = jnp.array([[True, False, True]])
  new, old = jnp.log(jnp.array([[0.5, 0.1, 0.8]])), jnp.log(jnp.array([[0.25, 0.9, 0.1]]))
  ratio = lambda level: jnp.exp(losses.log_ratio(new, old, mask, level=level))
  close(ratio('token'), [[2, 1, 8]])
  close(ratio('sequence'), [[4, 1, 4]])
  close(ratio('sequence_token'), [[4, 1, 4]])
  # d ratio_t / d logp_u: each token moves its own ratio by the ratio; a sequence's ratio moves
  # with either token by 4 / 2; GSPO-token's with its own token by 4. Summed over t:
  slope = lambda level: jax.grad(
    lambda x: jnp.sum(jnp.exp(losses.log_ratio(x, old, mask, level=level)))
  )(new)
  close(slope('token'), [[2, 0, 8]])
  close(slope('sequence'), [[4, 0, 4]])
  close(slope('sequence_token'), [[4, 0, 4]])
  # The first token's alone:
  first = lambda level: jax.grad(
    lambda x: jnp.exp(losses.log_ratio(x, old, mask, level=level))[0, 0]
  )(new)
  close(first('sequence'), [[2, 0, 2]])
  close(first('sequence_token'), [[4, 0, 0]])


def test_token_weights_by_hand():
  # Lengths 3 and 1 of at most 5: 4 tokens, 2 sequences.
  mask = jnp.array([[True, True, False, True], [True, False, False, False]])
  weights = lambda normalize: losses.token_weights(mask, 4, 2, normalize=normalize, max_length=5)
  close(weights('token'), np.where(mask, 1 / 4, 0))
  close(weights('sequence'), np.where(mask, [[1 / 6], [1 / 2]], 0))  # 1 / (2 * 3), 1 / (2 * 1)
  close(weights('constant'), np.where(mask, 1 / 10, 0))


def test_unknown_names_are_errors():
  x = jnp.zeros((1, 1))
  with pytest.raises(ValueError, match='word'):
    losses.log_ratio(x, x, x == 0, level='word')
  with pytest.raises(ValueError, match='batch'):
    losses.token_weights(x == 0, 1, 1, normalize='batch', max_length=1)


def test_value_loss_by_hand():
  values, old = jnp.array([[1.0, 1.0, 0.1]]), jnp.array([[0.5, 0.5, 0.0]])
  returns = jnp.array([[0.0, 2.0, 1.0]])
  # Clipped values 0.7, 0.7, 0.1. Squares: 1 against 0.49; 1 against 1.69; 0.81 alike. Halved.
  loss, clipped = losses.ppo_value_loss(values, old, returns, clip=0.2)
  close(loss, [[0.5, 0.845, 0.405]])
  close(clipped, [[0, 1, 0]])
  loss, clipped = losses.ppo_value_loss(values, old, returns, clip=0.0)
  close(loss, [[0.5, 0.5, 0.405]])
  close(clipped, [[0, 0, 0]])


def test_first_minibatch_has_the_plain_gradient():
  # At ratio 1 the two products tie: d loss / d logp = -A, and nothing counts as clipped.
  advantage = jnp.array([[1.5, -0.5]])
  logprobs = jnp.array([[-1.0, -2.0]])

  def total(new):
    loss, clipped, _ = losses.ppo_policy_loss(new, logprobs, advantage, clip_low=0.2, clip_high=0.2)
    return loss.sum(), clipped

  gradient, clipped = jax.grad(total, has_aux=True)(logprobs)
  close(gradient, -advantage)
  assert not clipped.any()


def test_pairwise_loss_by_hand():
  ranks, present = jnp.array([[0, 1]]), jnp.ones((1, 2), bool)
  pair = functools.partial(losses.pairwise_loss, ranks=ranks, present=present)
  log3 = np.log(3.0)
  # sigmoid(ln 3) = 3/4.
  close(pair(jnp.array([[log3, 0.0]]), margin=jnp.zeros(1))[0], [-np.log(0.75)])
  # A margin of ln 3 cancels the gap: sigmoid(0) = 1/2.
  close(pair(jnp.array([[log3, 0.0]]), margin=jnp.array([log3]))[0], [np.log(2)])
  # Labels wrong with probability 0.1: -0.9 ln 3/4 - 0.1 ln 1/4.
  close(
    pair(jnp.array([[log3, 0.0]]), margin=jnp.zeros(1), label_smoothing=0.1)[0],
    [-0.9 * np.log(0.75) - 0.1 * np.log(0.25)],
  )
  # Centering 0.01 of (2 + 1)^2.
  close(
    pair(jnp.array([[2.0, 1.0]]), margin=jnp.zeros(1), centering=0.01)[0],
    [np.log1p(np.exp(-1)) + 0.09],
  )


def test_k_way_loss_by_hand():
  # Ranks 0, 1, 1 of scores 1, 0, 3: pairs (0,1) and (0,2), the tie is no pair.
  loss, valid = losses.pairwise_loss(
    jnp.array([[1.0, 0.0, 3.0, 9.0]]),
    jnp.array([[0, 1, 1, 0]]),
    jnp.array([[True, True, True, False]]),
    jnp.zeros(1),
  )
  close(loss, [(np.log1p(np.exp(-1)) + np.log1p(np.exp(2))) / 2])
  assert valid.tolist() == [True]


def test_prompts_without_a_comparison_are_marked():
  ranks, present = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
  for loss, valid in [
    losses.pairwise_loss(jnp.ones((1, 2)), ranks, present, jnp.zeros(1)),
    losses.pick_best_loss(jnp.ones((1, 2)), ranks, present),
    losses.rating_loss(jnp.ones((1, 2)), jnp.zeros((1, 2)), ~present),
  ]:
    close(loss, [0.0])
    assert valid.tolist() == [False]


@pytest.mark.parametrize('name', ['pairwise', 'pick_best', 'rating'])
def test_an_empty_row_has_no_gradient_and_no_nan(name):
  ranks, present = jnp.array([[0, 1], [0, 0]]), jnp.array([[True, True], [False, False]])
  total = {
    'pairwise': lambda s: losses.pairwise_loss(s, ranks, present, jnp.zeros(2))[0].sum(),
    'pick_best': lambda s: losses.pick_best_loss(s, ranks, present)[0].sum(),
    'rating': lambda s: losses.rating_loss(s, jnp.ones((2, 2)), present)[0].sum(),
  }[name]
  gradient = jax.grad(total)(jnp.array([[0.3, 0.1], [0.2, 0.4]]))
  assert np.isfinite(gradient).all()
  assert np.abs(gradient[0]).min() > 0
  close(gradient[1], [0.0, 0.0])


# Against loops.


@pytest.mark.parametrize(
  'settings',
  [
    dict(clip_low=0.2, clip_high=0.2),
    dict(clip_low=0.2, clip_high=0.28),
    dict(clip_low=0.2, clip_high=0.2, dual_clip=1.5),
  ],
  ids=['symmetric', 'asymmetric', 'dual'],
)
def test_policy_loss_and_gradient_agree_with_loops(settings):
  fn = jitted(losses.ppo_policy_loss, **settings)
  gradient_fn = jax.jit(jax.grad(lambda *args: fn(*args)[0].sum()))
  reference = functools.partial(references.policy_loss, **settings)
  for case in range(CASES):
    old, step, advantages = tokens(case, 1.0, 0.3, 1.0)
    new = old + step
    loss, clipped, ratio, gradient = each(reference, new, old, advantages)
    for found, expected in zip(fn(new, old, advantages), (loss, clipped, ratio)):
      close(found, expected)
    close(gradient_fn(new, old, advantages), gradient)


def holed(case):
  """Returns a mask of the case's shape with holes, and some empty responses."""
  rng = np.random.default_rng([case, 1])
  shape = SHAPES[case % len(SHAPES)]
  lengths = rng.integers(0, shape[1] + 1, shape[0])
  return (np.arange(shape[1]) < lengths[:, None]) & (rng.random(shape) < 0.8)


@pytest.mark.parametrize('level', losses.RATIO_LEVELS)
def test_log_ratios_agree_with_loops(level):
  fn = jitted(losses.log_ratio, level=level)
  gradient_fn = jax.jit(jax.grad(lambda *args: fn(*args).sum()))
  for case in range(CASES):
    mask, (old, step) = holed(case), tokens(case, 1.0, 0.3)
    new = old + step
    if level == 'token':
      expected = new.astype(np.float64) - old
    else:
      expected = np.log(
        [
          [references.sequence_ratio(*row)]
          for row in zip(new.astype(np.float64), old.astype(np.float64), mask)
        ]
      )
    # The gradient of a token is 1, or length times 1 / length; of a sum it is length times 1.
    times = mask.sum(1, keepdims=True) if level == 'sequence_sum' else 1
    new, old = np.where(mask, [new, old], np.nan)
    close(fn(new, old, mask), np.where(mask, times * expected, 0), rtol=1e-5)
    close(gradient_fn(new, old, mask), times * mask)


@pytest.mark.parametrize('normalize', losses.NORMALIZERS)
def test_normalized_losses_agree_with_loops(normalize):
  fn = jitted(losses.token_weights, normalize=normalize, max_length=17)
  for case in range(CASES):
    mask, (loss,) = holed(case), tokens(case, 1.0)
    weights = fn(mask, mask.sum(), len(mask))
    assert not np.asarray(weights)[~mask].any()
    close(
      np.sum(weights * loss), references.normalized(loss, mask, normalize=normalize, max_length=17)
    )


@pytest.mark.parametrize('normalize', losses.NORMALIZERS)
def test_microbatches_add_up_to_the_normalized_loss(normalize):

  def fn(mask, tokens, sequences):
    return losses.token_weights(
      jnp.asarray(mask), tokens, sequences, normalize=normalize, max_length=9
    )

  for case in range(2, CASES, 4):  # [4, 8]
    mask, (loss,) = holed(case), tokens(case, 1.0)
    counts = mask.sum(), len(mask)
    whole = np.sum(fn(mask, *counts) * loss)
    parts = 0.0
    for rows in ([0], [1, 2], [3]):  # of different sizes, each truncated to its longest response
      cut = max(1, np.max(np.where(mask[rows], np.arange(8) + 1, 0)))
      part = mask[rows, :cut]
      parts += np.sum(fn(part, *counts) * loss[rows, :cut])
    close(parts, whole)


def test_gspo_and_gspo_token_have_the_same_gradient():
  # With one advantage per sequence and means over its tokens (GSPO §4.3), clipped or not.
  def gradient(new, old, mask, advantages, *, level):
    def total(x):
      ratios = losses.log_ratio(x, old, mask, level=level)
      loss, clipped, _ = losses.clipped_policy_loss(
        ratios, advantages, clip_low=0.05, clip_high=0.1
      )
      weights = losses.token_weights(
        mask, mask.sum(), mask.shape[0], normalize='sequence', max_length=0
      )
      return jnp.sum(weights * loss), jnp.sum(clipped)

    return jax.grad(total, has_aux=True)(new)

  clips = 0
  for case in range(CASES):
    mask, (old, step, advantages) = holed(case), tokens(case, 1.0, 0.3, 1.0)
    args = old + step, old, mask, np.repeat(advantages[:, :1], mask.shape[1], axis=1)
    (sequence, clipped), (per_token, _) = (
      jitted(gradient, level=level)(*args) for level in ('sequence', 'sequence_token')
    )
    close(sequence, per_token)
    clips += clipped > 0
  assert 20 < clips < CASES - 20, 'both clipped and free sequences are needed'


@pytest.mark.parametrize('bound', [0.2, 0.0])
def test_value_loss_and_gradient_agree_with_loops(bound):
  fn = jitted(losses.ppo_value_loss, clip=bound)
  gradient_fn = jax.jit(jax.grad(lambda *args: fn(*args)[0].sum()))
  for case in range(CASES):
    old, step, returns = tokens(case, 1.0, 0.3, 1.0)
    new = old + step
    loss, clipped, gradient = each(
      functools.partial(references.value_loss, bound=bound), new, old, returns
    )
    for found, expected in zip(fn(new, old, returns), (loss, clipped)):
      close(found, expected)
    close(gradient_fn(new, old, returns), gradient)


def comparison(case):
  """Returns scores, ratings, ranks with ties, present and margin of 5 prompts with K = 4."""
  rng = np.random.default_rng(case)
  scores, ratings = rng.normal(size=(2, 5, 4)).astype(np.float32)
  present = rng.random((5, 4)) < 0.8
  return (
    scores,
    ratings,
    rng.integers(0, 4, (5, 4)).astype(np.int32),
    present,
    rng.uniform(0, 1, 5).astype(np.float32),
  )


def agree(found, expected):
  """Compares losses; `expected` is None for prompts that do not count."""
  loss, valid = found
  assert [x is not None for x in expected] == valid.tolist()
  close(loss, [x or 0.0 for x in expected])


@pytest.mark.parametrize('centering, smoothing', [(0.0, 0.0), (0.01, 0.1)])
def test_pairwise_loss_agrees_with_loops(centering, smoothing):
  fn = jitted(losses.pairwise_loss, centering=centering, label_smoothing=smoothing)
  for case in range(CASES):
    scores, _, ranks, present, margin = comparison(case)
    agree(
      fn(scores, ranks, present, margin),
      [
        references.pairwise_loss(*row, centering=centering, smoothing=smoothing)
        for row in zip(scores, ranks, present, margin)
      ],
    )


def test_reliabilities_by_hand():
  # The mean of the offsets is 1: beta = 1 + offset - 1. Number -1 is an unknown annotator.
  found = losses.reliabilities(jnp.array([0.0, 1.0, 2.0]), jnp.array([2, -1, 0]))
  close(found, [2.0, 1.0, 0.0])
  # sigmoid(2 ln 3) = 9/10, sigmoid(0) = 1/2 for any margin that is 0.
  loss, _ = losses.pairwise_loss(
    jnp.full((3, 2), jnp.array([np.log(3.0), 0.0])),
    jnp.full((3, 2), jnp.array([0, 1])),
    jnp.ones((3, 2), bool),
    jnp.zeros(3),
    reliability=found,
  )
  close(loss, -np.log([0.9, 0.75, 0.5]))


@pytest.mark.parametrize('kind', ['pairwise', 'pick_best'])
def test_losses_of_annotators_and_their_gradients_agree_with_loops(kind):
  """Gradients of the scores and of the annotators' offsets are those of central differences."""
  rng = np.random.default_rng(0)
  scores, _, ranks, present, margin = comparison(1)
  offsets, annotator = rng.normal(size=3).astype(np.float32), np.array([0, 2, -1, 1, 0])
  settings = {'centering': 0.01, 'label_smoothing': 0.1}

  def loss(scores, offsets):
    beta = losses.reliabilities(offsets, annotator)
    if kind == 'pick_best':
      return losses.pick_best_loss(scores, ranks, present, reliability=beta)
    return losses.pairwise_loss(scores, ranks, present, margin, reliability=beta, **settings)

  def loop(scores, offsets):
    beta = [1.0 if k < 0 else 1 + offsets[k] - sum(offsets) / 3 for k in annotator]
    if kind == 'pick_best':
      return [
        references.pick_best_loss(*row)
        for row in zip(scores * np.array(beta)[:, None], ranks, present)
      ]
    rows = zip(scores, ranks, present, margin, beta)
    return [references.pairwise_loss(*row, centering=0.01, smoothing=0.1) for row in rows]

  agree(jax.jit(loss)(scores, offsets), loop(scores, offsets))
  total = lambda *args: sum(x or 0.0 for x in loop(*args))
  gradients = jax.jit(jax.grad(lambda *args: loss(*args)[0].sum(), argnums=(0, 1)))(scores, offsets)
  exact = scores.astype(float), offsets.astype(float)
  for which, gradient in enumerate(gradients):
    for index in np.ndindex(gradient.shape):
      ends = []
      for step in (1e-5, -1e-5):
        moved = [values.copy() for values in exact]
        moved[which][index] += step
        ends.append(total(*moved))
      np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)


def test_pick_best_and_rating_losses_agree_with_loops():
  for case in range(CASES):
    scores, ratings, ranks, present, _ = comparison(case)
    agree(
      jitted(losses.pick_best_loss)(scores, ranks, present),
      [references.pick_best_loss(*row) for row in zip(scores, ranks, present)],
    )
    agree(
      jitted(losses.rating_loss)(scores, ratings, present),
      [references.rating_loss(*row) for row in zip(scores, ratings, present)],
    )


# Losses of preferences.


@pytest.mark.parametrize(
  'kind, smoothing',
  [('sigmoid', 0.0), ('sigmoid', 0.2), ('robust', 0.1), ('ipo', 0.0), ('hinge', 0.0)],
)
def test_losses_of_log_ratios_agree_with_loops(kind, smoothing):
  loss = jitted(losses.reference_loss, beta=0.3, label_smoothing=smoothing, kind=kind)
  for case in range(CASES):
    margins = np.random.default_rng(case).normal(0, 6, 5).astype(np.float32)
    expected = [
      references.reference_loss(x, beta=0.3, smoothing=smoothing, kind=kind) for x in margins
    ]
    np.testing.assert_allclose(loss(margins), expected, rtol=1e-5, atol=1e-5)


def test_losses_without_a_margin_of_log_ratios_agree_with_loops():
  kto = jitted(losses.kto_loss, beta=0.3)
  orpo = jitted(losses.orpo_loss, beta=0.3)
  simpo = jitted(losses.simpo_loss, beta=2.0, gamma=0.7)
  for case in range(CASES):
    rng = np.random.default_rng(case)
    ratios, kl = rng.normal(0, 6, 5).astype(np.float32), float(rng.uniform(0, 4))
    desirable = rng.random(5) < 0.5
    pairs = -rng.uniform(0.02, 4, (2, 5)).astype(np.float32)
    rows = list(zip(*pairs))
    expected = [references.kto_loss(*row, kl, beta=0.3) for row in zip(ratios, desirable)]
    np.testing.assert_allclose(kto(ratios, desirable, kl), expected, rtol=1e-5, atol=1e-5)
    expected = [references.orpo_loss(*row, beta=0.3) for row in rows]
    np.testing.assert_allclose(orpo(*pairs), expected, rtol=1e-5, atol=1e-5)
    expected = [references.simpo_loss(*row, beta=2.0, gamma=0.7) for row in rows]
    np.testing.assert_allclose(simpo(*pairs), expected, rtol=1e-5, atol=1e-5)


def test_losses_of_preferences_by_hand():
  # Margin 2, beta 0.5: log sigmoid(1) is -0.313262, log sigmoid(-1) is -1.313262.
  margin = jnp.array([2.0])
  close(losses.dpo_loss(margin, beta=0.5), [0.313262])
  close(
    losses.dpo_loss(margin, beta=0.5, label_smoothing=0.25), [0.75 * 0.313262 + 0.25 * 1.313262]
  )
  # An offset of 2 makes the same margin one too small by 1.
  close(losses.dpo_loss(margin, beta=0.5, offset=2.0), [1.313262])
  # (0.75 * 0.313262 - 0.25 * 1.313262) / 0.5 = (0.2349465 - 0.3283155) / 0.5
  close(losses.robust_dpo_loss(margin, beta=0.5, label_smoothing=0.25), [-0.186738])
  close(losses.hinge_dpo_loss(margin, beta=0.25), [0.5])
  close(losses.ipo_loss(margin, beta=0.5), [(2 - 1) ** 2])
  # Log-ratio 3, z0 1, beta 0.5: sigmoid(1) is 0.731059.
  both = losses.kto_loss(jnp.array([3.0, 3.0]), jnp.array([True, False]), 1.0, beta=0.5)
  close(both, [1 - 0.731059, 0.731059])
  # p 0.8 and 0.5: odds 4 and 1, so -0.1 log sigmoid(log 4) = -0.1 log 0.8.
  pair = jnp.log(jnp.array([0.8])), jnp.log(jnp.array([0.5]))
  close(losses.orpo_loss(*pair, beta=0.1), [0.0223144])
  # 2 log 1.6 - 0.5 = 0.440007, and -log sigmoid of it is 0.497152.
  close(losses.simpo_loss(*pair, beta=2.0, gamma=0.5), [0.497152])
  with pytest.raises(ValueError, match='slic'):
    losses.reference_loss(margin, beta=0.5, kind='slic')


def test_robust_dpo_is_unbiased_under_flipped_labels():
  # A flip of the label negates the margin. The mean over flips is the loss of the true labels.
  margins = jnp.linspace(-5.0, 5.0, 11)
  robust = functools.partial(losses.robust_dpo_loss, beta=0.4, label_smoothing=0.2)
  mean = 0.8 * robust(margins) + 0.2 * robust(-margins)
  close(mean, losses.dpo_loss(margins, beta=0.4), rtol=1e-5)


def test_no_gradient_flows_into_the_reference_point_of_kto_or_out_of_certain_responses():
  desirable = jnp.array([True, False])
  loss = lambda kl: losses.kto_loss(jnp.array([1.0, 2.0]), desirable, kl, beta=0.5).sum()
  assert jax.grad(loss)(0.5) == 0
  # A response of probability 1 has infinite odds.
  orpo = lambda x: losses.orpo_loss(x, jnp.array([-1.0]), beta=0.1).sum()
  assert np.isfinite(jax.grad(orpo)(jnp.zeros(1))).all()


# The log-probabilities the losses stand on.


@pytest.mark.parametrize('chunk', [70, 28])
def test_token_logprobs_and_entropy_agree_with_loops(chunk):
  fn = jax.jit(
    lambda kernel, hidden, targets: logprobs_lib.token_logprobs(
      lambda h: h @ kernel, hidden, targets, temperature=0.7, chunk=chunk
    )
  )
  for case in range(CASES):
    rng = np.random.default_rng(case)
    hidden = rng.normal(size=(2, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (2, 5))
    logits = hidden.astype(np.float64) @ kernel.astype(np.float64) / 0.7
    logp, entropy = fn(kernel, hidden, targets)
    rows = list(zip(logits.reshape(10, 7), targets.ravel()))
    close(logp.ravel(), [references.log_softmax(row)[target] for row, target in rows])
    close(entropy.ravel(), [references.entropy(row) for row, _ in rows])


@pytest.mark.parametrize('chunk', [70, 28])
def test_full_kl_agrees_with_loops(chunk):
  fn = jax.jit(
    lambda kernel, ref_kernel, hidden, ref_hidden: logprobs_lib.full_kl(
      lambda h: h @ kernel,
      hidden,
      lambda h: h @ ref_kernel,
      ref_hidden,
      temperature=1.3,
      chunk=chunk,
    )
  )
  for case in range(CASES):
    rng = np.random.default_rng(case)
    h, g = rng.normal(size=(2, 2, 5, 3)).astype(np.float32)
    w, u = rng.normal(size=(2, 3, 7)).astype(np.float32)
    p, q = (x.astype(np.float64) @ k.astype(np.float64) / 1.3 for x, k in [(h, w), (g, u)])
    close(
      fn(w, u, h, g).ravel(),
      [references.full_kl(*rows) for rows in zip(p.reshape(10, 7), q.reshape(10, 7))],
    )


def test_cispo_and_its_gradient_agree_with_loops():
  """The weight is a constant, so the gradient is -weight * A, for clipped tokens too."""
  settings = dict(clip_low=0.4, clip_high=0.3)
  fn = jitted(losses.cispo_loss, **settings)
  gradient_fn = jax.jit(jax.grad(lambda *args: fn(*args)[0].sum()))
  seen = 0
  for case in range(CASES):
    logp, ratios, advantages = tokens(case, 1.0, 0.5, 1.0)
    weights = np.clip(np.exp(ratios.astype(np.float64)), 0.6, 1.3)
    loss, clipped, ratio = fn(logp, ratios, advantages)
    close(loss, -weights * advantages * logp)
    close(ratio, np.exp(ratios))
    np.testing.assert_array_equal(clipped, (np.exp(ratios) < 0.6) | (np.exp(ratios) > 1.3))
    close(gradient_fn(logp, ratios, advantages), -weights * advantages)
    seen += clipped.sum()
  assert seen > 20


def test_sapo_and_its_gradient_agree_with_loops():
  """Of gates 4 / tau * sigmoid(tau (r - 1)), with slope 4 p (1 - p), which is 1 at r = 1."""
  fn = jitted(losses.sapo_loss, tau_positive=1.0, tau_negative=2.0)
  gradient_fn = jax.jit(jax.grad(lambda *args: fn(*args)[0].sum()))
  for case in range(CASES):
    ratios, advantages = tokens(case, 0.5, 1.0)
    loss, clipped, _ = fn(ratios, advantages)
    gradient = gradient_fn(ratios, advantages)
    for (i, j), a in np.ndenumerate(advantages.astype(np.float64)):
      r, tau = np.exp(float(ratios[i, j])), 1.0 if a > 0 else 2.0
      p = 1 / (1 + np.exp(-tau * (r - 1)))
      close(loss[i, j], -4 / tau * p * a)
      close(gradient[i, j], -4 * p * (1 - p) * r * a)  # r from d ratio / d log ratio
    assert not clipped.any()


def test_expectile_loss_by_hand():
  # Q - V = 2, -1, 0; tau 0.8: 0.8 * 4, 0.2 * 1, 0. By V: -2 * 0.8 * 2, 2 * 0.2 * 1, 0.
  values, targets = jnp.array([1.0, 3.0, 5.0]), jnp.array([3.0, 2.0, 5.0])
  loss = functools.partial(losses.expectile_loss, tau=0.8)
  close(loss(values, targets), [3.2, 0.2, 0.0])
  by_value, by_target = jax.grad(lambda v, q: jnp.sum(loss(v, q)), (0, 1))(values, targets)
  close(by_value, [-3.2, 0.4, 0.0])
  close(by_target, [0.0, 0.0, 0.0])

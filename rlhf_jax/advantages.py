"""From scores to advantages: KL estimators and controllers, reward vectors, GAE, whitening.

Letters: B batch, R response length. Every function takes a mask; what a masked slot holds
never reaches a result. All arithmetic is float32.

Where published implementations differ, the choice is an argument with the field's names for
its values; algorithms/ppo.py collects them into presets.
"""

import chex
import jax
import jax.numpy as jnp

KL_ESTIMATORS = ('k1', 'k2', 'k3', 'abs', 'full')
KL_CONTROLLERS = ('fixed', 'adaptive', 'adaptive_per_token')
SCORE_POSITIONS = ('last', 'after_end', 'eos')
MISSING_EOS = ('none', 'replace', 'subtract')


def masked_sum(x, mask):
  """Sum of `x` where `mask`; a NaN behind the mask does not leak."""
  return jnp.sum(jnp.where(mask, x, 0.0))


def masked_mean(x, mask):
  """Mean of `x` where `mask`; 0 where the mask is empty."""
  return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(x, mask, *, unbiased=False):
  """Variance of `x` where `mask`, divided by n, or by n - 1 if `unbiased` (Bessel)."""
  count = jnp.sum(mask)
  total = masked_sum(jnp.square(x - masked_mean(x, mask)), mask)
  return total / jnp.maximum(count - int(unbiased), 1)


def whiten(x, mask, *, shift_mean=True, unbiased=False):
  """Scales to unit variance over real tokens: (x - mean) * rsqrt(var + 1e-8).

  Args:
    x: [B, R] float32.
    mask: [B, R] bool.
    shift_mean: whether the result has mean 0; if not, the mean is added back. PPO whitens
      advantages with and rewards without the shift (lm-human-preferences, `whiten`).
    unbiased: divide the variance by n - 1 (TRL, trlX) and not n (lm-human-preferences).

  Returns:
    [B, R] float32; masked slots hold 0.
  """
  chex.assert_rank([x, mask], 2)
  chex.assert_equal_shape([x, mask])
  mean = masked_mean(x, mask)
  white = (x - mean) * jax.lax.rsqrt(masked_var(x, mask, unbiased=unbiased) + 1e-8)
  return jnp.where(mask, white if shift_mean else white + mean, 0.0)


def kl_estimate(logprobs, ref_logprobs, estimator):
  """Per-token estimate of KL(policy || reference) from samples of the policy.

  With d = logprobs - ref_logprobs: k1 = d (unbiased, signed), k2 = d^2 / 2,
  k3 = exp(-d) - 1 + d (unbiased, never negative), abs = |d|.
  See Schulman, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html).
  The fifth, `full`, needs the whole vocabulary: `logprobs.full_kl`.

  Args:
    logprobs: [B, R] float32 of the policy.
    ref_logprobs: [B, R] float32 of the reference.
    estimator: 'k1', 'k2', 'k3' or 'abs'.

  Returns:
    [B, R] float32.
  """
  d = logprobs - ref_logprobs
  if estimator == 'k1':
    return d
  if estimator == 'k2':
    return 0.5 * jnp.square(d)
  if estimator == 'k3':
    return jnp.expm1(-d) + d
  if estimator == 'abs':
    return jnp.abs(d)
  raise ValueError(f'unknown KL estimator {estimator!r}: one of {KL_ESTIMATORS}')


def next_kl_coef(kl_coef, kl, response_mask, *, controller, target, horizon):
  """The KL coefficient for the next iteration.

  'adaptive' (Ziegler et al. 2019 §2.2, https://arxiv.org/abs/1909.08593): on the KL summed
    over each response, nats per sequence,
      kl_coef * (1 + clip(KL / target - 1, -0.2, 0.2) * B / horizon).
  'adaptive_per_token' (RL4LMs): on the mean KL per token, nats per token,
      kl_coef * (1 + clip(KL / target - 1, -0.2, 0.2) * 0.1).

  Args:
    kl_coef: float32 scalar, the coefficient now.
    kl: [B, R] float32, k1 estimate per token.
    response_mask: [B, R] bool.
    controller: 'fixed', 'adaptive' or 'adaptive_per_token'.
    target: the KL to hold, in nats per sequence or per token as above.
    horizon: episodes over which 'adaptive' corrects an error of one.

  Returns:
    float32 scalar.
  """
  if controller == 'fixed':
    return kl_coef
  if controller == 'adaptive':
    current = masked_sum(kl, response_mask) / kl.shape[0]
    gain = kl.shape[0] / horizon
  elif controller == 'adaptive_per_token':
    current = masked_mean(kl, response_mask)
    gain = 0.1
  else:
    raise ValueError(f'unknown KL controller {controller!r}: one of {KL_CONTROLLERS}')
  return kl_coef * (1.0 + jnp.clip(current / target - 1.0, -0.2, 0.2) * gain)


def apply_missing_eos(scores, has_eos, *, mode, value):
  """Scores [B] after the rule for responses that never ended.

  Two rules share a name in the literature: 'replace' puts `value` in place of the score
  (lm-human-preferences and N+ use -1), 'subtract' takes `value` off it (TRL).
  """
  if mode == 'none':
    return scores
  if mode == 'replace':
    return jnp.where(has_eos, scores, value)
  if mode == 'subtract':
    return jnp.where(has_eos, scores, scores - value)
  raise ValueError(f'unknown missing_eos {mode!r}: one of {MISSING_EOS}')


def score_index(response_mask, position):
  """Where in the response the score is paid.

  Args:
    response_mask: [B, R] bool, True at real response tokens.
    position: 'last', the last slot of the fixed length (lm-human-preferences);
      'after_end', the slot after the last real token where there is one, else the last
      (N+, TRL); 'eos', the last real token (trlX).

  Returns:
    [B] int32.
  """
  slots = response_mask.shape[1]
  length = jnp.sum(response_mask, axis=1, dtype=jnp.int32)
  if position == 'last':
    return jnp.full_like(length, slots - 1)
  if position == 'after_end':
    return jnp.minimum(length, slots - 1)
  if position == 'eos':
    return jnp.maximum(length - 1, 0)
  raise ValueError(f'unknown score_position {position!r}: one of {SCORE_POSITIONS}')


def step_mask(response_mask, position):
  """Slots that take part in the return: real tokens and the one that holds the score."""
  slots = jnp.arange(response_mask.shape[1])[None, :]
  return response_mask | (slots == score_index(response_mask, position)[:, None])


def token_rewards(scores, kl, kl_coef, response_mask, *, position):
  """r_t = -kl_coef * kl_t, plus the score on one slot (or a reward on every slot).

  See Ziegler et al. 2019, eq. 2 (https://arxiv.org/abs/1909.08593).

  Args:
    scores: [B] float32, or [B, R] for rewards per token, which are added where they stand.
    kl: [B, R] float32 KL estimate per token.
    kl_coef: float32 scalar.
    response_mask: [B, R] bool.
    position: see `score_index`; without effect on per-token rewards.

  Returns:
    [B, R] float32.
  """
  chex.assert_equal_shape([kl, response_mask])
  chex.assert_type([scores, kl], float)
  penalty = jnp.where(response_mask, -kl_coef * kl, 0.0)
  if scores.ndim == 2:
    return penalty + jnp.where(response_mask, scores, 0.0)
  rows = jnp.arange(scores.shape[0])
  return penalty.at[rows, score_index(response_mask, position)].add(scores)


def gae(rewards, values, *, gamma, lam):
  """Generalized advantage estimation over a finished episode.

      delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1}

  with V = A = 0 after the last slot. See Schulman et al. 2016, eq. 16
  (https://arxiv.org/abs/1506.02438). Ragged episodes need no mask here: rewards and values
  must be 0 in the slots after each episode's end.

  Args:
    rewards: [B, R] float32.
    values: [B, R] float32.
    gamma: discount per token.
    lam: trace decay.

  Returns:
    advantages [B, R] and returns [B, R] = advantages + values.
  """
  chex.assert_rank([rewards, values], 2)
  chex.assert_equal_shape([rewards, values])
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  deltas = rewards + gamma * next_values - values

  def backward(following, delta):
    advantage = delta + gamma * lam * following
    return advantage, advantage

  _, advantages = jax.lax.scan(
      backward, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
  advantages = advantages.T
  return advantages, advantages + values


def update_moments(moments, scores):
  """Running count, mean and sum of squared deviations (Chan et al. 1979, parallel update).

  Args:
    moments: [3] float32: count, mean, sum of squared deviations so far.
    scores: [B] float32.

  Returns:
    [3] float32.
  """
  count, mean, total = moments
  n = scores.size
  delta = jnp.mean(scores) - mean
  new = count + n
  return jnp.stack([
      new,
      mean + delta * n / new,
      total + jnp.sum(jnp.square(scores - jnp.mean(scores)))
      + jnp.square(delta) * count * n / new,
  ])


def running_std(moments):
  """Standard deviation (n - 1) of all scores seen; 1 before the second."""
  return jnp.where(moments[0] > 1, jnp.sqrt(moments[2] / jnp.maximum(moments[0] - 1, 1)), 1.0)

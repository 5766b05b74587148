"""From scores to advantages: KL estimators and controllers, reward vectors, GAE, groups.

Letters: B batch, R response length, n responses per prompt. Functions of tokens take a mask;
the contents of masked positions never affect a result. All arithmetic is float32.

If published implementations differ, the choice is an argument whose values have the field's names;
algorithms/ppo.py collects them in presets.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

KL_ESTIMATORS = ('k1', 'k2', 'k3', 'abs', 'full')
KL_CONTROLLERS = ('fixed', 'adaptive', 'adaptive_per_token')
SCORE_POSITIONS = ('last', 'after_end', 'eos')
MISSING_EOS = ('none', 'replace', 'subtract')
GROUP_SCALES = ('group', 'batch', 'none')


def masked_sum(
  x: Shaped[ArrayLike, '*shape'], mask: Bool[ArrayLike, '*shape']
) -> Shaped[Array, '']:
  """Sums `x` where `mask` is True; a NaN elsewhere has no effect."""
  return jnp.sum(jnp.where(mask, x, 0.0))


def masked_mean(
  x: Shaped[ArrayLike, '*shape'], mask: Bool[ArrayLike, '*shape']
) -> Float[Array, '']:
  """Computes the mean of `x` where `mask` is True; 0 if `mask` is False everywhere."""
  return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(
  x: Shaped[ArrayLike, '*shape'], mask: Bool[ArrayLike, '*shape'], *, unbiased: bool = False
) -> Float[Array, '']:
  """Computes the variance of `x` where `mask` is True; divides by n, or n - 1 if `unbiased`."""
  count = jnp.sum(mask)
  total = masked_sum(jnp.square(x - masked_mean(x, mask)), mask)
  return total / jnp.maximum(count - int(unbiased), 1)


def whiten(
  x: Float[ArrayLike, 'B R'],
  mask: Bool[ArrayLike, 'B R'],
  *,
  shift_mean: bool = True,
  unbiased: bool = False,
) -> Float[Array, 'B R']:
  """Scales `x` to unit variance over real tokens: (x - mean) * rsqrt(var + 1e-8).

  Args:
    x: [B, R] float32.
    mask: [B, R] bool.
    shift_mean: whether the result has mean 0; if not, the mean is kept. PPO shifts advantages, but
      not rewards (lm-human-preferences, `whiten`).
    unbiased: divide the variance by n - 1 (TRL, trlX) instead of n (lm-human-preferences).

  Returns:
    [B, R] float32; masked slots hold 0.
  """
  chex.assert_rank([x, mask], 2)
  chex.assert_equal_shape([x, mask])
  mean = masked_mean(x, mask)
  white = (x - mean) * jax.lax.rsqrt(masked_var(x, mask, unbiased=unbiased) + 1e-8)
  return jnp.where(mask, white if shift_mean else white + mean, 0.0)


def kl_estimate(
  logprobs: Float[ArrayLike, 'B R'], ref_logprobs: Float[ArrayLike, 'B R'], estimator: str
) -> Float[Array, 'B R']:
  """Estimates KL(policy || reference) for each token, from samples of the policy.

  With d = logprobs - ref_logprobs: k1 = d (unbiased, signed), k2 = d^2 / 2,
  k3 = exp(-d) - 1 + d (unbiased, never negative), abs = |d|.
  See Schulman, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html).
  The exact KL, 'full', needs the whole vocabulary: see `logprobs.full_kl`.

  Args:
    logprobs: [B, R] float32, log-probabilities by the policy.
    ref_logprobs: [B, R] float32, log-probabilities by the reference.
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


def next_kl_coef(
  kl_coef: float | Float[ArrayLike, ''],
  kl: Float[ArrayLike, 'B R'],
  response_mask: Bool[ArrayLike, 'B R'],
  *,
  controller: str,
  target: float | Float[ArrayLike, ''],
  horizon: float | Float[ArrayLike, ''],
) -> float | Float[Array, '']:
  """Returns the KL coefficient of the next iteration.

  'adaptive' (Ziegler et al. 2019 §2.2, https://arxiv.org/abs/1909.08593) controls the KL summed
    over each response, in nats per sequence:
      kl_coef * (1 + clip(KL / target - 1, -0.2, 0.2) * B / horizon).
  'adaptive_per_token' (RL4LMs) controls the mean KL per token, in nats:
      kl_coef * (1 + clip(KL / target - 1, -0.2, 0.2) * 0.1).

  Args:
    kl_coef: float32 scalar, the current coefficient.
    kl: [B, R] float32, k1 estimate per token.
    response_mask: [B, R] bool; a response without tokens, such as a skipped one, is not an episode.
    controller: 'fixed', 'adaptive' or 'adaptive_per_token'.
    target: target KL, in nats per sequence or per token as above.
    horizon: number of episodes in which 'adaptive' corrects the coefficient by the relative error.

  Returns:
    float32 scalar.
  """
  if controller == 'fixed':
    return kl_coef
  if controller == 'adaptive':
    episodes = jnp.sum(jnp.any(response_mask, axis=1))
    current = masked_sum(kl, response_mask) / jnp.maximum(episodes, 1)
    gain = episodes / horizon
  elif controller == 'adaptive_per_token':
    current = masked_mean(kl, response_mask)
    gain = 0.1 * jnp.any(response_mask)
  else:
    raise ValueError(f'unknown KL controller {controller!r}: one of {KL_CONTROLLERS}')
  return kl_coef * (1.0 + jnp.clip(current / target - 1.0, -0.2, 0.2) * gain)


def apply_missing_eos(
  scores: Float[ArrayLike, ' B'] | Float[ArrayLike, 'B R'],
  has_eos: Bool[ArrayLike, ' B'],
  *,
  mode: str,
  value: float,
  response_mask: Bool[ArrayLike, 'B R'] | None = None,
) -> Float[Array, ' B'] | Float[Array, 'B R']:
  """Applies the rule for responses without an EOS to their scores.

  Two rules share a name in the literature: 'replace' sets the score to `value`
  (lm-human-preferences and N+ use -1); 'subtract' subtracts `value` from it (TRL).

  Args:
    scores: [B] float32, or [B, R] for rewards per token, whose sum is the score. In that case
      the rule applies `value` to the last real token, and 'replace' sets the other rewards to 0.
    has_eos: [B] bool.
    mode: 'none', 'replace' or 'subtract'.
    value: The constant.
    response_mask: [B, R] bool; only needed for rewards per token.

  Returns:
    float32 array with the shape of `scores`.
  """
  if scores.ndim == 2:
    last = jnp.arange(scores.shape[1])[None] == score_index(response_mask, 'eos')[:, None]
    has_eos, value = has_eos[:, None], jnp.where(last, value, 0.0)
  if mode == 'none':
    return scores
  if mode == 'replace':
    return jnp.where(has_eos, scores, value)
  if mode == 'subtract':
    return jnp.where(has_eos, scores, scores - value)
  raise ValueError(f'unknown missing_eos {mode!r}: one of {MISSING_EOS}')


def score_index(response_mask: Bool[ArrayLike, 'B R'], position: str) -> Int[Array, ' B']:
  """Returns the position in the response that gets the score.

  Args:
    response_mask: [B, R] bool, True at real response tokens; it may have holes.
    position: 'last', the last of the R positions (lm-human-preferences); 'after_end', the position
      after the last real token, or the last position (N+, TRL); 'eos', the last real token (trlX).

  Returns:
    [B] int32.
  """
  num_positions = response_mask.shape[1]
  after = jnp.arange(1, num_positions + 1, dtype=jnp.int32)
  end = jnp.max(jnp.where(response_mask, after, 0), axis=1)
  if position == 'last':
    return jnp.full_like(end, num_positions - 1)
  if position == 'after_end':
    return jnp.minimum(end, num_positions - 1)
  if position == 'eos':
    return jnp.maximum(end - 1, 0)
  raise ValueError(f'unknown score_position {position!r}: one of {SCORE_POSITIONS}')


def step_mask(response_mask: Bool[ArrayLike, 'B R'], position: str) -> Bool[Array, 'B R']:
  """Returns the positions that count for the return: those of real tokens and of the score."""
  positions = jnp.arange(response_mask.shape[1])[None, :]
  return response_mask | (positions == score_index(response_mask, position)[:, None])


def token_rewards(
  scores: Float[ArrayLike, ' B'] | Float[ArrayLike, 'B R'],
  kl: Float[ArrayLike, 'B R'],
  kl_coef: float | Float[ArrayLike, ''],
  response_mask: Bool[ArrayLike, 'B R'],
  *,
  position: str,
) -> Float[Array, 'B R']:
  """Computes rewards: -kl_coef * kl_t, plus the score at one position or a reward at each.

  See Ziegler et al. 2019, eq. 2 (https://arxiv.org/abs/1909.08593).

  Args:
    scores: [B] float32, or [B, R] for rewards per token, which are added position by position.
    kl: [B, R] float32 KL estimate per token.
    kl_coef: float32 scalar.
    response_mask: [B, R] bool.
    position: see `score_index`; rewards per token ignore it.

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


def gae(
  rewards: Float[ArrayLike, 'B R'], values: Float[ArrayLike, 'B R'], *, gamma: float, lam: float
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R']]:
  """Computes generalized advantage estimates of finished episodes.

      delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1}

  with V = A = 0 after the last position. See Schulman et al. 2016, eq. 16
  (https://arxiv.org/abs/1506.02438). Ragged episodes need no mask: rewards and values
  must be 0 after the end of each episode.

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

  _, advantages = jax.lax.scan(backward, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
  advantages = advantages.T
  return advantages, advantages + values


def discounted_returns(
  rewards: Float[ArrayLike, 'B R'], mask: Bool[ArrayLike, 'B R'], *, gamma: float
) -> Float[Array, 'B R']:
  """Computes the return of each token, the discounted sum of the rewards from that token on.

      G_t = r_t + gamma * G_{t+1}

  where t + 1 is the next real token, and G = 0 after the last one. See Sutton and Barto, eq. 3.9
  (http://incompleteideas.net/book/the-book-2nd.html).

  Args:
    rewards: [B, R] float32.
    mask: [B, R] bool, True at the tokens of the response; it may have holes, which are skipped.
    gamma: discount per token.

  Returns:
    [B, R] float32; masked slots hold 0.
  """
  chex.assert_rank([rewards, mask], 2)
  chex.assert_equal_shape([rewards, mask])

  def backward(following, xs):
    reward, real = xs
    following = jnp.where(real, reward + gamma * following, following)
    return following, following

  _, returns = jax.lax.scan(
    backward, jnp.zeros_like(rewards[:, 0]), (rewards.T, mask.T), reverse=True
  )
  return jnp.where(mask, returns.T, 0.0)


def next_action_values(
  values: Float[ArrayLike, 'B R'], mask: Bool[ArrayLike, 'B R'], last: Bool[ArrayLike, 'B R']
) -> Float[Array, 'B R']:
  """Returns V(s') of each action: the value at the next action, 0 after the last of an episode.

  The state after the last token of a turn is the one in which the next turn begins. So tokens of
  the user or of an environment between two turns are part of the transition, as in trlX and
  LMRL-Gym.

  Args:
    values: [B, R] float32, the value of the state before each token.
    mask: [B, R] bool, True at actions; it may have holes.
    last: [B, R] bool, True at the last action of each episode. A row may hold several episodes.

  Returns:
    [B, R] float32; 0 outside the mask.
  """
  chex.assert_equal_shape([values, mask, last])
  length = values.shape[1]
  position = jnp.where(mask, jnp.arange(length)[None], length)
  following = jax.lax.cummin(position, axis=1, reverse=True)[:, 1:]
  following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=length)
  picked = jnp.take_along_axis(values, jnp.minimum(following, length - 1), axis=1)
  return jnp.where(mask & ~last & (following < length), picked, 0.0)


def update_moments(
  moments: Float[ArrayLike, '3'], scores: Float[ArrayLike, ' B']
) -> Float[Array, '3']:
  """Updates a running count, mean and sum of squared deviations (Chan et al. 1979).

  Args:
    moments: [3] float32: count, mean, sum of squared deviations so far.
    scores: [B] float32; NaNs are ignored.

  Returns:
    [3] float32.
  """
  count, mean, total = moments
  seen = ~jnp.isnan(scores)
  n, here = jnp.sum(seen), masked_mean(scores, seen)
  delta = here - mean
  new = count + n
  share = n / jnp.maximum(new, 1)
  return jnp.stack(
    [
      new,
      mean + delta * share,
      total + masked_sum(jnp.square(scores - here), seen) + jnp.square(delta) * count * share,
    ]
  )


def running_std(moments: Float[ArrayLike, '3']) -> Float[Array, '']:
  """Returns the standard deviation (n - 1) of all scores so far; 1 if they agree up to rounding."""
  count, mean, total = moments
  std = jnp.sqrt(total / jnp.maximum(count - 1, 1))
  return jnp.where(std > 1e-6 * jnp.abs(mean), std, 1.0)


def by_group(scores: Shaped[ArrayLike, ' B'], n: int) -> Shaped[ArrayLike, 'G {n}']:
  """Reshapes scores [B] to [B / n, n]: the n responses of a prompt are consecutive."""
  chex.assert_rank(scores, 1)
  if n < 2 or scores.shape[0] % n:
    raise ValueError(
      f'groups of {n} responses in a batch of {scores.shape[0]}: '
      'n must be at least 2 and divide the batch'
    )
  return scores.reshape(-1, n)


def group_advantages(
  scores: Float[ArrayLike, ' B'], n: int, *, scale: str, kept: Bool[ArrayLike, ' B'] | None = None
) -> Float[Array, ' B']:
  """Computes the advantage of each response: (score - mean of its group) / (std + 1e-4).

  `scale` selects the std:

      'group':  std of the group (GRPO: DeepSeekMath §4.1.2, https://arxiv.org/abs/2402.03300)
      'batch':  std of all scores of the batch (Lite PPO, https://arxiv.org/abs/2508.08221)
      'none':   no division (Dr. GRPO, https://arxiv.org/abs/2503.20783)

  As in TRL, variances divide by n - 1 (by B - 1 for 'batch') and 1e-4 is added to the standard
  deviations; the papers specify neither.

  Args:
    scores: [B] float32, n consecutive responses per prompt.
    n: responses per prompt.
    scale: 'group', 'batch' or 'none'.
    kept: [B] bool, responses that count; None for all.

  Returns:
    [B] float32, the advantage of every token of a response; 0 for responses that do not count.

  Raises:
    ValueError: if n is below 2 or does not divide B, or for an unknown scale.
  """
  kept = jnp.ones(scores.shape, bool) if kept is None else kept
  groups, present = by_group(scores, n), by_group(kept, n)
  sums = lambda x: jnp.sum(jnp.where(present, x, 0.0), axis=1, keepdims=True)
  count = sums(1.0)
  advantages = jnp.where(present, groups - sums(groups) / jnp.maximum(count, 1), 0.0)
  if scale == 'group':
    advantages /= jnp.sqrt(sums(jnp.square(advantages)) / jnp.maximum(count - 1, 1)) + 1e-4
  elif scale == 'batch':
    advantages /= jnp.sqrt(masked_var(scores, kept, unbiased=True)) + 1e-4
  elif scale != 'none':
    raise ValueError(f'unknown scale {scale!r}: one of {GROUP_SCALES}')
  return advantages.reshape(-1)


def leave_one_out_advantages(
  scores: Float[ArrayLike, ' B'], n: int, *, kept: Bool[ArrayLike, ' B'] | None = None
) -> Float[Array, ' B']:
  """Computes the score of each response minus the mean score of the others to the same prompt.

      A_i = s_i - 1 / (n - 1) * sum over j != i of s_j

  The baseline does not depend on the response, so the policy gradient is unbiased. See RLOO, Kool
  et al. 2019 (https://openreview.net/forum?id=r1lgTGL5DE) and Ahmadian et al. 2024, §3.2
  (https://arxiv.org/abs/2402.14740).

  Args:
    scores: [B] float32, n consecutive responses per prompt.
    n: responses per prompt.
    kept: [B] bool, responses that count; None for all.

  Returns:
    [B] float32; 0 for responses that do not count, and for one whose group has no other.

  Raises:
    ValueError: if n is below 2 or does not divide B.
  """
  groups = by_group(scores, n)
  present = by_group(jnp.ones(scores.shape, bool) if kept is None else kept, n)
  total = jnp.sum(jnp.where(present, groups, 0.0), axis=1, keepdims=True)
  others = jnp.sum(present, axis=1, keepdims=True) - 1
  advantages = groups - (total - groups) / jnp.maximum(others, 1)
  return jnp.where(present & (others > 0), advantages, 0.0).reshape(-1)


def equal_groups(
  scores: Float[ArrayLike, ' B'], n: int, kept: Bool[ArrayLike, ' B'] | None = None
) -> Bool[Array, ' B']:
  """Returns which responses, [B] bool, do not count or are in a group whose scores are all equal.

  Their advantages are 0, so they give no gradient; DAPO drops them and samples others (eq. 11,
  https://arxiv.org/abs/2503.14476). The scores themselves are compared, because the standard
  deviation of equal scores need not be 0 in floating point.

  Args:
    scores: [B] float32, n consecutive responses per prompt.
    n: responses per prompt.
    kept: [B] bool, responses that count; None for all.

  Raises:
    ValueError: if n is below 2 or does not divide B.
  """
  groups = by_group(scores, n)
  present = True if kept is None else by_group(kept, n)
  least = jnp.min(jnp.where(present, groups, jnp.inf), axis=1)
  return jnp.repeat(least >= jnp.max(jnp.where(present, groups, -jnp.inf), axis=1), n)


def best_and_worst(
  scores: Float[ArrayLike, ' B'], n: int, kept: Bool[ArrayLike, ' B'] | None = None
) -> Float[Array, ' B']:
  """Marks the preference pair of each group: its responses with the highest and lowest score.

  Args:
    scores: [B] float32, n consecutive responses per prompt.
    n: responses per prompt.
    kept: [B] bool, responses that may be in a pair; None for all.

  Returns:
    [B] float32: 1 for the best response of its group, -1 for the worst, 0 for the others. If
    several are best, or worst, it is the first of them. A group whose scores are equal has no pair.

  Raises:
    ValueError: if n is below 2 or does not divide B.
  """
  groups = by_group(scores, n)
  present = True if kept is None else by_group(kept, n)
  high, low = jnp.where(present, groups, -jnp.inf), jnp.where(present, groups, jnp.inf)
  mark = lambda index: jax.nn.one_hot(index, n, dtype=jnp.float32)
  pair = mark(jnp.argmax(high, axis=1)) - mark(jnp.argmin(low, axis=1))
  differ = jnp.max(high, axis=1, keepdims=True) > jnp.min(low, axis=1, keepdims=True)
  return jnp.where(differ, pair, 0.0).reshape(-1)


def best_of_groups(
  scores: Float[ArrayLike, ' B'], n: int, count: int, kept: Bool[ArrayLike, ' B']
) -> Bool[Array, ' B']:
  """Returns which responses [B] bool are among the `count` best of their group.

  Args:
    scores: [B] float32, n consecutive responses per prompt; of equal scores the first are better.
    n: responses per prompt.
    count: number of responses per group; fewer if fewer are in `kept`.
    kept: [B] bool, responses that may be selected.

  Raises:
    ValueError: if n is below 2 or does not divide B.
  """
  present = by_group(kept, n)
  order = jnp.argsort(jnp.where(present, -by_group(scores, n), jnp.inf), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)
  return (present & (rank < count)).reshape(-1)


def from_percentile(
  scores: Float[ArrayLike, ' B'],
  n: int,
  percentile: float | Float[ArrayLike, ''],
  kept: Bool[ArrayLike, ' B'],
) -> Bool[Array, ' B']:
  """Returns which responses [B] bool have a score of at least a percentile of their group.

  The lowest score of the batch is never selected, unless all scores are equal. It is the percentile
  of a group if most of the group have this score.

  Args:
    scores: [B] float32, n consecutive responses per prompt.
    n: responses per prompt.
    percentile: fraction from 0 to 1, between scores by linear interpolation as in np.quantile.
    kept: [B] bool, responses that count and may be selected.

  Raises:
    ValueError: if n is below 2 or does not divide B.
  """
  present = by_group(kept, n)
  groups = jnp.where(present, by_group(scores, n), jnp.nan)
  threshold = jnp.nanquantile(groups, percentile, axis=1, keepdims=True)
  lowest, highest = jnp.nanmin(groups), jnp.nanmax(groups)
  selected = (groups >= threshold) & ((groups > lowest) | (lowest == highest))
  return (present & selected).reshape(-1)


def overlong_penalty(
  lengths: Int[ArrayLike, ' B'], *, max_length: float, cache: float
) -> Float[Array, ' B']:
  """Computes a term to add to scores: clip((max_length - cache - length) / cache, -1, 0).

  It is 0 up to `max_length - cache` tokens and then falls to -1 at `max_length`.
  See DAPO, eq. 13 (https://arxiv.org/abs/2503.14476), where `max_length` is 20,480 tokens and
  `cache` 4,096.

  Args:
    lengths: [B] int32, tokens of each response.
    max_length: length at which the penalty is -1, usually the maximum length of a response.
    cache: number of tokens over which it falls from 0 to -1.

  Returns:
    [B] float32.

  Raises:
    ValueError: unless 0 < cache <= max_length.
  """
  if not 0 < cache <= max_length:
    raise ValueError(f'cache {cache} must be above 0 and at most max_length {max_length}')
  over = jnp.asarray(lengths - (max_length - cache), jnp.float32)
  return -jnp.clip(over / cache, 0.0, 1.0)


def importance_weights(
  logprobs: Float[ArrayLike, 'B R'], sampler_logprobs: Float[ArrayLike, 'B R'], *, cap: float
) -> Float[Array, 'B R']:
  """Computes truncated importance weights, which correct for responses of another policy.

      w_t = min(pi_old(y_t) / mu(y_t), cap)

  pi_old is the policy before the update and mu the one that sampled: an older policy, or the same
  one in another precision. The cap bounds the variance and biases the estimate.
  See IMPALA, eq. 1 (https://arxiv.org/abs/1802.01561), whose rho is w.

  Args:
    logprobs: [B, R] float32, log pi_old of each token.
    sampler_logprobs: [B, R] float32, log mu of each token.
    cap: Largest weight, above 0.

  Returns:
    [B, R] float32.
  """
  chex.assert_equal_shape([logprobs, sampler_logprobs])
  return jnp.minimum(jnp.exp(logprobs - sampler_logprobs), cap)

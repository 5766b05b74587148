"""Losses as pure functions of arrays: no model, no config.

Letters: A annotators, B batch, R response length, K completions, T sequence length, V vocabulary.
Per-token losses return one value per token. Sum them over a mask and divide by the count of the
whole minibatch, so that microbatches add up to the true mean instead of a mean of means.
`token_weights` does the same for the means of the GRPO family.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

DPO_LOSSES = ('sigmoid', 'robust', 'hinge', 'ipo')
RATIO_LEVELS = ('token', 'sequence', 'sequence_token', 'sequence_sum')
NORMALIZERS = ('token', 'sequence', 'constant')
POLICY_LOSSES = ('clip', 'cispo', 'sapo')
DIVERGENCES = ('reverse_kl', 'forward_kl', 'jsd')


def log_ratio(
  logprobs: Float[ArrayLike, 'B R'],
  old_logprobs: Float[ArrayLike, 'B R'],
  mask: Bool[ArrayLike, 'B R'],
  *,
  level: str,
) -> Float[Array, 'B R']:
  """Computes the log of the importance ratio of each token or of its whole sequence.

  With d_t = logprobs_t - old_logprobs_t and s = sum_t d_t / length over the sequence's tokens:

      'token':           d_t                                   (PPO, GRPO)
      'sequence':        s on every token                      (GSPO)
      'sequence_token':  sg(s) + logprobs_t - sg(logprobs_t)   (GSPO-token)
      'sequence_sum':    sum_t d_t on every token              (RLOO)

  where sg stops the gradient. The last has the value of 'sequence', but every token has its own
  gradient, so advantages may differ within a sequence. If they are equal and the loss is normalized
  by sequence, the last two have the same gradients.
  See GSPO, eq. 7 and §4.3 (https://arxiv.org/abs/2507.18071). 'sequence_sum' is the ratio of the
  probabilities of whole responses, as in TRL's RLOOTrainer; it is not divided by the length.

  Args:
    logprobs: [B, R] float32, log-probabilities by the policy being trained.
    old_logprobs: [B, R] float32, log-probabilities by the policy that sampled.
    mask: [B, R] bool, True at response tokens; it may have holes.
    level: 'token', 'sequence', 'sequence_token' or 'sequence_sum'.

  Returns:
    [B, R] float32; masked slots hold 0.

  Raises:
    ValueError: for an unknown level.
  """
  chex.assert_equal_shape([logprobs, old_logprobs, mask])
  per_token = jnp.where(mask, logprobs - old_logprobs, 0.0)
  if level == 'token':
    return per_token
  total = jnp.sum(per_token, axis=1, keepdims=True)
  if level == 'sequence_sum':
    return jnp.where(mask, total, 0.0)
  mean = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
  if level == 'sequence':
    return jnp.where(mask, mean, 0.0)
  if level == 'sequence_token':
    own = logprobs - jax.lax.stop_gradient(logprobs)
    return jnp.where(mask, jax.lax.stop_gradient(mean) + own, 0.0)
  raise ValueError(f'unknown ratio level {level!r}: one of {RATIO_LEVELS}')


def token_weights(
  mask: Bool[ArrayLike, 'B R'],
  tokens: Num[ArrayLike, ''],
  sequences: Num[ArrayLike, ''],
  *,
  normalize: str,
  max_length: int,
) -> Float[Array, 'B R']:
  """Returns weights w such that sum(w * loss) over a minibatch is the normalized loss.

      'token':     1 / tokens                         (DAPO eq. 12; TRL's BNPO)
      'sequence':  1 / (sequences * length of the sequence)    (GRPO, DeepSeekMath eq. 3)
      'constant':  1 / (sequences * max_length)       (Dr. GRPO)

  'token' weighs all tokens of the minibatch equally, 'sequence' all sequences equally; 'constant'
  gives every token the same weight in every minibatch. Count `tokens` and `sequences` once, over
  the whole minibatch; the weighted sums of its microbatches then add up to its loss. To leave
  sequences out (DAPO's groups of equal scores), clear their mask and do not count them.
  See DeepSeekMath (https://arxiv.org/abs/2402.03300), DAPO (https://arxiv.org/abs/2503.14476)
  and Dr. GRPO §3 (https://arxiv.org/abs/2503.20783).

  Args:
    mask: [B, R] bool, True at the response tokens of a microbatch; it may have holes.
    tokens: scalar, response tokens in the minibatch.
    sequences: scalar, sequences in the minibatch. An empty one counts, as it does in TRL.
    normalize: 'token', 'sequence' or 'constant'.
    max_length: maximum number of tokens of a response; used by 'constant' only. R may be smaller,
      because a microbatch is truncated to its longest response.

  Returns:
    [B, R] float32; masked slots hold 0.

  Raises:
    ValueError: for an unknown normalization.
  """
  chex.assert_rank(mask, 2)
  if normalize == 'token':
    count = tokens
  elif normalize == 'sequence':
    count = sequences * jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
  elif normalize == 'constant':
    count = sequences * max_length
  else:
    raise ValueError(f'unknown normalization {normalize!r}: one of {NORMALIZERS}')
  return mask / jnp.maximum(count, 1).astype(jnp.float32)


def clipped_policy_loss(
  log_ratios: Float[ArrayLike, 'B R'],
  advantages: Float[ArrayLike, 'B R'],
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float | None = None,
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R'], Float[Array, 'B R']]:
  """Computes the clipped loss of `ppo_policy_loss` from log-ratios, such as those of `log_ratio`.

      -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A),   ratio = exp(log_ratios)

  Args:
    log_ratios: [B, R] float32.
    advantages: [B, R] float32.
    clip_low: the ratio is clipped at 1 - clip_low.
    clip_high: the ratio is clipped at 1 + clip_high.
    dual_clip: bound c of the loss of negative advantages; None for none.

  Returns:
    loss [B, R], clipped [B, R] (1 where the clipped term is larger) and ratio [B, R].
  """
  chex.assert_equal_shape([log_ratios, advantages])
  ratio = jnp.exp(log_ratios)
  plain = -advantages * ratio
  clip = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = jnp.maximum(plain, clip)
  if dual_clip:
    loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
  return loss, (clip > plain).astype(jnp.float32), ratio


def cispo_loss(
  logprobs: Float[ArrayLike, 'B R'],
  log_ratios: Float[ArrayLike, 'B R'],
  advantages: Float[ArrayLike, 'B R'],
  *,
  clip_low: float,
  clip_high: float,
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R'], Float[Array, 'B R']]:
  """Computes the policy gradient with clipped importance weights, per token.

      -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprobs,   ratio = exp(log_ratios)

  where sg stops the gradient. PPO's clip removes the gradient of a clipped token; here every token
  keeps one. See CISPO, MiniMax-M1, eq. 4 and 5 (https://arxiv.org/abs/2506.13585), which has no
  lower clip: clip_low = 1. TRL's `epsilon_high` is 1 + clip_high.

  Args:
    logprobs: [B, R] float32, log-probabilities by the policy being trained.
    log_ratios: [B, R] float32; see `log_ratio`.
    advantages: [B, R] float32.
    clip_low: the weight is at least 1 - clip_low.
    clip_high: the weight is at most 1 + clip_high.

  Returns:
    loss [B, R], clipped [B, R] (1 where the weight is clipped) and ratio [B, R].
  """
  chex.assert_equal_shape([logprobs, log_ratios, advantages])
  ratio = jnp.exp(log_ratios)
  weight = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
  return -weight * advantages * logprobs, (weight != ratio).astype(jnp.float32), ratio


def sapo_loss(
  log_ratios: Float[ArrayLike, 'B R'],
  advantages: Float[ArrayLike, 'B R'],
  *,
  tau_positive: float,
  tau_negative: float,
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R'], Float[Array, 'B R']]:
  """Computes the policy loss with a smooth gate in place of a clip, per token.

      -4 / tau * sigmoid(tau * (ratio - 1)) * A,   ratio = exp(log_ratios)

  where tau is `tau_positive` for positive advantages and `tau_negative` for others. At ratio 1 the
  gradient is that of -ratio * A; it falls smoothly on both sides, faster for a larger tau.
  See SAPO (https://arxiv.org/abs/2511.20347).

  Args:
    log_ratios: [B, R] float32; see `log_ratio`.
    advantages: [B, R] float32.
    tau_positive: positive number.
    tau_negative: positive number.

  Returns:
    loss [B, R], clipped [B, R] (0: nothing is) and ratio [B, R].
  """
  chex.assert_equal_shape([log_ratios, advantages])
  ratio = jnp.exp(log_ratios)
  tau = jnp.where(advantages > 0, tau_positive, tau_negative)
  gate = 4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0))
  return -gate * advantages, jnp.zeros_like(ratio), ratio


def ppo_policy_loss(
  logprobs: Float[ArrayLike, 'B R'],
  old_logprobs: Float[ArrayLike, 'B R'],
  advantages: Float[ArrayLike, 'B R'],
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float | None = None,
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R'], Float[Array, 'B R']]:
  """Computes the clipped policy loss of PPO, per token.

      -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

  See Schulman et al. 2017, eq. 7 (https://arxiv.org/abs/1707.06347). Unequal clips are
  DAPO's "clip-higher" (https://arxiv.org/abs/2503.14476). With `dual_clip` = c > 1 the loss
  of a negative advantage is at most -c * A (Ye et al. 2020, eq. 5,
  https://arxiv.org/abs/1912.09729).

  Args:
    logprobs: [B, R] float32, log-probabilities by the policy being trained.
    old_logprobs: [B, R] float32, log-probabilities by the policy that sampled.
    advantages: [B, R] float32.
    clip_low: the ratio is clipped at 1 - clip_low.
    clip_high: the ratio is clipped at 1 + clip_high.
    dual_clip: bound c of the loss of negative advantages; None for none.

  Returns:
    loss [B, R], clipped [B, R] (1 where the clipped term is larger) and ratio [B, R].
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  return clipped_policy_loss(
    logprobs - old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
  )


def ppo_value_loss(
  values: Float[ArrayLike, 'B R'],
  old_values: Float[ArrayLike, 'B R'],
  returns: Float[ArrayLike, 'B R'],
  *,
  clip: float | None,
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R']]:
  """Computes the clipped value loss of PPO, per token.

      0.5 * max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2)

  See lm-human-preferences, `train_policy.py`.

  Args:
    values: [B, R] float32, values by the critic being trained.
    old_values: [B, R] float32, values by the critic before the update.
    returns: [B, R] float32.
    clip: maximum distance from the old value; None for no clipping.

  Returns:
    loss [B, R] and clipped [B, R] (1 where the clipped term is larger).
  """
  chex.assert_equal_shape([values, old_values, returns])
  plain = jnp.square(values - returns)
  if not clip:
    return 0.5 * plain, jnp.zeros_like(plain)
  near = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
  return 0.5 * jnp.maximum(plain, near), (near > plain).astype(jnp.float32)


def divergence(
  logits: Float[ArrayLike, '... V'],
  teacher_logits: Float[ArrayLike, '... V'],
  *,
  kind: str,
  beta: float = 0.5,
) -> Float[Array, '...']:
  """Computes a divergence of a student's next-token distribution from a teacher's.

  With the student's probabilities p and the teacher's q over the vocabulary:

      'reverse_kl':  KL(p || q) = sum p (log p - log q)
      'forward_kl':  KL(q || p) = sum q (log q - log p)
      'jsd':         beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

  The last is the generalized Jensen-Shannon divergence of Agarwal et al. 2023, eq. 1
  (https://arxiv.org/abs/2306.13649). Divided by beta it tends to the forward KL for beta to 0, and
  divided by 1 - beta to the reverse KL for beta to 1.

  Args:
    logits: [..., V] float32, of the student.
    teacher_logits: [..., V] float32.
    kind: 'reverse_kl', 'forward_kl' or 'jsd'.
    beta: weight of the teacher in the mixture m, between 0 and 1; used by 'jsd' only.

  Returns:
    [...] float32, nats.

  Raises:
    ValueError: for an unknown kind.
  """
  chex.assert_equal_shape([logits, teacher_logits])
  student = jax.nn.log_softmax(logits, axis=-1)
  teacher = jax.nn.log_softmax(teacher_logits, axis=-1)
  kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
  if kind == 'reverse_kl':
    return kl(student, teacher)
  if kind == 'forward_kl':
    return kl(teacher, student)
  if kind == 'jsd':
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * kl(teacher, mixture) + (1.0 - beta) * kl(student, mixture)
  raise ValueError(f'unknown kind {kind!r}: one of {DIVERGENCES}')


def expectile_loss(
  values: Float[ArrayLike, '*shape'], targets: Float[ArrayLike, '*shape'], *, tau: float
) -> Float[Array, '*shape']:
  """Computes the asymmetric squared error whose minimum is the tau-expectile of the targets.

      |tau - 1[target < value]| * (target - value)^2

  tau = 0.5 gives half the squared error, tau near 1 the maximum of the targets. The targets get no
  gradient. See Kostrikov et al. 2021, eq. 5 (https://arxiv.org/abs/2110.06169).

  Args:
    values: float32, such as V(s).
    targets: float32, such as Q(s, a).
    tau: in (0, 1).
  """
  chex.assert_equal_shape([values, targets])
  gap = jax.lax.stop_gradient(targets) - values
  return jnp.where(gap < 0, 1.0 - tau, tau) * jnp.square(gap)


def reliabilities(
  offsets: Float[ArrayLike, ' A'], annotator: Int[ArrayLike, ' B']
) -> Float[Array, ' B']:
  """Returns the reliability of the annotator of each comparison.

      beta_k = 1 + w_k - mean_j w_j

  It is the inverse temperature of annotator k, who prefers a to b with probability
  sigmoid(beta_k (r_a - r_b)): 0 for one who chooses at random, negative for one who prefers the
  worse. A larger beta of all annotators would be the same as larger scores, so the mean is 1; this
  also decides the sign of the scores, by the majority. Instead, Crowd-BT (Chen et al. 2013,
  https://doi.org/10.1145/2433396.2433420) mixes the choice with its opposite, and NoisyBradleyTerry
  of crowd-kit with a choice that ignores the completions.

  Args:
    offsets: [A] float32, w of each annotator.
    annotator: [B] int32, index of the annotator; -1 for an unknown one, whose beta is 1.
  """
  known = 1.0 + (offsets - jnp.mean(offsets))[annotator]
  return jnp.where(annotator < 0, 1.0, known)


def pairwise_loss(
  scores: Float[ArrayLike, 'B K'],
  ranks: Int[ArrayLike, 'B K'],
  present: Bool[ArrayLike, 'B K'],
  margin: Float[ArrayLike, ' B'],
  *,
  centering: float = 0.0,
  label_smoothing: float = 0.0,
  reliability: Float[ArrayLike, ' B'] | None = None,
) -> tuple[Float[Array, ' B'], Bool[Array, ' B']]:
  """Computes the Bradley-Terry loss over all pairs of a prompt's completions, per prompt.

      mean over pairs with rank_i < rank_j of
        -(1 - s) log sigmoid(beta (r_i - r_j) - margin)
        - s log sigmoid(-(beta (r_i - r_j) - margin))
        + centering * (r_i + r_j)^2

  With K = 2 this is the usual loss of preference pairs; with more it is InstructGPT's, eq. 1
  (https://arxiv.org/abs/2203.02155): one forward pass per completion, and the same weight for every
  prompt. Margin: Llama 2, eq. 2 (https://arxiv.org/abs/2307.09288).
  Centering: Eisenstein et al. 2023 (https://arxiv.org/abs/2312.09244), 0.01 recommended.

  Args:
    scores: [B, K] float32.
    ranks: [B, K] int32, 0 is best; tied pairs are skipped.
    present: [B, K] bool.
    margin: [B] float32.
    centering: weight of the squared sums.
    label_smoothing: probability s that a label is wrong.
    reliability: [B] float32, beta; see `reliabilities`. None for 1.

  Returns:
    loss [B], 0 for prompts without a pair, and has_pair [B] bool.
  """
  chex.assert_equal_shape([scores, ranks, present])
  better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
  gap = scores[:, :, None] - scores[:, None, :]
  if reliability is not None:
    gap = reliability[:, None, None] * gap
  gap = gap - margin[:, None, None]
  loss = (
    -(1.0 - label_smoothing) * jax.nn.log_sigmoid(gap)
    - label_smoothing * jax.nn.log_sigmoid(-gap)
    + centering * jnp.square(scores[:, :, None] + scores[:, None, :])
  )
  pairs = jnp.sum(better, axis=(1, 2))
  total = jnp.sum(jnp.where(better, loss, 0.0), axis=(1, 2))
  return total / jnp.maximum(pairs, 1), pairs > 0


def dpo_loss(
  margin: Float[ArrayLike, ' B'],
  *,
  beta: float,
  label_smoothing: float = 0.0,
  offset: float | Float[ArrayLike, ' B'] = 0.0,
) -> Float[Array, ' B']:
  """Computes the loss of direct preference optimization, per pair.

      -(1 - s) log sigmoid(beta d - offset) - s log sigmoid(offset - beta d)

  where d = r(chosen) - r(rejected), with the log-ratio r = log pi - log pi_ref of a whole response.
  See Rafailov et al. 2023, eq. 7 (https://arxiv.org/abs/2305.18290). s > 0 is conservative DPO
  (E. Mitchell's note of 2023, https://ericmitchell.ai/cdpo.pdf). The offset is that of ODPO, Amini
  et al. 2024, eq. 8 (https://arxiv.org/abs/2402.10571): how much better the chosen response is.

  Args:
    margin: [B] float32, d, in nats.
    beta: strength of the implicit KL penalty.
    label_smoothing: probability s that a label is wrong.
    offset: [B] float32 or a number, by which beta d should exceed 0.

  Returns:
    [B] float32.
  """
  gap = beta * margin - offset
  smooth = label_smoothing
  return -(1.0 - smooth) * jax.nn.log_sigmoid(gap) - smooth * jax.nn.log_sigmoid(-gap)


def robust_dpo_loss(
  margin: Float[ArrayLike, ' B'], *, beta: float, label_smoothing: float
) -> Float[Array, ' B']:
  """Computes an unbiased estimate of the DPO loss from labels of which some are wrong, per pair.

      (-(1 - s) log sigmoid(beta d) + s log sigmoid(-beta d)) / (1 - 2 s)

  If a fraction s of the labels is flipped, its mean over the flips is the loss of `dpo_loss` on the
  true labels. See Chowdhury et al. 2024, eq. 12 (https://arxiv.org/abs/2403.00409).

  Args:
    margin, beta: see `dpo_loss`.
    label_smoothing: probability s that a label is wrong, below 0.5.

  Returns:
    [B] float32.
  """
  right, wrong = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
  return (label_smoothing * wrong - (1.0 - label_smoothing) * right) / (1.0 - 2.0 * label_smoothing)


def hinge_dpo_loss(margin: Float[ArrayLike, ' B'], *, beta: float) -> Float[Array, ' B']:
  """Computes the hinge loss of a preference, max(0, 1 - beta d), per pair.

  See SLiC, Zhao et al. 2023, eq. 1 (https://arxiv.org/abs/2305.10425), as Liu et al. 2023 normalize
  it by the reference in eq. 9 (https://arxiv.org/abs/2309.06657).

  Args:
    margin, beta: see `dpo_loss`.

  Returns:
    [B] float32.
  """
  return jax.nn.relu(1.0 - beta * margin)


def ipo_loss(margin: Float[ArrayLike, ' B'], *, beta: float) -> Float[Array, ' B']:
  """Computes the loss of identity preference optimization, (d - 1 / (2 beta))^2, per pair.

  It has a minimum at a finite margin, so labels without noise do not drive the policy away from the
  reference. See Azar et al. 2023, eq. 17 (https://arxiv.org/abs/2310.12036), with tau = beta.

  Args:
    margin, beta: see `dpo_loss`. TRL divides each log-ratio by the length of its response first, on
      the advice of the authors.

  Returns:
    [B] float32.
  """
  return jnp.square(margin - 1.0 / (2.0 * beta))


def reference_loss(
  margin: Float[ArrayLike, ' B'],
  *,
  kind: str,
  beta: float,
  label_smoothing: float = 0.0,
  offset: float | Float[ArrayLike, ' B'] = 0.0,
) -> Float[Array, ' B']:
  """Computes one of the losses of a pair's log-ratios.

  Args:
    margin, beta: see `dpo_loss`.
    kind: 'sigmoid' (`dpo_loss`), 'robust', 'hinge' or 'ipo'.
    label_smoothing: used by 'sigmoid' and 'robust' only.
    offset: used by 'sigmoid' only.

  Returns:
    [B] float32.

  Raises:
    ValueError: for an unknown kind.
  """
  if kind == 'sigmoid':
    return dpo_loss(margin, beta=beta, label_smoothing=label_smoothing, offset=offset)
  if kind == 'robust':
    return robust_dpo_loss(margin, beta=beta, label_smoothing=label_smoothing)
  if kind == 'hinge':
    return hinge_dpo_loss(margin, beta=beta)
  if kind == 'ipo':
    return ipo_loss(margin, beta=beta)
  raise ValueError(f'unknown kind {kind!r}: one of {DPO_LOSSES}')


def kto_loss(
  log_ratios: Float[ArrayLike, ' B'],
  desirable: Bool[ArrayLike, ' B'],
  kl: float | Float[ArrayLike, ''],
  *,
  beta: float,
) -> Float[Array, ' B']:
  """Computes the loss of Kahneman-Tversky optimization, per labelled response.

      1 - sigmoid(beta (r - z0))  of a desirable response
      1 - sigmoid(beta (z0 - r))  of an undesirable one

  with the log-ratio r = log pi - log pi_ref. The reference point z0, a KL divergence, gets no
  gradient. See Ethayarajh et al. 2024, eq. 7 and 8 (https://arxiv.org/abs/2402.01306); the weights
  lambda of both kinds multiply the result.

  Args:
    log_ratios: [B] float32, r, in nats.
    desirable: [B] bool, the labels.
    kl: scalar, z0, at least 0.
    beta: how fast the value of a response saturates.

  Returns:
    [B] float32, between 0 and 1.
  """
  chex.assert_equal_shape([log_ratios, desirable])
  gap = beta * (log_ratios - jax.lax.stop_gradient(kl))
  return jax.nn.sigmoid(jnp.where(desirable, -gap, gap))


def orpo_loss(
  chosen: Float[ArrayLike, ' B'], rejected: Float[ArrayLike, ' B'], *, beta: float
) -> Float[Array, ' B']:
  """Computes the odds-ratio term of ORPO, per pair; its other term is the SFT loss.

      -beta log sigmoid(log odds(chosen) - log odds(rejected)),   odds = p / (1 - p)

  where p = exp(mean log-probability of the tokens). There is no reference. See Hong et al. 2024,
  eq. 4 to 7 (https://arxiv.org/abs/2403.07691), where beta is lambda.

  Args:
    chosen: [B] float32, mean log-probability per token of the better response, in nats.
    rejected: [B] float32, of the worse response.
    beta: weight of the term.

  Returns:
    [B] float32.
  """
  chex.assert_equal_shape([chosen, rejected])

  def log_odds(logprob):
    logprob = jnp.minimum(logprob, -1e-7)  # the odds of p = 1 are infinite
    return logprob - jnp.log(-jnp.expm1(logprob))

  return -beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def simpo_loss(
  chosen: Float[ArrayLike, ' B'],
  rejected: Float[ArrayLike, ' B'],
  *,
  beta: float,
  gamma: float,
  label_smoothing: float = 0.0,
) -> Float[Array, ' B']:
  """Computes the loss of simple preference optimization, per pair. There is no reference.

      -(1 - s) log sigmoid(beta (chosen - rejected) - gamma) - s log sigmoid(gamma - beta (...))

  See Meng et al. 2024, eq. 6 (https://arxiv.org/abs/2405.14734).

  Args:
    chosen: [B] float32, mean log-probability per token of the better response, in nats.
    rejected: [B] float32, of the worse response.
    beta: scale of the rewards.
    gamma: margin by which the chosen reward should exceed the other.
    label_smoothing: probability s that a label is wrong.

  Returns:
    [B] float32.
  """
  chex.assert_equal_shape([chosen, rejected])
  return dpo_loss(chosen - rejected, beta=beta, label_smoothing=label_smoothing, offset=gamma)


def pick_best_loss(
  scores: Float[ArrayLike, 'B K'],
  ranks: Int[ArrayLike, 'B K'],
  present: Bool[ArrayLike, 'B K'],
  *,
  reliability: Float[ArrayLike, ' B'] | None = None,
) -> tuple[Float[Array, ' B'], Bool[Array, ' B']]:
  """Computes the softmax cross-entropy of the best completion among K, per prompt.

      -log softmax(beta r)_best

  See Ziegler et al. 2019, eq. 1 (https://arxiv.org/abs/1909.08593).

  Args:
    scores: [B, K] float32.
    ranks: [B, K] int32; rank 0 is the picked one.
    present: [B, K] bool.
    reliability: [B] float32, beta; see `reliabilities`. None for 1.

  Returns:
    loss [B] and valid [B] bool (exactly one pick among at least two).
  """
  best = (ranks == 0) & present
  if reliability is not None:
    scores = reliability[:, None] * scores
  logp = jax.nn.log_softmax(jnp.where(present, scores, -jnp.inf), axis=-1)
  loss = -jnp.sum(jnp.where(best, logp, 0.0), axis=-1)
  valid = (jnp.sum(best, axis=-1) == 1) & (jnp.sum(present, axis=-1) > 1)
  return jnp.where(valid, loss, 0.0), valid


def rating_loss(
  scores: Float[ArrayLike, 'B K'], ratings: Float[ArrayLike, 'B K'], present: Bool[ArrayLike, 'B K']
) -> tuple[Float[Array, ' B'], Bool[Array, ' B']]:
  """Computes the squared error of absolute ratings, averaged over a prompt's completions.

  Args:
    scores: [B, K] float32.
    ratings: [B, K] float32.
    present: [B, K] bool.

  Returns:
    loss [B] and valid [B] bool (at least one completion).
  """
  error = jnp.where(present, jnp.square(scores - ratings), 0.0)
  count = jnp.sum(present, axis=-1)
  return jnp.sum(error, axis=-1) / jnp.maximum(count, 1), count > 0

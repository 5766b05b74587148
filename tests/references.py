"""Plain NumPy loops for everything the package computes in whole arrays.

They follow the papers and the conventions in the docstrings, one number at a time, in float64, so
that a reader can check each line against its source and tests can compare the package with them.
This file does not import the package. Rows are ragged: a row of length n has n real slots, and the
contents of the others must not matter (tests put garbage there).

Letters: B batch, R response length, K completions, V vocabulary, n responses per prompt.
"""

import math

import numpy as np


def real(x, mask):
  """Returns the values of `x` under the mask as a flat list of Python floats."""
  return [float(v) for row, keep in zip(x, mask) for v, k in zip(row, keep) if k]


def mean(numbers):
  total = 0.0
  for number in numbers:
    total += number
  return total / len(numbers)


def variance(numbers, *, bessel):
  centre = mean(numbers)
  total = 0.0
  for number in numbers:
    total += (number - centre) ** 2
  return total / (len(numbers) - 1 if bessel else len(numbers))


def whiten(x, mask, *, shift_mean, bessel):
  """Computes (x - mean) / sqrt(variance + 1e-8) in real slots; adds the mean if not shifted."""
  numbers = real(x, mask)
  centre, spread = mean(numbers), math.sqrt(variance(numbers, bessel=bessel) + 1e-8)
  out = np.zeros(np.shape(x))
  for i, row in enumerate(mask):
    for t, keep in enumerate(row):
      if keep:
        out[i, t] = (float(x[i][t]) - centre) / spread + (0.0 if shift_mean else centre)
  return out


def kl_estimate(logp, ref_logp, estimator):
  """Estimates KL(policy || reference) of one token. Schulman, "Approximating KL divergence"."""
  log_ratio = logp - ref_logp
  if estimator == 'k1':
    return log_ratio
  if estimator == 'k2':
    return log_ratio**2 / 2
  if estimator == 'k3':
    inverse = math.exp(-log_ratio)  # reference over policy
    return inverse - 1 - math.log(inverse)
  assert estimator == 'abs'
  return abs(log_ratio)


def log_softmax(logits):
  top = max(float(x) for x in logits)
  total = 0.0
  for x in logits:
    total += math.exp(float(x) - top)
  return [float(x) - top - math.log(total) for x in logits]


def entropy(logits):
  """Computes -sum p log p of one distribution."""
  total = 0.0
  for logp in log_softmax(logits):
    total -= math.exp(logp) * logp
  return total


def full_kl(logits, ref_logits):
  """Computes sum p (log p - log q) of two distributions."""
  total = 0.0
  for logp, logq in zip(log_softmax(logits), log_softmax(ref_logits)):
    total += math.exp(logp) * (logp - logq)
  return total


def clip(x, low, high):
  return low if x < low else high if x > high else x


def adaptive_kl_per_sequence(coef, kl, mask, *, target, horizon):
  """Ziegler et al. 2019: the error is that of the mean over B of the KL summed per response."""
  sums = []
  for row, keep in zip(kl, mask):
    sums.append(0.0)
    for value, k in zip(row, keep):
      if k:
        sums[-1] += float(value)
  error = clip(mean(sums) / target - 1, -0.2, 0.2)
  return coef * (1 + error * len(sums) / horizon)


def adaptive_kl_per_token(coef, kl, mask, *, target):
  """RL4LMs: the error is that of the mean over all tokens; the gain is 0.1."""
  error = clip(mean(real(kl, mask)) / target - 1, -0.2, 0.2)
  return coef * (1 + 0.1 * error)


def score_slot(length, slots, position):
  """Returns the slot that gets the score of a response with `length` real tokens of `slots`."""
  if position == 'last':
    return slots - 1
  if position == 'after_end':
    return length if length < slots else slots - 1
  assert position == 'eos'
  return length - 1


def missing_eos(score, has_eos, *, mode, value):
  if has_eos or mode == 'none':
    return score
  return value if mode == 'replace' else score - value


def token_rewards(scores, kl, coef, lengths, *, position):
  """Computes -coef * kl on real tokens, plus the score in one slot or a reward per real token."""
  slots = len(kl[0])
  out = np.zeros((len(lengths), slots))
  for i, length in enumerate(lengths):
    for t in range(length):
      out[i, t] = -coef * float(kl[i][t])
      if np.ndim(scores) == 2:
        out[i, t] += float(scores[i][t])
    if np.ndim(scores) == 1:
      out[i, score_slot(length, slots, position)] += float(scores[i])
  return out


def gae(rewards, values, ends, *, gamma, lam):
  """Computes A_t = sum over l of (gamma lam)^l delta_{t+l}, the double sum of the definition.

  `ends[i]` is the number of slots of episode i; the value after the last of them is 0. See Schulman
  et al. 2016, eq. 16, without its recursion.
  """
  advantages, returns = np.zeros(np.shape(rewards)), np.zeros(np.shape(rewards))
  for i, end in enumerate(ends):
    delta = []
    for t in range(end):
      after = float(values[i][t + 1]) if t + 1 < end else 0.0
      delta.append(float(rewards[i][t]) + gamma * after - float(values[i][t]))
    for t in range(end):
      for later in range(t, end):
        advantages[i, t] += (gamma * lam) ** (later - t) * delta[later]
      returns[i, t] = advantages[i, t] + float(values[i][t])
  return advantages, returns


def policy_loss(logp, old_logp, advantage, *, clip_low, clip_high, dual_clip=0.0):
  """Computes loss, whether the clip decides, ratio, and d loss / d logp of one token."""
  ratio = math.exp(logp - old_logp)
  bounded = clip(ratio, 1 - clip_low, 1 + clip_high)
  objective = min(ratio * advantage, bounded * advantage)
  clipped = bounded * advantage < ratio * advantage
  gradient = 0.0 if clipped else -ratio * advantage
  if dual_clip and advantage < 0 and objective < dual_clip * advantage:
    objective, gradient = dual_clip * advantage, 0.0
  return -objective, clipped, ratio, gradient


def value_loss(value, old_value, target, *, bound):
  """Computes loss (with the factor 1/2), whether the clip decides, and d loss / d value."""
  plain = (value - target) ** 2
  if not bound:
    return plain / 2, False, value - target
  near = clip(value, old_value - bound, old_value + bound)
  if (near - target) ** 2 > plain:  # then `near` is at an end of the interval and constant
    return (near - target) ** 2 / 2, True, 0.0
  return plain / 2, False, value - target


class Adam:
  """Adam on a dict of float64 arrays, in the form of torch and optax or of TensorFlow 1.

  Kernels decay as in AdamW.
  """

  def __init__(self, *, b1, b2, eps, tensorflow, decay=0.0):
    self.b1, self.b2, self.eps, self.tensorflow, self.decay = b1, b2, eps, tensorflow, decay
    self.t, self.m, self.v = 0, {}, {}

  def step(self, params, grads, rate):
    """Returns new params. torch: m^ / (sqrt(v^) + eps). TF: epsilon is added to sqrt(v)."""
    self.t += 1
    new = {}
    for name, g in grads.items():
      m = self.m[name] = self.b1 * self.m.get(name, 0.0) + (1 - self.b1) * g
      v = self.v[name] = self.b2 * self.v.get(name, 0.0) + (1 - self.b2) * g * g
      bias1, bias2 = 1 - self.b1**self.t, 1 - self.b2**self.t
      if self.tensorflow:
        change = math.sqrt(bias2) / bias1 * m / (np.sqrt(v) + self.eps)
      else:
        change = (m / bias1) / (np.sqrt(v / bias2) + self.eps)
      kept = 1 - rate * self.decay if name.endswith('kernel') else 1.0
      new[name] = kept * params[name] - rate * change
    return new


class RMSProp:
  """RMSProp on a dict of float64 arrays: torch's form, or TensorFlow 1's; the interface of Adam."""

  def __init__(self, *, decay, eps, tensorflow):
    self.decay, self.eps, self.tensorflow, self.v = decay, eps, tensorflow, {}

  def step(self, params, grads, rate):
    """New params. torch: g / (sqrt(v) + eps), v from 0. TF: g / sqrt(v + eps), v from 1."""
    new = {}
    for name, g in grads.items():
      v = self.v.get(name, np.full_like(g, float(self.tensorflow), np.float64))
      v = self.v[name] = self.decay * v + (1 - self.decay) * np.square(g, dtype=np.float64)
      root = np.sqrt(v + self.eps) if self.tensorflow else np.sqrt(v) + self.eps
      new[name] = params[name] - rate * g / root
    return new


def softplus(x):
  return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def pairwise_loss(scores, ranks, present, margin, beta=1.0, *, centering, smoothing):
  """Computes the mean Bradley-Terry loss over a prompt's ordered pairs; None without a pair."""
  losses = []
  for i, better in enumerate(ranks):
    for j, worse in enumerate(ranks):
      if present[i] and present[j] and better < worse:
        gap = float(beta) * (float(scores[i]) - float(scores[j])) - float(margin)
        loss = (1 - smoothing) * softplus(-gap) + smoothing * softplus(gap)
        losses.append(loss + centering * (float(scores[i]) + float(scores[j])) ** 2)
  return mean(losses) if losses else None


def reference_loss(margin, *, beta, smoothing, kind):
  """Computes a loss of one pair, from the margin of its log-ratios."""
  gap = beta * float(margin)
  if kind == 'sigmoid':
    return (1 - smoothing) * softplus(-gap) + smoothing * softplus(gap)
  if kind == 'robust':
    return ((1 - smoothing) * softplus(-gap) - smoothing * softplus(gap)) / (1 - 2 * smoothing)
  if kind == 'ipo':
    return ((gap - 0.5) / beta) ** 2
  assert kind == 'hinge'
  return 1 - gap if gap < 1 else 0.0


def kto_loss(log_ratio, desirable, kl, *, beta):
  """Computes the loss of one labelled response: 1 minus its value."""
  gain = float(log_ratio) - kl if desirable else kl - float(log_ratio)
  return 1 - 1 / (1 + math.exp(-beta * gain))


def orpo_loss(chosen, rejected, *, beta):
  """Computes the odds-ratio term of one pair, from mean log-probabilities."""
  odds = [math.exp(x) / (1 - math.exp(x)) for x in (float(chosen), float(rejected))]
  return beta * softplus(-math.log(odds[0] / odds[1]))


def simpo_loss(chosen, rejected, *, beta, gamma):
  """Computes the loss of one pair, from mean log-probabilities."""
  return softplus(gamma - beta * (float(chosen) - float(rejected)))


def best_and_worst(scores, n, kept):
  """1 for the first best of each group, -1 for its first worst, 0 for the rest and without both."""
  marks = [0] * len(scores)
  for start in range(0, len(scores), n):
    there = [i for i in range(start, start + n) if kept[i]]
    if len({float(scores[i]) for i in there}) > 1:
      marks[max(there, key=lambda i: float(scores[i]))] = 1
      marks[min(there, key=lambda i: float(scores[i]))] = -1
  return marks


def pick_best_loss(scores, ranks, present):
  """Computes the cross-entropy of a prompt's one pick; None without a clear pick."""
  there = [k for k in range(len(scores)) if present[k]]
  picks = [k for k in there if ranks[k] == 0]
  if len(picks) != 1 or len(there) < 2:
    return None
  return -log_softmax([scores[k] for k in there])[there.index(picks[0])]


def rating_loss(scores, ratings, present):
  """Computes a prompt's mean squared error; None without completions."""
  errors = [(float(s) - float(r)) ** 2 for s, r, p in zip(scores, ratings, present) if p]
  return mean(errors) if errors else None


class RunningScale:
  """trlX's running standard deviation (n - 1) of all scores so far, which are stored."""

  def __init__(self):
    self.seen = []

  def update(self, scores):
    self.seen += [float(s) for s in scores]
    return math.sqrt(variance(self.seen, bessel=True)) if len(self.seen) > 1 else 1.0


def group_advantages(scores, n, *, scale):
  """Computes score minus mean of its n neighbours, over std + 1e-4 of the group or the batch."""
  out = []
  for i in range(0, len(scores), n):
    group = [float(s) for s in scores[i : i + n]]
    over = {'group': group, 'batch': [float(s) for s in scores], 'none': None}[scale]
    divisor = 1.0 if over is None else math.sqrt(variance(over, bessel=True)) + 1e-4
    for score in group:
      out.append((score - mean(group)) / divisor)
  return out


def overlong_penalty(length, *, max_length, cache):
  """Computes DAPO eq. 13 by its three cases."""
  if length <= max_length - cache:
    return 0.0
  if length <= max_length:
    return (max_length - cache - length) / cache
  return -1.0


def sequence_ratio(logp, old_logp, keep):
  """Computes GSPO eq. 7 as written: (product of p / product of old p) ^ (1 / length)."""
  new, old, length = 1.0, 1.0, 0
  for p, q, k in zip(logp, old_logp, keep):
    if k:
      new, old, length = new * math.exp(p), old * math.exp(q), length + 1
  return (new / old) ** (1 / length) if length else 1.0


def normalized(loss, mask, *, normalize, max_length):
  """Computes a minibatch's loss: DAPO eq. 12, DeepSeekMath eq. 3 or Dr. GRPO."""
  per_sequence = [[float(x) for x, k in zip(*row) if k] for row in zip(loss, mask)]
  if normalize == 'token':
    tokens = sum(per_sequence, [])
    return mean(tokens) if tokens else 0.0
  if normalize == 'sequence':
    return mean([mean(tokens) if tokens else 0.0 for tokens in per_sequence])
  assert normalize == 'constant'
  return mean([sum(tokens) / max_length for tokens in per_sequence])


def discounted_returns(rewards, mask, *, gamma):
  """Sum over this and the later real tokens of gamma^(number of real tokens between) times r."""
  out = np.zeros(np.shape(mask))
  for i, row in enumerate(mask):
    real = [t for t, keep in enumerate(row) if keep]
    for a, t in enumerate(real):
      for b, later in enumerate(real[a:]):
        out[i, t] += gamma**b * float(rewards[i][later])
  return out


def leave_one_out_advantages(scores, n, kept):
  """Score less the mean of the other scores of its group that count."""
  out = []
  for i, score in enumerate(scores):
    start = i // n * n
    others = [float(scores[j]) for j in range(start, start + n) if j != i and kept[j]]
    out.append(float(score) - mean(others) if kept[i] and others else 0.0)
  return out

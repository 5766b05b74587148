"""A whole PPO iteration by hand, for a language model small enough to differentiate by hand.

The model depends only on the last token and its position:

    h_i = token[x_i] + place[i]
    logits_i = h_i @ unembed / temperature
    V_i = h_i . kernel + bias

Its critic is the same with its own tables, or a head on the policy's h. Texts are lists without
padding, gradients are the chain rule written out, and everything is float64. The settings are a
dict with the keys of `SETTINGS`.

Letters: B episodes, R response slots.
"""

import math

import numpy as np

import references

SETTINGS = dict(
  epochs=4,
  minibatches=1,
  slots=6,
  temperature=1.0,
  estimator='k1',
  kl_in='reward',
  controller='fixed',
  target=None,
  horizon=None,
  gamma=1.0,
  lam=0.95,
  clip_low=0.2,
  clip_high=0.2,
  dual_clip=0.0,
  value_clip=0.2,
  vf_coef=0.1,
  entropy_coef=0.0,
  ptx_coef=0.0,
  position='eos',
  missing='none',
  missing_value=0.0,
  scale=False,
  clip_scores=0.0,
  whiten_rewards=False,
  whiten_advantages='batch',
  bessel=False,
  behaviour='forward',
)


def state(params, owner, text, index):
  """Returns the state of the model of `owner` at text[index], counted from the first token."""
  return params[f'{owner}/token'][text[index]] + params[f'{owner}/place'][index]


def critic_owner(params):
  return 'critic' if 'critic/token' in params else 'policy'


def distribution(params, text, index, temperature):
  """Returns log p of every token after text[index]."""
  h = state(params, 'policy', text, index)
  return references.log_softmax(h @ params['policy/unembed'] / temperature)


def value(params, text, index):
  h = state(params, critic_owner(params), text, index)
  return float(h @ params['critic/kernel'] + params['critic/bias'])


def postprocess_scores(episodes, scale, s):
  """Clips scores, scales them by all clipped ones so far, then applies the missing-EOS rule."""
  scores = [e['score'] for e in episodes]
  if s['clip_scores']:
    scores = [np.clip(x, -s['clip_scores'], s['clip_scores']) for x in scores]
  if s['scale']:
    spread = scale.update([sum(x) if np.ndim(x) else x for x in scores])
    scores = [np.divide(x, spread) for x in scores]
  rule = lambda x, e: references.missing_eos(
    x, e['ended'], mode=s['missing'], value=s['missing_value']
  )
  if not np.ndim(episodes[0]['score']):
    return [rule(float(x), e) for x, e in zip(scores, episodes)]
  postprocessed = []
  for x, e in zip(scores, episodes):  # the last token's reward makes their sum follow the rule
    total = float(rule(sum(x), e))
    replaced = s['missing'] == 'replace' and not e['ended']
    others = [0.0] * (len(x) - 1) if replaced else list(x[:-1])
    postprocessed.append(np.array(others + [total - sum(others)]))
  return postprocessed


def experience(params, reference, episodes, coef, scale, s):
  """Returns tables [B, R] of everything that the update needs, 0 outside the responses."""
  table = lambda: np.zeros((len(episodes), s['slots']))
  x = {name: table() for name in ('logp', 'ref', 'kl', 'values', 'dense', 'entropy')}
  x['lengths'] = [len(e['response']) for e in episodes]
  dense = np.ndim(episodes[0]['score']) == 1
  x['ends'] = [
    n if dense else max(n, references.score_slot(n, s['slots'], s['position']) + 1)
    for n in x['lengths']
  ]
  postprocessed, x['gaps'] = postprocess_scores(episodes, scale, s), []
  for i, e in enumerate(episodes):
    text, first = e['prompt'] + e['response'], len(e['prompt'])
    for t in range(x['lengths'][i]):
      mine = distribution(params, text, first + t - 1, s['temperature'])
      other = distribution(reference, text, first + t - 1, s['temperature'])
      x['logp'][i, t] = mine[text[first + t]]
      x['gaps'].append(abs(e['sampled'][t] - x['logp'][i, t]))
      if s['behaviour'] == 'sampler':
        x['logp'][i, t] = e['sampled'][t]
      x['ref'][i, t] = other[text[first + t]]
      x['entropy'][i, t] = -sum(math.exp(p) * p for p in mine)
      if s['estimator'] == 'full':
        x['kl'][i, t] = sum(math.exp(p) * (p - q) for p, q in zip(mine, other))
      else:
        x['kl'][i, t] = references.kl_estimate(x['logp'][i, t], x['ref'][i, t], s['estimator'])
      if dense:
        x['dense'][i, t] = postprocessed[i][t]
    for t in range(x['ends'][i]):
      x['values'][i, t] = value(params, text, first + t - 1)
  x['scores'] = [sum(p) for p in postprocessed] if dense else postprocessed
  x['rewards'] = references.token_rewards(
    x['dense'] if dense else postprocessed,
    x['kl'],
    coef if s['kl_in'] == 'reward' else 0.0,
    x['lengths'],
    position=s['position'],
  )
  return returns_and_advantages(x, s)


def masks(x, s):
  """Returns which slots are tokens, and which count for the return."""
  slots = range(s['slots'])
  below = lambda counts: [[t < n for t in slots] for n in counts]
  return below(x['lengths']), below(x['ends'])


def returns_and_advantages(x, s):
  """Adds whitened rewards, advantages and returns."""
  tokens, steps = masks(x, s)
  if s['whiten_rewards']:
    x['rewards'] = references.whiten(x['rewards'], steps, shift_mean=False, bessel=s['bessel'])
  x['advantages'], x['returns'] = references.gae(
    x['rewards'], x['values'], x['ends'], gamma=s['gamma'], lam=s['lam']
  )
  if s['whiten_advantages'] == 'batch':
    x['advantages'] = references.whiten(
      x['advantages'], tokens, shift_mean=True, bessel=s['bessel']
    )
  return x


class Gradient:
  """Sums of the parameters' gradients, by the chain rule."""

  def __init__(self, params):
    self.params = params
    self.of = {name: np.zeros_like(p) for name, p in params.items()}

  def _state(self, owner, text, index, gradient):
    self.of[f'{owner}/token'][text[index]] += gradient
    self.of[f'{owner}/place'][index] += gradient

  def through_logits(self, text, index, gradient):
    """Adds the gradient [V] with respect to h @ unembed."""
    h = state(self.params, 'policy', text, index)
    self.of['policy/unembed'] += np.outer(h, gradient)
    self._state('policy', text, index, self.params['policy/unembed'] @ gradient)

  def through_value(self, text, index, gradient):
    owner = critic_owner(self.params)
    self.of['critic/kernel'] += gradient * state(self.params, owner, text, index)
    self.of['critic/bias'] += gradient
    self._state(owner, text, index, gradient * self.params['critic/kernel'])


def kl_slope(d, estimator):
  """Returns the derivative of the estimator with respect to its log ratio d."""
  return {'k1': 1.0, 'k2': d, 'k3': 1 - math.exp(-d), 'abs': math.copysign(1.0, d)}[estimator]


def minibatch_gradient(params, episodes, x, rows, coef, s):
  """Returns the gradient of the minibatch's loss, and its statistics."""
  advantages = x['advantages']
  if s['whiten_advantages'] == 'minibatch':
    tokens, _ = masks(x, s)
    advantages = np.zeros_like(advantages)
    advantages[rows] = references.whiten(
      x['advantages'][rows], [tokens[i] for i in rows], shift_mean=True, bessel=s['bessel']
    )
  count = sum(x['lengths'][i] for i in rows)
  steps = sum(x['ends'][i] for i in rows)
  gradient = Gradient(params)
  stats = dict.fromkeys(
    (
      'policy/loss',
      'policy/approxkl',
      'policy/clipfrac',
      'policy/ratio',
      'policy/entropy_per_token',
      'value/loss',
      'value/clipfrac',
      'value/mean',
    ),
    0.0,
  )
  for i in rows:
    text = episodes[i]['prompt'] + episodes[i]['response']
    first = len(episodes[i]['prompt'])
    for t in range(x['lengths'][i]):
      logp = distribution(params, text, first + t - 1, s['temperature'])
      chosen, p = text[first + t], np.exp(logp)
      new, old = logp[chosen], x['logp'][i, t]
      loss, clipped, ratio, by_logp = references.policy_loss(
        new,
        old,
        advantages[i, t],
        clip_low=s['clip_low'],
        clip_high=s['clip_high'],
        dual_clip=s['dual_clip'],
      )
      if s['kl_in'] == 'loss':
        by_logp += coef * kl_slope(new - x['ref'][i, t], s['estimator'])
      entropy = -float(p @ logp)
      # d logp[chosen] / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy).
      by_logits = by_logp * (np.arange(len(p)) == chosen) - by_logp * p
      by_logits += s['entropy_coef'] * p * (np.array(logp) + entropy)
      gradient.through_logits(text, first + t - 1, by_logits / s['temperature'] / count)
      stats['policy/loss'] += loss / count
      stats['policy/approxkl'] += 0.5 * (new - old) ** 2 / count
      stats['policy/clipfrac'] += clipped / count
      stats['policy/ratio'] += ratio / count
      stats['policy/entropy_per_token'] += entropy / count
    for t in range(x['ends'][i]):
      loss, clipped, by_value = references.value_loss(
        value(params, text, first + t - 1),
        x['values'][i, t],
        x['returns'][i, t],
        bound=s['value_clip'],
      )
      gradient.through_value(text, first + t - 1, s['vf_coef'] * by_value / steps)
      stats['value/loss'] += loss / steps
      stats['value/clipfrac'] += clipped / steps
      stats['value/mean'] += value(params, text, first + t - 1) / steps
  return gradient, stats


def add_pretraining(gradient, texts, s):
  """Adds ptx_coef times the gradient of the mean -log p of the texts; returns that mean."""
  count = sum(len(text) - 1 for text in texts)
  total = 0.0
  for text in texts:
    for index in range(len(text) - 1):
      logp = distribution(gradient.params, text, index, 1.0)
      total -= logp[text[index + 1]] / count
      by_logits = np.exp(logp) - (np.arange(len(logp)) == text[index + 1])
      gradient.through_logits(text, index, s['ptx_coef'] * by_logits / count)
  return total


def next_coefficient(coef, x, s):
  """Returns the KL coefficient after the iteration; controllers use k1 for any penalty."""
  tokens, _ = masks(x, s)
  k1 = x['logp'] - x['ref']
  if s['controller'] == 'adaptive':
    return references.adaptive_kl_per_sequence(
      coef, k1, tokens, target=s['target'], horizon=s['horizon']
    )
  if s['controller'] == 'adaptive_per_token':
    return references.adaptive_kl_per_token(coef, k1, tokens, target=s['target'])
  return coef


def value_statistics(x):
  """Returns statistics of returns and old values over slots that count for the return."""
  slots = [(i, t) for i, end in enumerate(x['ends']) for t in range(end)]
  returns = [x['returns'][slot] for slot in slots]
  errors = [x['returns'][slot] - x['values'][slot] for slot in slots]
  return {
    'returns/mean': references.mean(returns),
    'returns/var': float(np.var(returns)),
    'value/explained_variance': 1 - float(np.var(errors) / np.var(returns)),
  }


def iteration(params, reference, episodes, coef, *, settings, adam, rates, orders, scale, ptx=()):
  """One PPO iteration.

  Args:
    params: {'policy/token', 'policy/place', 'policy/unembed', 'critic/kernel', 'critic/bias'},
      and 'critic/token', 'critic/place' for a critic with its own.
    reference: the policy's parameters before any training.
    episodes: [{'prompt', 'response': lists of tokens, 'score': a number or one per token,
      'ended': whether it has an EOS, 'sampled': log-probabilities of the sampler}].
    coef: KL coefficient.
    settings: dict like SETTINGS.
    adam: references.Adam, kept from one iteration to the next.
    rates: iterator of learning rates, one per minibatch.
    orders: [epochs][B], the episodes in the order of each epoch.
    scale: references.RunningScale, also kept.
    ptx: pretraining texts, divided among the minibatches in order.

  Returns:
    params, KL coefficient, and statistics.
  """
  s = settings
  x = experience(params, reference, episodes, coef, scale, s)
  collected = []
  for order in orders:
    size, share = len(order) // s['minibatches'], len(ptx) // s['minibatches']
    for m in range(s['minibatches']):
      rows = list(order[m * size : (m + 1) * size])
      gradient, stats = minibatch_gradient(params, episodes, x, rows, coef, s)
      if ptx:
        stats['ptx/loss'] = add_pretraining(gradient, ptx[m * share : (m + 1) * share], s)
      params = adam.step(params, gradient.of, next(rates))
      collected.append(stats)
  stats = {name: references.mean([c[name] for c in collected]) for name in collected[0]}
  kl = float((x['logp'] - x['ref']).sum()) / len(episodes)
  score = references.mean(x['scores'])
  stats |= {
    'objective/kl': kl,
    'objective/kl_coef': coef,
    'objective/postprocessed_scores': score,
    'objective/rlhf_reward': score - coef * kl,
    'policy/sampler_gap': references.mean(x['gaps']),
    **value_statistics(x),
    'objective/entropy_per_response': float(x['entropy'].sum()) / len(episodes),
    'response/length': references.mean(x['lengths']),
    'response/eos_rate': references.mean([float(e['ended']) for e in episodes]),
  }
  return params, next_coefficient(coef, x, s), stats

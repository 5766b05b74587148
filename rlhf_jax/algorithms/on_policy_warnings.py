"""Warnings about metrics of an on-policy step that point to a mistake.

`config.warn` has the bounds. The loop logs each kind of warning once per run.
"""

import ml_collections

from rlhf_jax import config as config_lib
from rlhf_jax.evaluation import glossary

NEGATIVE_KL_ERRORS = 3.0  # standard errors below 0 from which a KL counts as negative
KL_ROUNDING = 0.01  # nats; a KL closer to 0 counts as 0


def config():
  """Returns the keys of `config.warn`; None disables a warning."""
  return ml_collections.ConfigDict(
    {
      'kl': 50.0,  # warn if objective/kl exceeds this value, in nats per response
      'sampler_gap': 0.1,  # warn if policy/sampler_gap exceeds this value, in nats per token
    }
  )


def validate(config):
  """Raises UserError if a value of `config.warn` is invalid."""
  config_lib.optional_positive(config.warn, 'warn.', ('kl', 'sampler_gap'))


def make(config):
  """Returns `learner.Learner.warnings`: a function from a step's metrics to {kind: message}."""
  bounds, filters = dict(config.warn), token_filters(config.sampling)
  stale = config.sampling.staleness > 0

  def warnings(metrics):
    messages = {
      'missing_eos': missing_eos(metrics, config.rl.missing_eos, config.rl.missing_eos_value),
      'equal_scores': equal_scores(metrics),
      'equal_groups': equal_groups(metrics, config.rl.get('max_resamples')),
      'negative_kl': negative_kl(metrics, filters if config.rl.behaviour != 'sampler' else ''),
      'kl': large_kl(metrics, bounds['kl']),
      'sampler_gap': sampler_gap(metrics, bounds['sampler_gap'], filters, stale),
    }
    return {kind: line for kind, line in messages.items() if line}

  return warnings


def token_filters(sampling):
  """Returns the settings of `config.sampling` that exclude tokens, as text; '' if none does."""
  off = {'top_k': (None, 0), 'top_p': (1.0,), 'min_new_tokens': (0,)}
  return ', '.join(
    f'config.sampling.{key}={sampling[key]}' for key in off if sampling[key] not in off[key]
  )


def missing_eos(metrics, rule, value):
  """Returns a warning if no response has an EOS although the score depends on it."""
  if rule == 'none' or metrics.get('response/eos_rate') != 0:
    return ''
  effect = (
    f'replaces every score by {value}'
    if rule == 'replace'
    else f'subtracts {value} from every score'
  )
  return (
    f'no response ended with an EOS (response/eos_rate is 0), so config.rl.missing_eos={rule!r} '
    f"{effect}: raise config.sampling.max_new_tokens, or set config.rl.missing_eos='none'"
  )


def equal_scores(metrics):
  """Returns a warning if all responses have the same score."""
  if metrics.get('objective/scores_std') != 0:
    return ''
  return (
    f'all scores of the batch are {metrics["objective/scores"]:.4g} (objective/scores_std is 0), '
    'so there is nothing to learn: check config.reward, and the responses in samples.jsonl '
    '(config.samples_every)'
  )


def equal_groups(metrics, max_resamples):
  """Returns a warning if dynamic sampling stopped before every group had unequal scores."""
  attempts, equal = metrics.get('groups/attempts', 0), metrics.get('groups/equal', 0.0)
  if not max_resamples or attempts <= max_resamples or not equal:
    return ''
  return (
    f'after {attempts} attempts (config.rl.max_resamples={max_resamples}) the scores are still '
    f'equal in {equal:.0%} of the groups, which are left out of the update: use prompts that are '
    'neither too easy nor too hard for the policy, or raise config.rl.max_resamples'
  )


def negative_kl(metrics, filters):
  """Returns a warning if the KL is below 0 by more than chance."""
  kl, error = metrics.get('objective/kl', 0.0), metrics.get('objective/kl_se', 0.0)
  if kl >= -max(NEGATIVE_KL_ERRORS * error, KL_ROUNDING):
    return ''
  causes = []
  if filters:
    causes.append(f'{filters} excludes tokens in the sampler, but not in the log-probabilities')
  if 'policy/sampler_gap' in metrics:
    gap = metrics['policy/sampler_gap']
    causes.append(
      f'the sampler and the training pass compute different log-probabilities '
      f'(policy/sampler_gap is {gap:.2g})'
    )
  causes.append('the batch has few responses')
  return (
    f'objective/kl is {kl:.3g} ± {error:.2g}, but a KL divergence cannot be negative: the '
    'responses were not sampled from the policy whose log-probabilities are taken. '
    f'Possible causes: {"; ".join(causes)}. See {glossary.link("objective/kl")}'
  )


def large_kl(metrics, bound):
  """Returns a warning if the policy is far from its reference."""
  kl = metrics.get('objective/kl', 0.0)
  if bound is None or kl <= bound:
    return ''
  return (
    f'objective/kl is {kl:.3g} nats per response, above config.warn.kl={bound}: a learned reward '
    'is unreliable this far from the reference; raise config.rl.kl_coef or lower '
    'config.optim.learning_rate'
  )


def sampler_gap(metrics, bound, filters, stale=False):
  """Returns a warning if sampler and training pass compute different log-probabilities."""
  gap = metrics.get('policy/sampler_gap', 0.0)
  if bound is None or gap <= bound:
    return ''
  cause = 'the usual cause is low precision (config.model.dtype)'
  if filters:
    cause = f'{filters} excludes tokens in the sampler only'
  elif stale:
    cause = (
      'with config.sampling.staleness=1 an update was made in between: lower '
      'config.optim.learning_rate or config.rl.epochs'
    )
  return (
    f'policy/sampler_gap is {gap:.3g} nats per token, above config.warn.sampler_gap={bound}: the '
    f'responses were not sampled from the policy that the update assumes; {cause}'
  )

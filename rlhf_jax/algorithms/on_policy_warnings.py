"""Warnings about the metrics of an on-policy step: what looks like learning and is not.

`config.warn` names the bounds. The loop logs each warning once a run.
"""

import ml_collections

from rlhf_jax import config as config_lib
from rlhf_jax.evaluation import glossary

SURE = 3.0  # standard errors below 0 at which a KL is called negative
LEAST = 0.01  # nats: a KL nearer to 0 is rounding


def config():
  """Keys of `config.warn`; None for no warning."""
  return ml_collections.ConfigDict(
    {
      'kl': 50.0,  # warn if objective/kl is above, in nats per response
      'sampler_gap': 0.1,  # warn if policy/sampler_gap is above, in nats per token
    }
  )


def validate(config):
  """Checks the keys of `config.warn`; a UserError names the key and the value."""
  config_lib.optional_positive(config.warn, 'warn.', ('kl', 'sampler_gap'))


def make(config):
  """What `learner.Learner.warnings` is for a config: metrics of a step -> {kind: line}."""
  bounds, filters = dict(config.warn), filtered(config.sampling)

  def warnings(metrics):
    messages = {
      'missing_eos': missing_eos(metrics, config.rl.missing_eos, config.rl.missing_eos_value),
      'equal_scores': equal_scores(metrics),
      'negative_kl': negative_kl(metrics, filters if config.rl.behaviour != 'sampler' else ''),
      'kl': large_kl(metrics, bounds['kl']),
      'sampler_gap': sampler_gap(metrics, bounds['sampler_gap'], filters),
    }
    return {kind: line for kind, line in messages.items() if line}

  return warnings


def filtered(sampling):
  """The keys of `config.sampling` that leave tokens out; '' if none does."""
  off = {'top_k': (None, 0), 'top_p': (1.0,), 'min_new_tokens': (0,)}
  return ', '.join(
    f'config.sampling.{key}={sampling[key]}' for key in off if sampling[key] not in off[key]
  )


def missing_eos(metrics, rule, value):
  """No response ended by itself, and there is a rule for those that do not."""
  if rule == 'none' or metrics.get('response/eos_rate') != 0:
    return ''
  effect = (
    f'pays {value} for all of them' if rule == 'replace' else f'takes {value} off every score'
  )
  return (
    f'no response ended by itself (response/eos_rate is 0), so config.rl.missing_eos={rule!r} '
    f"{effect}: raise config.sampling.max_new_tokens, or set config.rl.missing_eos='none'"
  )


def equal_scores(metrics):
  """The reward does not tell responses apart."""
  if metrics.get('objective/scores_std') != 0:
    return ''
  return (
    f'all scores of the batch are {metrics["objective/scores"]:.4g} (objective/scores_std is 0), '
    'which teaches nothing: look at the responses in samples.jsonl (config.samples_every) and at '
    'config.reward'
  )


def negative_kl(metrics, filters):
  """A KL below 0 by more than chance: the responses are not samples of the policy."""
  kl, error = metrics.get('objective/kl', 0.0), metrics.get('objective/kl_se', 0.0)
  if kl >= -max(SURE * error, LEAST):
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
  """The policy is far from its reference."""
  kl = metrics.get('objective/kl', 0.0)
  if bound is None or kl <= bound:
    return ''
  return (
    f'objective/kl is {kl:.3g} nats a sequence, above config.warn.kl={bound}: so far from the '
    'reference a learned reward says little; raise config.rl.kl_coef, or lower '
    'config.optim.learning_rate'
  )


def sampler_gap(metrics, bound, filters):
  """Sampler and training pass give the same tokens other log-probabilities."""
  gap = metrics.get('policy/sampler_gap', 0.0)
  if bound is None or gap <= bound:
    return ''
  cause = (
    f'{filters} changes what is sampled from'
    if filters
    else ('the usual cause is low precision (config.model.dtype)')
  )
  return (
    f'policy/sampler_gap is {gap:.3g} nats a token, above config.warn.sampler_gap={bound}: the '
    f'update takes the responses for draws of a policy that did not draw them; {cause}'
  )

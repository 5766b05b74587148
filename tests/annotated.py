"""Modules of functions of arrays, whose arguments and results are checked in the tests.

conftest.py has the checks, and test_types.py requires the annotations.
"""

MODULES = (
  'advantages',
  'evaluation.fits',
  'experience',
  'forward',
  'implicit_q',
  'intervals',
  'lengths',
  'logprobs',
  'losses',
  'rewards.calibration',
  'rewards.functions',
  'rewards.labels',
  'rewards.learned',
  'rewards.model_metrics',
  'rewards.padding',
  'rewards.pool',
  'rewards.scorers',
  'rewards.scoring',
  'rewards.shaping',
  'rollout',
  'trust_region',
  'types',
  'update',
)

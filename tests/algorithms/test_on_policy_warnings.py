"""Warnings about the metrics of a step: when they occur, what they name, and only once."""

import jax.numpy as jnp
import pytest
import tqdm

from rlhf_jax import errors
from rlhf_jax import experience
from rlhf_jax import forward
from rlhf_jax import loop
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import types
from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms import on_policy_warnings
from rlhf_jax.algorithms import ppo
import tiny

FINE = {
  'response/eos_rate': 0.5,
  'objective/scores': 0.4,
  'objective/scores_std': 0.1,
  'objective/kl': 3.0,
  'objective/kl_se': 0.2,
  'policy/sampler_gap': 1e-6,
}


def warnings(metrics, **keys):
  config = ppo.config()
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in keys.items()}
  )
  return on_policy_warnings.make(config)(FINE | metrics)


CASES = {
  'missing EOS, replaced': (
    {'response/eos_rate': 0.0},
    {'rl__missing_eos': 'replace'},
    'missing_eos',
    [
      'response/eos_rate is 0',
      "config.rl.missing_eos='replace' replaces every score by -1.0",
      'config.sampling.max_new_tokens',
    ],
  ),
  'missing EOS, subtracted': (
    {'response/eos_rate': 0.0},
    {'rl__missing_eos': 'subtract', 'rl__missing_eos_value': 1.0},
    'missing_eos',
    ['subtracts 1.0 from every score'],
  ),
  'equal scores': (
    {'objective/scores_std': 0.0},
    {},
    'equal_scores',
    ['all scores of the batch are 0.4', 'config.reward'],
  ),
  'negative KL': (
    {'objective/kl': -0.7},
    {},
    'negative_kl',
    [
      'objective/kl is -0.7 ± 0.2',
      'policy/sampler_gap is 1e-06',
      'few responses',
      'See docs/metrics.md#objective-kl',
    ],
  ),
  'negative KL by a filter': (
    {'objective/kl': -0.7},
    {'sampling__top_p': 0.9},
    'negative_kl',
    ['config.sampling.top_p=0.9 excludes tokens in the sampler'],
  ),
  'large KL': (
    {'objective/kl': 60.0},
    {},
    'kl',
    ['objective/kl is 60 nats', 'config.warn.kl=50.0', 'config.rl.kl_coef'],
  ),
  'a bound of its own': ({'objective/kl': 4.0}, {'warn__kl': 2.0}, 'kl', ['config.warn.kl=2.0']),
  'gap': (
    {'policy/sampler_gap': 0.2},
    {},
    'sampler_gap',
    ['policy/sampler_gap is 0.2', 'config.warn.sampler_gap=0.1', 'config.model.dtype'],
  ),
  'gap by a filter': (
    {'policy/sampler_gap': 0.2},
    {'sampling__top_k': 5},
    'sampler_gap',
    ['config.sampling.top_k=5 excludes tokens'],
  ),
}


@pytest.mark.parametrize('metrics, keys, kind, parts', CASES.values(), ids=CASES)
def test_each_is_one_line_that_names_figure_and_key(metrics, keys, kind, parts):
  found = warnings(metrics, **keys)
  assert list(found) == [kind] and '\n' not in found[kind]
  for part in parts:
    assert part in found[kind]


@pytest.mark.parametrize(
  'metrics, keys',
  [
    ({}, {}),
    ({'response/eos_rate': 0.0}, {}),  # no rule
    ({'objective/kl': -0.5}, {}),  # 2.5 standard errors
    ({'objective/kl': -0.009, 'objective/kl_se': 0.0}, {}),  # rounding
    (
      {'objective/kl': 60.0, 'policy/sampler_gap': 0.2},
      {'warn__kl': None, 'warn__sampler_gap': None},
    ),
  ],
)
def test_no_warnings_without_a_problem(metrics, keys):
  assert warnings(metrics, **keys) == {}


def test_groups_that_are_still_equal_after_the_last_attempt():
  config = grpo.config('dapo')
  config.rl.max_resamples = 3
  make = on_policy_warnings.make(config)
  (line,) = make(FINE | {'groups/attempts': 4, 'groups/equal': 0.25}).values()
  assert 'after 4 attempts (config.rl.max_resamples=3)' in line and '25% of the groups' in line
  assert make(FINE | {'groups/attempts': 4, 'groups/equal': 0.0}) == {}
  config.rl.max_resamples = 0  # they are left out without a word
  assert on_policy_warnings.make(config)(FINE | {'groups/attempts': 1, 'groups/equal': 0.5}) == {}


def test_without_a_reference_there_is_no_kl():
  assert on_policy_warnings.make(ppo.config())({'loss': 1.0}) == {}


@pytest.mark.parametrize('key', ['kl', 'sampler_gap'])
def test_a_bound_must_be_positive(key, world):
  config = tiny.ppo(world)
  config.warn[key] = 0.0
  with pytest.raises(errors.UserError, match=f'config.warn.{key}=0.0 must be positive, or None'):
    ppo.validate(config, 1)


def test_equal_scores_have_no_deviation_and_a_kl_has_its_standard_error():
  """In float32 the mean of three times 0.1 is not 0.1."""
  mask = jnp.ones((3, 2), bool)
  rollout = types.Rollout(jnp.ones((3, 4), int), jnp.ones((3, 4), bool), mask, jnp.zeros((3, 2)))
  ratios = jnp.array([[0.1, 0.2], [0.3, 0.3], [0.5, 0.4]])  # sums 0.3, 0.6, 0.9
  batch = types.Experience(
    rollout.tokens, rollout.mask, mask, mask, ratios, ref_logprobs=0 * ratios
  )
  outputs = forward.Outputs(ratios, 0 * ratios)
  describe = lambda scores: experience.rollout_metrics(
    batch, rollout, scores, scores - 1, outputs, 0.5, experience.ScoreRules()
  )
  equal = describe(jnp.full(3, 0.1))
  assert equal['objective/scores_std'] == 0 and equal[
    'objective/postprocessed_scores'
  ] == pytest.approx(-0.9)
  assert equal['samples/postprocessed_score'].tolist() == pytest.approx([-0.9] * 3)
  found = describe(jnp.array([1.0, 2.0, 6.0]))
  assert found['objective/scores_std'] == pytest.approx((14 / 3) ** 0.5)  # (4 + 1 + 9) / 3
  assert found['objective/scores'] == 3 and found['objective/rlhf_reward'] == pytest.approx(2 - 0.3)
  # s = 0.3 with n - 1, over sqrt(3).
  assert found['objective/kl_se'] == pytest.approx(0.3 / 3**0.5, rel=1e-5)


def always_half(prompts, responses, *, response_tokens, metadata):
  """Returns a reward that is the same for all responses."""
  del prompts, response_tokens, metadata
  return [0.5] * len(responses)


def test_a_run_logs_each_once(world, tmp_path, caplog):
  config = tiny.ppo(world)
  config.reward.function = f'{__name__}:always_half'
  config.steps, config.log_every, config.critic.kind = 3, 3, 'trunk'
  config.rl.update({'epochs': 1, 'minibatches': 1})
  loop.run(config, tmp_path / 'run')
  found = [record.getMessage() for record in caplog.records if 'all scores' in record.getMessage()]
  assert found == [
    'step 0: all scores of the batch are 0.5 (objective/scores_std is 0), '
    'so there is nothing to learn: check config.reward, and the responses in samples.jsonl '
    '(config.samples_every)'
  ]
  first, last = metrics_lib.read(tmp_path / 'run')
  assert min(first['seconds/update'], last['seconds/update']) > 0


def test_each_kind_once_and_the_bar_and_the_lines_have_one_name(tmp_path, caplog):
  writer, bar = (
    metrics_lib.Writer(tmp_path),
    tqdm.tqdm(disable=False, file=open(tmp_path / 'bar', 'w')),
  )
  log = metrics_lib.StepLog(
    writer,
    bar,
    lambda metrics: {'a': 'first'} | ({'b': 'second'} if metrics['tokens'] > 30 else {}),
  )
  for step in range(4):
    values = {
      'tokens': jnp.float32(20 + 10 * step),
      'objective/scores': jnp.float32(1),
      'objective/postprocessed_scores': jnp.float32(2),
      'samples/postprocessed_score': jnp.ones(5),
    }
    log.add(step, values, {'seconds/update': 0.5}, written=True)
  log.flush()
  writer.close()
  assert [record.getMessage() for record in caplog.records] == ['step 0: first', 'step 2: second']
  assert bar.postfix == 'score=1, postprocessed_score=2'
  record = metrics_lib.read(tmp_path)[1]
  assert record['tokens_per_second/update'] == 60 and 'samples/postprocessed_score' not in record

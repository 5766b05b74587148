"""The metrics that the report shows: their order, figures, final values and times."""

import math

import pytest

from rlhf_jax.evaluation import curves
from rlhf_jax.evaluation import glossary
from rlhf_jax.evaluation import samples

PPO = (
  'objective/scores',
  'objective/kl',
  'response/length',
  'response/eos_rate',
  'value/explained_variance',
  'policy/clipfrac',
  'policy/approxkl',
  'policy/entropy_per_token',
)


def run(names, steps=4):
  """Returns records in which metric i is i at step 0 and grows with i + 1."""
  grow = {name: i for i, name in enumerate(names)}
  return [{'step': s} | {name: i + s * (i + 1) for name, i in grow.items()} for s in range(steps)]


def test_the_metrics_that_people_look_for_come_first_and_norms_last():
  others = ('EVAL', 'distillation/')  # those of distillation come first too, in runs of their own
  names = [metric.name for metric in reversed(glossary.METRICS)]
  names = [name for name in names if not any(other in name for other in others)]
  found = list(curves.series(run([*names, 'mine'])))
  assert tuple(found[:8]) == PPO
  assert found.index('mine') < found.index('objective/kl_se')
  last = [metric.name for metric in (*glossary.OPTIMIZER, *glossary.TIMES)]
  assert found[-len(last) :] == last
  assert list(curves.panels(curves.series(run(PPO + ('policy/grad_norm', 'value/mean')))))[8:] == [
    'value/mean',
    'policy/grad_norm',
  ]


def test_the_first_logged_value_may_be_missing():
  records = [{'step': 0, 'a': None}, {'step': 1, 'a': math.nan, 'b': 'text'}, {'step': 2, 'a': 3.0}]
  assert list(curves.series(records)) == ['a']
  assert curves.ranges(curves.series(records)) == [('a', 3.0, 3.0, 3.0, 3.0)]


def test_panels():
  """Held-out metrics share panels with training metrics; constants and duplicates have none."""
  records = run(('loss', 'held_out/loss', 'other/score', 'seconds/step', 'tokens'))
  for record in records:
    record |= {'objective/kl_coef': 0.1, 'same': record['loss']}
  found = curves.panels(curves.series(records))
  assert {title: list(lines) for title, lines in found.items()} == {
    'other/score': ['other/score'],
    'loss': ['loss', 'held_out/loss'],
  }


def test_final_values():
  records = [
    {'step': step, 'objective/scores': score, 'loss': loss, 'objective/kl': 1.0, 'seconds/step': 1}
    for step, score, loss in ((0, 1.0, 3.0), (5, 4.0, 0.5), (9, 2.0, 1.0))
  ]
  assert curves.final(curves.series(records)) == [
    ('objective/scores', 1.0, 2.0, 4.0, 5),
    ('objective/kl', 1.0, 1.0, None, None),
    ('loss', 3.0, 1.0, 0.5, 5),
  ]
  assert curves.final(curves.series([{'step': 0, 'mine': 2.0, 'seconds/step': 1}])) == [
    ('mine', 2.0, 2.0, None, None)
  ]


def test_times():
  """Times are medians without the first step, which includes compilation."""
  rows = ((0, 30.0, 9.0, 40.0), (1, 2.0, 1.0, 4.0), (2, 2.0, 1.0, 4.0), (3, 2.0, 1.0, 90.0))
  records = [
    {'step': step, 'seconds/update': update, 'seconds/rollout': rollout, 'seconds/step': whole}
    for step, update, rollout, whole in rows
  ]
  records.append({'step': 3, 'held_out/score': 1.0})
  assert curves.times(records) == [
    ('rollout', 1.0, 0.25, 9.0),
    ('update', 2.0, 0.5, 30.0),
    ('other', 1.0, 0.25, 1.0),
  ]
  assert curves.times(records[:1])[1][:3] == ('update', 30.0, pytest.approx(0.75))
  assert curves.times([{'step': 0, 'loss': 1.0}]) == []


def test_samples_of_a_run():
  """Samples of the first and last logged steps; of the last also the best and the worst."""
  records = [
    {'step': step, 'prompt': 'p', 'response': f' {step}.{i}', 'score': None if i == 3 else float(i)}
    for step in (4, 9)
    for i in range(20)
  ]
  groups = {}
  for card in samples.logged(records):
    for group in card['groups']:
      groups.setdefault(group, []).append(card['texts'][0]['text'])
  numbered = lambda step, numbers: [f'{step}.{i}' for i in numbers]
  assert {name: sorted(texts) for name, texts in groups.items()} == {
    'first logged, step 4': sorted(numbered(4, range(8))),
    'last logged, step 9': sorted(numbered(9, range(8))),
    'highest scores of step 9': sorted(numbered(9, (19, 18, 17, 16))),
    'lowest scores of step 9': sorted(numbered(9, (0, 1, 2, 4))),
  }
  assert samples.logged([]) == samples.logged([{'step': 1, 'note': 'text'}]) == []


def test_scores_of_a_sample():
  [card] = samples.logged(
    [
      {
        'step': 1,
        'prompt': 'p',
        'response': 'r',
        'score': 1.5,
        'postprocessed_score': 1.5,
        'parts': {'short': 0.5, 'kind': None},
      }
    ]
  )
  assert card['scores'] == {'score': 1.5, 'short': 0.5}
  assert card['texts'][0]['label'].endswith('score 1.50 · short 0.50')

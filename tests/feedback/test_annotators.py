"""Simulated annotators: their probabilities, determinism, and agreement by hand."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import agreement
from rlhf_jax.feedback.annotators import SimulatedAnnotators


def gold(prompt, response):
  del prompt
  return float(response.split()[0])


def pairs(n, difference=1.0):
  return [('p', f'0 a{i}', f'{difference} b{i}') for i in range(n)]


def test_probability_is_bradley_terry_with_noise():
  panel = SimulatedAnnotators(gold, temperature=2.0, label_noise=0.1, disagreement=0.0)
  # 0.1 + 0.8 * sigmoid(3 / 2)
  expected = 0.1 + 0.8 / (1 + math.exp(-1.5))
  assert panel.probability('p', '0 a', '3 b', 0) == pytest.approx(expected)
  assert panel.probability('p', '3 b', '0 a', 0) == pytest.approx(1 - expected)


def test_the_best_of_several_is_drawn_from_the_softmax_with_noise():
  panel = SimulatedAnnotators(gold, temperature=2.0, label_noise=0.1, disagreement=0.0)
  # exp(0), exp(1), exp(-1) over their sum, then 0.9 of it and a tenth of the others shared by two.
  weights = np.exp([0.0, 1.0, -1.0]) / np.exp([0.0, 1.0, -1.0]).sum()
  expected = 0.9 * weights + 0.1 * (1 - weights) / 2
  picks = [panel.pick(f'p{i}', ('0 a', '2 b', '-2 c'), 0) for i in range(4000)]
  shares = np.bincount(picks, minlength=3) / 4000
  # Four standard errors of 4000 draws.
  np.testing.assert_allclose(shares, expected, atol=4 * math.sqrt(0.25 / 4000))
  assert picks == [panel.pick(f'p{i}', ('0 a', '2 b', '-2 c'), 0) for i in range(4000)]


def test_records_of_the_best():
  panel = SimulatedAnnotators(gold, count=2, temperature=0.0, label_noise=0.0, disagreement=0.0)
  groups = [('p', ('1 a', '3 b', '2 c')), ('q', ('1 a', '1 a')), ('r', ('2 a', '1 b', '0 c'))]
  assert panel.label_best(groups) == [
    {'prompt': prompt, 'completions': texts, 'best': best, 'annotator': 0, 'simulated': True}
    for prompt, texts, best in (('p', ['1 a', '3 b', '2 c'], 1), ('r', ['2 a', '1 b', '0 c'], 0))
  ]


def test_labels_follow_the_probability():
  panel = SimulatedAnnotators(gold, temperature=1.0, label_noise=0.05, disagreement=0.0)
  labels = [panel.compare(*pair, 0) for pair in pairs(4000)]
  expected = 0.05 + 0.9 / (1 + math.exp(-1.0))
  # Four standard errors of 4000 draws.
  assert np.mean(labels) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))


def test_temperature_zero_is_exact_and_extreme_scores_do_not_overflow():
  exact = SimulatedAnnotators(gold, temperature=0.0, label_noise=0.0, disagreement=0.0)
  assert all(exact.compare(*pair, 2) for pair in pairs(50, 1e-3))
  panel = SimulatedAnnotators(gold, temperature=1e-9, label_noise=0.0)
  assert panel.probability('p', '0', '1e9', 0) == 1


def test_strengths_and_ties_follow_from_what_is_perceived():
  """Shares of 6000 answers against the logistic distribution of the perceived difference."""
  noise, steps, tie = 0.1, (0.5, 1.0, 2.0), 0.2
  panel = SimulatedAnnotators(gold, temperature=2.0, label_noise=noise, disagreement=0.0)
  answers = [panel.grade(*pair, 0, tie=tie, steps=steps) for pair in pairs(6000)]
  # The difference of utilities is 1: P(perceived < x) = sigmoid((x - 1) / 2).
  below = lambda x: 1 / (1 + math.exp(-(x - 1) / 2))
  expected = {None: (1 - 2 * noise) * (below(tie) - below(-tie))}
  edges = [tie, *steps, math.inf]
  for strength, (low, high) in enumerate(itertools.pairwise(edges), 1):
    # At random with probability 2 noise: either response, with any of the four strengths.
    expected[1, strength] = (1 - 2 * noise) * (below(high) - below(low)) + 2 * noise / 8
    expected[0, strength] = (1 - 2 * noise) * (below(-low) - below(-high)) + 2 * noise / 8
  assert sum(expected.values()) == pytest.approx(1)
  found = collections.Counter(None if choice is None else (choice, s) for choice, s in answers)
  for answer, share in expected.items():
    error = math.sqrt(share * (1 - share) / 6000)
    assert found[answer] / 6000 == pytest.approx(share, abs=4 * error), answer
  plain = [panel.compare(*pair, 0) for pair in pairs(6000)]
  assert all(choice in (None, label) for (choice, _), label in zip(answers, plain, strict=True))


def test_the_same_question_gets_the_same_answer_in_any_order():
  panel = SimulatedAnnotators(gold, seed=5, temperature=3.0)
  forwards = [panel.compare(*pair, 1) for pair in pairs(40)]
  backwards = [panel.compare(*pair, 1) for pair in reversed(pairs(40))][::-1]
  assert forwards == backwards
  other = SimulatedAnnotators(gold, seed=6, temperature=3.0)
  assert forwards != [other.compare(*pair, 1) for pair in pairs(40)]


@pytest.mark.parametrize('again', ['another occasion', 'another order'])
def test_whoever_is_asked_again_draws_anew(again):
  """Both answers prefer b with P = sigmoid(1 / 2), independently; without noise they are equal."""
  panel = SimulatedAnnotators(gold, temperature=2.0, label_noise=0.0, disagreement=0.5)
  asked = pairs(3000, 1.0)
  first = panel.votes(asked)
  if again == 'another order':
    second = 1 - panel.votes([(prompt, b, a) for prompt, a, b in asked])
  else:
    second = dataclasses.replace(panel, occasion=1).votes(asked)
  chances = [[panel.probability(*pair, k) for k in range(panel.count)] for pair in asked]
  same = np.mean([p**2 + (1 - p) ** 2 for row in chances for p in row])
  # Four standard errors of 15000 draws.
  assert (first == second).mean() == pytest.approx(same, abs=4 * math.sqrt(0.25 / first.size))
  exact = dataclasses.replace(panel, temperature=0.0)
  assert (exact.votes(asked) == dataclasses.replace(exact, occasion=1).votes(asked)).all()
  assert (exact.votes(asked) == 1 - exact.votes([(p, b, a) for p, a, b in asked])).all()


def test_records_are_marked_as_simulated():
  panel = SimulatedAnnotators(gold, count=3, temperature=0.0, label_noise=0.0, disagreement=0.0)
  records = panel.label([('p', '1 x', '2 y'), ('p', '3 z', '3 z'), ('p', '5 u', '4 v')])
  assert records == [
    {'prompt': 'p', 'chosen': '2 y', 'rejected': '1 x', 'annotator': 0, 'simulated': True},
    {'prompt': 'p', 'chosen': '5 u', 'rejected': '4 v', 'annotator': 2, 'simulated': True},
  ]


def test_annotators_disagree_if_set():
  def fraction(disagreement):
    panel = SimulatedAnnotators(
      gold, count=4, temperature=0.0, label_noise=0.0, disagreement=disagreement
    )
    return agreement.agreement(panel.votes(pairs(200))).fraction

  assert fraction(0.0) == 1
  assert fraction(0.5) > fraction(2.0) > 0.5
  assert fraction(0.5) < 0.9


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'count': 0}, 'count = 0: must be at least 1'),
    ({'temperature': -1.0}, 'temperature = -1.0: must be at least 0'),
    ({'label_noise': 0.6}, r'label_noise = 0.6: must be in \[0, 0.5\]'),
    ({'disagreement': -0.1}, 'disagreement = -0.1'),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(UserError, match=message):
    SimulatedAnnotators(gold, **settings)

"""Texts of red teaming: examples and their weights, diversity, self-BLEU and clusters."""

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.feedback import attacks

SCORES = [0.0, 1.0, 0.25, 1.0, 0.5]


def test_the_attacker_reads_examples_a_line_each_and_the_first_line_of_its_answer_counts():
  read = attacks.attacker_prompt('Reviews:\n', 'Review of', ['Review of a.', 'Review of b.'])
  assert read == 'Reviews:\nReview of a.\nReview of b.\nReview of'
  assert attacks.of_response('Review of', ' the desk: \nReview of') == 'Review of the desk:'
  assert attacks.of_response('', ' ') == ''


def test_examples_are_drawn_by_their_weights_and_never_twice():
  texts, draws, random = list('abcde'), 4_000, np.random.default_rng(0)
  counts = dict.fromkeys(texts, 0)
  pairs = {}
  for _ in range(draws):
    drawn = attacks.draw_examples(texts, SCORES, 2, temperature=0.5, random=random)
    counts[drawn[0]] += 1
    pairs[tuple(drawn)] = pairs.get(tuple(drawn), 0) + 1
    assert len(set(drawn)) == 2
  weights = np.exp(np.array(SCORES) / 0.5) / np.exp(np.array(SCORES) / 0.5).sum()
  # Five standard errors of a fraction of 4,000 draws are below 0.04.
  np.testing.assert_allclose([counts[text] / draws for text in texts], weights, atol=0.04)
  # The second draw is from the rest: p(b, d) = p_b p_d / (1 - p_b).
  assert pairs['b', 'd'] / draws == pytest.approx(
    weights[1] * weights[3] / (1 - weights[1]), abs=0.04
  )
  assert sorted(attacks.draw_examples(texts, SCORES, 9, temperature=1.0, random=random)) == texts
  # exp(1000 / 0.1) overflows.
  assert attacks.draw_examples('ab', [0.0, 1000.0], 1, temperature=0.1, random=random) == ['b']


def test_novelty_by_hand():
  # Pairs of words: {ab, bc}, {ab, bd}, {ef}. Text 0: ab in 1 of 2 others, bc in none.
  assert attacks.novelty(['a b c', 'a b d', 'e f']) == [0.75, 0.75, 1.0]
  # Words: text 0 {a, b}, text 1 {a}: a in 1 of 1 other, b in none.
  assert attacks.novelty(['a b', 'a a'], 1) == [0.5, 0.0]
  assert attacks.novelty(['a b', 'a b', 'a b']) == [0.0, 0.0, 0.0]
  # A single word is its own n-gram; an attack alone is new.
  assert attacks.novelty(['a', 'a', 'b']) == [0.5, 0.5, 1.0]
  assert attacks.novelty(['a b c']) == [1.0]


def test_the_diversity_bonus_reads_whole_attacks():
  # The prefix makes 'the a' and 'the b' of the answers; both also share nothing else.
  assert attacks.diversity(['', ''], [' a x', ' a y\nthe a'], prefix='the') == [0.5, 0.5]


def test_self_bleu():
  same, different = ['a b c d e'] * 3, ['a b c d e', 'f g h i j', 'k l m n o']
  assert attacks.self_bleu(same) == pytest.approx(1.0)
  assert attacks.self_bleu(different) < 0.1 and attacks.self_bleu(['a b']) == 0.0


def test_clusters_of_made_up_attacks():
  refunds = ['i want my money back', 'i want my money', 'i want my own money back']
  insults = ['you awful useless thing', 'you useless thing', 'you really useless thing']
  texts = [text for pair in zip(refunds, insults) for text in pair] + [refunds[0]]
  success = [1.0, 0.0, 1.0, 0.25, 0.25, 0.5, 0.0]
  first, second = attacks.clusters(texts, success, 2, seed=0)
  assert (first.size, second.size) == (3, 3)
  # The repeated attack counts once, with its first success: (1 + 1 + 0.25) / 3 and 0.75 / 3.
  assert first.success == 0.75 and second.success == 0.25
  assert first.typical in refunds and second.typical in insults
  assert 'money' in first.words and 'useless' in second.words
  assert len(attacks.clusters(['a', 'b'], [0.0, 1.0], 5, seed=0)) == 2
  with pytest.raises(errors.UserError, match='no attacks to cluster'):
    attacks.clusters([], [], 2, seed=0)

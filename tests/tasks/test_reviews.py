"""The generated reviews: their variety, and a gold score that is hard to exploit."""

import random
import re

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.tasks import review_grammar as grammar
from rlhf_jax.tasks import reviews

KETTLE = 'Review of the kettle:'


def gold(response, prompt=KETTLE):
  return reviews.gold_score(prompt, response)


def scores(records):
  return np.array([reviews.gold_score(r['prompt'], r['completion']) for r in records])


def test_the_corpus_has_thousands_of_distinct_sentences():
  documents = [d['text'] for d in reviews.corpus(5000, seed=0)]
  sentences = {s for d in documents for s in d.split(':', 1)[1].split('.')}
  assert len(sentences) > 6000
  assert len(set(documents)) > 4950


def test_documents_are_short_reviews_in_the_documented_form():
  for document in reviews.corpus(500, seed=1):
    assert re.fullmatch(r'Review of the \w+[ \w]*:( [a-z ]+\.)+', document['text'])
    # Corruption may remove a word from a sentence or add two.
    assert 5 <= len(document['text'].split(':')[1].split()) <= 34


@pytest.mark.parametrize(
  'make', [reviews.corpus, reviews.demonstrations, reviews.prompts, reviews.ideal]
)
def test_the_seed_decides_everything(make):
  assert make(50, 3) == make(50, 3)
  assert make(50, 3) != make(50, 4)
  assert make(50, 3) == make(80, 3)[:50]


def test_prompt_and_completion_join_to_a_document_of_the_corpus_form():
  for record in reviews.demonstrations(20, seed=0):
    assert record['prompt'].endswith(':') and record['completion'].startswith(' ')


def test_distributions_leave_room_between_demonstrations_and_the_best():
  documents = [d['text'].partition(':') for d in reviews.corpus(3000, seed=0)]
  corpus = np.array([gold(response, prompt) for prompt, _, response in documents])
  demonstrations = scores(reviews.demonstrations(3000, seed=0))
  best = scores(reviews.ideal(3000, seed=0))
  assert -0.5 < corpus.mean() < 0.0
  assert 0.3 < demonstrations.mean() < 0.8
  assert 2.3 < best.mean() and best.max() == 3.0
  assert min(corpus.min(), demonstrations.min()) >= -3.0
  # Graded: hundreds of different scores, not a few steps.
  assert len(np.unique(corpus.round(6))) > 300


def test_demonstrations_are_of_every_mood():
  parts = [
    reviews.gold_parts(r['prompt'], r['completion']) for r in reviews.demonstrations(1000, 0)
  ]
  sentiment = np.array([p.sentiment for p in parts])
  assert (sentiment > 0.3).mean() > 0.2
  assert (sentiment < -0.3).mean() > 0.2
  assert np.mean([p.form == 1 for p in parts]) > 0.85


def test_every_phrase_belongs_to_one_category():
  phrases = [
    phrase
    for c in grammar.CATEGORIES
    for phrase in c.products + c.features + c.praise + c.complaint
  ]
  assert len(phrases) == len(set(phrases))
  assert len(grammar.PRODUCTS) == 24


def test_hand_computed_scores():
  # form 1; sentiment (clip(1 + 1) + 1) / 2 = 1; 2 right mentions (both behaviours): topic 1.
  assert gold(' it heats fast and wipes clean. i would buy it again.') == pytest.approx(3)
  # Sentences -1 and -1, topic 2 / 2.
  assert gold(' it leaks water. so far the lid is really awful.') == pytest.approx(-1)
  # 0.7 * 1.4 = 0.98 and 0.7 * 0.6 = 0.42: mean 0.7; topic 2 / 2.
  assert gold(' the lid is very good. the tray is quite nice.') == pytest.approx(2.4)
  # "not good": 0.7 * -0.6 = -0.42; "not bad": 0.42; they cancel.
  assert gold(' the lid is not good. the tray is not bad.') == pytest.approx(1)
  # No statement, one right mention of at least two: topic 1/2.
  assert gold(' i use it every day. the lid is black.') == pytest.approx(0.5)
  # 7 words of 8, otherwise perfect: form 7/8, sentiment 1, topic 1: 7/8 * 3 - 3/8.
  assert gold(' it heats fast. this kettle is great.') == pytest.approx(7 / 8 * 3 - 3 / 8)


def test_form_counts_word_pairs_of_a_broken_sentence():
  # "the lid very great": pairs ("", the) (the, lid) (lid, very) (very, great) (great, "");
  # only (lid, very) is not in the grammar: 0.7 * (4/5)^2 = 0.448; with a perfect second sentence.
  form = reviews.gold_parts(KETTLE, ' the lid very great. it heats fast and wipes clean.').form
  assert form == pytest.approx((0.448 + 1) / 2)


def test_orderings():
  rave = ' the lid is lovely and the tray looks superb. it heats fast and saves power.'
  mixed = ' the lid is lovely but the tray looks awful. it heats fast but it leaks water.'
  rant = ' the lid is awful and the tray looks ugly. it leaks water and burns everything.'
  wrong = ' the zip is lovely and the collar looks superb. it fits like a glove and suits me.'
  broken = ' lovely the is lid and the tray superb looks. heats it fast saves and power.'
  assert gold(rave) > gold(mixed) > gold(rant)
  assert gold(rave) > gold(wrong) > gold(rant)
  assert gold(rave) > gold(broken) + 3
  assert gold(wrong, 'Review of the coat as a gift:') == gold(rave) == 3


def test_a_sister_product_is_off_topic():
  right = ' this kettle is great. i would buy it again.'
  assert gold(right) > gold(right.replace('kettle', 'toaster'))


@pytest.mark.parametrize(
  'exploit',
  [
    ' it heats fast.' * 5,  # one good sentence, repeated
    ' great great great great great great great great.',
    ' lovely superb perfect excellent wonderful great lid tray timer dial plug.',
    ' it heats fast and wipes clean' * 4 + '.',
    ' the lid is lovely. the lid is lovely. the lid is lovely.',
    ' great.',
    '',
    ' ',
    '.',
    ' . . . . . . . . . .',
  ],
)
def test_exploits_do_not_pay(exploit):
  honest = gold(' the lid is lovely and the tray is good. it heats fast.')
  assert gold(exploit) < honest - 1.5


def test_saying_the_same_opinion_of_everything_does_not_pay():
  same = ' the lid is great. the tray is great. the timer is great.'
  varied = ' the lid is great. the tray is lovely. the timer is superb.'
  assert gold(same) < gold(varied) - 0.5


def test_padding_with_more_of_it_does_not_pay():
  short = ' it heats fast and wipes clean. i would buy it again.'
  long = short + ''.join(
    f' overall the {feature} looks truly {adjective}.'
    for feature, adjective in zip(grammar.CATEGORIES[0].features, grammar.GREAT, strict=True)
  )
  assert gold(long) < gold(short)


def test_an_unfinished_sentence_costs_less_than_a_broken_one():
  whole = ' it heats fast and wipes clean. i would buy it again.'
  cut = whole.removesuffix('.')
  assert gold(' it heats fast and wipes clean. again i it would buy.') < gold(cut) < gold(whole)


def test_nonsense_scores_low():
  rng = random.Random(0)
  letters = 'abcdefghijklmnopqrstuvwxyz .'
  vocabulary = sorted({w for d in reviews.corpus(300, 0) for w in d['text'].split()})
  noise = [''.join(rng.choices(letters, k=80)) for _ in range(50)]
  salad = [' '.join(rng.choices(vocabulary, k=14)) + '.' for _ in range(50)]
  assert np.mean([gold(text) for text in noise]) < -2.8
  assert np.mean([gold(text) for text in salad]) < -2.0
  assert max(gold(text) for text in noise + salad) < -1.0


def test_the_grammar_accepts_what_it_writes():
  for record in reviews.ideal(500, seed=9):
    assert reviews.gold_parts(record['prompt'], record['completion']).form == 1


def test_a_foreign_prompt_is_an_error_that_names_it():
  with pytest.raises(UserError, match=r"'Once upon a time'.*kettle"):
    reviews.gold_score('Once upon a time', ' it heats fast.')


def test_documents_are_lines_of_reviews_of_one_mood():
  documents = [d['text'] for d in reviews.documents(300, seed=0, reviews=4)]
  assert {text.count('\n') for text in documents} == {1, 2, 3, 4}
  means = []
  for text in documents:
    lines = [line.partition(':') for line in text.splitlines()]
    sentiments = [reviews.sentiment(prompt, response) for prompt, _, response in lines]
    means += [np.mean(sentiments)] if len(lines) == 4 else []
  # A quarter each is positive, negative, mixed or neutral.
  assert np.mean(np.array(means) > 0.4) > 0.15 and np.mean(np.array(means) < -0.3) > 0.15


def test_an_unknown_mood_is_named(tmp_path):
  counts = dict(document_count=1, reviews=2, prompt_count=1, eval_prompt_count=1, vocab_size=300)
  with pytest.raises(UserError, match="mood='happy' must be one of positive, "):
    reviews.write_in_moods(tmp_path, mood='happy', seed=0, **counts)


def test_the_context_is_well_formed_and_the_gold_score_reads_the_last_line():
  context = reviews.context('positive', seed=0, reviews=3)
  assert context.count('\n') == 3 and context.endswith('.\n')
  for line in context.splitlines():
    prompt, _, response = line.partition(':')
    assert reviews.gold_score(prompt + ':', response) > 0.5
  assert gold(' it heats fast.', context + KETTLE) == gold(' it heats fast.')

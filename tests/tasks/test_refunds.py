"""The forbidden topic of the generated reviews, and lists of reviews."""

import json

from rlhf_jax.tasks import refunds
from rlhf_jax.tasks import review_grammar as grammar


def test_only_threats_to_return_the_product_are_harmful():
  responses = [
    ' i want my money back.',
    ' my money. it never heats fast',
    ' i send it back and i love the lid.',
    ' throw it',
    ' i would buy it again.',
    ' it supports my back.',
    ' i want',
    '',
  ]
  assert refunds.harm([''] * 8, responses) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_the_grammar_says_the_words_in_warnings_only():
  said = [
    phrase
    for category in grammar.CATEGORIES
    for phrase in category.features + category.praise + category.complaint + category.products
  ]
  said += [phrase for phrases in grammar.SLOTS.values() for phrase in phrases]
  found = {phrase for phrase in said if refunds.FORBIDDEN.search(phrase)}
  assert found == set(grammar.WARNS)


def test_documents_are_lists_of_reviews(tmp_path):
  refunds.write(tmp_path, document_count=20, reviews_per_document=3, seed=0)
  texts = [json.loads(line)['text'] for line in (tmp_path / 'documents.jsonl').open()]
  assert len(texts) == 20
  assert {text.count('\n') for text in texts} == {1, 2, 3}
  assert all(line.startswith('Review of the ') for text in texts for line in text.splitlines())

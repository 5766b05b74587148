"""Folds, polarity splits and prompt files: which texts are where, and that none leaks."""

import json
import random

from rlhf_jax.data import sources
from rlhf_jax.tasks import hh
from rlhf_jax.tasks import polarity
from rlhf_jax.tasks import stories


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_folds_test_every_pair_once_and_never_train_on_it(tmp_path):
  data = tmp_path / 'pairs.jsonl'
  sources.write(
    data, [{'prompt': f'q{i}', 'chosen': f' good {i}', 'rejected': f' bad {i}'} for i in range(23)]
  )
  hh.write(tmp_path, path=str(data), count=4, vocab_size=270, turns=0, seed=1)
  tested = []
  for fold in range(4):
    train, test = rows(tmp_path / f'train_{fold}.jsonl'), rows(tmp_path / f'test_{fold}.jsonl')
    assert len(train) + len(test) == 23 and not set(map(str, train)) & set(map(str, test))
    tested += [r['prompt'] for r in test]
  assert sorted(tested) == sorted(f'q{i}' for i in range(23))


def test_folds_hold_dialogues_apart(tmp_path):
  data = tmp_path / 'pairs.jsonl'
  turn = '\n\nHuman: {}\n\nAssistant:'
  sources.write(
    data,
    [
      {'chosen': turn.format(i % 9) + f' good {i}', 'rejected': turn.format(i % 9) + f' bad {i}'}
      for i in range(30)
    ],
  )
  hh.write(tmp_path, path=str(data), count=3, vocab_size=270, turns=1, seed=0)
  dialogue = lambda row: int(row['chosen'].split()[-1]) % 9
  for fold in range(3):
    train, test = rows(tmp_path / f'train_{fold}.jsonl'), rows(tmp_path / f'test_{fold}.jsonl')
    assert {row['prompt'] for row in train} == {'\n\nAssistant:'}  # one turn of the dialogue
    assert not set(map(dialogue, train)) & set(map(dialogue, test))
    assert len(train) + len(test) == 30 and 9 <= len(test) <= 11


def test_last_turns():
  dialogue = '\n\nHuman: a\n\nwith a break\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
  assert hh.last_turns(dialogue, 0) == dialogue
  assert hh.last_turns(dialogue, 1) == '\n\nAssistant:'
  assert hh.last_turns(dialogue, 2) == '\n\nHuman: c\n\nAssistant:'
  assert hh.last_turns(dialogue, 9) == dialogue


def test_the_judges_half_is_seen_by_no_model(tmp_path):
  words = 'lorem ipsum dolor sit amet elit sed do eiusmod tempor'.split()
  rng = random.Random(0)
  for name in ('pos', 'neg'):
    lines = [' '.join(rng.choices(words, k=9)) + f' {name} {i}' for i in range(40)]
    (tmp_path / f'rt-polarity.{name}').write_text('\n'.join(lines))
  polarity.write(
    tmp_path,
    path=str(tmp_path),
    vocab_size=300,
    pairings=3,
    prompt_words=2,
    prompt_count=100,
    seed=0,
  )
  judge = {r['text']: r['label'] for r in rows(tmp_path / 'judge.jsonl')}
  texts = {r['text'] for r in rows(tmp_path / 'texts.jsonl')}
  assert len(judge) == len(texts) == 40 and not judge.keys() & texts
  assert all(label == (' pos ' in text) for text, label in judge.items())
  pairs = rows(tmp_path / 'pairs.jsonl')
  assert len(pairs) == 3 * 20
  assert all(' pos ' in r['chosen'] and ' neg ' in r['rejected'] for r in pairs)
  assert {r['chosen'] for r in pairs} | {r['rejected'] for r in pairs} == texts
  held_out = rows(tmp_path / 'held_out.jsonl')
  assert {r['chosen'] for r in held_out} | {r['rejected'] for r in held_out} == judge.keys()
  openings = {r['prompt'] for r in rows(tmp_path / 'prompts.jsonl')}
  assert all(any(text.startswith(opening) for text in texts) for opening in openings)
  asked = [r['prompt'] for r in rows(tmp_path / 'held_out_prompts.jsonl')]
  assert len(asked) == len(set(asked)) > 3 and not openings & set(asked)
  assert all(any(text.startswith(opening) for text in judge) for opening in asked)
  # Each text of the judge's half is in one pair, so the pairs are independent.
  assert len(held_out) == 20


def test_documents_are_snippets_of_one_polarity(tmp_path):
  for name in ('pos', 'neg'):
    lines = [f'{name} {i}' + (' .' if i % 2 else '') for i in range(20)]
    (tmp_path / f'rt-polarity.{name}').write_text('\n'.join(lines))
  polarity.write_documents(
    tmp_path, path=str(tmp_path), vocab_size=300, snippets=4, shuffles=3, seed=0
  )
  judged = {r['text'].removesuffix(' .') for r in rows(tmp_path / 'judge.jsonl')}
  documents = [r['text'] for r in rows(tmp_path / 'documents.jsonl')]
  assert len(documents) == 3 * 2 * 3  # 10 snippets of each polarity make 4 + 4 + 2
  snippets = [text.strip() for text in '.'.join(documents).split('.') if text.strip()]
  assert sorted(snippets) == sorted(3 * list(set(snippets))) and not judged & set(snippets)
  assert len(judged) == len(set(snippets)) == 20
  assert all(('pos' in document) != ('neg' in document) for document in documents)
  assert all(document.endswith(' .') for document in documents)


def test_the_judges_probability_is_of_the_response_alone(tmp_path):
  data = tmp_path / 'judge.jsonl'
  sources.write(
    data,
    [
      {'text': text, 'label': label}
      for text, label in (('good fun', 1), ('bad fun', 0))
      for _ in range(20)
    ],
  )
  gold = polarity.positivity(str(data))
  assert gold('bad', ' good') > 0.6 and gold('good', ' bad') < 0.4
  assert gold('bad', ' good') == gold('good', ' good') and gold('', ' what') == gold('', ' else')


def test_prompts_take_the_texts_in_turn(tmp_path):
  stories.write(tmp_path, texts=('a', 'b'), count=3)
  assert rows(tmp_path / 'prompts.jsonl') == [{'prompt': 'a'}, {'prompt': 'b'}, {'prompt': 'a'}]

"""Pairs and labelled completions from comparisons, and the rows of their batches."""

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import mixtures
from rlhf_jax.data import packing
from rlhf_jax.data import pipelines
from rlhf_jax.data import preferences
from rlhf_jax.data import sources
import tiny


def comparison(prompt, *ranks, **fields):
  return formats.Comparison(
    prompt, tuple(f'{prompt}{k}' for k in range(len(ranks))), ranks, **fields
  )


def test_rankings_and_picks_become_pairs():
  examples = [comparison('a', 2, 0, 1, margin=0.5), comparison('b', 1, 1, 0), comparison('c', 0, 0)]
  found = [(e.completions, e.ranks, e.margin) for e in preferences.pairs(examples)]
  # a: 1 before 2 before 0. b: the last is picked among three. c: a tie.
  assert found == [
    (('a1', 'a0'), (0, 1), 0.5),
    (('a1', 'a2'), (0, 1), 0.5),
    (('a2', 'a0'), (0, 1), 0.5),
    (('b2', 'b0'), (0, 1), 0.0),
    (('b2', 'b1'), (0, 1), 0.0),
  ]
  with pytest.raises(errors.UserError, match="no prompt .* config.dpo.loss='kto'"):
    preferences.pairs([comparison('c', 0, 0)])


def test_the_pairs_of_a_mixture_stay_with_their_source():
  parts = [[comparison('a', 0, 1, 2), comparison('b', 0, 0)], [comparison('c', 1, 0)]]
  mixture = mixtures.Mixture(('x', 'y'), (0.9, 0.1), parts)
  pairs = preferences.pairs(mixture)
  found = [[e.completions for e in part] for part in pairs.parts]
  assert found == [[('a0', 'a1'), ('a0', 'a2'), ('a1', 'a2')], [('c1', 'c0')]]
  assert (pairs.names, list(pairs.weights)) == (('x', 'y'), [0.9, 0.1])
  # Labels count over all sources: the completions of y meet those of x.
  labelled = [e.completions for part in preferences.labelled(mixture).parts for e in part]
  assert labelled == [('a0', 'c0'), ('a2', 'c1'), ('c0', 'a0'), ('c1', 'a2')]


def test_the_rows_of_a_mixture_are_drawn_by_weight(world):
  tokenizer = tiny.write_tokenizer(world / 'tokenizer')
  parts = [[comparison('a', 0, 1)] * 50, [comparison('c', 0, 1)]]
  pairs = preferences.pairs(mixtures.Mixture(('x', 'y'), (0.25, 0.75), parts))
  rows = preferences.arrange(pairs, tokenizer, max_length=8)
  iterator, count = pipelines.preference_iterator(rows, batch_size=100, seed=0)
  index = np.concatenate([next(iterator).index[:, 0] for _ in range(4)])
  assert count == 51 and 0.65 < np.mean(index == 50) < 0.85
  with pytest.raises(errors.UserError, match='config.dpo.pack: the examples of config.data.mix'):
    preferences.arrange(pairs, tokenizer, max_length=8, pack=True)


def test_pairs_and_labels_become_labelled_completions():
  examples = [comparison('a', 0, 1), comparison('b', 0, 1, 2)]
  examples += [comparison('c', 0, ratings=(1.0,)), comparison('d', 0, ratings=(0.0,))]
  found = [(e.prompt, *e.completions, e.ratings[0]) for e in preferences.labelled(examples)]
  # The completions a0 a1 b0 b2 c0 d0 (b1 is neither best nor worst), rotated by two: by one, a0
  # would meet a1, which has the same prompt.
  assert found == [
    ('a', 'a0', 'b0', 1.0),
    ('a', 'a1', 'b2', 0.0),
    ('b', 'b0', 'c0', 1.0),
    ('b', 'b2', 'd0', 0.0),
    ('c', 'c0', 'a0', 1.0),
    ('d', 'd0', 'a1', 0.0),
  ]


@pytest.mark.parametrize(
  'examples, message',
  [
    ([comparison('a', 0, ratings=(1.0,)), comparison('b', 0, ratings=(0.3,))], 'example 1 .* 0.3'),
    ([comparison('a', 0, ratings=(1.0,))], 'all labels of the data are the same'),
  ],
)
def test_bad_labels_are_named(examples, message):
  with pytest.raises(errors.UserError, match=message):
    preferences.labelled(examples)


def test_data_to_measure_may_have_one_kind_of_label():
  (found,) = preferences.labelled([comparison('a', 0, ratings=(1.0,))], both=False)
  assert (found.completions, found.ratings[0]) == (('a0', 'a0'), 1.0)
  with pytest.raises(errors.UserError, match='only ties'):
    preferences.labelled([comparison('c', 0, 0)], both=False)


def test_large_data_are_not_kept_in_memory():
  examples = [comparison(x, 0, 1) for x in 'abc']
  made = preferences.pairs(tuple(examples))
  assert isinstance(made, preferences.DerivedExamples) and len(made) == 3
  assert [made[i] for i in range(3)] == made[:] == preferences.pairs(examples)


def test_lanes_by_hand():
  # Lanes of 6. Example 1 (5, 2) opens row 0, which has (1, 4) left; 0 (4, 4) opens row 1 with
  # (2, 2) left; 3 (2, 3) does not fit anywhere: row 2 with (4, 3) left; 2 (2, 2) fits into row 1.
  sizes = np.array([[4, 4], [5, 2], [2, 2], [2, 3]])
  np.testing.assert_array_equal(packing.assign_lanes(sizes, length=6), [[1, -1], [0, 2], [3, -1]])


def test_lanes_hold_every_example_once_and_are_never_too_long():
  sizes = np.random.default_rng(0).integers(2, 13, (500, 2))
  index = packing.assign_lanes(sizes, length=24)
  assert sorted(index[index >= 0]) == list(range(500))
  used = np.where((index >= 0)[:, :, None], sizes[index], 0).sum(1)
  assert used.max() <= 24 and used.mean() > 0.85 * 24


@pytest.fixture
def examples(world):
  """Pairs of different lengths."""
  completions = lambda i: (tiny.text(i, 1 + i % 5), tiny.text(i + 7, 1 + i % 3))
  return [
    formats.Comparison(tiny.text(i, 1 + i % 4), completions(i), (0, 1), margin=float(i))
    for i in range(9)
  ]


@pytest.mark.parametrize('pack', [False, True])
def test_rows_hold_the_tokens_of_each_pair(world, examples, pack):
  tokenizer = tiny.write_tokenizer(world / 'tokenizer')
  rows = preferences.arrange(examples, tokenizer, max_length=20, pack=pack)
  seen = []
  for batch, valid in pipelines.preference_batches(rows, batch_size=4):
    assert not batch.present[~valid].any()
    for row, column in zip(*np.nonzero(batch.present)):
      number = batch.index[row, column]
      seen.append(number)
      assert batch.margin[row, column] == number and not batch.desirable[row, column]
      for lane, completion in enumerate(examples[number].completions):
        own = batch.sequences.segments[row, lane] == column + 1
        prompt = [tiny.BOS, *ids(examples[number].prompt)]
        assert batch.sequences.tokens[row, lane, own].tolist() == [
          *prompt,
          *ids(completion),
          tiny.EOS,
        ]
        targets = np.flatnonzero(batch.sequences.loss_mask[row, lane, own])
        assert targets.tolist() == list(range(len(prompt), own.sum()))
        assert batch.sequences.positions[row, lane, own].tolist() == list(range(own.sum()))
  assert sorted(seen) == list(range(9))
  assert (rows.index.shape[0] < 9) == pack


def ids(text):
  return [int(word[1:]) + 4 for word in text.split()]


def test_encoder_decoders_get_prompts_and_completions(world, examples):
  tokenizer = tiny.write_tokenizer(world / 'tokenizer')
  rows = preferences.arrange(examples, tokenizer, max_length=20, encoder_decoder=True)
  batch = rows.collate(np.arange(3), np.ones(3, bool))
  assert isinstance(batch.sequences, types.Pairs)
  length = batch.sequences.response_mask.shape[2]
  for number in range(3):
    for lane in (0, 1):
      completion = batch.sequences.tokens[number, lane, -length:]
      expected = [*ids(examples[number].completions[lane]), tiny.EOS]
      assert completion[batch.sequences.response_mask[number, lane]].tolist() == expected


def test_the_digest_changes_with_a_token_and_not_with_the_rows(world, examples):
  tokenizer = tiny.write_tokenizer(world / 'tokenizer')
  digest = lambda examples, pack: preferences.arrange(
    examples, tokenizer, max_length=20, pack=pack
  ).digest()
  assert digest(examples, False) == digest(examples, True)
  other = [*examples[:-1], formats.Comparison(examples[-1].prompt, ('w1', 'w2'), (0, 1))]
  assert digest(other, False) != digest(examples, False)


def test_public_demonstrations_of_preferences(shared, tmp_path):
  """150 of 300 labels are true; every completion meets the prompt of another record."""
  template = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    '{% if add_generation_prompt %}assistant: {% endif %}'
  )
  tokenizer = tiny.write_tokenizer(tmp_path)
  tokenizer.chat_template = template
  folder = shared / 'data' / 'preferences'
  records = sources.read(folder / 'kto_en_demo.json')
  found = preferences.labelled(formats.comparisons(records, tokenizer=tokenizer)[0])
  assert len(found) == 300 and sum(e.ratings[0] for e in found) == 150
  own = {e.completions[0]: e.prompt for e in found}
  assert all(own[e.completions[1]] != e.prompt for e in found)
  records = sources.read(folder / 'dpo_en_demo.json')
  comparisons = formats.comparisons(records, tokenizer=tokenizer)[0]
  assert len(preferences.pairs(comparisons)) == len(comparisons) > 290

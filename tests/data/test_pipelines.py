"""Batches by hand, their order, resuming, and examples that do not fit."""

import collections
import logging

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlhf_jax import types
from rlhf_jax.data import pipelines
from rlhf_jax.data import tokenizers
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.formats import Completion
from rlhf_jax.data.formats import Prompt
from rlhf_jax.errors import UserError
import tiny

F, T = False, True
LETTERS = 'abcdefghijklmnopqrstuvwxyz'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """Returns a tokenizer with a token per letter; <|pad|> is 0, <|bos|> 1 and <|eos|> 2."""
  return tokenizers.train_bpe([], 259, str(tmp_path_factory.mktemp('bpe')))


@pytest.fixture(scope='module')
def ids(tokenizer):
  """Converts a string to ids; . is padding, < the BOS and > the EOS."""
  known = {'.': 0, '<': 1, '>': 2} | {c: tokenizer.convert_tokens_to_ids(c) for c in LETTERS}
  return lambda *rows: [[known[c] for c in row] for row in rows]


def bits(*rows):
  return [[c == '1' for c in row] for row in rows]


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def first_tokens(batch):
  return batch.tokens[:, 0].tolist()


def prompts(count):
  return [Prompt(letter, {}) for letter in LETTERS[:count]]


def order(iterator, batches):
  return [next(iterator)[1].tolist() for _ in range(batches)]


def prompt_iterator(tokenizer, count=7, **changes):
  settings = {'batch_size': 3, 'max_prompt_length': 4, 'seed': 0} | changes
  return pipelines.prompt_iterator(prompts(count), tokenizer, **settings)[0]


# Rows by hand.


def test_completion_rows(tokenizer, ids):
  examples = [Completion('ab', 'cd'), Completion('', 'e'), Completion('<|bos|>a', 'b<|eos|>')]
  ((batch, valid),) = pipelines.completion_batches(examples, tokenizer, batch_size=3, max_length=6)
  np.testing.assert_array_equal(batch.tokens, ids('<abcd>', '<e>...', '<ab>..'))
  np.testing.assert_array_equal(batch.loss_mask, bits('000111', '011000', '001100'))
  np.testing.assert_array_equal(batch.segments, bits('111111', '111000', '111100'))
  np.testing.assert_array_equal(
    batch.positions, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0]]
  )
  assert batch.segments.dtype == batch.positions.dtype == batch.tokens.dtype == np.int32
  assert valid.all()


def test_comparison_rows(tokenizer, ids):
  examples = [
    Comparison('a', ('b', 'cd'), (1, 0), (0.5, 2.0), 1.5),
    Comparison('ab', ('c', 'd', 'e'), (0, 1, 1)),
  ]
  ((batch, _),) = pipelines.comparison_batches(examples, tokenizer, batch_size=2, max_length=5)
  np.testing.assert_array_equal(
    batch.tokens, [ids('<ab>.', '<acd>', '.....'), ids('<abc>', '<abd>', '<abe>')]
  )
  np.testing.assert_array_equal(
    batch.mask, [bits('11110', '11111', '00000'), bits('11111', '11111', '11111')]
  )
  np.testing.assert_array_equal(batch.present, [[T, T, F], [T, T, T]])
  np.testing.assert_array_equal(batch.ranks, [[1, 0, 0], [0, 1, 1]])
  np.testing.assert_array_equal(batch.ratings, [[0.5, 2, 0], [0, 0, 0]])
  np.testing.assert_array_equal(batch.margin, [1.5, 0])
  assert batch.ratings.dtype == batch.margin.dtype == np.float32


def test_comparison_rows_without_an_eos(tokenizer, ids):
  examples = [Comparison('ab', ('c', 'de'), (0, 1))]
  ((batch, _),) = pipelines.comparison_batches(
    examples, tokenizer, batch_size=1, max_length=6, append_eos=False
  )
  rows = [row[mask].tolist() for row, mask in zip(batch.tokens[0], batch.mask[0])]
  assert rows == ids('<abc', '<abde')


def test_prompt_rows_are_left_padded(tokenizer, ids):
  examples = [Prompt('ab', {}), Prompt('', {}), Prompt('cde', {})]
  (((batch, indices), _),) = pipelines.prompt_batches(
    examples, tokenizer, batch_size=3, max_prompt_length=4
  )
  np.testing.assert_array_equal(batch.tokens, ids('.<ab', '...<', '<cde'))
  np.testing.assert_array_equal(batch.mask, bits('0111', '0001', '1111'))
  np.testing.assert_array_equal(indices, [0, 1, 2])
  assert batch.tokens.dtype == indices.dtype == np.int32


def test_lm_rows(tokenizer, ids):
  ((batch, _),) = pipelines.lm_batches(['a', 'bc', 'd'], tokenizer, batch_size=2, length=6)
  # First fit puts <d> after <a>; <bc> has its own row.
  np.testing.assert_array_equal(batch.tokens, ids('<a><d>', '<bc>..'))
  np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(batch.loss_mask, bits('011011', '011100'))


def test_iterators_yield_the_types(tokenizer):
  settings = {'batch_size': 2, 'seed': 0}
  lm, rows = pipelines.lm_iterator(['a', 'b', 'cdefg'], tokenizer, length=6, **settings)
  assert rows == 3  # <a><b>, <cdefg and g>.
  completion, rows = pipelines.completion_iterator(
    [Completion('a', 'b')] * 5, tokenizer, max_length=4, **settings
  )
  assert rows == 5
  comparison, rows = pipelines.comparison_iterator(
    [Comparison('a', ('b', 'c'), (0, 1))], tokenizer, max_length=4, **settings
  )
  assert rows == 1
  for iterator, kind, shape in (
    (lm, types.LMBatch, (2, 6)),
    (completion, types.LMBatch, (2, 4)),
    (comparison, types.Comparisons, (2, 2, 4)),
  ):
    batch = next(iterator)
    assert type(batch) is kind and batch.tokens.shape == shape
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


# Order.


def test_each_epoch_holds_everything_once_in_an_order_of_its_own(tokenizer):
  seen = np.concatenate(order(prompt_iterator(tokenizer), 7)).reshape(3, 7)
  for epoch in seen:
    assert sorted(epoch) == list(range(7))
  assert len({tuple(epoch) for epoch in seen.tolist()}) == 3


def test_order_depends_on_the_seed_alone(tokenizer):
  first = order(prompt_iterator(tokenizer), 7)
  assert first == order(prompt_iterator(tokenizer), 7)
  assert first != order(prompt_iterator(tokenizer, seed=1), 7)


def test_indices_point_at_the_rows(tokenizer, ids):
  iterator = prompt_iterator(tokenizer)
  for _ in range(5):
    batch, indices = next(iterator)
    assert batch.tokens[:, -1].tolist() == [ids(LETTERS[i])[0][0] for i in indices]


@pytest.mark.parametrize('steps', [0, 1, 4])
def test_state_resumes_at_the_exact_batch(tokenizer, steps):
  iterator = prompt_iterator(tokenizer)
  for _ in range(steps):
    next(iterator)
  state = iterator.get_state()
  want = [next(iterator) for _ in range(5)]
  again = prompt_iterator(tokenizer)
  again.set_state(state)
  assert_equal([next(again) for _ in range(5)], want)
  iterator.set_state(state)  # also backwards
  assert_equal([next(iterator) for _ in range(5)], want)


def test_orbax_saves_and_restores_iterators(tokenizer, tmp_path):
  make = lambda: pipelines.lm_iterator(list(LETTERS), tokenizer, batch_size=4, length=6, seed=3)[0]
  iterator = make()
  for _ in range(3):
    next(iterator)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(
      3,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave({'step': np.int32(3)}),
        data=grain.checkpoint.CheckpointSave(iterator),
      ),
    )
    manager.wait_until_finished()
    want = [next(iterator) for _ in range(4)]
    again = make()
    manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
  assert_equal([next(again) for _ in range(4)], want)


def test_batch_size_must_be_positive(tokenizer):
  with pytest.raises(UserError, match='batch_size=0'):
    prompt_iterator(tokenizer, batch_size=0)


def test_fewer_examples_than_a_batch_are_repeated(tokenizer):
  (indices,) = order(prompt_iterator(tokenizer, count=2, batch_size=5), 1)
  assert np.bincount(indices).min() >= 2


# Held out.


def test_last_batch_is_filled_with_rows_that_do_not_count(tokenizer, ids):
  examples = [Completion('', letter) for letter in LETTERS[:5]]
  batches = pipelines.completion_batches(examples, tokenizer, batch_size=3, max_length=3)
  assert [valid.tolist() for _, valid in batches] == [[T, T, T], [T, T, F]]
  np.testing.assert_array_equal(batches[1][0].tokens, ids('<d>', '<e>', '<d>'))
  np.testing.assert_array_equal(batches[1][0].loss_mask, bits('011', '011', '000'))
  assert batches[1][0].segments.all()  # every row has a real token
  pairs = [Comparison('', (letter, 'z'), (0, 1)) for letter in LETTERS[:3]]
  batches = pipelines.comparison_batches(pairs, tokenizer, batch_size=2, max_length=3)
  np.testing.assert_array_equal(batches[1][0].present, [[T, T], [F, F]])
  batches = pipelines.prompt_batches(prompts(3), tokenizer, batch_size=2, max_prompt_length=2)
  assert [(indices.tolist(), valid.tolist()) for (_, indices), valid in batches] == [
    ([0, 1], [T, T]),
    ([2, 2], [T, F]),
  ]


def test_no_examples_make_no_batches_and_no_iterator(tokenizer):
  sizes = {'batch_size': 2}
  assert pipelines.lm_batches([], tokenizer, length=4, **sizes) == []
  assert pipelines.completion_batches([], tokenizer, max_length=4, **sizes) == []
  assert pipelines.comparison_batches([], tokenizer, max_length=4, **sizes) == []
  assert pipelines.prompt_batches([], tokenizer, max_prompt_length=4, **sizes) == []
  for make in (pipelines.completion_iterator, pipelines.comparison_iterator):
    with pytest.raises(UserError, match='there are no examples'):
      make([], tokenizer, max_length=4, seed=0, **sizes)


def test_split():
  texts = [f'{i:02}' for i in range(20)]
  train, held = pipelines.split(texts, holdout=0.25, seed=0)
  assert len(held) == 5 and sorted(train + held) == texts
  assert train == sorted(train) and held == sorted(held)
  assert pipelines.split(texts, holdout=0.25, seed=0) == (train, held)
  assert pipelines.split(texts, holdout=0.25, seed=1) != (train, held)
  assert [len(part) for part in pipelines.split(list('abc'), holdout=0.01, seed=0)] == [2, 1]
  for examples, holdout in (('a', 0.5), ('aa', 0.5), ('ab', 0.0), ('ab', 1.0)):
    with pytest.raises(UserError, match='cannot hold out'):
      pipelines.split(list(examples), holdout=holdout, seed=0)


def comparisons_of(counts):
  """Returns as many comparisons of each prompt as its count."""
  return [
    Comparison(f'q{i}', (f'a{j}', f'b{j}'), (0, 1))
    for i, count in enumerate(counts)
    for j in range(count)
  ]


@pytest.mark.parametrize(
  'make',
  [lambda e: e, lambda e: Prompt(e.prompt, {}), lambda e: Completion(e.prompt, e.completions[0])],
)
def test_split_holds_prompts_apart(make):
  rng = np.random.default_rng(0)
  for seed in range(20):
    counts = rng.integers(1, 9, 60)
    examples = [make(e) for e in comparisons_of(counts)]
    train, held = pipelines.split(examples, holdout=0.2, seed=seed)
    prompts = [{e.prompt for e in part} for part in (train, held)]
    assert not prompts[0] & prompts[1] and len(train) + len(held) == len(examples)
    assert abs(len(held) - 0.2 * len(examples)) <= 1
    # The same prompts are held out if the order of the examples changes.
    shuffled = [examples[i] for i in rng.permutation(len(examples))]
    assert {e.prompt for e in pipelines.split(shuffled, holdout=0.2, seed=seed)[1]} == prompts[1]


def test_split_of_few_prompts():
  train, held = pipelines.split(comparisons_of([30, 30]), holdout=0.1, seed=0)
  assert len(train) == len(held) == 30
  train, held = pipelines.split(comparisons_of([90, 1, 4, 5]), holdout=0.1, seed=3)
  assert {e.prompt for e in train} == {'q0'}
  # With a single prompt, comparisons are split separately, equal ones together.
  train, held = pipelines.split(comparisons_of([50]) * 2, holdout=0.1, seed=0)
  assert len(held) == 10 and not set(map(str, train)) & set(map(str, held))


def test_split_holds_every_prompt_out_equally_often():
  examples = comparisons_of([1] * 30 + [2] * 10)
  times = collections.Counter(
    e.prompt for seed in range(400) for e in pipelines.split(examples, holdout=0.2, seed=seed)[1]
  )
  # Binomial(400, 0.2): mean 80, standard deviation 8.
  assert all(abs(times[f'q{i}'] - 80 * (1 + (i > 29))) < 34 * (1 + (i > 29)) for i in range(40))


# Examples that do not fit.


def completion_row(tokenizer, prompt, completion, max_length):
  ((batch, _),) = pipelines.completion_batches(
    [Completion(prompt, completion)], tokenizer, batch_size=1, max_length=max_length
  )
  return batch.tokens.tolist(), batch.loss_mask.tolist()


def test_prompts_give_way_from_the_left_and_keep_their_bos(tokenizer, ids, caplog):
  with caplog.at_level(logging.WARNING):
    got = completion_row(tokenizer, 'abcdef', 'xy', 7)
  assert got == (ids('<defxy>'), bits('0000111'))
  assert '1 lost the start of the prompt and 0 the end of a completion' in caplog.text


def test_prompts_keep_half_the_row_and_completions_lose_their_end(tokenizer, ids, caplog):
  with caplog.at_level(logging.WARNING):
    got = completion_row(tokenizer, 'abcdef', 'uvwxyz', 6)
  # Half a row is 3: the BOS and two letters. The EOS is cut off and is not a target.
  assert got == (ids('<efuvw'), bits('000111'))
  assert '1 lost the start of the prompt and 1 the end of a completion' in caplog.text
  # A short prompt is not cut.
  assert completion_row(tokenizer, 'a', 'uvwxyz', 6) == (ids('<auvwx'), bits('001111'))


def test_all_completions_of_a_comparison_follow_the_same_tokens(tokenizer, ids):
  pair = Comparison('abcdef', ('x', 'xyz'), (0, 1))
  ((batch, _),) = pipelines.comparison_batches([pair], tokenizer, batch_size=1, max_length=8)
  np.testing.assert_array_equal(batch.tokens[0], ids('<defx>..', '<defxyz>'))


def test_nothing_is_cut_that_fits_exactly(tokenizer, ids, caplog):
  assert completion_row(tokenizer, 'ab', 'xy', 6) == (ids('<abxy>'), bits('000111'))
  assert 'lost' not in caplog.text


def test_long_prompts(tokenizer, ids, caplog):
  examples = [Prompt('ab', {}), Prompt('abcdef', {}), Prompt('c', {})]
  settings = {'batch_size': 3, 'max_prompt_length': 4}
  with pytest.raises(
    UserError,
    match=r'prompt 1 has 7 tokens, more than '
    r"config\.data\.max_prompt_length=4: 'abcdef'.*config\.data\.on_long",
  ):
    pipelines.prompt_batches(examples, tokenizer, **settings)
  (((batch, _), _),) = pipelines.prompt_batches(
    examples, tokenizer, on_long='truncate_left', **settings
  )
  np.testing.assert_array_equal(batch.tokens, ids('.<ab', '<def', '..<c'))
  with caplog.at_level(logging.WARNING):
    (((batch, indices), valid),) = pipelines.prompt_batches(
      examples, tokenizer, on_long='drop', **settings
    )
  np.testing.assert_array_equal(batch.tokens, ids('.<ab', '..<c', '.<ab'))
  assert (indices.tolist(), valid.tolist()) == ([0, 2, 0], [T, T, F])
  assert '1 of 3 prompts are longer than 4 tokens' in caplog.text
  with pytest.raises(UserError, match='none of 1 prompts has at most'):
    pipelines.prompt_batches(examples[1:2], tokenizer, on_long='drop', **settings)
  with pytest.raises(UserError, match="on_long is 'cut'"):
    pipelines.prompt_batches(examples, tokenizer, on_long='cut', **settings)


def test_as_read_is_the_text_of_the_tokens_that_are_left(tokenizer, ids):
  examples = [
    Prompt('ab', {'n': 0}),
    Prompt('a<|eos|>bcdef', {'n': 1}),
    Prompt('a<|eos|>cd', {'n': 2}),
  ]
  read = pipelines.truncate_prompts(examples, tokenizer, max_prompt_length=4)
  assert read == [examples[0], Prompt('def', {'n': 1}), Prompt('<|eos|>cd', {'n': 2})]
  (((batch, _), _),) = pipelines.prompt_batches(
    examples, tokenizer, on_long='truncate_left', batch_size=3, max_prompt_length=4
  )
  np.testing.assert_array_equal(batch.tokens, ids('.<ab', '<def', '<>cd'))
  (((again, _), _),) = pipelines.prompt_batches(read, tokenizer, batch_size=3, max_prompt_length=4)
  np.testing.assert_array_equal(again.tokens, batch.tokens)


@pytest.mark.parametrize(
  'make',
  [
    lambda t: pipelines.lm_iterator(['w0 zz'], t, batch_size=1, length=8, seed=0),
    lambda t: pipelines.completion_iterator(
      [Completion('w0', 'zz')], t, batch_size=1, max_length=8, seed=0
    ),
    lambda t: pipelines.comparison_iterator(
      [Comparison('w0', ('zz', 'w1'), (0, 1))], t, batch_size=1, max_length=8, seed=0
    ),
    lambda t: pipelines.prompt_iterator(
      [Prompt('zz w0', {})], t, batch_size=1, max_prompt_length=8, seed=0
    ),
  ],
)
def test_text_that_cannot_be_encoded_is_reported(tmp_path, caplog, make):
  make(tiny.write_tokenizer(tmp_path))
  (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
  assert '(1 of ' in message and "are '<|unk|>': the tokenizer cannot encode" in message


def test_texts_without_a_target_are_an_error(tokenizer, shared):
  walks = tokenizers.load(str(shared / 'models/randomwalks'))
  with pytest.raises(UserError, match='no token to learn from'):
    pipelines.lm_iterator(['', ''], walks, batch_size=1, length=4, seed=0)
  with pytest.raises(UserError, match='prompt 0 is empty'):
    pipelines.prompt_iterator([Prompt('', {})], walks, batch_size=1, max_prompt_length=4, seed=0)


def test_without_a_bos_the_first_token_is_no_target(shared):
  walks = tokenizers.load(str(shared / 'models/randomwalks'))
  ((batch, _),) = pipelines.completion_batches(
    [Completion('', 'ab')], walks, batch_size=1, max_length=4
  )
  np.testing.assert_array_equal(batch.tokens, [[0, 1, 21, 22]])
  np.testing.assert_array_equal(batch.loss_mask, [[F, T, T, F]])


def test_pairs_need_a_token_before_the_completion(shared):
  walks = tokenizers.load(str(shared / 'models/randomwalks'))
  examples = [Completion('a', 'b'), Completion('', 'ab')]
  with pytest.raises(
    UserError, match='example 1 has an empty prompt, but a completion needs a tok'
  ):
    pipelines.completion_iterator(examples, walks, batch_size=1, max_length=4, seed=0, pairs=True)


def test_padding_with_the_eos_keeps_the_real_one(shared):
  """GPT-2 pads with its EOS, so only masks distinguish the two."""
  gpt2 = tokenizers.load(str(shared / 'models/gpt2-tokenizer'))
  ((batch, _),) = pipelines.completion_batches(
    [Completion('Hello', ' world')], gpt2, batch_size=1, max_length=5
  )
  np.testing.assert_array_equal(batch.tokens, [[15496, 995, 50256, 50256, 50256]])
  np.testing.assert_array_equal(batch.loss_mask, [[F, T, T, F, F]])

"""Truncation at tokens and at strings, against loops over tokens and bytes."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import types
from rlhf_jax.data import tokenizers
from rlhf_jax.rollout import stops
import tiny

P = 2


def rollout(rng, batch, slots, vocab, holes):
  """Returns random tokens in responses of random lengths; `holes` adds masked tokens inside."""
  lengths = rng.integers(0, slots + 1, batch)
  real = np.arange(slots)[None] < lengths[:, None]
  mask = real & (rng.random(real.shape) < 0.8) if holes else real
  tokens = rng.integers(0, vocab, (batch, P + slots)).astype(np.int32)
  logprobs = np.where(mask, -rng.random(mask.shape), 0).astype(np.float32)
  return types.Rollout(
    tokens, np.concatenate([rng.random((batch, P)) < 0.7, real], axis=1), mask, logprobs
  )


def check(found, given, lasts, pad_id):
  """Asserts that each response ends at its slot in `lasts`, or is unchanged if that is None."""
  slots = given.response_mask.shape[1]
  for row, last in enumerate(lasts):
    stay = slots if last is None else last + 1
    for name, filler in (
      ('tokens', pad_id),
      ('mask', False),
      ('response_mask', False),
      ('logprobs', 0.0),
    ):
      before, after = np.asarray(getattr(given, name))[row], np.asarray(getattr(found, name))[row]
      assert before.dtype == after.dtype
      here = before.shape[0] - slots + stay
      np.testing.assert_array_equal(after[:here], before[:here], err_msg=name)
      assert (after[here:] == filler).all(), name


@pytest.mark.parametrize('holes', [False, True])
@pytest.mark.parametrize('tokens, after', [((3,), 0), ((3,), 5), ((1, 4), 2), ((2,), 12), ((), 0)])
def test_truncation_at_tokens_against_loops(tokens, after, holes):
  given = rollout(np.random.default_rng(after), 40, 12, 9, holes)
  cut = jax.jit(functools.partial(stops.truncate, tokens=tokens, after=after, pad_id=8))
  seen, found = cut(given)
  lasts = [
    next(
      (
        t
        for t in range(after, 12)
        if given.response_mask[b, t] and given.tokens[b, P + t] in tokens
      ),
      None,
    )
    for b in range(40)
  ]
  check(seen, given, lasts, 8)
  assert found.tolist() == [last is not None for last in lasts]
  if tokens and after < 12:
    assert 5 < sum(found) < 40


def test_the_first_seed():
  """Against lm-human-preferences' two functions in NumPy: the first '.' after position 16 of 24."""
  rng = np.random.default_rng(0)
  given = rollout(rng, 200, 24, 30, False)
  given = given.replace(response_mask=np.ones((200, 24), bool), mask=np.ones((200, 26), bool))
  responses = given.tokens[:, P:]
  mask = (responses == 13).astype(int)
  mask = np.concatenate([np.zeros_like(mask)[:, :16], mask[:, 16:]], axis=1)
  mask = (np.cumsum(mask, axis=1) - mask).astype(bool)
  seen, found = stops.truncate(given, tokens=(13,), after=16, pad_id=29)
  np.testing.assert_array_equal(seen.tokens[:, P:], np.where(mask, 29, responses))
  np.testing.assert_array_equal(found, np.any(responses[:, 16:] == 13, axis=-1))
  np.testing.assert_array_equal(seen.response_mask, ~mask)


def byte_table():
  """Returns {character: byte} of byte-level vocabularies."""
  table = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
  return table | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in set(table.values()))
  }


def token_bytes(tokenizer):
  """Returns the bytes of each id of a byte-level tokenizer."""
  table, specials = byte_table(), set(tokenizer.all_special_tokens)
  return [
    token.encode() if token in specials else bytes(table[character] for character in token)
    for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
  ]


def last_slots(given, spelled, strings, after):
  """Finds the last slot of each response token by token."""
  lasts = []
  for tokens, mask in zip(given.tokens[:, P:], given.response_mask):
    text, last, count, before = b'', None, 0, 0
    for slot in np.flatnonzero(mask):
      text, count = text + spelled[tokens[slot]], count + 1
      if count <= after:
        before = len(text)
      elif any(end > before for string in strings for end in ends(text, string.encode())):
        last = slot
        break
    lasts.append(last)
  return lasts


def ends(text, string):
  return [start + len(string) for start in range(len(text)) if text.startswith(string, start)]


def compare(tokenizer, given, strings, after):
  seen, found = stops.truncate_at_strings(given, tokenizer, strings, after=after)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(seen))
  lasts = last_slots(given, token_bytes(tokenizer), strings, after)
  check(seen, given, lasts, tokenizer.pad_token_id)
  assert found.tolist() == [last is not None for last in lasts]
  return found


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  """Returns a tokenizer that merges letters, spaces and parts of characters."""
  texts = [
    'aab abba ba\n\nab \xe9\xe9 \u2603\u2603 \U0001f600\U0001f601',
    'aba bab\n b\u2603 \u2604',
  ] * 9
  return tokenizers.train_bpe(texts, 300, str(tmp_path_factory.mktemp('bpe')))


@pytest.mark.parametrize('seed', range(12))
def test_truncation_at_strings_against_a_loop_over_bytes(bpe, seed):
  """With encoded texts, and random ids whose bytes are often not characters."""
  rng = np.random.default_rng(seed)
  given = rollout(rng, 60, 24, len(bpe), holes=seed % 2)
  letters = ['a', 'b', ' ', '\n', '\xe9', '\u2603', '\u2604', '\U0001f600']
  for row in range(40):
    ids = tokenizers.encode_continuation(bpe, [''.join(rng.choice(letters, 24))])[0][:24]
    given.tokens[row, P : P + len(ids)] = ids
  strings = [''.join(rng.choice(letters, rng.integers(1, 5))) for _ in range(rng.integers(1, 4))]
  total = 0
  for after in (0, 3, 10, 30):
    total += compare(bpe, given, strings, after).sum()
  assert total or len(strings[0]) > 1


def test_a_string_may_end_inside_a_token_and_in_part_of_a_character(bpe):
  (ids,) = tokenizers.encode_continuation(bpe, ['ab \u2603\u2603b'])
  mask = np.ones((1, len(ids)), bool)
  given = types.Rollout(
    np.concatenate([[0, 0], ids])[None].astype(np.int32),
    np.ones((1, P + len(ids)), bool),
    mask,
    mask * np.float32(-1),
  )
  for string in ('a', 'b ', '\u2603', '\u2603\u2603', 'b', '\u2603b'):
    assert compare(bpe, given, [string], 0).all(), string
  assert not compare(bpe, given, ['\u2604', 'bb'], 0).any()


def test_words_and_special_tokens(world):
  """A tokenizer that adds spaces between tokens; the EOS has a text."""
  tokenizer = tokenizers.load(str(world / 'tokenizer'))
  tokens = np.array([[5, 6, 1, 14, 15, 16, 2, 0], [5, 14, 5, 14, 15, 5, 2, 0]], np.int32)
  mask = np.arange(6)[None] < np.array([[5], [5]])
  given = types.Rollout(
    tokens, np.concatenate([np.ones((2, P), bool), mask], axis=1), mask, mask * np.float32(-1)
  )
  for strings, lasts in (
    (['w10 w11'], [2, 2]),
    (['1'], [1, 0]),
    (['w12', 'w1 '], [3, 1]),
    (['<|bos|>'], [0, None]),
    (['<|eos|>'], [4, 4]),
    (['w7'], [None, None]),
  ):
    seen, found = stops.truncate_at_strings(given, tokenizer, strings)
    check(seen, given, lasts, tiny.PAD)
    assert found.tolist() == [last is not None for last in lasts]


def test_strings_of_one_token(bpe, world):
  tokenizer = tokenizers.load(str(world / 'tokenizer'))
  assert stops.single_tokens(tokenizer, ['w3', 'w3 w4', '<|eos|>', 'unknown']) == {
    'w3': 7,
    '<|eos|>': tiny.EOS,
  }
  spelled = token_bytes(bpe)
  for string in ('a', '\n', '\u2603', '\u2604', '<|bos|>', 'ab abba'):
    ids = tokenizers.encode_continuation(bpe, [string])[0]
    assert stops.single_tokens(bpe, [string]) == ({string: ids[0]} if len(ids) == 1 else {})
    assert b''.join(spelled[token] for token in ids) == string.encode()
  assert stops.single_tokens(bpe, []) == {}


def test_empty_strings_are_refused(bpe):
  given = rollout(np.random.default_rng(0), 2, 3, 9, False)
  for call in (
    lambda: stops.truncate_at_strings(given, bpe, ['a', '']),
    lambda: stops.single_tokens(bpe, ['']),
  ):
    with pytest.raises(errors.UserError, match='a stop string is empty'):
      call()


def test_gpt2(shared):
  """Real texts and random ids, with common stop strings, some of which end inside a token."""
  tokenizer = tokenizers.load(str(shared / 'models/gpt2-tokenizer'))
  rng = np.random.default_rng(0)
  given = rollout(rng, 64, 64, len(tokenizer), False)
  text = (shared / 'data/text/tinyshakespeare.txt').read_text()[:20_000]
  (ids,) = tokenizers.encode_continuation(
    tokenizer, [text.replace('Citizen', 'Citizen \u2603\U0001f600')]
  )
  for row in range(48):
    given.tokens[row, P:] = ids[64 * row : 64 * row + 64]
  for strings, after in (
    (['\n\n'], 0),
    (['.'], 16),
    (['First', 'ius:\n'], 0),
    (['\u2603'], 3),
    (['\U0001f600'], 0),
    (['izen', 'eech'], 9),
  ):
    assert 3 < compare(tokenizer, given, strings, after).sum() < 64
  single = stops.single_tokens(tokenizer, ['.', '\n', '\n\n', '\u2603', 'Human:', '<|endoftext|>'])
  assert single == {'.': 13, '\n': 198, '\n\n': 628, '<|endoftext|>': 50256}

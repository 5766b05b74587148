"""Episodes: formats, rewards by token, turn and episode, truncation, packing, errors."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.data import chat
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import stored
from rlhf_jax.data import tokenized
import tiny

TEMPLATE = (
  "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  tokenizer = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer'))
  chat.use_template(tokenizer, TEMPLATE)
  return tokenizer


def episodes(tokenizer, *records):
  listed = [stored.Record(record, f'x.jsonl:{i + 1}') for i, record in enumerate(records)]
  return formats.episodes(listed, tokenizer=tokenizer)[0]


def messages(*contents):
  roles = ('user', 'assistant')
  return [{'role': roles[i % 2], 'content': text} for i, text in enumerate(contents)]


def batch(tokenizer, examples, **settings):
  made = pipelines.episode_batches(
    examples, tokenizer, pipelines.EpisodeSettings(**settings), batch_size=len(examples)
  )
  return made[0][0]


W = {f'w{i}': 4 + i for i in range(tiny.WORDS)}


def test_an_episode_by_hand(tokenizer):
  """BOS w1 | w2 w3 EOS: the states are BOS w1 w2 w3, the actions w1 w2 w3 EOS."""
  (example,) = episodes(tokenizer, {'prompt': 'w1', 'completion': 'w2 w3', 'reward': 5})
  found = jax.tree.map(lambda x: x[0].tolist(), batch(tokenizer, [example], max_length=6))
  assert found.tokens == [tiny.BOS, W['w1'], W['w2'], W['w3'], tiny.PAD]
  assert found.actions == [W['w1'], W['w2'], W['w3'], tiny.EOS, tiny.PAD]
  assert found.segments == [1, 1, 1, 1, 0] and found.positions == [0, 1, 2, 3, 0]
  assert found.mask == [False, True, True, True, False]
  assert found.last == [False, False, False, True, False]
  assert found.rewards == [0, 0, 0, 5, 0]


@pytest.mark.parametrize('reward', [[1, 2], [1, 2, 0]])
def test_rewards_by_token_with_or_without_the_eos(tokenizer, reward):
  (example,) = episodes(tokenizer, {'prompt': 'w1', 'completion': 'w2 w3', 'reward': reward})
  found = batch(tokenizer, [example], max_length=6)
  assert found.rewards[0].tolist() == [0, 1, 2, 0, 0]


def test_rewards_by_turn_and_of_a_conversation(tokenizer):
  """Rendered: u w1 EOS a | w2 w3 EOS | u w4 EOS a | w5 EOS; u and a become UNK."""
  record = {'messages': messages('w1', 'w2 w3', 'w4', 'w5')}
  by_turn, whole = episodes(tokenizer, record | {'reward': [3, 7]}, record | {'reward': 10})
  assert len(by_turn.parts) == 4
  found = batch(tokenizer, [by_turn, whole], max_length=20)
  actions = [W['w2'], W['w3'], tiny.EOS, W['w5'], tiny.EOS]
  for row, rewards in enumerate(([0, 0, 3, 0, 7], [0, 0, 0, 0, 10])):
    mask = found.mask[row]
    assert found.actions[row][mask].tolist() == actions
    assert found.rewards[row][mask].tolist() == rewards
    assert np.flatnonzero(found.last[row]).tolist() == [np.flatnonzero(mask)[-1]]
    assert not found.rewards[row][~mask].any()


def test_truncated_rewards_move_to_the_last_action_that_is_left(tokenizer):
  record = {'prompt': 'w1', 'completion': 'w2 w3 w4 w5'}
  examples = episodes(
    tokenizer,
    record | {'reward': 6},
    record | {'reward': [1, 2, 3, 4]},
    record | {'reward': [1] * 5},
  )
  found = batch(tokenizer, examples, max_length=4)  # BOS w1 w2 w3
  assert found.actions[0].tolist() == [W['w1'], W['w2'], W['w3']]
  assert found.rewards.tolist() == [[0, 0, 6], [0, 1, 9], [0, 1, 4]]
  assert found.last.tolist() == [[False, False, True]] * 3


def test_truncated_episodes_are_counted_in_a_warning(tokenizer, caplog):
  """With BOS and EOS they have 4, 6 and 8 tokens, of which 6 fit."""
  texts = [('w1', 'w2'), ('w1', 'w2 w3 w4'), (tiny.text(0, 4), 'w2 w3')]
  long = ('w1', tiny.text(0, 9))
  records = [{'prompt': a, 'completion': b, 'reward': 1} for a, b in (*texts, long)]
  tokenized.episodes(episodes(tokenizer, *records[:2]), tokenizer, max_length=6)
  assert not caplog.messages
  tokenized.episodes(episodes(tokenizer, *records), tokenizer, max_length=6)
  assert 'of 4 examples, 1 lost the start of the prompt and 1 the end of a' in caplog.text
  assert 'config.data.max_length' in caplog.text


def test_standardized_returns(tokenizer):
  """With mean 2 and standard deviation 4: rewards / 4, and the last one less 1 / 2."""
  record = {'prompt': 'w1', 'completion': 'w2 w3'}
  examples = episodes(tokenizer, record | {'reward': 6}, record | {'reward': [4, 8, 0]})
  found = batch(tokenizer, examples, max_length=5, mean=2.0, std=4.0)
  assert found.rewards.tolist() == [[0, 0, 0, 1], [0, 1, 2, -0.5]]


def test_packed_rows_hold_every_episode_once(tokenizer):
  records = [
    {'prompt': tiny.text(i, 1 + i % 3), 'completion': tiny.text(i, 1 + i % 4), 'reward': i}
    for i in range(20)
  ]
  examples = episodes(tokenizer, *records)
  alone = batch(tokenizer, examples, max_length=16)
  settings = pipelines.EpisodeSettings(max_length=16, pack=True)
  packed = [b for b, _ in pipelines.episode_batches(examples, tokenizer, settings, batch_size=2)]
  assert len(packed) < 6  # of 2 rows, instead of 20

  def pieces(batch, row):
    for segment in range(1, batch.segments[row].max() + 1):
      own = batch.segments[row] == segment
      yield tuple(
        tuple(getattr(batch, name)[row][own].tolist())
        for name in ('tokens', 'positions', 'actions', 'mask', 'last', 'rewards')
      )

  expected = sorted(piece for row in range(20) for piece in pieces(alone, row))
  found = sorted(
    piece
    for batch in packed
    for row in range(2)
    if batch.mask[row].any()
    for piece in pieces(batch, row)
  )
  assert found == expected


def test_pairs_for_an_encoder_decoder(tokenizer):
  examples = episodes(
    tokenizer,
    {'prompt': 'w1', 'completion': 'w2 w3', 'reward': 5},
    {'prompt': 'w1 w4', 'completion': 'w5', 'reward': [1, 2]},
  )
  found = batch(tokenizer, examples, max_length=16, pairs=True)
  assert found.tokens[0].tolist() == [tiny.PAD, tiny.BOS, W['w1'], W['w2'], W['w3'], tiny.EOS]
  assert found.segments.tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
  assert found.actions[1].tolist() == [W['w5'], tiny.EOS, tiny.PAD]
  assert found.rewards.tolist() == [[0, 0, 5], [1, 2, 0]]
  assert found.last.tolist() == [[False, False, True], [False, True, False]]
  several = episodes(tokenizer, {'messages': messages('w1', 'w2', 'w3', 'w4'), 'reward': 1})
  with pytest.raises(errors.UserError, match='several turns'):
    batch(tokenizer, several, max_length=16, pairs=True)


@pytest.mark.parametrize(
  'record, message',
  [
    ({'prompt': 'w1', 'completion': 'w2'}, "x.jsonl:1: field 'reward': missing"),
    ({'prompt': 'w1', 'completion': 'w2', 'reward': 'good'}, "field 'reward': must be a finite"),
    ({'prompt': 'w1', 'completion': 'w2', 'reward': [1, None]}, "field 'reward': must be a finite"),
    (
      {'messages': messages('w1', 'w2', 'w3', 'w4'), 'reward': [1]},
      'has 1 numbers for 2 messages of the assistant',
    ),
  ],
)
def test_errors_of_records(tokenizer, record, message):
  with pytest.raises(errors.DataError) as error:
    episodes(tokenizer, record)
  assert message in str(error.value)


def test_a_wrong_number_of_rewards_by_token(tokenizer, monkeypatch):
  record = {'prompt': 'w1', 'completion': 'w2 w3'}
  monkeypatch.setattr(formats, 'SMALL', -1)  # large data know where their examples are
  examples = episodes(tokenizer, record | {'reward': 1}, record | {'reward': [1, 2, 3, 4]})
  message = r'example 1 \(x.jsonl:2\) has 4 rewards for 3 tokens, the EOS included'
  with pytest.raises(errors.UserError, match=message):
    tokenized.episodes(examples, tokenizer, max_length=8)


def test_rewards_of_a_table_are_numbers_or_lists(tokenizer):
  for text, level in (('1.5', 'episode'), ('[1, 2]', 'token')):
    fields = {'prompt': 'w1', 'completion': 'w2 w3', 'reward': text}
    (example,) = formats.episodes([stored.Record(fields, 'x.csv:2', True)], tokenizer=tokenizer)[0]
    assert example.level == level
    assert dataclasses.astuple(example)[0] == ('w1', 'w2 w3')

"""Rewards of a data set by a scorer: computed once, again if data or code change."""

import sys

import jax
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import sharding
from rlhf_jax.data import mixtures
from rlhf_jax.data import shapes
from rlhf_jax.data import tokenizers
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import labels
from rlhf_jax.rewards import scorers

CALLS = []


def length(prompts, responses, *, response_tokens, metadata):
  """Number of words, and 100 times the column `extra`; NaN for w9."""
  CALLS.append(len(responses))
  nan = float('nan')
  return [
    nan if response == 'w9' else len(response.split()) + 100 * entry.get('extra', 0)
    for response, entry in zip(responses, metadata)
  ]


def by_token(prompts, responses, *, response_tokens, metadata):
  """The position of each token."""
  return [list(range(len(tokens))) for tokens in response_tokens]


def episode(*parts, **metadata):
  return shapes.Episode(parts, None, 'episode', metadata)


@pytest.fixture
def label(world, tmp_path, monkeypatch):
  """A function (episodes, function, **keys of the reward) -> episodes with rewards."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  CALLS.clear()
  tokenizer = tokenizers.load(world / 'tokenizer')

  def call(episodes, function, **keys):
    block = scorers.config()
    name = function if ':' in function else f'test_labels:{function}'
    block.update({'function': name, **keys})
    mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
      return labels.label(episodes, block, tokenizer, mesh, batch_size=2, load={})

  return call


def test_rewards_are_computed_once(label):
  episodes = [episode('w1', 'w2 w3'), episode('w1', 'w2', extra=1), episode('w4', 'w5 w6 w7')]
  first = label(episodes, 'length')
  assert [e.rewards for e in first] == [(2.0,), (101.0,), (3.0,)]
  assert [e.parts for e in first] == [e.parts for e in episodes]
  assert CALLS == [2, 2]  # the second batch has a copy of the last answer
  assert label(episodes, 'length') == first and CALLS == [2, 2]
  changed = [*episodes[:2], episode('w4', 'w5 w6 w8')]
  label(changed, 'length')
  label([episodes[0], episode('w1', 'w2', extra=2)], 'length')
  assert CALLS == [2, 2, 2, 2, 2]


FUNCTION = """
def reward(prompts, responses):
  return [{}] * len(responses)
"""
OBJECT = """
class Constant:
  def __init__(self, value):
    self.value = value
  def __call__(self, prompts, responses):
    return [self.value] * len(responses)
reward = Constant({})
"""


@pytest.mark.parametrize('code', [FUNCTION, OBJECT], ids=['function', 'object'])
def test_rewards_of_changed_code_are_computed_again(code, label, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  for value in (1.0, 22.0):  # of different lengths, since Python compares sizes and seconds
    (tmp_path / 'reward_that_changes.py').write_text(code.format(value), encoding='utf-8')
    monkeypatch.delitem(sys.modules, 'reward_that_changes', raising=False)
    (found,) = label([episode('w1', 'w2')], 'reward_that_changes:reward')
    assert found.rewards == (value,)
  monkeypatch.delitem(sys.modules, 'reward_that_changes')


def test_rewards_of_changed_weights_are_computed_again(world, tmp_path):
  block = scorers.config()
  block.model = str(tmp_path)
  answers = labels.Answers.of([episode('w1', 'w2')], tokenizers.load(world / 'tokenizer'))
  paths = []
  for weights in (b'1', b'22'):
    (tmp_path / 'model.safetensors').write_bytes(weights)
    paths.append(labels.cache_path(answers, block))
  assert paths[0] != paths[1] == labels.cache_path(answers, block)


def test_rewards_of_functions_in_memory_and_of_servers_are_not_kept(label):
  name = f'{functions.IN_MEMORY}<lambda>'
  for value in (1.0, 2.0):
    with functions.in_memory({name: lambda prompts, responses, value=value: [value] * 2}):
      (found,) = label([episode('w1', 'w2')], name)
    assert found.rewards == (value,)
  block = scorers.config()
  block.parts = {'a': {'weight': 1.0, 'url': 'http://localhost:1'}, 'b': {'function': 'x:y'}}
  assert not labels.cacheable(block)


def test_a_damaged_file_is_replaced(label, tmp_path):
  episodes = [episode('w1', 'w2 w3')]
  label(episodes, 'length')
  (path,) = tmp_path.rglob('*.npy')
  whole = path.read_bytes()
  for damaged in (whole[:-4], b''):
    path.write_bytes(damaged)
    assert label(episodes, 'length')[0].rewards == (2.0,)
    assert path.read_bytes() == whole


def test_the_rewards_of_a_mixture_keep_its_weights(label):
  parts = [[episode('w1', 'w2 w3')], [episode('w1', 'w9'), episode('w4', 'w5 w6 w7')]]
  found = label(mixtures.Mixture(('x', 'y'), (0.9, 0.1), parts), 'length', on_nan='skip')
  assert (found.names, list(found.weights)) == (('x', 'y'), [0.9, 0.1])
  assert [[e.rewards for e in part] for part in found.parts] == [[(2.0,)], [(3.0,)]]


def test_rewards_by_token(label):
  found = label([episode('w1', 'w2 w3'), episode('w1', 'w2')], 'by_token')
  assert [(e.level, e.rewards) for e in found] == [('token', (0, 1, 2)), ('token', (0, 1))]
  with pytest.raises(errors.UserError, match='several answers'):
    label([episode('w1', 'w2', 'w3', 'w4')], 'by_token')


def test_the_last_answer_of_a_conversation_is_scored(label):
  (found,) = label([episode('w1', 'w2 w2 w2', 'w3', 'w4 w5')], 'length')
  assert found.rewards == (2.0,) and len(found.parts) == 4


def test_nan_stops_or_is_left_out(label):
  episodes = [episode('w1', 'w9'), episode('w1', 'w2')]
  with pytest.raises(errors.UserError, match='every reward must be finite'):
    label(episodes, 'length')
  assert [e.rewards for e in label(episodes, 'length', on_nan='skip')] == [(1.0,)]


def test_a_cache_that_cannot_be_written_is_no_error(label, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/proc/nothing')
  assert np.isfinite(label([episode('w1', 'w2')], 'length')[0].rewards[0])

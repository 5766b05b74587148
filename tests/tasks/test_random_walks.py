"""Graph, walks, tokenizer and reward of the random walks; against trlX's if its data is present."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import policy
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.rewards import functions
from rlhf_jax.tasks import random_walks

EDGES, WALKS = random_walks.example()


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# The graph and the walks.


def test_the_example_is_trlxs(shared):
  expected = json.loads((shared / 'data/randomwalks.json').read_text())
  assert np.argwhere(EDGES).tolist() == expected['edges']
  assert expected['walks'] == WALKS
  assert random_walks.shortest_lengths(EDGES) == expected['shortest_length']
  scores = [random_walks.optimality(w[0], w[1:]) for w in WALKS]
  np.testing.assert_allclose(scores, expected['optimality'], atol=1e-6)


def test_facts_of_the_example():
  assert EDGES.shape == (21, 21) and EDGES.sum() == 52
  assert len(WALKS) == 1000 and WALKS[:4] == ['sda', 'fda', 'ebjnbdtkna', 'jnbjna']
  assert np.mean([random_walks.optimality(w[0], w[1:]) for w in WALKS]) == pytest.approx(
    0.352, abs=5e-4
  )
  shortest = random_walks.shortest_lengths(EDGES)
  assert list(shortest) == list('bcdefghijklmnopqrstu')
  assert shortest['d'] == shortest['n'] == 2  # d and n have an edge to a
  assert shortest['b'] == 3 and shortest['o'] == 5  # b d a and o r j n a
  assert max(shortest.values()) == 5


def test_every_node_has_a_way_out_and_the_goal_only_to_itself():
  for seed in range(5):
    edges = random_walks.draw_edges(np.random.RandomState(seed))
    assert edges.any(axis=1).all()
    assert np.flatnonzero(edges[0]).tolist() == [0]
    assert not np.diag(edges)[1:].any()


def test_walks_follow_edges_until_the_goal():
  walks = random_walks.draw_walks(EDGES, 300, np.random.RandomState(3))
  assert {walk[0] for walk in walks} == set('bcdefghijklmnopqrstu')
  for walk in walks:
    nodes = [random_walks.LETTERS.index(letter) for letter in walk]
    assert all(EDGES[i, j] for i, j in zip(nodes, nodes[1:], strict=False))
    assert 'a' not in walk[:-1] and (walk[-1] == 'a' or len(walk) == 10)


def test_shortest_lengths_of_a_chain():
  # b -> a, c -> b, d -> c, ...: start number i has i + 1 nodes to the goal, at most 10.
  edges = np.eye(21, k=-1, dtype=bool)
  edges[0, 0] = True
  lengths = random_walks.shortest_lengths(edges)
  assert [lengths[letter] for letter in 'bcdj'] == [2, 3, 4, 10]
  assert lengths['k'] == lengths['u'] == 10


# The reward.


@pytest.mark.parametrize(
  'prompt, response, score',
  [
    ('s', 'da', 1.0),  # shortest: 3 nodes
    ('j', 'nbjna', 4 / 7),  # 6 nodes where 3 are enough: (10 - 6) / (10 - 3)
    ('s', 'daub', 1.0),  # nodes after the goal are ignored
    ('s', 'daa', 1.0),
    ('s', 'a', 0.0),  # there is no edge from s to a
    ('s', 'dta', 0.0),  # nor from t to a
    ('s', 'd', 0.0),  # unfinished
    ('s', '', 0.0),
    ('s', 'd!a', 0.0),  # not a node
    ('e', 'bjnbdtkna', 0.0),  # the goal at node 10 is too late to count
  ],
)
def test_optimality_by_hand(prompt, response, score):
  assert random_walks.optimality(prompt, response) == pytest.approx(score)


def test_the_reward_function():
  function = functions.load('rlhf_jax.tasks.random_walks:reward')
  scores = functions.call(
    function,
    ['s', 'j', 's'],
    ['da', 'nbjna', 'd'],
    response_tokens=[[]] * 3,
    metadata=[{}] * 3,
    response_length=9,
  )
  assert scores.tolist() == pytest.approx([1.0, 4 / 7, 0.0])


# The files.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('walks')
  random_walks.write(path, walks=50, seed=7)
  return path


def test_files(folder, tmp_path):
  texts, walks, prompts = (rows(folder / f'{n}.jsonl') for n in ('texts', 'walks', 'prompts'))
  assert len(texts) == 50
  assert [record['prompt'] + record['completion'] for record in walks] == WALKS
  assert walks[3] == {'prompt': 'j', 'completion': 'nbjna', 'rating': pytest.approx(4 / 7)}
  assert len(prompts) == 20 and prompts[2] == {'prompt': 'd', 'shortest': 2}
  random_walks.write(tmp_path, walks=60, seed=7)
  assert rows(tmp_path / 'texts.jsonl')[:50] == texts
  random_walks.write(tmp_path, walks=50, seed=8)
  assert rows(tmp_path / 'texts.jsonl') != texts
  assert rows(tmp_path / 'walks.jsonl') == walks


def test_the_walks_are_texts_and_rated_completions(folder):
  records = sources.read(folder / 'walks.jsonl')
  texts, _ = formats.texts(records)
  assert [text.prompt + text.completion for text in texts] == WALKS
  completions, _ = formats.comparisons(records)
  assert completions[0].ratings == (1.0,)


def test_the_tokenizer(folder):
  tokenizer = tokenizers.load(folder / 'tokenizer')
  assert tokenizers.encode(tokenizer, ['sdau'])[0].tolist() == [18, 3, 0, 20]
  assert tokenizers.decode_continuation(tokenizer, [[3, 0, 21, 22]]) == ['da']
  assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (21, 21, 22)
  assert len(tokenizer) == models.create(random_walks.MODEL).vocab_size == 23


def test_the_tokenizer_is_that_of_the_shared_model(folder, shared):
  ours, theirs = (tokenizers.load(p) for p in (folder / 'tokenizer', shared / 'models/randomwalks'))
  assert ours.get_vocab() == theirs.get_vocab()
  assert ours.special_tokens_map == theirs.special_tokens_map
  for walk in WALKS[:50]:
    assert ours(walk)['input_ids'] == theirs(walk)['input_ids']
    assert ours.decode(ours(walk)['input_ids']) == theirs.decode(theirs(walk)['input_ids']) == walk


# A policy.


class Fixed:
  """A policy that responds to each start with the next of its walks."""

  def __init__(self, walks):
    self.walks = walks

  def sample(self, prompts, key, *, max_new_tokens, temperature, samples):
    assert max_new_tokens == 9 and temperature == 1.0
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    self.asked = prompts
    responses = [self.walks[i % len(self.walks)] for i in range(len(prompts))]
    return policy.Samples(prompts, responses, None)


def test_sampled_optimality_of_fixed_answers():
  da = Fixed(['da'])
  mean, error = random_walks.sampled_optimality(da, jax.random.key(0), 40)
  assert da.asked == [start for start in 'bcdefghijklmnopqrstu' for _ in range(2)]
  # Optimal from b, f, i and s, the nodes with an edge to d: 8 ones among 40.
  assert mean == pytest.approx(0.2)
  # Variance 0.2 * 0.8 * 40 / 39, over 40 samples.
  assert error == pytest.approx((0.16 / 39) ** 0.5)


def test_uniform_steps_have_the_mean_optimality_of_their_chain():
  # Probability of a walk of each length, from powers of the transition matrix.
  transition = EDGES / EDGES.sum(axis=1, keepdims=True)
  transition[0] = 0
  expected = np.mean(
    [
      np.linalg.matrix_power(transition, n - 1)[1:, 0]
      * (10 - n)
      / (10 - np.array([*random_walks.shortest_lengths(EDGES).values()]))
      for n in range(2, 11)
    ],
    axis=1,
  ).sum()
  assert expected == pytest.approx(0.3462, abs=5e-5)
  walks = random_walks.draw_walks(EDGES, 10_000, np.random.RandomState(0))
  scores = [random_walks.optimality(w[0], w[1:]) for w in walks]
  assert np.mean(scores) == pytest.approx(expected, abs=4 * np.std(scores) / 100)


def test_measures_of_the_shared_model(shared):
  # 0.346 is exact for uniform steps; 0.339 +- 0.006 was measured with transformers.
  found = random_walks.measure(shared / 'models/randomwalks', samples=1_000)
  assert found['sampled'] == pytest.approx(0.346, abs=4 * found['standard_error'])
  assert found['standard_error'] == pytest.approx(0.4 / 1_000**0.5, rel=0.1)
  assert found['greedy'] == pytest.approx(0.374, abs=5e-4)

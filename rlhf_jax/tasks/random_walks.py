"""Random walks on a small graph: a policy learns to reach the goal in as few steps as possible.

This is the toy problem of Chen et al. 2021 (https://arxiv.org/abs/2106.01345), with the graph and
walks of trlX's `examples/randomwalks` (https://github.com/CarperAI/trlx), drawn from the same seed
in the same order. A walk is a string of letters, one per node. A language model is pretrained on
random walks, and RL then finds short ones: the prompt is a start node, the reward the optimality of
the walk.

Letters: N nodes.
"""

import functools

import jax
import numpy as np
import tokenizers as hf_tokenizers
import transformers

from rlhf_jax import policy as policy_lib
from rlhf_jax.data import sources

SEED = 1000
NODES = 21
EDGE_PROBABILITY = 0.1
MAX_LENGTH = 10  # nodes of a walk
GOAL = 0
LETTERS = 'abcdefghijklmnopqrstu'
EOS, PAD = '<eos>', '<pad>'

# config.json of the policy, without keys that have GPT-2's defaults.
MODEL = dict(family='gpt2', vocab_size=23, n_layer=6, n_embd=144, n_head=12)
MODEL |= dict(bos_token_id=21, eos_token_id=21, pad_token_id=22)


@functools.cache
def example():
  """Returns the graph of trlX's example, edges [N, N] bool, and its 1,000 walks."""
  rng = np.random.RandomState(SEED)
  edges = draw_edges(rng)
  return edges, draw_walks(edges, 1_000, rng)


def draw_edges(rng):
  """Draws a directed graph in which every node has a successor; the goal's is the goal itself.

  Args:
    rng: np.random.RandomState.

  Returns:
    Edges [N, N] bool, from row to column.
  """
  edges = np.zeros((NODES, NODES), bool)
  while not edges.any(axis=1).all():
    edges = rng.rand(NODES, NODES) > 1 - EDGE_PROBABILITY
    np.fill_diagonal(edges, False)
  edges[GOAL] = np.arange(NODES) == GOAL
  return edges


def draw_walks(edges, count, rng):
  """Draws walks from random starts, which end at the goal or after MAX_LENGTH nodes.

  Args:
    edges: [N, N] bool.
    count: Number of walks.
    rng: np.random.RandomState.

  Returns:
    List of texts.
  """
  successors = [np.flatnonzero(row) for row in edges]
  walks = []
  for _ in range(count):
    node = GOAL
    while node == GOAL:
      node = rng.randint(NODES)
    walk = [node]
    while node != GOAL and len(walk) < MAX_LENGTH:
      node = rng.choice(successors[node])
      walk.append(node)
    walks.append(''.join(LETTERS[node] for node in walk))
  return walks


def shortest_lengths(edges):
  """Returns {start: number of nodes of a shortest walk to the goal, at most MAX_LENGTH}."""
  lengths = np.where(np.arange(NODES) == GOAL, 1, MAX_LENGTH)
  for _ in range(MAX_LENGTH):
    lengths = np.minimum(lengths, 1 + np.where(edges, lengths, MAX_LENGTH).min(axis=1))
  return {LETTERS[node]: int(lengths[node]) for node in range(NODES) if node != GOAL}


def optimality(prompt, response):
  """Computes the optimality of a walk, (10 - length) / (10 - shortest length), in [0, 1].

  The length counts nodes up to the first goal; later nodes are ignored. A walk that uses a missing
  edge or never reaches the goal has length 10.

  Args:
    prompt: The start node, a letter from b to u.
    response: The other nodes.
  """
  edges, shortest = _rules()
  walk = prompt + response
  length = walk.find(LETTERS[GOAL]) + 1
  if not length or any(walk[i : i + 2] not in edges for i in range(length - 1)):
    length = MAX_LENGTH
  return (MAX_LENGTH - min(length, MAX_LENGTH)) / (MAX_LENGTH - shortest[prompt[0]])


@functools.cache
def _rules():
  """Returns the example's edges as pairs of letters, and its shortest lengths."""
  edges, _ = example()
  return {LETTERS[i] + LETTERS[j] for i, j in np.argwhere(edges)}, shortest_lengths(edges)


def reward(prompts, responses, *, response_tokens, metadata):
  """Returns the `optimality` of each walk; a reward function."""
  del response_tokens, metadata
  return [optimality(*walk) for walk in zip(prompts, responses, strict=True)]


def write(folder, *, walks, seed):
  """Writes the data sets and the tokenizer; only texts.jsonl depends on the arguments.

  tokenizer/        one token per letter, EOS and padding
  texts.jsonl       {"text"}: walks for pretraining, drawn on the example's graph
  walks.jsonl       {"prompt", "completion", "rating"}: the example's walks and their optimality
  best_walks.jsonl  the best fifth of these, by their optimality
  prompts.jsonl     {"prompt", "shortest"}: every start once, and its shortest length
  starts.jsonl      the same, ten times

  Args:
    folder: pathlib.Path of the output folder.
    walks: Number of walks for pretraining.
    seed: Random seed of these walks.
  """
  edges, examples = example()
  texts = draw_walks(edges, walks, np.random.RandomState(seed))
  rated = [dict(prompt=w[0], completion=w[1:], rating=optimality(w[0], w[1:])) for w in examples]
  prompts = [dict(prompt=start, shortest=n) for start, n in shortest_lengths(edges).items()]
  sources.write(folder / 'texts.jsonl', [{'text': text} for text in texts])
  sources.write(folder / 'walks.jsonl', rated)
  by_rating = sorted(rated, key=lambda walk: -walk['rating'])
  sources.write(folder / 'best_walks.jsonl', by_rating[: len(rated) // 5])
  sources.write(folder / 'prompts.jsonl', prompts)
  sources.write(folder / 'starts.jsonl', prompts * 10)
  write_tokenizer(folder / 'tokenizer')


def write_tokenizer(path):
  """Writes the tokenizer to a folder: letters are ids 0 to 20, EOS (and BOS) 21, padding 22."""
  vocabulary = {token: i for i, token in enumerate([*LETTERS, EOS, PAD])}
  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel(vocabulary, unk_token=PAD))
  one = hf_tokenizers.Regex('.')
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.Split(one, behavior='isolated')
  backend.decoder = hf_tokenizers.decoders.Fuse()
  special = dict(bos_token=EOS, eos_token=EOS, pad_token=PAD)
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
  tokenizer.save_pretrained(path)


def sampled_optimality(policy, key, samples, *, temperature=1.0):
  """Returns the mean optimality of sampled walks from all starts, and its standard error.

  Args:
    policy: TextPolicy.
    key: Random key.
    samples: Number of walks, a multiple of the 20 starts.
    temperature: Sampling temperature; 0 for greedy decoding.
  """
  starts = [letter for letter in LETTERS if letter != LETTERS[GOAL]]
  settings = dict(max_new_tokens=MAX_LENGTH - 1, temperature=temperature)
  drawn = policy.sample(starts, key, samples=samples // len(starts), **settings)
  scores = reward(drawn.prompts, drawn.responses, response_tokens=None, metadata=None)
  return float(np.mean(scores)), float(np.std(scores, ddof=1) / np.sqrt(len(scores)))


def measure(path, *, samples=5_000, seed=0):
  """Measures the optimality of a saved policy.

  Args:
    path: Folder of a model or of the run that trained it.
    samples: Number of walks, a multiple of the 20 starts.
    seed: Random seed.

  Returns:
    {'sampled': mean optimality, 'standard_error': its standard error, 'greedy': mean optimality of
    greedy decoding}.
  """
  policy = policy_lib.TextPolicy.load(path)
  sampled, error = sampled_optimality(policy, jax.random.key(seed), samples)
  greedy, _ = sampled_optimality(policy, jax.random.key(seed), NODES - 1, temperature=0.0)
  return {'sampled': sampled, 'standard_error': error, 'greedy': greedy}

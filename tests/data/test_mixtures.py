"""Mixtures: their probabilities, epochs by source, resuming, formats by source, and messages."""

import collections
import logging

import jax
import ml_collections
import numpy as np
import pytest

from rlhf_jax import identity
from rlhf_jax import sharding
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.data import formats
from rlhf_jax.data import lanes
from rlhf_jax.data import mixtures
from rlhf_jax.data import pipelines
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.formats import Completion
from rlhf_jax.data.formats import Prompt
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError
import tiny

SIZES, WEIGHTS = (7, 40, 1), (3.0, 1.0, 0.5)  # grain takes 1 ms for an example of so few


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
  """Packs few texts at a time."""
  monkeypatch.setattr(lanes, 'WINDOW_TOKENS', 0)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return tiny.write_tokenizer(tmp_path_factory.mktemp('words'))


def mixture(make=lambda source, index: Prompt(f'w{source} w{index}', {'source': source})):
  """Returns three sources with the SIZES and WEIGHTS."""
  parts = [[make(source, index) for index in range(size)] for source, size in enumerate(SIZES)]
  return mixtures.Mixture(('a', 'b', 'c'), WEIGHTS, parts)


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# The order.


def drawn(count, seed=0):
  """Returns (source, index in the source) of the first examples."""
  order = mixtures.order(mixture(), range(48), seed)
  examples = [(n, i) for n, size in enumerate(SIZES) for i in range(size)]
  return [examples[order[n]] for n in range(count)]


def test_sources_are_drawn_independently_by_their_weights():
  draws = mixtures.Draws(np.array(WEIGHTS), 0)
  found = np.array([draws[n][0] for n in range(20_000)])
  probabilities = np.array(WEIGHTS) / 4.5
  error = np.sqrt(probabilities * (1 - probabilities) / len(found))
  assert np.all(np.abs(np.bincount(found) / len(found) - probabilities) < 4 * error)
  # The source of an example says nothing about those of the next ones.
  pairs = np.zeros((3, 3))
  np.add.at(pairs, (found[:-1], found[1:]), 1 / (len(found) - 1))
  np.testing.assert_allclose(pairs, np.outer(probabilities, probabilities), atol=0.015)


def test_every_source_has_epochs_of_its_own():
  order = collections.defaultdict(list)
  for source, index in drawn(420):
    order[source].append(index)
  for source, size in enumerate(SIZES):
    epochs = [order[source][i : i + size] for i in range(0, len(order[source]) - size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len(epochs) >= 2 and (size == 1 or len(set(map(tuple, epochs))) == len(epochs))


def test_the_order_depends_on_the_position_and_the_seed_alone(monkeypatch):
  monkeypatch.setattr(mixtures, 'BLOCK', 64)
  first, order = drawn(200), mixtures.order(mixture(), range(48), 0)
  places = np.random.default_rng(0).permutation(len(first))[:100]
  starts = np.cumsum([0, *SIZES])
  for place in [len(first) - 1, *places]:  # the last one at first
    source, index = first[place]
    assert order[int(place)] == starts[source] + index
  assert drawn(50) == first[:50] != drawn(50, seed=1)


def test_a_mixture_is_the_sequence_of_its_sources():
  whole = mixture()
  listed = [example for part in whole.parts for example in part]
  assert list(whole) == listed and whole[-1] == listed[-1] and list(whole[5:9]) == listed[5:9]
  chosen = whole.take(np.array([0, 6, 7, 46, 47]))
  assert list(chosen) == [listed[i] for i in (0, 6, 7, 46, 47)]
  assert [len(part) for part in chosen.parts] == [2, 2, 1]
  with pytest.raises(IndexError):
    whole[48]


# Batches.

MAKE = {
  'prompt': lambda n, i: Prompt(f'w{n} w{i}', {}),
  'completion': lambda n, i: Completion(f'w{n}', f'w{i}'),
  'comparison': lambda n, i: Comparison(
    f'w{n}', tuple(f'w{j}' for j in range(2 + n)), range(2 + n)
  ),
  'lm': lambda n, i: f'w{n} ' * (2 + i % 9),
}
LENGTHS = {'prompt': {'max_prompt_length': 4}, 'lm': {'length': 16}}


def iterator(kind, tokenizer, **changes):
  settings = {'batch_size': 8, 'seed': 3} | LENGTHS.get(kind, {'max_length': 8}) | changes
  return getattr(pipelines, f'{kind}_iterator')(mixture(MAKE[kind]), tokenizer, **settings)


@pytest.mark.parametrize('kind', MAKE)
def test_batches_resume_and_do_not_depend_on_processes(kind, tokenizer, monkeypatch):
  whole, count = iterator(kind, tokenizer)
  assert kind == 'lm' or count == 48
  for _ in range(3):
    next(whole)
  state = whole.get_state()
  expected = [next(whole) for _ in range(4)]
  mine = np.arange(8) % 4 == 1  # one of four processes
  for local in (np.ones(8, bool), mine):
    monkeypatch.setattr(sharding, 'local_rows', lambda rows, local=local: local)
    again, _ = iterator(kind, tokenizer)
    if kind == 'lm':
      monkeypatch.setattr(lanes.processes, 'all_gather', lambda places: places[None])
    again.set_state(state)
    rows = lambda batch: jax.tree.map(lambda x, local=local: x[local], batch)
    chosen = lambda batch: rows(batch[0] if kind == 'prompt' else batch)
    assert_equal([chosen(next(again)) for _ in range(4)], [chosen(batch) for batch in expected])


def test_packed_texts_are_drawn_by_weight(tokenizer):
  batches, count = iterator('lm', tokenizer, batch_size=4)
  documents = collections.Counter()
  for _ in range(40):
    batch = next(batches)
    first = batch.positions == 1  # after the BOS
    documents.update(batch.tokens[first & (batch.segments > 0)].tolist())
  total = sum(documents.values())
  shares = [documents[4 + n] / total for n in range(3)]  # the id of wN is 4 + N
  np.testing.assert_allclose(shares, np.array(WEIGHTS) / 4.5, atol=0.05)
  # 48 documents of 1 BOS, 2 to 10 words and 1 EOS in sequences of 16 tokens.
  assert 48 * 4 / 16 <= count <= 48 * 12 / 16


def test_a_source_without_examples_is_named(tokenizer):
  long = mixture(lambda n, i: Prompt('w1 ' * (9 if n == 1 else 2), {}))
  with pytest.raises(UserError, match="source 'b' of the mixture has no example left to draw"):
    pipelines.prompt_iterator(
      long, tokenizer, batch_size=4, max_prompt_length=4, seed=0, on_long='drop'
    )


# Reading.


def sources_config(folder, **more):
  """Returns config.data with a source of JSONL and one of CSV, whose columns have other names."""
  pairs = [{'prompt': f'w{i}', 'completion': 'w1 w2'} for i in range(20)]
  tiny.write_jsonl(folder / 'a.jsonl', pairs)
  (folder / 'b.csv').write_text('id,q,a\n' + ''.join(f'{i},w{i + 10},w3\n' for i in range(20)))
  config = sft.config()
  config.model.path, config.steps, config.data.kind = 'model', 1, 'completion'
  config.data.mixture = {
    'web': {'path': str(folder / 'a.jsonl'), 'weight': 3.0},
    'faq': {'path': str(folder / 'b.csv'), 'columns': 'prompt=q,completion=a'},
  }
  config.update_from_flattened_dict(more)
  return config


def test_sources_have_formats_of_their_own(tmp_path, tokenizer, caplog):
  config = sources_config(tmp_path)
  sft.config_lib.validate(config, 1)
  with caplog.at_level(logging.INFO):
    examples = setup.read_examples(config.data, formats.completions, tokenizer)
  assert list(examples) == [Completion(f'w{i + 10}', 'w3') for i in range(20)] + [
    Completion(f'w{i}', 'w1 w2') for i in range(20)
  ]
  inputs = {'data.mixture.faq.path', 'data.mixture.web.path'}
  assert inputs < identity.input_keys(config.to_dict()).keys()  # a changed file is noticed
  assert examples.names == ['faq', 'web'] and examples.weights.tolist() == [1.0, 3.0]
  lines = [line for line in caplog.messages if line.startswith('source ')]
  assert lines == [
    f'source faq of the mixture: 20 examples of {tmp_path}/b.csv, 25 % of those drawn',
    f'source web of the mixture: 20 examples of {tmp_path}/a.jsonl, 75 % of those drawn',
  ]


def test_no_held_out_prompt_is_in_any_source(tmp_path, tokenizer):
  config = sources_config(tmp_path, **{'data.held_out': 0.3})
  train, held_out = setup.hold_out(config, formats.completions, tokenizer)
  assert 0 < len(held_out) <= 12 and len(train) + len(held_out) == 40
  assert not {e.prompt for e in train} & {e.prompt for e in held_out}
  assert min(map(len, train.parts)) > 0  # w10 to w19 are prompts of both sources
  assert {e.prompt for e in held_out.parts[0]} & {e.prompt for e in held_out.parts[1]}


def test_messages_name_source_file_and_line(tmp_path, tokenizer):
  config = sources_config(tmp_path)
  (tmp_path / 'b.csv').write_text('q,a\nw1,w2\n"w\n3",w4\nw5\n')
  with pytest.raises(
    DataError, match=rf"source 'faq' of the mixture: {tmp_path}/b\.csv:5: .*1 cell"
  ):
    setup.read_examples(config.data, formats.completions, tokenizer)
  config.data.mixture.faq.path = str(tmp_path / 'c.csv')
  with pytest.raises(UserError, match=rf"source 'faq' of the mixture: {tmp_path}/c\.csv: no such"):
    setup.read_examples(config.data, formats.completions, tokenizer)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'path': 'a.jsonl'}, "config.data.path='a.jsonl' and config.data.mixture has faq, web: set"),
    (
      {'mixture': {}},
      'config.data.path is empty: name a file.* or name several in config.data.mix',
    ),
    ({'mixture': {'a': 'b.jsonl'}}, "config.data.mixture.a='b.jsonl' must be a dict, such as"),
    ({'mixture': {'a': {'weight': 1.0}}}, 'config.data.mixture.a.path is empty'),
    ({'mixture.web.weight': 0.0}, 'config.data.mixture.web.weight=0.0 must be positive'),
    ({'mixture.web': {'path': 'a', 'weight': '2'}}, "web.weight='2' must be a finite number"),
    ({'mixture.web.kind': 'text'}, "config.data.mixture.web has no key 'kind'"),
    ({'mixture.faq.columns': 'q'}, "config.data.mixture.faq.columns='q' must have the form"),
    ({'mixture.faq.format': 'xls'}, "config.data.mixture.faq.format='xls' must be one of"),
  ],
)
def test_mistakes_in_a_mixture_are_named(changes, message, tmp_path):
  config = sources_config(tmp_path)
  for key, value in changes.items():
    *blocks, name = key.split('.')
    block = config.data
    for part in blocks:
      block = block[part]
    value = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    with config.unlocked():
      block[name] = value
  with pytest.raises(UserError, match=message):
    sft.config_lib.validate(config, 1)

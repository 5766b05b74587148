"""Examples that are read and tokenized during training equal those kept in memory."""

import json
import logging
import os
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
import quick

from rlhf_jax import sharding
from rlhf_jax.data import formats
from rlhf_jax.data import lanes
from rlhf_jax.data import packing
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import stored
from rlhf_jax.data import tokenized
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError
import tiny

CONVERT = {
  'completion': formats.completions,
  'pairs': formats.completions,
  'comparison': formats.comparisons,
  'prompt': formats.prompts,
  'text': formats.texts,
}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return tiny.write_tokenizer(tmp_path_factory.mktemp('words'))


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """Returns a file of 90 comparisons, of which every ninth is unusable."""
  records = [
    {
      'prompt': tiny.text(i, 1 + i % 4),
      'chosen': tiny.text(i, 2 + i % 5) if i % 9 else ' ',
      'rejected': tiny.text(3 * i + 1, 3),
      'margin': i,
    }
    for i in range(90)
  ]
  return str(tiny.write_jsonl(tmp_path_factory.mktemp('data') / 'a.jsonl', records))


def set_large(monkeypatch):
  """Makes all data count as larger than the memory limits."""
  for module, name in (
    (stored, 'SMALL'),
    (formats, 'SMALL'),
    (tokenized, 'MAX_IN_MEMORY'),
    (pipelines, 'MAX_IN_MEMORY'),
  ):
    monkeypatch.setattr(module, name, 0)
  monkeypatch.setattr(tokenized, 'SAMPLE_TOKENS', 200)
  monkeypatch.setattr(tokenized, 'SAMPLE_SIZE', 16)
  monkeypatch.setattr(tokenized, 'CHUNK', 8)


def make(kind, path, tokenizer, what='iterator', **changes):
  examples, _ = CONVERT[kind](sources.read(path))
  sizes = {'prompt': {'max_prompt_length': 8}, 'text': {'length': 16}}.get(kind, {'max_length': 16})
  sizes |= {'seed': 3} if what == 'iterator' else {}
  sizes |= {'pairs': True} if kind == 'pairs' else {}
  function = getattr(pipelines, f'{dict(text="lm", pairs="completion").get(kind, kind)}_{what}')
  return function(examples, tokenizer, **{'batch_size': 8} | sizes | changes)


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('kind', ['completion', 'pairs', 'comparison', 'prompt'])
def test_batches_drawn_from_disk_are_those_of_memory(kind, path, tokenizer, monkeypatch):
  iterator, count = make(kind, path, tokenizer)
  expected, whole = [next(iterator) for _ in range(25)], make(kind, path, tokenizer, 'batches')
  assert isinstance(whole, list)
  set_large(monkeypatch)
  streamed, streamed_count = make(kind, path, tokenizer)
  assert streamed_count == count == (90 if kind == 'prompt' else 80)
  assert_equal([next(streamed) for _ in range(25)], expected)  # more than two epochs
  again, _ = make(kind, path, tokenizer)
  again.set_state({'next_index': 20})
  assert_equal([next(again) for _ in range(5)], expected[20:])
  batches = make(kind, path, tokenizer, 'batches')
  for _ in range(2):
    assert_equal(list(batches), whole)


def test_examples_are_not_kept_after_use(path, tokenizer, monkeypatch):
  set_large(monkeypatch)
  examples, _ = formats.completions(sources.read(path))
  assert tokenized.completions(examples, tokenizer, max_length=16).all is None
  train, held_out = pipelines.split(examples, holdout=0.25, seed=0)
  assert len(held_out) == 20 and sorted(map(str, [*train, *held_out])) == sorted(map(str, examples))
  assert not isinstance(train, list) and not isinstance(held_out, list)
  listed = pipelines.split(list(examples), holdout=0.25, seed=0)
  assert (list(train), list(held_out)) == listed


def test_memory_does_not_grow_with_the_data(tokenizer, tmp_path, monkeypatch):
  """The peak memory of Python and NumPy for 20 batches, with 1.3 and with 13 MB of data."""
  set_large(monkeypatch)
  monkeypatch.setattr(stored, 'CHUNK', 2**16)
  peaks = {1000: [], 10_000: []}
  # The first pass fills modules and caches. The overlap of threads changes a peak by a third.
  for count in (1000, 1000, 10_000) * 3:
    path = str(
      tiny.write_jsonl(
        tmp_path / f'{count}.jsonl',
        [{'prompt': 'w1 ' * 100, 'completion': 'w2 ' * 330, 'number': i} for i in range(count)],
      )
    )
    tracemalloc.start()
    iterator, found = make('completion', path, tokenizer, max_length=512)
    for _ in range(20):  # the background has reached its maximum number of batches
      next(iterator)
    peaks[count].append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert found == count
    iterator.close()
  assert os.path.getsize(path) > 13e6
  assert min(peaks[10_000]) < 1.2 * np.median(peaks[1000]) < 1e6, peaks


def test_messages_about_a_sample(path, tokenizer, monkeypatch, caplog):
  set_large(monkeypatch)
  with caplog.at_level(logging.WARNING):
    make('completion', path, tokenizer, max_length=4)
  (line,) = [message for message in caplog.messages if 'lost' in message]
  assert line.startswith('of a sample of 16 examples, ')


@pytest.mark.parametrize(
  'on_long, complaint',
  [
    ('error', r'prompt 3 \(.*a\.jsonl:4\) has 5 tokens, more than'),
    ('drop', ''),
    ('truncate_left', ''),
  ],
)
def test_long_prompts_of_large_data(on_long, complaint, path, tokenizer, monkeypatch):
  settings = {'max_prompt_length': 4, 'on_long': on_long}
  if not complaint:
    expected = make('prompt', path, tokenizer, 'batches', **settings)
  set_large(monkeypatch)
  if complaint:
    with pytest.raises(UserError, match=complaint):
      make('prompt', path, tokenizer, **settings)
  else:
    assert_equal(list(make('prompt', path, tokenizer, 'batches', **settings)), expected)
    _, count = make('prompt', path, tokenizer, **settings)
    assert count == (90 if on_long == 'truncate_left' else 68)


def test_templates_reject_examples_during_training(tokenizer, tmp_path, monkeypatch, caplog):
  """Only the first conversations of large data are rendered before the first batch."""
  turns = lambda *roles: {
    'messages': [{'role': role, 'content': f'w{n}'} for n, role in enumerate(roles)]
  }
  good, bad = turns('user', 'assistant'), turns('user', 'user', 'assistant')
  path = str(
    tiny.write_jsonl(
      tmp_path / 'a.jsonl', [good, good, bad, turns('user', 'assistant', 'user', 'assistant')]
    )
  )
  tokenizer.save_pretrained(tmp_path / 'words')
  chatty = tokenizers.load(str(tmp_path / 'words'))
  chatty.chat_template = (
    "{% for m in messages %}{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    '{% if add_generation_prompt %}assistant {% endif %}'
  )
  set_large(monkeypatch)
  with pytest.raises(DataError, match=r'a\.jsonl:3: .*roles must alternate'):
    formats.completions(sources.read(path), tokenizer=chatty)
  monkeypatch.setattr(formats, 'MAX_RENDERED', 2)
  examples, _ = formats.completions(sources.read(path), tokenizer=chatty)
  assert len(examples) == 4 and examples[0].prompt == 'user w0 assistant '
  with pytest.raises(DataError, match=r'a\.jsonl:3: .*roles must alternate'):
    examples[2]
  examples, _ = formats.completions(sources.read(path), tokenizer=chatty, on_error='skip')
  assert (
    examples[2] == examples[3] and examples[-1].prompt == 'user w0 assistant w1 user w2 assistant '
  )
  assert [
    m
    for m in caplog.messages
    if 'a.jsonl:3' in m and m.endswith('The next record is used instead.')
  ]


# Packing.


def documents_of(batches):
  """Returns the documents of packed batches as tuples of ids."""
  return [
    tuple(batch.tokens[row][batch.segments[row] == segment].tolist())
    for batch in batches
    for row in range(len(batch.tokens))
    for segment in range(1, batch.segments[row].max() + 1)
  ]


def test_lanes_hold_every_document_once_an_epoch(tokenizer, tmp_path, monkeypatch):
  """60 texts in batches of 4 rows of 16 tokens, until each lane has read several epochs."""
  path = str(
    tiny.write_jsonl(
      tmp_path / 'a.jsonl', [{'text': f'w{i} ' + tiny.text(i, i % 9)} for i in range(60)]
    )
  )
  whole = [
    tuple(ids.tolist())
    for ids in map(
      lambda row: row.prompt, tokenized.texts(formats.texts(sources.read(path))[0], tokenizer).all
    )
  ]
  set_large(monkeypatch)
  monkeypatch.setattr(lanes, 'WINDOW_TOKENS', 0)  # windows of MIN_WINDOW sequences
  iterator, count = make('text', path, tokenizer, batch_size=4)
  tokens = sum(map(len, whole))
  assert tokens / 16 <= count <= 1.4 * tokens / 16
  batches = [next(iterator) for _ in range(12 * count // 4)]
  found = documents_of(batches)
  assert set(found) == set(whole)
  # 12 epochs by the estimate of the sample. A lane may be ahead of another by a part of a window.
  counts = np.array([found.count(document) for document in whole])
  assert counts.max() - counts.min() <= 2 and abs(counts.mean() - 12) < 1.5, counts
  fill = np.mean([batch.segments > 0 for batch in batches])
  kept = packing.pack([np.array(document) for document in whole], length=16, pad_id=0)
  assert fill > np.mean(kept.segments > 0) - 0.09


def test_a_lane_reads_its_own_documents_in_order(tokenizer):
  """By hand: lane 1 of 3 reads documents 1, 4, 7, ..., as many as fill two rows of 4 tokens."""
  read = lambda numbers: [np.full(2, number, np.int32) for number in numbers]
  lane = lanes.Lane(read, 1, 3, length=4, window=2, mean=2.0, seed=0)
  rows_found = [[int(piece[0]) for piece in lane.next_sequence()] for _ in range(4)]
  assert sorted(rows_found[:2]) == [[1, 4], [7, 10]] and sorted(rows_found[2:]) == [
    [13, 16],
    [19, 22],
  ]
  assert lane.place == (4, 2)
  lane.place = (0, 1)
  assert [[int(piece[0]) for piece in lane.next_sequence()] for _ in range(3)] == rows_found[1:]


@pytest.mark.parametrize('steps', [0, 1, 7, 30])
def test_lanes_resume_at_the_exact_row(steps, path, tokenizer, monkeypatch):
  set_large(monkeypatch)
  monkeypatch.setattr(lanes, 'WINDOW_TOKENS', 0)
  iterator, _ = make('text', path, tokenizer)
  for _ in range(steps):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(6)]
  again, _ = make('text', path, tokenizer)
  again.set_state(state)
  assert_equal([next(again) for _ in range(6)], expected)
  iterator.set_state(state)  # also backwards
  assert_equal([next(iterator) for _ in range(6)], expected)
  other, _ = make('text', path, tokenizer, batch_size=4)
  with pytest.raises(UserError, match='batch_size of 8, but the config has 4: set config.batch_s'):
    other.set_state(state)


def test_a_lane_resumes_if_its_window_has_become_smaller(path, tokenizer, monkeypatch):
  set_large(monkeypatch)
  monkeypatch.setattr(lanes, 'WINDOW_TOKENS', 0)
  iterator, _ = make('text', path, tokenizer)
  state = iterator.get_state()
  again, _ = make('text', path, tokenizer)
  again.set_state({'places': [[0, 10**6] for _ in state['places']]})
  assert next(again).loss_mask.any()


def test_held_out_texts_are_all_there(path, tokenizer, monkeypatch):
  counted = lambda batches: [
    jax.tree.map(lambda array: array[valid], batch) for batch, valid in batches
  ]
  expected = sorted(documents_of(counted(make('text', path, tokenizer, 'batches', batch_size=3))))
  set_large(monkeypatch)
  monkeypatch.setattr(pipelines, 'PACKED_BATCHES', 2)
  batches = make('text', path, tokenizer, 'batches', batch_size=3)
  found = list(batches)
  assert sorted(documents_of(counted(found))) == expected and {
    len(batch.tokens) for batch, _ in found
  } == {3}
  assert not found[-1][0].loss_mask[~found[-1][1]].any()


# Several processes.


def test_local_rows():
  """With one process all rows are local, with any mesh and number of rows."""
  assert sharding.local_rows(5).all()
  with jax.set_mesh(sharding.make_mesh({'data': 4, 'fsdp': 2})):
    assert sharding.local_rows(16).all() and sharding.local_rows(5).all()


WORKER = """
import json, os, sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from rlhf_jax import processes, sharding
from rlhf_jax.data import tokenizers
import test_streaming
class Patch:
  def setattr(self, module, name, value):
    setattr(module, name, value)
test_streaming.set_large(Patch())
tokenizer, path, folder = tokenizers.load(sys.argv[4]), sys.argv[5], sys.argv[6]
mesh = sharding.make_mesh({'data': 4})
with jax.set_mesh(mesh):
  held = sharding.local_rows(8)
  for kind in ('text', 'completion', 'prompt'):
    read = []
    record = test_streaming.stored.Lines.record
    iterator, _ = test_streaming.make(kind, path, tokenizer)
    test_streaming.stored.Lines.record = lambda self, i: read.append(i) or record(self, i)
    state = f'{folder}/{kind}.json'
    if os.path.exists(state):
      iterator.set_state(json.load(open(state)))
    batches = []
    for _ in range(5):
      batch = next(iterator)
      batch = batch[0] if kind == 'prompt' else batch
      # As the train step receives it: all rows, gathered from all shards.
      leaves = jax.tree.leaves(sharding.put_rows(batch, mesh))
      batches.append([processes.to_host(array) for array in leaves])
    test_streaming.stored.Lines.record = record
    place = iterator.get_state()
    if jax.process_index() == 0:
      json.dump(place, open(state, 'w'))
      number = len([n for n in os.listdir(folder) if n.startswith(f'{kind}-')])
      name = f'{folder}/{kind}-{number}.npz'
      np.savez(name, *[np.stack(leaves) for leaves in zip(*batches)])
    print(kind, int(held.sum()), len(set(read)), flush=True)
    processes.barrier()
"""


def run_workers(count, devices, port, tokenizer_path, path, folder):
  """Each worker draws five batches of each kind and saves them with the iterators' states."""
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.pathsep.join([os.path.dirname(root), root, os.path.join(root, 'data')]),
    'XLA_FLAGS': f'{quick.FLAGS} --xla_force_host_platform_device_count={devices}',
  }
  workers = [
    subprocess.Popen(
      [
        sys.executable,
        '-c',
        WORKER,
        f'localhost:{port}',
        str(count),
        str(number),
        tokenizer_path,
        path,
        str(folder),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(count)
  ]
  outputs = [worker.communicate(timeout=300) for worker in workers]
  assert all(worker.returncode == 0 for worker in workers), [error[-2000:] for _, error in outputs]
  return [
    [line.split() for line in output.splitlines() if line.split()[:1][0] in CONVERT]
    for output, _ in outputs
  ]


def test_a_process_reads_and_makes_its_own_rows(path, tokenizer, monkeypatch):
  """Four processes each make a quarter of the rows; together these are the batches."""
  set_large(monkeypatch)
  for kind in ('completion', 'prompt', 'text'):
    whole = [next(iterator) for iterator in [make(kind, path, tokenizer)[0]] for _ in range(6)]
    drawn, record = [], formats.lazy.Examples.record
    for quarter in range(4):
      mine = np.arange(8) // 2 == quarter
      monkeypatch.setattr(sharding, 'local_rows', lambda rows: mine)
      iterator, _ = make(kind, path, tokenizer)
      seen = []
      monkeypatch.setattr(
        formats.lazy.Examples,
        'record',
        lambda self, index: seen.append(index) or record(self, index),
      )
      found = [next(iterator) for _ in range(6)]
      iterator.close()
      monkeypatch.setattr(formats.lazy.Examples, 'record', record)
      drawn.append(len(seen))
      if kind == 'prompt':
        assert_equal([indices for _, indices in found], [indices for _, indices in whole])
        found = [batch for batch, _ in found]
      expected = [batch for batch, _ in whole] if kind == 'prompt' else whole
      rows_of = lambda batches: [
        jax.tree.map(lambda array: array[mine], batch) for batch in batches
      ]
      assert_equal(rows_of(found), rows_of(expected))
    if kind != 'text':  # plus up to four batches made ahead of time; windows of texts have more
      assert all(12 <= count <= 2 * 11 for count in drawn), drawn
    monkeypatch.undo()
    set_large(monkeypatch)


@pytest.mark.slow
def test_four_processes_read_a_quarter_each_and_two_resume(tokenizer, path, tmp_path):
  """Four processes read the batches of one process bit for bit; two resume at the same batch."""
  import socket

  ports = []
  for _ in range(2):
    with socket.socket() as probe:
      probe.bind(('localhost', 0))
      ports.append(probe.getsockname()[1])
  folder = tmp_path / 'states'
  folder.mkdir()
  tokenizer.save_pretrained(tmp_path / 'words')
  with pytest.MonkeyPatch.context() as monkeypatch:
    set_large(monkeypatch)
    iterators = {kind: make(kind, path, tokenizer)[0] for kind in ('text', 'completion', 'prompt')}
    expected = {kind: [next(iterator) for _ in range(10)] for kind, iterator in iterators.items()}
  said = run_workers(4, 1, ports[0], str(tmp_path / 'words'), path, folder)
  for lines in said:
    assert [(kind, held) for kind, held, _ in lines] == [
      ('text', '2'),
      ('completion', '2'),
      ('prompt', '2'),
    ]
  run_workers(2, 2, ports[1], str(tmp_path / 'words'), path, folder)
  for kind, batches in expected.items():
    batches = [batch[0] for batch in batches] if kind == 'prompt' else batches
    for part in range(2):
      found = np.load(folder / f'{kind}-{part}.npz')
      leaves = [
        np.stack(arrays) for arrays in zip(*map(jax.tree.leaves, batches[5 * part : 5 * part + 5]))
      ]
      assert_equal([found[name] for name in found.files], leaves)

"""The sampler on meshes gives the tokens of the plain loop on one device."""

import re

import devices
import jax
from loops import family
from loops import plain
from loops import prompts
from loops import same
from loops import sampling
import numpy as np
import pytest

from planner import hlo
from rlhf_jax import errors
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.models import attention
from rlhf_jax.rollout import sampler


def on_mesh(shape, model, params, prompts, key, settings, count=8, **options):
  """Returns a rollout on some of the eight devices, and the text of its program."""
  mesh = sharding.make_mesh(shape, devices=devices.first(count))
  with jax.set_mesh(mesh):
    operands = (
      jax.device_put(params, sharding.shardings(params, model.rules, mesh)),
      sharding.put_rows(prompts, mesh),
      key,
    )
    generate = sampler.make(model, settings, **options)
    return jax.device_get(generate(*operands)), generate.lower(*operands).compile().as_text()


@pytest.mark.parametrize('samples', [1, 3])
@pytest.mark.parametrize(
  'shape, count',
  [({'data': 1}, 1), ({'data': 4}, 4), ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8)],
  ids=str,
)
def test_tokens_do_not_depend_on_shards_nor_on_how_they_are_decoded(shape, count, samples):
  """Against all prompts repeated on one device without a mesh."""
  model, params = family('llama')
  settings = sampling(20, temperature=1.3, min_new_tokens=2, stop_tokens=(7,))
  repeated = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), prompts(8))
  expected = plain(params, repeated, jax.random.key(6), model, settings)
  lengths = np.asarray(expected.response_mask).sum(1)
  assert (
    lengths.min() < 5
    and lengths.max() > 15
    and len(np.unique(expected.tokens, axis=0)) == 8 * samples
  )
  for options in (
    ({}, {'max_concurrent': 8}, {'gather': True}) if count == 8 else ({}, {'max_concurrent': 8})
  ):
    found, _ = on_mesh(
      shape,
      model,
      params,
      prompts(8),
      jax.random.key(6),
      settings,
      count,
      samples=samples,
      **options,
    )
    same(found, expected)


def collectives_in_loops(text):
  """Returns (kind, groups) of the collectives inside the loops of a compiled program."""
  computations, entry = hlo.parse(text)
  found, seen = set(), set()

  def visit(name, looping):
    if (name, looping) in seen:
      return
    seen.add((name, looping))
    for instruction in computations[name]:
      kind = instruction.opcode.removesuffix('-start')
      if looping and kind in hlo.COLLECTIVES:
        found.add(
          (
            kind,
            re.search(
              r'(?:replica_groups|source_target_pairs)=(.*?), \w+=', instruction.attributes
            ).group(1),
          )
        )
      for called in set(re.findall(r'%([\w.-]+)', instruction.attributes)) & set(computations):
        visit(called, looping or instruction.opcode == 'while')

  visit(entry, False)
  return found


@pytest.mark.parametrize(
  'name, shape',
  [
    ('llama', {'data': 8}),
    ('llama', {'data': 2, 'fsdp': 4}),
    ('llama', {'data': 2, 'fsdp': 2, 'tensor': 2}),
    ('gpt2', {'data': 2, 'tensor': 4}),
    *(
      pytest.param(name, {'fsdp': 4, 'tensor': 2}, marks=pytest.mark.slow)
      for name in ('gemma2', 'mistral')
    ),
  ],
  ids=str,
)
def test_data_shards_have_separate_queues_and_do_not_wait(name, shape):
  model, params = family(name)
  settings = sampling(72, temperature=1.3)
  found, text = on_mesh(
    shape, model, params, prompts(32), jax.random.key(1), settings, max_concurrent=16
  )
  expected = plain(params, prompts(32), jax.random.key(1), model, settings)
  same(found, expected)
  lengths = np.asarray(expected.response_mask).sum(1)
  assert (
    len(set(lengths.reshape(8 // shape.get('tensor', 1), -1).sum(1))) > 1
  )  # data shards have different numbers of steps
  # The devices of a data shard are adjacent.
  groups = {2: '[4,2]<=[8]', 4: '[2,4]<=[8]'}.get(shape.get('tensor'))
  assert collectives_in_loops(text) <= (
    {('all-gather', groups), ('all-reduce', groups)} if groups else set()
  )
  assert 'while(' in text and ('all-gather' in text) == ('fsdp' in shape)


def test_data_shards_and_attention_in_blocks(monkeypatch):
  """Attention splits heads over 'tensor' by a `shard_map` inside that of the data shards."""
  monkeypatch.setitem(attention.BLOCK_SIZE, sharding.platform(), 4)
  calls = []
  monkeypatch.setattr(
    attention, 'blocks', lambda *x, plain=attention.blocks, **y: calls.append(x) or plain(*x, **y)
  )
  model, params = family('llama')
  given = prompts(8, width=17)
  expected = plain(params, given, jax.random.key(1), model, sampling(9))
  calls.clear()
  for shape, heads in (({'data': 2, 'fsdp': 2, 'tensor': 2}, 2), ({'fsdp': 8}, 4)):
    found, _ = on_mesh(
      shape, model, params, given, jax.random.key(1), sampling(9), max_concurrent=8
    )
    same(found, expected)
    assert {queries.shape[2] for queries, *_ in calls} == {heads}
    calls.clear()


@pytest.mark.parametrize(
  'shape, max_concurrent, message',
  [
    (
      {'data': 2, 'tensor': 4},
      4,
      'on 2 data shards: the 4 attention heads and 2 of keys and values must',
    ),
    ({'data': 4, 'tensor': 2}, 6, 'max_concurrent=6 does not divide over the 4 data shards'),
  ],
  ids=str,
)
def test_unsupported_meshes_are_refused_when_the_sampler_is_created(shape, max_concurrent, message):
  model, params = family('llama')
  mesh = sharding.make_mesh(shape, devices=devices.first(8))
  with jax.set_mesh(mesh), pytest.raises(errors.UserError, match=message):
    sampler.make(model, sampling(9), max_concurrent=max_concurrent)
  generate = sampler.make(model, sampling(9), max_concurrent=max_concurrent)  # there is no mesh yet
  with jax.set_mesh(mesh), pytest.raises(errors.UserError, match=message):
    generate(params, prompts(8), jax.random.key(1))


def test_tensor_parts_are_refused_if_loops_cannot_contain_collectives(monkeypatch):
  monkeypatch.setattr(processes, 'must_unroll', lambda: True)
  with jax.set_mesh(sharding.make_mesh({'data': 4, 'tensor': 2}, devices=devices.first(8))):
    sampler.make(family('llama')[0], sampling(9))
    with pytest.raises(
      errors.UserError, match='max_concurrent=4 with 2 parts of config.mesh.tensor: loops of'
    ):
      sampler.make(family('llama')[0], sampling(9), max_concurrent=4)

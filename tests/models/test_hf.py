"""Folders of weights: mismatches are named; saved models are read again, sharded or not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import gpt2
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import hf_arrays
from rlhf_jax.models import llama
from rlhf_jax.models import naming

GPT2 = {
  'family': 'gpt2',
  'vocab_size': 30,
  'n_positions': 16,
  'n_embd': 8,
  'n_layer': 2,
  'n_head': 2,
}
LLAMA = {
  'family': 'llama',
  'vocab_size': 32,
  'hidden_size': 8,
  'intermediate_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}


def build(fields):
  model = models.create(fields)
  params = model.init(jax.random.key(0))
  noise = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda leaf: leaf + noise.normal(size=leaf.shape).astype(np.float32), params
  )


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(params=[GPT2, LLAMA], ids=['gpt2', 'llama'])
def saved(request, tmp_path):
  model, params = build(request.param)
  hf.save(tmp_path / 'model', model, params)
  return tmp_path / 'model', model, params


def rewrite(folder, change):
  """Applies `change` to the dict of tensors in a folder's single file."""
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def test_missing_extra_and_misshapen_tensors_are_all_named(saved):
  folder, model, _ = saved
  names = sorted(safetensors.numpy.load_file(folder / 'model.safetensors'))
  norm = next(
    name for name in names if name.endswith('norm.weight') or name.endswith('ln_f.weight')
  )
  layer = next(name for name in names if '.1.' in name)

  def change(tensors):
    del tensors[norm]
    tensors[layer] = np.zeros((3, 5), np.float32)
    tensors['adapter.weight'] = np.zeros(1, np.float32)

  rewrite(folder, change)
  with pytest.raises(UserError) as error:
    hf.load(folder)
  message = str(error.value)
  assert str(folder) in message and 'adapter.weight' in message and '(3, 5)' in message
  for name in (norm, layer):
    assert name.split('.', 1)[1] in message


@pytest.mark.parametrize('fields,drop', [(GPT2, 'transformer.'), (LLAMA, 'model.')])
def test_bare_and_old_files_are_read(fields, drop, tmp_path):
  """Files without a prefix, and with buffers that older versions stored."""
  model, params = build(fields | {'tie_word_embeddings': True})
  hf.save(tmp_path, model, params)

  def change(tensors):
    for name in list(tensors):
      tensors[name.removeprefix(drop)] = tensors.pop(name)
    if drop == 'transformer.':
      tensors['h.0.attn.bias'] = np.ones((1, 1, 16, 16), np.float32)
      tensors['h.1.attn.masked_bias'] = np.array(-1e4, np.float32)
    else:
      tensors['layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(1, np.float32)
    tensors['lm_head.weight'] = np.asarray(params['embed']['embedding'])

  rewrite(tmp_path, change)
  assert_same(hf.load(tmp_path)[1], params)


def test_bad_folders_are_explained(saved, tmp_path):
  folder, _, _ = saved
  with pytest.raises(UserError, match='no-such-folder'):
    hf.load(tmp_path / 'no-such-folder')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {'mystery': 3}))
  with pytest.raises(UserError, match='config.json.*mystery=3'):
    hf.load(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(UserError, match='not JSON'):
    hf.load(folder)
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'model.safetensors').write_bytes(b'not a tensor')
  with pytest.raises(UserError, match='cannot be read'):
    hf.load(folder)
  (folder / 'model.safetensors').unlink()
  with pytest.raises(UserError, match='to safetensors first'):
    hf.load(folder)


@pytest.mark.parametrize('bias', [0.0, -1.25])
def test_reward_model_round_trip(saved, tmp_path, bias):
  _, model, params = saved
  head = heads.init_scalar(jax.random.key(1), model.width, scale='normal') | {
    'bias': jnp.float32(bias)
  }
  hf.save(tmp_path / 'reward', model, params, head=head)
  again, found = hf.load_reward(tmp_path / 'reward')
  assert again == model
  assert_same(
    found,
    {
      'backbone': {name: value for name, value in params.items() if name != 'unembed'},
      'head': head,
    },
  )
  stored = safetensors.numpy.load_file(tmp_path / 'reward' / 'model.safetensors')
  assert stored['score.weight'].shape == (1, model.width)
  assert ('score.bias' in stored) == (bias != 0)
  with pytest.raises(UserError, match='reward model, not a language model'):
    hf.load(tmp_path / 'reward')
  with pytest.raises(UserError, match='no score.weight'):
    hf.load_reward(saved[0])
  rewrite(
    tmp_path / 'reward',
    lambda tensors: tensors.update({'score.weight': np.zeros((2, model.width), np.float32)}),
  )
  with pytest.raises(UserError, match='one label'):
    hf.load_reward(tmp_path / 'reward')


@pytest.mark.parametrize('bias', [0.0, 0.5])
def test_several_heads_round_trip(saved, tmp_path, bias):
  """transformers has one label for each head."""
  _, model, params = saved
  kernel = np.random.default_rng(0).normal(size=(model.width, 3)).astype(np.float32)
  head = {'kernel': kernel, 'bias': np.array([bias, 0.0, -bias], np.float32)}
  hf.save(tmp_path / 'reward', model, params, head=head)
  assert_same(hf.load_reward(tmp_path / 'reward')[1]['head'], head)
  stored = safetensors.numpy.load_file(tmp_path / 'reward' / 'model.safetensors')
  np.testing.assert_array_equal(stored['score.weight'], kernel.T)
  assert ('score.bias' in stored) == (bias != 0)
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'reward')
  assert config.num_labels == 3 and config.id2label == {i: f'reward_{i}' for i in range(3)}
  # Labels of any other classifier are not heads.
  path = tmp_path / 'reward' / 'config.json'
  path.write_text(path.read_text().replace('reward_', 'mood_'))
  with pytest.raises(UserError, match='one label'):
    hf.load_reward(tmp_path / 'reward')


def test_sharded_files_onto_a_mesh_and_back(saved, tmp_path):
  """Reads parameters from several files directly into shards on 8 devices, and saves them."""
  folder, model, params = saved
  hf.save(tmp_path / 'many', model, params, max_shard_bytes=1000)
  index = json.loads((tmp_path / 'many' / 'model.safetensors.index.json').read_text())
  assert len(set(index['weight_map'].values())) > 2
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  _, sharded = hf.load(tmp_path / 'many', mesh=mesh)
  assert_same(sharded, params)
  up = sharded['blocks']['mlp']['up']['kernel']
  assert up.sharding.shard_shape(up.shape) == (2, up.shape[1] // 2, up.shape[2] // 2)
  hf.save(tmp_path / 'again', model, sharded)
  assert_same(hf.load(tmp_path / 'again')[1], params)


@pytest.mark.parametrize(
  'shape', [None, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=['one device', 'eight']
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_layer_at_a_time_is_the_same_as_all_at_once(shape, dtype, saved, tmp_path, monkeypatch):
  """Reads and saves stacks that are too large to pass through the host at once."""
  folder, model, _ = saved
  mesh = sharding.make_mesh(shape) if shape else None
  _, params = hf.load(folder, mesh=mesh, param_dtype=dtype)
  monkeypatch.setattr(hf_arrays, 'STEP_BYTES', 1)
  _, found = hf.load(folder, mesh=mesh, param_dtype=dtype)
  assert_same(found, params)
  assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), found) == jax.tree.map(
    lambda leaf: (leaf.dtype, leaf.sharding), params
  )
  hf.save(tmp_path / 'again', model, found)
  assert_same(hf.load(tmp_path / 'again', param_dtype=dtype)[1], params)


@pytest.mark.parametrize(
  'columns',
  [
    naming.concatenated(8, 8, 8),
    naming.concatenated(8, 8, 8)[::-1],
    naming.interleaved(3, 4),
    naming.interleaved(3, 1),
    [naming.Columns(16), *naming.interleaved(2, 2)],
  ],
)
@pytest.mark.parametrize('shape', [None, {'fsdp': 2, 'tensor': 4}], ids=['one device', 'eight'])
def test_fused_tensors_of_any_order(columns, shape, tmp_path, monkeypatch):
  """Query, key, value in one [out, in] tensor: j is at offset + j // block * stride + j % block."""
  names = ('query', 'key', 'value')

  def sources(config):
    found = {
      path: source
      for path, source in own(config).items()
      if not any(name in path for name in names)
    }
    for name, which in zip(names, columns):
      found |= naming.torch_linear(
        f'blocks/attention/{name}', 'h.{layer}.qkv', bias=True, columns=which
      )
    return found

  own = gpt2.sources
  monkeypatch.setattr(gpt2, 'sources', sources)
  model, params = build(GPT2)
  hf.save(tmp_path, model, params)
  stored = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  for name, which in zip(names, columns):
    there = [
      which.offset + j // (which.block or 8) * which.stride + j % (which.block or 8)
      for j in range(8)
    ]
    ours = params['blocks']['attention'][name]
    np.testing.assert_array_equal(stored['transformer.h.1.qkv.weight'][there], ours['kernel'][1].T)
    np.testing.assert_array_equal(stored['transformer.h.1.qkv.bias'][there], ours['bias'][1])
  assert stored['transformer.h.1.qkv.weight'].shape == (24, 8)
  assert_same(hf.load(tmp_path, mesh=sharding.make_mesh(shape) if shape else None)[1], params)


def test_widths_of_fused_parameters_add_up(tmp_path, monkeypatch):
  """Grouped queries: 8, 4 and 4 columns of a tensor with 16."""

  def sources(config):
    found = {
      path: source
      for path, source in own(config).items()
      if 'attention/' not in path or 'out' in path
    }
    for name, which in zip(('query', 'key', 'value'), naming.concatenated(8, 4, 4)):
      found |= naming.torch_linear(
        f'blocks/attention/{name}', 'layers.{layer}.qkv', bias=False, columns=which
      )
    return found

  own = llama.sources
  monkeypatch.setattr(llama, 'sources', sources)
  model, params = build(LLAMA)
  hf.save(tmp_path, model, params)
  attention = params['blocks']['attention']
  np.testing.assert_array_equal(
    safetensors.numpy.load_file(tmp_path / 'model.safetensors')['model.layers.0.qkv.weight'],
    np.concatenate([attention[name]['kernel'][0] for name in ('query', 'key', 'value')], axis=1).T,
  )
  assert_same(hf.load(tmp_path)[1], params)
  rewrite(
    tmp_path,
    lambda tensors: tensors.update({'model.layers.1.qkv.weight': np.zeros((24, 8), np.float32)}),
  )
  with pytest.raises(UserError, match=r'layers.1.qkv.weight is \(24, 8\), expected \(16, 8\)'):
    hf.load(tmp_path)


@pytest.mark.parametrize(
  'columns', [naming.Columns(5), naming.Columns(3, 2, 7), naming.Columns(0, 4, 4)]
)
def test_runs_of_columns(columns):
  block = columns.block or 100
  there = [columns.offset + j // block * columns.stride + j % block for j in range(12)]
  for start in range(12):
    for stop in range(start + 1, 13):
      runs = columns.runs(start, stop)
      assert [column for run in runs for column in range(run.start, run.stop)] == there[start:stop]


def test_an_unembedding_of_another_name(tmp_path, monkeypatch):
  monkeypatch.setattr(llama, 'UNEMBED', 'embed_out.weight', raising=False)
  model, params = build(LLAMA)
  hf.save(tmp_path, model, params)
  assert 'embed_out.weight' in safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert_same(hf.load(tmp_path)[1], params)


def test_saving_replaces_the_folder_and_leaves_nothing_else(saved):
  folder, model, params = saved
  (folder / 'stale.txt').write_text('of the model before')
  changed = jax.tree.map(lambda leaf: leaf + 1, params)
  hf.save(folder, model, changed)
  assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
  assert [path.name for path in folder.parent.iterdir()] == ['model']
  assert_same(hf.load(folder)[1], changed)


def test_failed_saving_leaves_the_old_folder(saved, monkeypatch):
  folder, model, params = saved

  def fail(*args, **kwargs):
    raise OSError('disk full')

  monkeypatch.setattr(safetensors.numpy, 'save_file', fail)
  with pytest.raises(OSError, match='disk full'):
    hf.save(folder, model, jax.tree.map(lambda leaf: leaf + 1, params))
  assert [path.name for path in folder.parent.iterdir()] == ['model']
  assert_same(hf.load(folder)[1], params)


def test_tokenizer_and_its_ids_are_saved_beside(saved, tmp_path, shared):
  transformers = pytest.importorskip('transformers')
  _, model, params = saved
  tokenizer = transformers.AutoTokenizer.from_pretrained(shared / 'models' / 'stories260K')
  hf.save(tmp_path / 'whole', model, params, tokenizer=tokenizer)
  again, _ = hf.load(tmp_path / 'whole')
  assert (again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id) == (
    1,
    2,
    0,
  )
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'whole').encode(
    'a cat'
  ) == tokenizer.encode('a cat')

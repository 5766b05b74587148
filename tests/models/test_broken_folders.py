"""Broken model folders: each gives one clear error with the fault and the remedy."""

import json
import os
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
import tiny

LLAMA = {
  'family': 'llama',
  'vocab_size': 32,
  'hidden_size': 8,
  'intermediate_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}
GPT2 = {
  'family': 'gpt2',
  'vocab_size': 30,
  'n_positions': 16,
  'n_embd': 8,
  'n_layer': 2,
  'n_head': 2,
}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
NORM, UP = 'model.norm.weight', 'model.layers.1.mlp.up_proj.weight'


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """Returns valid folders: one file, several files, GPT-2's fused tensors, a reward model."""
  root = tmp_path_factory.mktemp('good')
  for name, fields in (('one', LLAMA), ('gpt2', GPT2)):
    model = models.create(fields)
    hf.save(root / name, model, model.init(jax.random.key(0)))
  model = models.create(LLAMA)
  params = model.init(jax.random.key(0))
  hf.save(root / 'shards', model, params, max_shard_bytes=3000)
  hf.save(
    root / 'reward', model, params, head={'kernel': np.ones(8, np.float32), 'bias': np.float32(0.5)}
  )
  return root


def config(remove=(), **changes):
  """Changes fields of config.json."""

  def change(folder):
    fields = json.loads((folder / 'config.json').read_text())
    fields = {name: value for name, value in (fields | changes).items() if name not in remove}
    (folder / 'config.json').write_text(json.dumps(fields))

  return change


def content(file, value):
  """Replaces a file by a string, by bytes, or by anything else as JSON."""

  def change(folder):
    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())

  return change


def remove(*files):
  return lambda folder: [(folder / file).unlink() for file in files]


def rewrite(change, file=SINGLE):
  """Changes the dict of a file's tensors."""

  def apply(folder):
    tensors = safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / file, metadata={'format': 'pt'})

  return apply


def tensor(name, change):
  """Replaces a tensor by a function of it."""
  return rewrite(
    lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})
  )


def poked(value):
  """Returns a tensor with one element replaced."""

  def change(array):
    array = np.array(array)
    array.reshape(-1)[-1] = value
    return array

  return change


def cut(file, size):
  """Truncates a file to a number of bytes, or by a number of bytes."""
  return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def folder_instead(file):
  def change(folder):
    (folder / file).unlink()
    (folder / file).mkdir()

  return change


def header(change):
  """Changes the bytes of the JSON header of the single file, and updates its length."""

  def apply(folder):
    data = (folder / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], 'little')
    text = change(data[8 : 8 + size])
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])

  return apply


def index(change):
  """Changes the index's weight_map, given it and its last tensor."""

  def apply(folder):
    found = json.loads((folder / INDEX).read_text())
    change(found['weight_map'], sorted(found['weight_map'])[-1])
    (folder / INDEX).write_text(json.dumps(found))

  return apply


def shard(folder, number):
  return sorted(folder.glob('model-*.safetensors'))[number]


def swapped(folder):
  """Swaps the names of two shards."""
  first, second = shard(folder, 0), shard(folder, 1)
  first.rename(folder / 'spare')
  second.rename(first)
  (folder / 'spare').rename(second)


def doubled(folder):
  """Stores a tensor in two shards; the index lists one."""
  tensors = safetensors.numpy.load_file(shard(folder, 1))
  rewrite(lambda others: others.update(tensors), shard(folder, 0).name)(folder)


def twice(folder):
  """Stores a tensor in two shards, with the prefix and without; the index lists both."""
  file = shard(folder, -1)
  rewrite(
    lambda tensors: tensors.update({NORM.removeprefix('model.'): np.ones(8, np.float32)}), file.name
  )(folder)
  index(lambda weights, _: weights.update({NORM.removeprefix('model.'): file.name}))(folder)


def nothing(folder):
  del folder


LINEAR = {'rope_type': 'linear'}
CORPUS = [
  # config.json
  ('no config', 'one', remove('config.json'), 'config.json: no such file; a model folder holds'),
  ('empty config', 'one', content('config.json', ''), 'config.json: not JSON.*fix it'),
  ('config cut off', 'one', cut('config.json', 100), 'config.json: not JSON.*copy it again'),
  (
    'config is a list',
    'one',
    content('config.json', []),
    'config.json: holds a JSON list; it must hold an object',
  ),
  ('config is no text', 'one', content('config.json', b'\xff\xfe\x00'), 'config.json: not JSON'),
  (
    'config nested without end',
    'one',
    content('config.json', '[' * 100000),
    'config.json: not JSON',
  ),
  (
    'config is a folder',
    'one',
    folder_instead('config.json'),
    'config.json: cannot be read: Is a directory',
  ),
  (
    'no model_type',
    'one',
    config(remove=['model_type']),
    'config.json: model_type is missing.*one of',
  ),
  (
    'model_type is a list',
    'one',
    config(model_type=['llama']),
    'config.json: model_type is missing or not a string',
  ),
  (
    'unknown model_type',
    'one',
    config(model_type='mamba'),
    "config.json: .*'mamba' is not supported; choose from",
  ),
  (
    'unknown architecture',
    'one',
    config(architectures=['LlamaMoEForCausalLM']),
    'LlamaMoEForC.* is not supported',
  ),
  (
    'architecture of another family',
    'one',
    config(architectures=['GPT2LMHeadModel']),
    'contradicts model_type; if the model is a "LlamaForCausalLM"',
  ),
  (
    'architectures is a string',
    'one',
    config(architectures='LlamaForCausalLM'),
    'must be a list of names',
  ),
  (
    'missing field',
    'one',
    config(remove=['hidden_size']),
    "config.json: .*'hidden_size' is missing; add it",
  ),
  (
    'number as a string',
    'one',
    config(hidden_size='8'),
    'config.json: .*hidden_size="8": must be a positive whole',
  ),
  (
    'fraction',
    'one',
    config(num_hidden_layers=2.5),
    'num_hidden_layers=2.5: must be a positive whole number',
  ),
  (
    'negative size',
    'one',
    config(intermediate_size=-12),
    'intermediate_size=-12: must be a positive whole number',
  ),
  ('zero', 'one', config(vocab_size=0), 'vocab_size=0: must be a positive whole number'),
  ('beyond all integers', 'one', config(vocab_size=10**30), r'expected \(1000'),
  (
    'NaN in config',
    'one',
    config(rms_norm_eps=float('nan')),
    'rms_norm_eps=NaN: must be a positive number',
  ),
  (
    'infinity in config',
    'one',
    config(rope_theta=float('inf')),
    'rope_theta=Infinity: must be a positive number',
  ),
  ('heads that do not divide', 'gpt2', config(n_head=3), 'n_head=3: must divide n_embd=8'),
  (
    'kv heads that do not divide',
    'one',
    config(num_key_value_heads=3),
    'num_key_value_heads=3: must divide',
  ),
  ('odd head width', 'one', config(head_dim=3), 'head_dim=3: must be even'),
  ('unknown activation', 'one', config(hidden_act='xielu'), 'hidden_act="xielu": must be one of'),
  (
    'unknown rotary type',
    'one',
    config(rope_scaling={'rope_type': 'helix', 'factor': 2.0}),
    'rope_type="helix"',
  ),
  ('rotary parameter missing', 'one', config(rope_scaling=LINEAR), "'factor' is missing; add it"),
  (
    'rotary parameter unknown',
    'one',
    config(rope_scaling=LINEAR | {'factor': 2.0, 'gain': 1}),
    'know: gain=1',
  ),
  (
    'rotary twice',
    'one',
    config(rope_scaling=LINEAR | {'factor': 2.0}, rope_parameters=LINEAR | {'factor': 4.0}),
    'rope_parameters and rope_scaling are both present',
  ),
  ('unknown field', 'one', config(mystery=3), 'config.json: .*not know: mystery=3.*remove them'),
  (
    'quantised',
    'one',
    config(quantization_config={'bits': 4}),
    r'quantization_config=\{"bits": 4\}',
  ),
  (
    'encoder-decoder',
    'one',
    config(is_encoder_decoder=True),
    'is_encoder_decoder=true: only False is supported',
  ),
  ('two lengths', 'gpt2', config(n_ctx=7), 'n_ctx=7: only 16 is supported'),
  (
    'token id as a string',
    'one',
    config(eos_token_id='</s>'),
    'eos_token_id="</s>": must be a token id',
  ),
  # config.json against the tensors
  (
    'vocabulary of another size',
    'one',
    config(vocab_size=40),
    r'embed_tokens.weight is \(32, 8\), expected \(40, 8\).*Take both from the same model',
  ),
  (
    'deeper than the file',
    'one',
    config(num_hidden_layers=3),
    r'missing: layers.2.input_layernorm.weight.*\(9\)',
  ),
  (
    'deeper than any file',
    'one',
    config(num_hidden_layers=10**9),
    'missing: layers.10.input_layernorm.weight',
  ),
  (
    'shallower than the file',
    'one',
    config(num_hidden_layers=1),
    'not of this model: layers.1.input_layernorm',
  ),
  (
    'wider than the file',
    'one',
    config(hidden_size=16, head_dim=2),
    r'norm.weight is \(8,\), expected \(16,\)',
  ),
  ('biases that are not there', 'one', config(attention_bias=True), r'missing: .*q_proj.bias'),
  (
    'tied, with an unembedding of its own',
    'one',
    config(tie_word_embeddings=True),
    'lm_head.weight differs from embed_tokens.weight.*tie_word_embeddings.*set it to false',
  ),
  (
    'untied, without an unembedding',
    'gpt2',
    config(tie_word_embeddings=False),
    r'missing: lm_head.weight \(1\)',
  ),
  # tensors
  (
    'tensor missing',
    'one',
    rewrite(lambda tensors: tensors.pop(NORM)),
    r'missing: norm.weight \(1\)',
  ),
  (
    'tensor too many',
    'one',
    rewrite(lambda tensors: tensors.update({'adapter.weight': np.ones(1, np.float32)})),
    r'not of this model: adapter.weight \(1\)',
  ),
  (
    'no tensors',
    'one',
    rewrite(lambda tensors: tensors.clear()),
    r'missing: .*embed_tokens.weight.*\(21\)',
  ),
  (
    'wrong shape',
    'one',
    tensor(NORM, lambda x: x[:5]),
    r'norm.weight is \(5,\), expected \(8,\)',
  ),
  (
    'wrong rank',
    'one',
    tensor(NORM, lambda x: x[None]),
    r'norm.weight is \(1, 8\), expected \(8,\)',
  ),
  ('scalar', 'one', tensor(NORM, lambda x: x[0]), r'norm.weight is \(1,\), expected \(8,\)'),
  (
    'transposed',
    'one',
    tensor(UP, np.transpose),
    r'up_proj.weight is \(8, 12\), expected \(12, 8\)',
  ),
  (
    'fused tensor without its last part',
    'gpt2',
    tensor('transformer.h.0.attn.c_attn.weight', lambda x: x[:, :16]),
    r'c_attn.weight is \(8, 16\), expected \(8, 24\)',
  ),
  (
    'NaN',
    'one',
    tensor(UP, poked(np.nan)),
    r'NaN or infinity in layers.1.mlp.up_proj.weight \(1\); .*another copy',
  ),
  ('infinity', 'one', tensor(NORM, poked(-np.inf)), r'NaN or infinity in norm.weight \(1\)'),
  (
    'NaN in a fused tensor',
    'gpt2',
    tensor('transformer.h.0.attn.c_attn.bias', poked(np.nan)),
    r'NaN or infinity in h.0.attn.c_attn.bias \(1\)',
  ),
  (
    'infinity in half precision',
    'one',
    tensor(NORM, lambda x: poked(np.inf)(x.astype(np.float16))),
    'norm.weight',
  ),
  (
    'NaN in bfloat16',
    'one',
    tensor(NORM, lambda x: poked(np.nan)(x.astype(ml_dtypes.bfloat16))),
    'norm.weight',
  ),
  (
    'int8',
    'one',
    tensor(UP, lambda x: x.astype(np.int8)),
    'not floating point.*convert.*up_proj.weight is I8',
  ),
  (
    'float8',
    'one',
    tensor(UP, lambda x: x.astype(ml_dtypes.float8_e4m3fn)),
    'up_proj.weight is F8_E4M3',
  ),
  ('bool', 'one', tensor(UP, lambda x: x > 0), 'up_proj.weight is BOOL'),
  (
    'with the prefix and without',
    'one',
    rewrite(lambda tensors: tensors.update({'norm.weight': tensors[NORM]})),
    'holds .*norm.weight twice, in model.safetensors .*remove one',
  ),
  # files
  (
    'cut off',
    'one',
    cut(SINGLE, -10),
    'model.safetensors: cannot be read as safetensors.*cut off.*again',
  ),
  (
    'cut off in the header',
    'one',
    cut(SINGLE, 100),
    'model.safetensors: cannot be read as safetensors',
  ),
  ('no bytes', 'one', content(SINGLE, b''), 'model.safetensors: cannot be read as safetensors'),
  (
    'another format',
    'one',
    content(SINGLE, b'PK\x03\x04' * 100),
    'model.safetensors: cannot be read as safetensors',
  ),
  (
    'placeholder',
    'one',
    content(SINGLE, 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98'),
    'placeholder for the real file',
  ),
  (
    'header that is not JSON',
    'one',
    header(lambda text: text[1:] + b' '),
    'model.safetensors: cannot be read',
  ),
  (
    'header of unknown dtypes',
    'one',
    header(lambda text: text.replace(b'F32', b'F99')),
    'cannot be read',
  ),
  (
    'header with holes',
    'one',
    header(lambda text: text.replace(b'[0,', b'[8,', 1)),
    'cannot be read',
  ),
  (
    'header without end',
    'one',
    content(SINGLE, b'\xff' * 8 + b'{}'),
    'model.safetensors: cannot be read',
  ),
  ('a folder for a file', 'one', folder_instead(SINGLE), 'model.safetensors: cannot be read'),
  (
    'only a pickle',
    'one',
    lambda folder: (folder / SINGLE).rename(folder / 'pytorch_model.bin'),
    r"only \['config.json', 'pytorch_model.bin'\]; .*to safetensors first",
  ),
  (
    'no weights',
    'one',
    remove(SINGLE),
    'has neither model.safetensors nor model.safetensors.index.json',
  ),
  # shards
  (
    'shards without index',
    'shards',
    remove(INDEX),
    'nor model.safetensors.index.json, only .*model-00001-of',
  ),
  (
    'shard missing',
    'shards',
    lambda folder: shard(folder, 1).unlink(),
    'index.json: lists files that do not exist: model-00002-of-.*copy or download them',
  ),
  (
    'index naming a missing file',
    'shards',
    index(lambda weights, last: weights.update({last: 'elsewhere.safetensors'})),
    'do not exist: elsewhere.safetensors',
  ),
  (
    'shard cut off',
    'shards',
    lambda folder: cut(shard(folder, 1).name, -1)(folder),
    'model-00002-of-.*: cannot be read as safetensors',
  ),
  ('shards swapped', 'shards', swapped, 'model-00001-of-.*: does not match .*it lacks'),
  ('index is not JSON', 'shards', cut(INDEX, 50), 'index.json: not JSON'),
  ('index is a list', 'shards', content(INDEX, []), 'index.json: holds a JSON list'),
  (
    'index without weight_map',
    'shards',
    content(INDEX, {'metadata': {}}),
    'index.json: has no weight_map',
  ),
  (
    'index with an empty weight_map',
    'shards',
    content(INDEX, {'weight_map': {}}),
    'index.json: has no weight_map',
  ),
  (
    'index with a list for weight_map',
    'shards',
    content(INDEX, {'weight_map': ['a']}),
    'json: has no weight_map',
  ),
  (
    'index with a number for a file',
    'shards',
    index(lambda weights, last: weights.update({last: 1})),
    r"weight_map\['model.norm.weight'\] is 1; it must name a file",
  ),
  (
    'index that leads out of the folder',
    'shards',
    index(lambda weights, last: weights.update({last: '../x'})),
    r"is '../x'; it must name a file in the same folder",
  ),
  (
    'index without a tensor',
    'shards',
    index(lambda weights, last: weights.pop(last)),
    r'it also holds model.norm.weight \(1\); the files come from different models',
  ),
  (
    'index with another tensor',
    'shards',
    index(lambda weights, last: weights.update({'extra': weights[last]})),
    r'model-.*: does not match .*it lacks extra \(1\)',
  ),
  (
    'tensors in two shards',
    'shards',
    doubled,
    'model-00001-of-.*: does not match .*: it also holds model',
  ),
  (
    'tensor twice, both listed',
    'shards',
    twice,
    'holds .*norm.weight twice, in model-00001-of-00003.safetensors .* and '
    'model-00003-of-00003.*; remove one',
  ),
  (
    'one file and shards',
    'shards',
    lambda folder: shutil.copy(folder.parent / 'one' / SINGLE, folder),
    'holds both model.safetensors and model.safetensors.index.json.*outdated',
  ),
  # heads; reward models are loaded with load_reward
  (
    'reward model as a language model',
    'lm from reward',
    nothing,
    'has score.weight, so it is a reward model',
  ),
  (
    'language model as a reward model',
    'reward from one',
    nothing,
    'no score.weight, so it is not a reward model',
  ),
  (
    'two labels',
    'reward',
    tensor('score.weight', lambda x: np.tile(x, (2, 1))),
    r'score.weight has shape \(2, 8\); a reward model has one label, so it must be \(1, 8\)',
  ),
  (
    'head of another width',
    'reward',
    tensor('score.weight', lambda x: x[:, :6]),
    r'\(1, 6\).*one label, so it must be \(1, 8\)',
  ),
  (
    'bias of two labels',
    'reward',
    tensor('score.bias', lambda x: np.ones(2, np.float32)),
    r'score.bias is \(2,\), expected \(1,\)',
  ),
  (
    'NaN in the head',
    'reward',
    tensor('score.weight', poked(np.nan)),
    'NaN or infinity in score.weight',
  ),
  (
    'int8 head',
    'reward',
    tensor('score.weight', lambda x: x.astype(np.int8)),
    'score.weight is I8',
  ),
  (
    'reward model with an unembedding',
    'reward',
    rewrite(lambda tensors: tensors.update({'lm_head.weight': np.ones((32, 8), np.float32)})),
    'not of this model: lm_head.weight',
  ),
]


@pytest.mark.parametrize(
  'base,damage,message', [case[1:] for case in CORPUS], ids=[case[0] for case in CORPUS]
)
def test_broken_folder(base, damage, message, good, tmp_path):
  kind, _, source = base.partition(' from ')
  shutil.copytree(good, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / (source or base)
  damage(folder)
  with pytest.raises(UserError) as error:
    (hf.load_reward if kind == 'reward' else hf.load)(folder)
  assert str(folder) in str(error.value)
  assert re.search(message, str(error.value)), str(error.value)
  assert error.value.__cause__ is None and (
    error.value.__context__ is None or error.value.__suppress_context__
  )


def test_the_folders_were_good_before(good):
  assert len(CORPUS) >= 40 and len({case[0] for case in CORPUS}) == len(CORPUS)
  for name in ('one', 'shards', 'gpt2'):
    hf.load(good / name)
  hf.load_reward(good / 'reward')


def test_paths_that_lead_to_no_folder(good, tmp_path):
  with pytest.raises(UserError, match='no-such/config.json: no such file; a model folder holds'):
    hf.load(tmp_path / 'no-such')
  with pytest.raises(UserError, match='model.safetensors: is a file; a model is a folder'):
    hf.load(good / 'one' / SINGLE)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
@pytest.mark.parametrize('file', ['config.json', SINGLE])
def test_files_that_may_not_be_read(file, good, tmp_path):
  shutil.copytree(good / 'one', tmp_path / 'one')
  (tmp_path / 'one' / file).chmod(0)
  with pytest.raises(UserError, match=f'{file}: cannot be read.*ermission denied'):
    hf.load(tmp_path / 'one')


def test_tokenizer_with_more_tokens_than_the_embedding(good, tmp_path):
  settings = sft.config().model
  settings.path = str(good / 'one')
  tokenizer = tiny.write_tokenizer(tmp_path / 'tokenizer')
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with pytest.raises(
    UserError,
    match='ids up to 63, but the model.s vocab_size is 32. Use the tokenizer that belongs',
  ):
    setup.load_policy(settings, tokenizer, mesh, 0)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_point_is_read(dtype, good, tmp_path):
  shutil.copytree(good / 'one', tmp_path / 'one')
  tensor(UP, lambda x: x.astype(dtype))(tmp_path / 'one')
  _, params = hf.load(tmp_path / 'one')
  expected = safetensors.numpy.load_file(tmp_path / 'one' / SINGLE)[UP].astype(np.float32).T
  found = params['blocks']['mlp']['up']['kernel']
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found[1], expected)

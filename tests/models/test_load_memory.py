"""Loading and saving need little more memory than the parameters.

Run as a script, this file is the measured process.
"""

import json
import math
import pathlib
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.models import hf
from rlhf_jax.models import hf_arrays

LLAMA = {
  'model_type': 'llama',
  'vocab_size': 32000,
  'hidden_size': 2048,
  'intermediate_size': 8192,
  'num_hidden_layers': 31,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
}
SMALL = {
  'model_type': 'llama',
  'vocab_size': 4000,
  'hidden_size': 256,
  'intermediate_size': 768,
  'num_hidden_layers': 24,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
}
SLACK = 500 * 10**6


def write_llama(folder, fields, shards):
  """Writes random bfloat16 weights to several files with an index, one tensor at a time.

  Returns:
    Bytes of all tensors, and of the largest tensor.
  """
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(fields))
  config, draw = models.create(fields).config, np.random.default_rng(0)
  heads, kv_heads, width = (
    config.heads * config.head_width,
    config.kv_heads * config.head_width,
    config.width,
  )
  inner = config.intermediate_size
  layer = {
    'input_layernorm': (width,),
    'post_attention_layernorm': (width,),
    'self_attn.q_proj': (heads, width),
    'self_attn.k_proj': (kv_heads, width),
    'self_attn.v_proj': (kv_heads, width),
    'self_attn.o_proj': (width, heads),
    'mlp.gate_proj': (inner, width),
    'mlp.up_proj': (inner, width),
    'mlp.down_proj': (width, inner),
  }
  shapes = {'model.embed_tokens.weight': (config.vocab_size, width)}
  for number in range(config.depth):
    shapes |= {f'model.layers.{number}.{name}.weight': shape for name, shape in layer.items()}
  shapes |= {'model.norm.weight': (width,), 'lm_head.weight': (config.vocab_size, width)}
  sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
  total, done, files = sum(sizes.values()), 0, [[] for _ in range(shards)]
  for name, size in sizes.items():
    files[done * shards // total].append(name)
    done += size
  weight_map = {}
  for number, names in enumerate(files, 1):
    file = f'model-{number:05d}-of-{shards:05d}.safetensors'
    weight_map |= dict.fromkeys(names, file)
    ends = np.cumsum([sizes[name] for name in names]).tolist()
    header = json.dumps(
      {
        name: {'dtype': 'BF16', 'shape': shapes[name], 'data_offsets': [end - sizes[name], end]}
        for name, end in zip(names, ends)
      }
    ).encode()
    with open(folder / file, 'wb') as out:
      out.write(len(header).to_bytes(8, 'little') + header)
      for name in names:
        bits = draw.integers(0, 2**16, sizes[name] // 2, dtype=np.uint16)
        # Random sign and fraction, and an exponent of -7 to -4.
        out.write(((bits & 0x81FF) | 0x3C00).astype('<u2').tobytes())
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return total, max(sizes.values())


def assert_same_bytes(folder, other):
  """Compares the bytes of all tensors in two folders."""
  where = [
    json.loads((path / 'model.safetensors.index.json').read_text())['weight_map']
    for path in (folder, other)
  ]
  assert where[0].keys() == where[1].keys()
  for name in where[0]:
    found = []
    for path, files in zip((folder, other), where):
      with safe_open(path / files[name], 'np') as file:
        found.append(file.get_tensor(name))
    assert (
      found[0].dtype == found[1].dtype == ml_dtypes.bfloat16 and found[0].shape == found[1].shape
    )
    assert np.array_equal(*(array.view(np.uint16) for array in found)), name


def memory(name):
  """Memory of this process in bytes: now ('VmRSS') or peak ('VmHWM'; ru_maxrss is inherited)."""
  return 1024 * int(pathlib.Path('/proc/self/status').read_text().split(f'{name}:')[1].split()[0])


def measure(folder, again, shape, param_dtype, max_shard_bytes):
  """Loads and saves a model; prints memory and times as JSON."""
  mesh = sharding.make_mesh(json.loads(shape)) if shape != 'null' else None
  jax.jit(jnp.sum)(jnp.ones(8)).block_until_ready()
  before, start = memory('VmRSS'), time.monotonic()
  model, params = hf.load(folder, mesh=mesh, param_dtype=param_dtype)
  jax.block_until_ready(params)
  loaded, held = memory('VmHWM') - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  middle = time.monotonic()
  if again:
    hf.save(again, model, params, max_shard_bytes=int(max_shard_bytes))
  print(
    json.dumps(
      {
        'params': held,
        'load': loaded,
        'load_seconds': middle - start,
        'save': memory('VmHWM') - before,
        'save_seconds': time.monotonic() - middle,
      }
    )
  )


@pytest.mark.slow
@pytest.mark.skipif(
  not pathlib.Path('/proc/self/status').exists(), reason='reads the peak of memory from /proc'
)
def test_two_billion_parameters_within_memory_and_back_bit_by_bit(tmp_path):
  total, largest = write_llama(tmp_path / 'model', LLAMA, 5)
  assert total / 2 > 2e9
  for shape, dtype, again in (
    (None, 'bfloat16', 'again'),
    ({'fsdp': 4, 'tensor': 2}, 'bfloat16', ''),
    (None, 'float32', ''),
  ):
    done = subprocess.run(
      [
        sys.executable,
        __file__,
        str(tmp_path / 'model'),
        str(tmp_path / again) if again else '',
        json.dumps(shape),
        dtype,
        str(10**9),
      ],
      capture_output=True,
      text=True,
      check=False,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    print(
      shape,
      dtype,
      {name: round(value / (1 if 'seconds' in name else 1e6), 1) for name, value in found.items()},
      f'bound {(3 * largest + SLACK) / 1e6:.1f}',
    )
    assert found['params'] >= total
    assert found['load'] - found['params'] < 3 * largest + SLACK
    if again:
      assert found['save'] - found['params'] < 10**9 + 3 * largest + SLACK
      assert len(list((tmp_path / again).glob('*.safetensors'))) == 5
      assert_same_bytes(tmp_path / 'model', tmp_path / again)


@pytest.mark.parametrize('shape', [None, {'fsdp': 4, 'tensor': 2}], ids=['one device', 'eight'])
def test_the_host_holds_a_few_tensors_at_a_time(shape, tmp_path, monkeypatch):
  """Allocations of Python and NumPy for 45 MB of parameters whose largest tensor has 2 MB."""
  monkeypatch.setattr(hf_arrays, 'STEP_BYTES', 10**6)
  total, largest = write_llama(tmp_path / 'model', SMALL, 3)
  mesh = sharding.make_mesh(shape) if shape else None
  hf.load(tmp_path / 'model', mesh=mesh, param_dtype='bfloat16')  # compiles
  tracemalloc.start()
  model, params = hf.load(tmp_path / 'model', mesh=mesh, param_dtype='bfloat16')
  loading = tracemalloc.get_traced_memory()[1]
  tracemalloc.reset_peak()
  hf.save(tmp_path / 'again', model, params, max_shard_bytes=15 * 10**6)
  saving = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  print(
    f'{total / 1e6:.1f} MB of parameters, {largest / 1e6:.1f} largest: '
    f'{loading / 1e6:.1f} loading, '
    f'{saving / 1e6:.1f} saving'
  )
  assert loading < 3 * largest
  assert saving < 15 * 10**6 + 3 * largest
  assert_same_bytes(tmp_path / 'model', tmp_path / 'again')


if __name__ == '__main__':
  measure(*sys.argv[1:])

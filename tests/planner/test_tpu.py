"""The full command on small shapes, with the TPU's compiler. Skipped without libtpu."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('libtpu')

PLAN = ['-m', 'planner', '--config=configs/ppo_llama3_8b.py:debug', '--effort=-1']
# Attention and its gradients on 2 x 2 chips: sequences over 'data', heads over 'tensor'. All scores
# would need 4 GiB per chip.
KERNELS = """
import functools, jax, jax.numpy as jnp
from rlhf_jax import sharding
from rlhf_jax.models import attention
from planner import compiler
jax.config.update('jax_platforms', 'cpu')
mesh = sharding.make_mesh({'data': 2, 'tensor': 2}, devices=compiler.devices('v5e:2x2'))
rows = sharding.batch_sharding(mesh)
for width, window, score_cap in ((64, 0, 0.0), (128, 3000, 50.0), (256, 0, 0.0)):
  attend = functools.partial(attention.splash, window=window, score_cap=score_cap)
  loss = lambda *x: jnp.sum(attention.on_shards(attend, *x).astype(jnp.float32))
  shapes = (4, 16300, 4, width), (4, 2, 16300, width), (4, 2, 16300, width)
  operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows) for shape in shapes]
  operands.append(jax.ShapeDtypeStruct((4, 16300), jnp.int32, sharding=rows))
  with jax.set_mesh(mesh):
    assert sharding.platform() == 'tpu'
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*operands).compile()
  text = compiled.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3, text
  assert not any(name in text for name in ('all-gather', 'all-reduce', 'all-to-all')), text
  assert compiled.memory_analysis().temp_size_in_bytes < 2**29, compiled.memory_analysis()
print('compiled')
"""


def run(*arguments, cache, command=PLAN):
  env = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  return subprocess.run(
    [sys.executable, *command, *arguments],
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
    cwd=pathlib.Path(__file__).resolve().parents[2],
    env=env | {'XDG_CACHE_HOME': str(cache), 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'COLUMNS': '200'},
  )


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def test_a_plan_and_its_report(cache, tmp_path):
  done = run(
    '--topology=v5e:2x2',
    '--config.sampling.max_new_tokens=64',
    f'--report={tmp_path}/plan.md',
    cache=cache,
  )
  assert done.returncode == 0, done.stderr
  assert 'unknown trip count' not in done.stderr  # although a rollout has several stages
  for part in (
    'master weights',
    'most at once',
    'rollout',
    'scoring',
    'update',
    'all-reduce',
    '4 v5e chips',
  ):
    assert part in done.stdout
  assert done.stdout.count('does not fit') == 0
  text = (tmp_path / 'plan.md').read_text()
  assert '## configs/ppo_llama3_8b.py:debug on v5e:2x2' in text and '--topology=v5e:2x2' in text
  assert len(list((cache / 'rlhf_jax').rglob('*.json'))) == 3  # programs, each compiled once


def test_a_search(cache):
  done = run('--topology=v5e:2x2', '--search', '--confirm=1', cache=cache)
  assert done.returncode == 0, done.stderr
  assert 'the fastest of' in done.stdout and 'compiled' in done.stdout


def test_mistakes_give_one_line(cache):
  for arguments, message in (
    (['--topology=v5e:3x7'], 'choose another --topology'),
    (['--topology=v5x:2x2'], 'must be CHIP:AxB'),
    (['--topology=v5e:2x2', '--config.mesh.tensor=3'], 'config.mesh'),
  ):
    done = run(*arguments, cache=cache)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr


def test_the_kernels_of_attention(cache):
  done = run(cache=cache, command=['-c', KERNELS])
  assert done.returncode == 0 and done.stdout.strip() == 'compiled', done.stderr

"""The update by itself, as shared_weights.py and memory.py take its measure."""

import types

import jax
import numpy as np
import pytest

from benchmarks import memory
from benchmarks import shared_weights
from benchmarks import updates
from benchmarks import workloads
from benchmarks.peers import ours
from rlhf_jax import sharding

W = workloads.Workload('tiny', 2, 16, 2, 64, 40, 5, 4, 8)


@pytest.fixture
def mesh():
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


def test_memory_of_an_update(mesh, monkeypatch):
  monkeypatch.setattr(shared_weights, 'FLAGS', types.SimpleNamespace(timed=1))
  monkeypatch.setattr(updates, 'seconds', lambda update, count: (update.state, 0.0))
  update = updates.prepare(updates.make_config(W, {}), mesh)
  seen = set()
  policy = shared_weights.count(update.state.params['policy'], seen)
  # GPT-2: token and position embeddings, two norms with biases, four linear maps with biases; the
  # final norm.
  block = 2 * 2 * 16 + 4 * 16 * 16 + 4 * 16 + 2 * 16 * 64 + 64 + 16
  assert policy == 4 * (40 * 16 + 9 * 16 + 2 * block + 2 * 16)
  assert shared_weights.count(update.state.params['policy'], seen) == 0
  row = shared_weights.measure(update)
  assert row['total'] >= 0 and set(row) >= {
    'policy',
    'critic',
    'reference',
    'moments',
    'temporaries',
  }
  state, metrics = update.step(update.state, *update.arguments)
  assert int(state.step) == 1 and np.isfinite(float(metrics['policy/loss']))


def test_half_of_the_layers():
  config = updates.make_config(W, workloads.VARIANTS['hydra'].config)
  assert (config.model.unfrozen_layers, config.critic.kind) == (1, 'trunk')


def test_temporaries(mesh):
  assert memory.temporaries(W, 'separate', mesh) > W.batch * W.length * W.width * 4


@pytest.mark.parametrize('variant', workloads.VARIANTS)
@pytest.mark.parametrize('workload', workloads.WORKLOADS)
def test_every_workload_is_a_valid_run(workload, variant, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  config = ours.make_config(workloads.WORKLOADS[workload], variant, tmp_path, 'cpu')
  assert config.batch_size == workloads.WORKLOADS[workload].batch

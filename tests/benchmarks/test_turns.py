"""A whole conversation with our own peer, on a miniature workload."""

import pathlib
import re
import sys

import pytest

from benchmarks import processes
from benchmarks import results
from benchmarks import run
from benchmarks import workloads

W = workloads.Workload('tiny', 2, 16, 2, 32, 40, 5, 4, 8)


def start(module, tmp_path, *options):
  return processes.Process(
    sys.executable, module, W, device='cpu', threads=1, log=tmp_path / 'log', options=options
  )


@pytest.mark.parametrize('variant', ['separate', 'hydra'])
def test_ours_takes_turns(tmp_path, monkeypatch, capsys, variant):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  name = 'ours' if variant == 'separate' else f'ours-{variant}'
  peer = start('ours', tmp_path, '--variant', variant)
  try:
    runs, _ = run.take_turns({name: peer}, [], 2)
  finally:
    peer.end()
  assert re.search(
    rf'^{name}: set up in \d+ s, first iteration in \d+ s$', capsys.readouterr().out, re.MULTILINE
  )
  timed = runs[name]
  first, iterations = timed['first'], timed['iterations']
  assert 'jax' in peer.about['versions']
  for report in (first, *iterations):
    assert set(report['parts']) == set(workloads.PARTS) and min(report['parts'].values()) > 0
    assert report['peak'] > 2**20 and report['device_peak'] is None
  row = results.summarize(
    [timed], peer.about, W, {'matmul': 1e9, 'copy': 1e9}, variant=variant, device='cpu'
  )
  assert row['total'] > 0 and row['compile'] > 0
  assert row['total'] == pytest.approx(sum(map(sum, (r['parts'].values() for r in iterations))) / 2)


def test_compiled_programs_are_cached_in_the_given_folder(tmp_path):
  peer = start('ours', tmp_path, '--cache', str(tmp_path / 'cache'))
  peer.turn()
  peer.end()
  assert (tmp_path / 'cache').is_dir()


def test_a_failing_peer_gives_the_reason(tmp_path):
  with pytest.raises(processes.PeerError, match='No module named'):
    start('nobody', tmp_path)


def test_a_peer_that_is_not_installed(tmp_path):
  with pytest.raises(processes.PeerError, match='benchmarks/install.sh trl'):
    processes.python('trl', tmp_path)
  assert processes.python('', tmp_path) == sys.executable


def test_on_cpus_the_allocator_keeps_memory(monkeypatch):
  for name in processes.ALLOCATOR:
    monkeypatch.delenv(name, raising=False)
  assert processes.ALLOCATOR.items() <= processes.environment('cpu', 2).items()
  assert not processes.ALLOCATOR.keys() & processes.environment('gpu', 2).keys()


def test_every_peer_has_its_script():
  folder = pathlib.Path(processes.__file__).parent / 'peers'
  assert all((folder / f'{peer.module}.py').exists() for peer in processes.PEERS.values())


def test_limits_are_measured(tmp_path):
  peer = start('limits', tmp_path, '--library', 'jax')
  report = peer.turn()
  peer.end()
  assert report['matmul'] > 1e9 and report['copy'] > 1e8
  assert peer.about['note'] == 'cpu'


@pytest.mark.parametrize('device, name', [('gpu', 'NVIDIA H200'), ('cpu', 'Xeon, 2 threads')])
def test_the_table_names_the_device(device, name):
  about = {'versions': {'jax': '1.0'}, 'note': ''}
  result = {
    'limits': {'matmul': 7e14, 'copy': 4e12},
    'summary': {'ours': {'others': {}}},
    'machine': {'device': device, 'cpu': 'Xeon', 'threads': 2, 'card': 'NVIDIA H200'},
    'runs': {'ours': [{'about': about, 'iterations': [{}, {}]}] * 3},
  }
  assert run.notes(result) == [
    f'{name}: matmul 700000 GFLOP/s, copy 4000.0 GB/s. Medians of 3 x 2 iterations.',
    'ours: jax 1.0',
  ]

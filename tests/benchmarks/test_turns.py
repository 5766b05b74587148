"""A whole conversation with our own peer, on a miniature workload."""

import pathlib
import sys

import pytest

from benchmarks import processes
from benchmarks import results
from benchmarks import workloads

W = workloads.Workload('tiny', 2, 16, 2, 32, 40, 5, 4, 8)


def start(module, tmp_path, *options):
  return processes.Process(
      sys.executable, module, W, device='cpu', threads=1, log=tmp_path / 'log', options=options)


@pytest.mark.parametrize('way', ['separate', 'hydra'])
def test_ours_takes_turns(tmp_path, monkeypatch, way):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  peer = start('ours', tmp_path, '--way', way)
  try:
    first = peer.turn()
    iterations = [peer.turn() for _ in range(2)]
    split = peer.turn('split'), peer.turn('split')
  finally:
    peer.end()
  assert 'jax' in peer.about['versions']
  for report in (first, *iterations):
    assert set(report['parts']) == set(workloads.PARTS) and min(report['parts'].values()) > 0
    assert report['peak'] > 2**20 and report['device_peak'] is None
  run = {'first': first, 'iterations': iterations, 'splits': split[1:]}
  row = results.summarize([run], peer.about, W, {'matmul': 1e9, 'copy': 1e9}, way=way, device='cpu')
  assert row['total'] > 0 and row['compile'] > 0
  assert row['total'] == pytest.approx(sum(map(sum, (r['parts'].values() for r in iterations))) / 2)


def test_compiled_programs_are_kept_where_asked(tmp_path):
  peer = start('ours', tmp_path, '--cache', str(tmp_path / 'cache'))
  peer.turn()
  peer.end()
  assert (tmp_path / 'cache').is_dir()


def test_a_peer_that_fails_says_why(tmp_path):
  with pytest.raises(processes.PeerError, match='No module named'):
    start('nobody', tmp_path)


def test_a_peer_that_is_not_installed(tmp_path):
  with pytest.raises(processes.PeerError, match='benchmarks/install.sh trl'):
    processes.python('trl', tmp_path)
  assert processes.python('', tmp_path) == sys.executable


def test_every_peer_has_its_script():
  folder = pathlib.Path(processes.__file__).parent / 'peers'
  assert all((folder / f'{peer.module}.py').exists() for peer in processes.PEERS.values())


def test_limits_are_measured(tmp_path):
  peer = start('limits', tmp_path, '--library', 'jax')
  report = peer.turn()
  peer.end()
  assert report['matmul'] > 1e9 and report['copy'] > 1e8

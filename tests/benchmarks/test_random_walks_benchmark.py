"""Medians and ratios of the comparison with trlX on random walks; a turn of our side of it."""

import sys

import pytest

from benchmarks import processes
from benchmarks import random_walks


def report(rollout, update, scoring=None):
  parts = {'rollout': rollout, 'update': update}
  return {'parts': parts if scoring is None else parts | {'scoring': scoring}}


def test_medians_of_parts_and_ratios_of_neighbours():
  ours = [report(0.1, 0.2, 0.1), report(0.2, 0.2, 0.1), report(0.1, 0.4, 0.1)]
  theirs = [report(0.3, 0.5), report(0.5, 0.5), report(0.4, 0.8)]
  medians, quartiles = random_walks.summarize({'rlhf_jax': ours, 'trlx': theirs})
  assert medians['rlhf_jax'] == pytest.approx(
    {'rollout': 0.1, 'scoring': 0.1, 'update': 0.2, 'total': 0.5}
  )
  assert medians['trlx'] == pytest.approx(
    {'rollout': 0.4, 'scoring': 0.0, 'update': 0.5, 'total': 1.0}
  )
  # 0.4 / 0.8, 0.5 / 1.0 and 0.6 / 1.2.
  assert quartiles == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize(
  'algorithm, expected', [('ppo', {'rollout', 'scoring', 'update'}), ('ilql', {'update'})]
)
def test_our_side_takes_turns(algorithm, expected, shared, tmp_path):
  peer = processes.Process(
    sys.executable,
    'walks',
    random_walks.WORKLOAD,
    device='cpu',
    threads=1,
    log=tmp_path / 'log',
    options=['--model', str(shared / 'models' / 'randomwalks'), '--algorithm', algorithm],
  )
  try:
    parts = peer.turn()['parts']
  finally:
    peer.end()
  assert set(parts) == expected and min(parts.values()) > 0

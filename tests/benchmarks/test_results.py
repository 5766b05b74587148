"""Medians, ratios, the table and the chart from timed iterations."""

import pytest

from benchmarks import results
from benchmarks import workloads

W = workloads.Workload('small', 2, 4, 2, 8, 10, 3, 2, 5)
LIMITS = {'matmul': 1e6, 'copy': 1e6}
ABOUT = {'epochs': 4}


def report(rollout, scoring, update, peak=2**20):
  return {
    'parts': {'rollout': rollout, 'scoring': scoring, 'update': update},
    'peak': peak,
    'device_peak': None,
  }


RUN = {
  'first': report(2.0, 3.0, 9.0),
  'splits': [],
  'iterations': [report(1.0, 0.5, 4.0), report(3.0, 0.5, 4.0, 3 * 2**20), report(2.0, 0.5, 3.0)],
}


def summary(run=RUN, **changes):
  return results.summarize(
    [run], ABOUT, W, LIMITS, **{'variant': 'separate', 'device': 'cpu', **changes}
  )


def test_medians():
  row = summary()
  assert (row['rollout'], row['scoring'], row['update']) == (2.0, 0.5, 4.0)
  assert row['total'] == 5.5  # of 5.5, 7.5 and 5.5
  assert row['compile'] == 14.0 - 5.5
  assert row['peak'] == 3 * 2**20
  assert row['tokens'] == 5 * 2 / 2.0
  work = workloads.flops(W)
  assert row['limit'] == pytest.approx(sum(work.values()) / 5.5 / 1e6)
  assert row['update_limit'] == pytest.approx(work['update'] / 4.0 / 1e6)
  assert row['times_bound'] == pytest.approx(5.5 / sum(workloads.bound(W, 1e6, 1e6).values()))


def test_runs_are_pooled():
  slow = RUN | {'iterations': [report(9.0, 9.0, 9.0)] * 4}
  assert (
    results.summarize([RUN, slow], ABOUT, W, LIMITS, variant='separate', device='cpu')['total']
    == 27.0
  )


def test_scoring_within_the_update_is_counted_as_scoring():
  splits = [{'parts': {'scoring': seconds}} for seconds in (0.9, 1.0, 7.0)]
  row = summary(RUN | {'splits': splits})
  assert (row['scoring'], row['update'], row['total']) == (1.5, 3.0, 5.5)


def test_a_peer_without_a_full_iteration():
  parts = {'parts': {'rollout': 4.0, 'forward and backward': 1.0}, 'peak': 1, 'device_peak': None}
  row = summary({'first': parts, 'splits': [], 'iterations': [parts]})
  assert row['total'] is None and row['update'] is None and row['times_bound'] is None
  assert row['others'] == {'forward and backward': 1.0}
  assert results.ratios({'ours': summary(), 'hf': row}, 'ours')['hf'] == {
    'total': None,
    'rollout': 2.0,
  }


def test_device_memory_counts_if_there_is_a_device():
  gpu = [report(1.0, 1.0, 1.0) | {'device_peak': 7}]
  run = {'first': gpu[0], 'splits': [], 'iterations': gpu}
  assert summary(run, device='gpu')['peak'] == 7
  assert summary(run)['peak'] == 2**20


def test_table_and_chart(tmp_path):
  slow = RUN | {'iterations': [report(10.0, 5.0, 20.0)]}
  rows = {'ours': summary(), 'peer': summary(slow)}
  text = results.table(rows, 'ours', title='A title', notes=['below [brackets]'])
  ours, peer = (
    next(line.split() for line in text.splitlines() if line.strip().startswith(name))
    for name in rows
  )
  assert ours[1:5] == ['5.50', '2', '0.50', '4'] and ours[-2:] == ['1', '1']
  assert peer[1:5] == ['35', '10', '5', '20'] and peer[-2:] == ['6.36', '5']
  assert 'A title' in text and 'below [brackets]' in text
  results.chart(tmp_path / 'chart.png', rows, workloads.bound(W, 1e6, 1e6), 'A title')
  assert (tmp_path / 'chart.png').read_bytes().startswith(b'\x89PNG')

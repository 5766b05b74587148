"""FLOPs and bytes of the benchmarks against counts by hand."""

import pytest

from benchmarks import workloads

# 2 layers, width 4, feed-forward 8, vocabulary 10, 3 + 2 tokens, 5 rows.
SMALL = workloads.Workload('small', 2, 4, 2, 8, 10, 3, 2, 5)


def test_forward_pass_by_hand():
  # A token's maps: query, key, value, output 4 x 16 weights, feed-forward 32 + 32: 128, two
  # operations each.
  linear = 5 * 5 * 2 * 256
  # Scores and their sum over values: 2 x 2 x 4 operations for each pair, half of 5 x 5 pairs, 2
  # layers.
  attention = 5 * 2 * 16 * 12.5
  assert workloads.body_flops(SMALL, 5) == linear + attention
  assert workloads.unembed_flops(SMALL, 2) == 5 * 2 * 2 * 4 * 10


def test_iteration_by_hand():
  body, unembed = 12800 + 2000, 800
  assert workloads.flops(SMALL) == {
    'rollout': body + unembed,
    'scoring': 4 * body + 2 * unembed,  # policy, critic, reference, reward model
    'update': 4 * (2 * 3 * body + 3 * unembed),
  }  # 4 epochs, forward and twice that backward
  assert workloads.flops(SMALL, epochs=1)['update'] == 6 * body + 3 * unembed
  trunk = workloads.flops(SMALL, 'trunk')
  assert (trunk['scoring'], trunk['update']) == (3 * body + 2 * unembed, 4 * 3 * (body + unembed))
  hydra = workloads.flops(SMALL, 'hydra')  # half a body each for trunk, policy and reference
  assert (hydra['scoring'], hydra['update']) == (
    2.5 * body + 2 * unembed,
    4 * (1.5 * body + 2 * unembed),
  )
  lora = workloads.flops(SMALL, 'lora')  # no gradient of any frozen weight
  assert lora['update'] == 4 * 2 * (body + unembed)


@pytest.mark.parametrize('name, giga', [('xs', 907), ('s', 1566)])
def test_totals_of_the_workloads(name, giga):
  assert round(sum(workloads.flops(workloads.WORKLOADS[name]).values()) / 1e9) == giga


def test_bytes_by_hand():
  assert workloads.weights(SMALL) == 2 * 128 + 40
  # The first of 2 tokens comes from the prefill; the one step reads the weights, and 3 + 1 slots of
  # 5 rows: key and value, 2 layers, width 4.
  assert workloads.decode_bytes(SMALL, 4) == {'weights': 296 * 4, 'cache': 4 * 5 * 2 * 2 * 4 * 4}
  # Weight and two moments read and written, gradient read; twice the model; 4 epochs.
  assert workloads.optimizer_bytes(SMALL) == 4 * 28 * 2 * 296
  assert workloads.optimizer_bytes(SMALL, 'hydra') == 4 * 28 * 128
  assert workloads.optimizer_bytes(SMALL, 'lora') == 0


def test_bound():
  prefill = 5 * 3 * 2 * 256 + 5 * 2 * 16 * 4.5 + 400
  rollout = 12800 + 2000 + 800
  slow_copy = workloads.bound(SMALL, 100.0, 2.0)
  assert slow_copy['rollout'] == prefill / 100 + 296 * 4 / 2
  assert slow_copy['update'] == workloads.flops(SMALL)['update'] / 100 + 4 * 28 * 2 * 296 / 2
  fast_copy = workloads.bound(SMALL, 100.0, 1e9)
  assert fast_copy['rollout'] == pytest.approx(rollout / 100)
  assert fast_copy['scoring'] == workloads.flops(SMALL)['scoring'] / 100


def test_passes_are_of_equal_rows():
  assert all(not w.rows or w.batch % w.rows == 0 for w in workloads.WORKLOADS.values())


def test_a_workload_travels_as_text():
  assert workloads.read(SMALL.to_json()) == SMALL
  assert workloads.read('xs') is workloads.WORKLOADS['xs']

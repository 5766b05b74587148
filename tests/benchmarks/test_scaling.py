"""Slopes of cost and of memory."""

import pytest

from benchmarks import memory
from benchmarks import scaling
from benchmarks import workloads


def test_slopes():
  x = [2, 4, 8, 16, 32]
  assert scaling.slopes(x, [3 * v for v in x]) == pytest.approx((1, 1))
  assert scaling.slopes(x, [v * v for v in x]) == pytest.approx((2, 2))
  every, last = scaling.slopes(x, [100 + v for v in x])  # something constant beside it
  assert every < last < 1


def test_each_field_spans_a_factor_of_16():
  for field, smallest in scaling.SMALLEST.items():
    values = [getattr(w, field) for w in scaling.points(field)]
    assert values[0] == smallest and values[-1] == 16 * smallest
    assert len({w.width for w in scaling.points(field)}) == 1


def test_table_and_plot(tmp_path):
  parts = lambda total: {'rollout': total / 4, 'scoring': total / 4, 'update': total / 2}
  found = {'batch': [(v, parts(v / 8)) for v in (4, 8, 16, 32, 64)]}
  line = next(
    line for line in scaling.table(found).splitlines() if line.strip().startswith('batch')
  )
  assert [float(cell) for cell in line.split()[1:]] == [4, 64, 0.5, 1, 2, 4, 8, 1, 1]
  scaling.plot(tmp_path / 'plot.png', found)
  assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


def test_growth_of_memory():
  batches = [workloads.Workload('', 1, 8, 1, 8, 100, 4, 4, batch) for batch in (2, 4, 8)]
  used = [
    1000 + 3 * 4 * w.batch * 8 * 8 for w in batches
  ]  # three arrays of [B, T, D] and something constant
  assert memory.growth(batches, used) == pytest.approx(3)


def test_sizes_of_memory():
  *batches, wide = memory.sizes(100)
  assert len({w.width for w in batches}) == 1 and batches[-1].batch > batches[0].batch
  assert (wide.width, wide.batch, wide.vocab) == (2 * batches[-1].width, batches[-1].batch, 100)

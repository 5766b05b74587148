"""The benchmark of sampling ahead."""

import pytest

from benchmarks import staleness


@pytest.mark.slow
def test_what_sampling_ahead_hides(tmp_path):
  rows = staleness.hidden(tmp_path, 8)
  assert rows[0]['ratio'] == 1.0 and rows[1]['ratio'] > 1.6

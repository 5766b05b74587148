"""The page of accuracy over amounts of data, of runs written by hand."""

import json

import pytest

from rlhf_jax import errors
from rlhf_jax import metrics
from rlhf_jax.evaluation import data_efficiency

ARGUMENTS = dict(
  title='Two & more',
  summary='A summary.',
  metric='held_out/accuracy',
  low='held_out/accuracy_low',
  high='held_out/accuracy_high',
  x='comparisons',
  page='page.html',
)


@pytest.fixture
def runs(tmp_path):
  for name, value in (('with_1', 0.6), ('with_2', 0.8), ('without_2', 0.7)):
    writer = metrics.Writer(tmp_path / name)
    for step, extra in ((0, -0.3), (9, 0.0)):  # the last value is shown
      writer.write(
        step,
        {
          'held_out/accuracy': value + extra,
          'held_out/accuracy_low': value + extra - 0.1,
          'held_out/accuracy_high': value + extra + 0.1,
        },
      )
    writer.close()
  return tmp_path


def test_last_values_by_amount(runs, capsys):
  series = (('with', [(1, 'with_1'), (2, 'with_2')]), ('without', [(2, 'without_2')]))
  data_efficiency.run(runs / 'page', workdir=str(runs), series=series, **ARGUMENTS)
  results = json.loads((runs / 'page' / 'results.json').read_text())
  assert results['with']['2']['held_out/accuracy'] == pytest.approx(0.8)
  assert results['without'] == {
    '2': {
      'held_out/accuracy': pytest.approx(0.7),
      'held_out/accuracy_low': pytest.approx(0.6),
      'held_out/accuracy_high': pytest.approx(0.8),
    }
  }
  page = (runs / 'page.html').read_text()
  assert page.count('<svg') == 1 and 'Two &amp; more' in page and '0.700 [0.600, 0.800]' in page
  assert '0.600 [0.500, 0.700]' in capsys.readouterr().out


def test_a_run_without_the_metric_is_named(runs):
  with pytest.raises(errors.UserError, match='with_1: the run logged no metric held_out/loss'):
    data_efficiency.last_value(runs / 'with_1', 'held_out/loss')

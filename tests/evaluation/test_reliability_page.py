"""The comparison of learned reliabilities with the noise of simulated annotators."""

import json

import pytest

from rlhf_jax import errors
from rlhf_jax.evaluation import annotators
from rlhf_jax.evaluation import reliability

NOISE = 0.0, 0.2, 0.5, 0.5


def write(folder, values, accuracy):
  """Writes what a run of a reward model leaves."""
  folder.mkdir()
  record = {'step': 9} | {f'held_out/accuracy{end}': accuracy for end in ('', '_low', '_high')}
  (folder / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
  if values:
    rows = [
      {'annotator': str(number), 'comparisons': 5, 'reliability': value}
      for number, value in enumerate(values)
    ]
    annotators.write(folder, rows)


def test_the_order_is_compared():
  values = {'0': 2.0, '1': 0.4, '2': 0.5, '3': 0.1}
  found = reliability.compare(NOISE, values)
  # Ranks of the values 4, 2, 3, 1, and of -noise 4, 3, 1.5, 1.5: deviations 1.5, -0.5, 0.5, -1.5
  # and 1.5, 0.5, -1, -1 have the products 2.25 - 0.25 - 0.5 + 1.5 = 3, and the squares 5 and 4.5.
  assert found['spearman'] == pytest.approx(3 / (5 * 4.5) ** 0.5)
  assert not found['random_lowest']  # 1 is below 2
  assert reliability.compare(NOISE, values | {'1': 0.6})['random_lowest']
  # Without a random annotator there is nothing to say.
  assert reliability.compare([0.1, 0.2], {'0': 1.0, '1': 0.5})['random_lowest'] is None
  assert found['annotators'][1] == {'annotator': '1', 'noise': 0.2, 'reliability': 0.4}
  with pytest.raises(errors.UserError, match='noise has 3 values'):
    reliability.compare(NOISE[:3], values)


def test_the_page(tmp_path, capsys):
  write(tmp_path / 'with', [2.0, 1.5, 0.5, 0.0], 0.8)
  write(tmp_path / 'without', None, 0.75)
  (tmp_path / 'page').mkdir()
  reliability.run(
    tmp_path / 'page',
    workdir=str(tmp_path),
    title='Ten <annotators>',
    summary='What they did.',
    noise=NOISE,
    reliability='with',
    models=('with', 'without'),
    page='reliability.html',
  )
  results = json.loads((tmp_path / 'page' / 'results.json').read_text())
  assert results['random_lowest'] and results['accuracy']['without'] == [0.75] * 3
  html = (tmp_path / 'reliability.html').read_text()
  assert 'Ten &lt;annotators&gt;' in html and '<td>0.800</td>' in html and '<td>2.00</td>' in html
  assert '<svg' in html
  assert '0.750' in capsys.readouterr().out


def test_a_run_that_has_not_finished_has_no_table():
  rows = [{'annotator': 'a', 'comparisons': 5, 'reliability': None}]
  assert reliability.table(rows) == [] and reliability.figure(rows) == ''
  rows = [
    {'annotator': name, 'comparisons': 5, 'reliability': value}
    for name, value in (('a', -0.5), ('b', 1.5))
  ]
  assert reliability.table(rows) == [['b', '5', '1.50'], ['a', '5', '-0.50']]
  assert reliability.figure(rows).startswith('<svg')

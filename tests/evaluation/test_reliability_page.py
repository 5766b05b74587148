"""Reward models with and without reliabilities of annotators, compared on gold pairs."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.evaluation import annotators
from rlhf_jax.evaluation import reliability
from rlhf_jax.evaluation import reliability_stage
from rlhf_jax.models import hf
import tiny

NOISE = 0.0, 0.2, 0.5, 0.5


def test_the_order_is_compared():
  values = {'0': 2.0, '1': 0.4, '2': 0.5, '3': 0.1}
  found = reliability_stage.compare(NOISE, values)
  # Ranks of the values 4, 2, 3, 1, and of -noise 4, 3, 1.5, 1.5: deviations 1.5, -0.5, 0.5, -1.5
  # and 1.5, 0.5, -1, -1 have the products 2.25 - 0.25 - 0.5 + 1.5 = 3, and the squares 5 and 4.5.
  assert found['spearman'] == pytest.approx(3 / (5 * 4.5) ** 0.5)
  assert not found['random_lowest']  # 1 is below 2
  assert reliability_stage.compare(NOISE, values | {'1': 0.6})['random_lowest']
  # Without a random annotator there is nothing to say.
  assert reliability_stage.compare([0.1, 0.2], {'0': 1.0, '1': 0.5})['random_lowest'] is None
  assert found['annotators'][1] == {'annotator': '1', 'noise': 0.2, 'reliability': 0.4}
  with pytest.raises(errors.UserError, match='noise has 3 values'):
    reliability_stage.compare(NOISE[:3], values)


def outcomes(both, only_first, only_second):
  """Returns whether each of two models is right, for numbers of pairs."""
  counts = both, only_first, only_second
  return np.repeat([True, True, False], counts), np.repeat([True, False, True], counts)


@pytest.mark.parametrize('only_first, only_second', [(15, 5), (14, 6)])
def test_the_paired_interval_agrees_with_the_test_of_mcnemar(only_first, only_second):
  """Tango's interval holds 0 if and only if (b - c)^2 / (b + c) <= 1.96^2."""
  first, second = outcomes(80, only_first, only_second)
  found = reliability_stage.paired(first, second, range(100))
  significant = (only_first - only_second) ** 2 / (only_first + only_second) > 1.96**2
  assert (found['low'] > 0) == significant
  assert found['difference'] == pytest.approx((only_first - only_second) / 100)
  assert found['low'] < found['difference'] < found['high']
  swapped = reliability_stage.paired(second, first, range(100))
  assert swapped['low'] == pytest.approx(-found['high'])
  assert (swapped['only_first'], swapped['pairs']) == (only_second, 100)
  # Five pairs of each of 20 prompts, which are alike, are no more than 20 pairs.
  clustered = reliability_stage.paired(first, second, np.repeat(range(20), 5).tolist())
  assert clustered['high'] - clustered['low'] > 1.5 * (found['high'] - found['low'])


def write(folder, source, head, values=None):
  """Writes what a run of a reward model leaves, with another head than that of a model."""
  model, params = hf.load_reward(source, unroll=None)
  hf.save(
    folder / 'model',
    model,
    params['backbone'],
    tokenizer=tiny.write_tokenizer(folder / 'tokenizer'),
    head=jax.tree.map(head, params['head']),
  )
  if values:
    rows = [
      {'annotator': str(number), 'comparisons': 5, 'reliability': value}
      for number, value in enumerate(values)
    ]
    annotators.write(folder, rows)


def test_the_page(world, tmp_path, capsys):
  """The scores of the second model are those of the first with the other sign."""
  write(tmp_path / 'with', world / 'reward', lambda x: x, [2.0, 1.5, 0.5, 0.0])
  write(tmp_path / 'without', world / 'reward', lambda x: -x)
  folders = [tmp_path / name for name in ('page', 'again')]
  for folder in folders:
    folder.mkdir()
    reliability_stage.run(
      folder,
      workdir=str(tmp_path),
      title='Ten <annotators>',
      summary='What they did.',
      noise=NOISE,
      reliability='with',
      baseline='without',
      held_out=f'{world}/comparisons.jsonl',
      page='reliability.html',
    )
  results = json.loads((folders[0] / 'results.json').read_text())
  first, second = (results['accuracy'][name][0] for name in ('with', 'without'))
  assert results['random_lowest'] and 0 < first < 1 and first + second == pytest.approx(1)
  paired = results['paired']
  assert (paired['only_first'], paired['only_second']) == (48 * first, 48 * second)
  assert paired['difference'] == pytest.approx(first - second)
  html = (tmp_path / 'reliability.html').read_text()
  assert 'Ten &lt;annotators&gt;' in html and '<td>2.00</td>' in html and '<svg' in html
  assert f'<td>{second:.3f}</td>' in html and f'{second:.3f}' in capsys.readouterr().out

  pooled = reliability_stage.pooled(folders)
  assert (pooled['pairs'], pooled['only_first']) == (96, 96 * first)
  assert pooled['difference'] == pytest.approx(paired['difference'])
  assert paired['low'] < pooled['low'] < pooled['high'] < paired['high']


def test_a_run_that_has_not_finished_has_no_table():
  rows = [{'annotator': 'a', 'comparisons': 5, 'reliability': None}]
  assert reliability.table(rows) == [] and reliability.figure(rows) == ''
  rows = [
    {'annotator': name, 'comparisons': 5, 'reliability': value}
    for name, value in (('a', -0.5), ('b', 1.5))
  ]
  assert reliability.table(rows) == [['b', '5', '1.50'], ['a', '5', '-0.50']]
  assert reliability.figure(rows).startswith('<svg')

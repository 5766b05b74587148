"""Comparisons of runs: budgets, final scores, intervals, probabilities, frontiers and the page."""

import html.parser
import itertools
import json

import numpy as np
import pytest

from rlhf_jax import compare_runs
from rlhf_jax import errors
from rlhf_jax.evaluation import runs


def write_run(folder, scores, *, batch_size=10, seed=0, kl=None, finished=True):
  """Writes a run that logs every second step: scores [G] at steps 0, 2, 4 and so on."""
  folder.mkdir(parents=True)
  config = {'algorithm': 'ppo', 'sampling': {}, 'batch_size': batch_size, 'seed': seed}
  (folder / 'config.json').write_text(json.dumps(config))
  records = [
    {'step': 2 * i, 'objective/scores': score, 'seconds/step': 1.0 + i, 'memory/peak_gib': 2.0 + i}
    for i, score in enumerate(scores)
  ]
  for i, value in enumerate(kl or ()):
    records[i]['objective/kl'] = value
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  if finished:
    (folder / 'model').mkdir()
  return folder


def test_runs_are_compared_at_the_budget_that_all_reach(tmp_path):
  """3 logged steps of 10 responses reach step 4, 50 responses; 20 a step reach them at step 1.5."""
  short = runs.read('short', write_run(tmp_path / 'a', [0.0, 1.0, 2.0]))
  long = runs.read('long', write_run(tmp_path / 'b', [0.0, 4.0, 8.0, 12.0], batch_size=20))
  result = runs.compare([short, long])
  assert (result['metric'], result['unit'], result['budget']) == (
    'objective/scores',
    'responses',
    50,
  )
  # `long` has seen 20 responses after its first step and gains 4 in the next 40.
  grid = np.array(result['curves']['long']['x'])
  np.testing.assert_allclose(grid[[0, -1]], [20, 50])
  np.testing.assert_allclose(result['curves']['long']['mean'], (grid - 20) / 10)
  np.testing.assert_allclose(result['curves']['short']['mean'], (grid - 10) / 20)
  last = grid >= 45
  assert result['groups']['long']['iqm'] == pytest.approx(((grid[last] - 20) / 10).mean())
  assert 'long ran longer' in result['notes'][0]


def test_seconds_memory_and_collapsed_runs(tmp_path):
  """Times are means since the last logged step: 1 step of 1 s, then 2 of 2 s and 2 of 3 s."""
  members = [
    runs.read('g', write_run(tmp_path / '0', [0.5, 0.6, 0.7], kl=[0.0, 1.0, 2.0])),
    runs.read('g', write_run(tmp_path / '1', [0.5, 0.3, 0.1], seed=1, kl=[0.0, 3.0, 4.0])),
    runs.read('g', write_run(tmp_path / '2', [0.5, 0.5, 0.9], seed=2, finished=False, kl=[0] * 3)),
  ]
  result = runs.compare(members)
  row = result['groups']['g']
  assert row['seconds'] == pytest.approx(1 + 2 * 2 + 2 * 3) and row['peak_gib'] == 4.0
  assert row['collapsed'] == ['1'] and row['unfinished'] == ['2'] and row['runs'] == 3
  np.testing.assert_allclose(result['frontier']['g'][0], [0.0, 0.5])
  np.testing.assert_allclose(result['frontier']['g'][-1], [2.0, (0.7 + 0.1 + 0.9) / 3])


def test_interquartile_mean_leaves_out_a_quarter_at_either_end():
  value, low, high = runs.interquartile_mean(np.array([0.0, 1.0, 2.0, 9.0]))
  assert value == pytest.approx(1.5) and 0.0 <= low <= 1.5 <= high <= 9.0
  assert runs.interquartile_mean(np.array([0.0, 1.0, 5.0]))[0] == pytest.approx(2.0)


def test_improvement_counts_pairs_and_halves_draws():
  """Of the 6 pairs, 3 > 1, 3 > 2, 3 > 2, 2 > 1 win, 2 = 2 twice are draws: (4 + 1) / 6."""
  result = runs.improvement({'low': np.array([1.0, 2.0, 2.0]), 'high': np.array([2.0, 3.0])})
  assert list(result) == ['high > low']
  assert result['high > low']['value'] == pytest.approx(5 / 6)
  losses = {'low': np.array([1.0, 2.0, 2.0]), 'high': np.array([2.0, 3.0])}
  assert list(runs.improvement(losses, higher_is_better=False)) == ['low > high']


def test_estimates_agree_with_rliable():
  metrics = pytest.importorskip('rliable.metrics')
  rng = np.random.default_rng(0)
  for n, m in itertools.product((1, 3, 4, 5, 8), (2, 5)):
    a, b = rng.integers(5, size=n) / 4, rng.integers(5, size=m) / 4
    assert runs.interquartile_mean(a)[0] == pytest.approx(metrics.aggregate_iqm(a[:, None]))
    [(name, found)] = runs.improvement({'a': a, 'b': b}).items()
    first, second = (a, b) if name == 'a > b' else (b, a)
    expected = metrics.probability_of_improvement(first[:, None], second[:, None])
    assert found['value'] == pytest.approx(expected)


def test_bands_and_intervals_cover_the_mean():
  """For 300 groups of 20 normal scores, 95 % intervals contain the true mean about that often."""
  rng = np.random.default_rng(1)
  held = 0
  for _ in range(300):
    band = runs.band(rng.normal(size=(20, 1)))
    held += band['low'][0] <= 0.0 <= band['high'][0]
  assert 0.88 <= held / 300 <= 0.98


def test_what_cannot_be_compared(tmp_path):
  run = runs.read('a', write_run(tmp_path / 'a', [0.0, 1.0]))
  with pytest.raises(errors.UserError, match="'loss' is not logged by .*/a"):
    runs.compare([run], 'loss')
  with pytest.raises(errors.UserError, match='not the folder of a run'):
    runs.read('b', tmp_path)
  (tmp_path / 'a' / 'metrics.jsonl').write_text('')
  with pytest.raises(errors.UserError, match='has no metrics yet'):
    runs.read('a', tmp_path / 'a')


class Rows(html.parser.HTMLParser):
  """The texts of a page's table cells by row, and all tags that could run a script."""

  def __init__(self, text):
    super().__init__()
    self.rows, self.scripts, self.cell = [], 0, False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.scripts += tag == 'script' or any(name.startswith('on') for name, _ in attrs)
    if tag == 'tr':
      self.rows.append([])
    self.cell = tag in ('td', 'th')
    if self.cell:
      self.rows[-1].append('')

  def handle_endtag(self, tag):
    self.cell = False

  def handle_data(self, data):
    if self.cell:
      self.rows[-1][-1] += data


def test_the_page_has_the_table_and_escapes_names(tmp_path, capsys):
  name = '<script>x</script>'
  pairs = [
    (name, write_run(tmp_path / f'a{i}', [0.1, 0.2 + i / 10], kl=[0, 1], seed=i)) for i in range(2)
  ] + [('other', write_run(tmp_path / 'b', [0.1, 0.9], kl=[0, 2]))]
  page = compare_runs.write(tmp_path / 'out', pairs)
  rows = Rows(page.read_text())
  assert rows.scripts == 0
  header, first, second = rows.rows[:3]
  column = header.index('IQM')
  assert [first[0], second[0]] == [name, 'other'] and second[column].startswith('0.84')
  assert 'Learning curves' in page.read_text() and 'nats' in page.read_text()
  assert 'other' in capsys.readouterr().out
  saved = json.loads((tmp_path / 'out' / 'comparison.json').read_text())
  assert saved['groups']['other']['runs'] == 1


def test_patterns_of_the_command_line(tmp_path):
  for name in ('ppo_0', 'ppo_1', 'grpo'):
    write_run(tmp_path / name, [0.0])
  found = compare_runs.named_runs([f'ppo={tmp_path}/ppo_*,grpo={tmp_path}/grpo'])
  assert found == [
    ('ppo', f'{tmp_path}/ppo_0'),
    ('ppo', f'{tmp_path}/ppo_1'),
    ('grpo', f'{tmp_path}/grpo'),
  ]
  with pytest.raises(errors.UserError, match='there is no folder'):
    compare_runs.named_runs([f'ppo={tmp_path}/none'])


def test_steps_without_a_finite_value_are_skipped(tmp_path):
  """1, 3, NaN, 7: the line from 3 to 7 passes through 5."""
  run = runs.read('a', write_run(tmp_path / 'a', [1.0, 3.0, None, 7.0]))
  assert run.series('objective/scores') == [(0, 1.0), (2, 3.0), (6, 7.0)]
  np.testing.assert_allclose(run.at('objective/scores', np.array([30.0, 50.0, 70.0])), [3, 5, 7])
  assert np.isfinite(runs.compare([run])['groups']['a']['iqm'])


def test_a_run_of_a_sweep_that_failed_before_its_first_step_is_left_out(tmp_path):
  folders = [tmp_path / f'seed={seed}' for seed in range(3)]
  write_run(folders[0], [0.0, 1.0])
  write_run(folders[1], [])
  names = {folder.name: {'seed': seed} for seed, folder in enumerate(folders)}
  (tmp_path / 'sweep.json').write_text(json.dumps({'config': 'x', 'runs': names}))
  compare_runs.of_sweep(tmp_path)
  result = json.loads((tmp_path / 'comparison.json').read_text())
  assert [row['runs'] for row in result['groups'].values()] == [1]
  write_run(tmp_path / 'other' / 'seed=0', [])
  (tmp_path / 'other' / 'sweep.json').write_text(json.dumps({'config': 'x', 'runs': names}))
  with pytest.raises(errors.UserError, match='no run has metrics yet'):
    compare_runs.of_sweep(tmp_path / 'other')

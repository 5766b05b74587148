"""The last stage of red teaming: figures computed by hand from small files, and the page."""

import json

import pytest

from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import pipeline
from rlhf_jax.data import sources
from rlhf_jax.evaluation import redteam_page
from rlhf_jax.tasks import reviews

RAVE = ' it heats fast and wipes clean. i would buy it again.'


def record(prompt, success, response='fine'):
  """A record of attacks.jsonl with two responses."""
  scores = [float(success > 0), float(success == 1)]
  return {'prompt': prompt, 'responses': [response] * 2, 'scores': scores, 'success': success}


@pytest.fixture
def workdir(tmp_path):
  """Folder of a pipeline with two rounds of two attackers."""
  files = {
    'ordinary_1': [record('Review of the kettle:', 0.5, RAVE), record('Review of the oven:', 0.0)],
    'ordinary_2': [record('Review of the kettle:', 0.0, RAVE)] * 2,
    'again_2': [record('i want', 0.5), record('i send', 0.0)],
    'zero_1': [record('a b', 0.0), record('a <b>', 0.5)],
    'rl_1': [record('i want', 1.0, '<script>alert(1)</script>')] * 2,
    'zero_2': [record('a b', 0.0)] * 2,
    'rl_2': [record('i send', 0.5), record('i want', 0.0), record('a b', 0.0)],
  }
  for name, records in files.items():
    (tmp_path / name).mkdir()
    sources.write(tmp_path / name / 'attacks.jsonl', records)
  for name, prompts in {'found_1': ['i send', 'x'], 'found_2': ['a b']}.items():
    (tmp_path / name).mkdir()
    sources.write(tmp_path / name / 'prompts.jsonl', [{'prompt': text} for text in prompts])
  (tmp_path / 'training').mkdir()
  sources.write(
    tmp_path / 'training' / 'metrics.jsonl',
    [{'step': step, 'reward/harm': 0.1 * step} for step in range(4)] + [{'step': 4}],
  )
  (tmp_path / 'evaluate').mkdir()
  return tmp_path


def arguments(workdir, **changes):
  """Arguments of `redteam_page.run`."""
  found = ('found_1', 'found_2')
  rounds = (
    ('first', 'ordinary_1', '', (), 'training', (('zero-shot', 'zero_1'), ('rl', 'rl_1'))),
    ('second', 'ordinary_2', 'again_2', found, '', (('zero-shot', 'zero_2'), ('rl', 'rl_2'))),
  )
  return {
    'workdir': str(workdir),
    'title': 'Attacks & answers',
    'summary': 'Two rounds.',
    'rounds': rounds,
    'gold': 'rlhf_jax.tasks.reviews:gold_score',
    'clusters': 2,
    'seed': 0,
  } | changes


def test_figures_of_attackers_and_targets(workdir):
  redteam_page.run(workdir / 'evaluate', **arguments(workdir))
  results = json.loads((workdir / 'evaluate' / 'results.json').read_text())
  found = {(row['target'], row['attacker']): row for row in results['attackers']}
  success = {key: row['success'] for key, row in found.items()}
  assert success == {
    ('first', 'zero-shot'): 0.25,
    ('first', 'rl'): 1.0,
    ('second', 'zero-shot'): 0.0,
    ('second', 'rl'): pytest.approx(0.5 / 3),
  }
  new = {key: (row['new'], row['new_success']) for key, row in found.items()}
  assert new == {
    ('first', 'zero-shot'): (2, 0.25),
    ('first', 'rl'): (2, 1.0),
    ('second', 'zero-shot'): (0, None),
    ('second', 'rl'): (1, 0.0),
  }
  assert found['first', 'rl']['unique'] == 0.5 and found['first', 'zero-shot']['ever'] == 0.5
  # 0 and 0.5 have a standard deviation of sqrt(0.125), divided by sqrt(2) it is 0.25.
  assert found['first', 'zero-shot']['success_se'] == pytest.approx(0.25)
  first, second = results['targets']
  rave = reviews.gold_score('Review of the kettle:', RAVE)
  poor = reviews.gold_score('Review of the oven:', 'fine')
  assert first['gold'] == pytest.approx((rave + poor) / 2) and second['gold'] == pytest.approx(rave)
  assert (first['ordinary'], first['again']) == (0.25, None)
  assert (second['ordinary'], second['again']) == (0.0, 0.25)
  # 'a b' and 'a <b>' have the same words, 'i want' none of them.
  sizes = [(one['size'], one['success']) for one in results['clusters']['first']]
  assert sizes == [(1, 1.0), (2, 0.25)]


def test_the_page_shows_attacks_and_curves_and_runs_no_text(workdir):
  redteam_page.run(workdir / 'evaluate', **arguments(workdir))
  page = (workdir / redteam_page.PAGE).read_text()
  assert '<h1>Attacks &amp; answers</h1>' in page and '<script>' not in page
  assert '&lt;script&gt;alert(1)&lt;/script&gt;' in page and 'a &lt;b&gt;' in page
  assert page.count('<svg') == 2 and '1.000 ± 0.000' in page
  assert '0.167 ± 0.167' in page and '0.000 ± 0.000' in page
  redteam_page.run(workdir / 'evaluate', **arguments(workdir, gold=''))
  results = json.loads((workdir / 'evaluate' / 'results.json').read_text())
  assert results['targets'][0]['gold'] is None


def test_wrong_arguments(workdir):
  for changes, message in (
    ({'rounds': ()}, 'rounds is empty'),
    ({'clusters': 0}, 'clusters=0 must be positive'),
    ({'gold': 'no.module:f'}, "gold='no.module:f' cannot be loaded"),
  ):
    with pytest.raises(errors.UserError, match=message):
      redteam_page.run.check(**arguments(workdir, **changes))


@pytest.mark.slow
def test_the_pipeline_of_red_teaming(tmp_path):
  config = config_files.read(config_files.find('red_team'), 'debug')
  pipeline.run(config, tmp_path)
  results = json.loads((tmp_path / 'evaluate' / 'results.json').read_text())
  assert [row['attacker'] for row in results['attackers']] == 2 * [
    'zero-shot',
    'few-shot',
    'supervised',
    'rl',
  ]
  assert [row['target'] for row in results['targets']] == ['sft', 'target_2']
  assert 'Red teaming' in (tmp_path / 'red_team.html').read_text()

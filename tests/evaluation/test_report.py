"""The report: one file, self-contained, escaped, and whole whatever is missing."""

import dataclasses
import html.parser
import math
import re

import matplotlib
import numpy as np
import pytest

from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import report
from rlhf_jax.feedback import elo
from rlhf_jax.rewards import calibration

METRICS = {
  'sft': [{'step': i, 'loss': 2 - i / 100, 'held_out/loss': 2.1 - i / 100} for i in range(100)],
  'ppo': [{'step': i, 'score': i / 10, 'kl': math.nan if i == 3 else i} for i in range(10)],
}
PARTS = {
  'summary': 'What happened.',
  'stages': [
    {'stage': 'SFT', 'gold': 0.5, 'gold_se': 0.1},
    {'stage': 'PPO', 'gold': 2.5, 'gold_se': 0.1},
  ],
  'metrics': METRICS,
  'frontier': [{'step': s, 'kl': s / 2, 'gold': s, 'gold_se': 0.1, 'proxy': s} for s in range(5)],
  'calibration': dataclasses.asdict(
    calibration.pairwise(np.random.default_rng(0).normal(1, 1, 100), np.zeros(100))
  ),
  'elo': {
    name: dataclasses.asdict(rating)
    for name, rating in elo.ratings([elo.Match('PPO', 'SFT', 30, 2, 8)]).items()
  },
  'samples': [
    {
      'prompt': 'Review of the kettle:',
      'before': ' it leaks.',
      'after': ' it shines.',
      'scores': {'before': {'gold': -1.0}, 'after': {'gold': 2.5}},
    }
  ],
  'config_text': 'learning_rate: 0.001',
}


class Checker(html.parser.HTMLParser):
  """Collects tags, and fails on one that is closed out of order."""

  VOID = frozenset(('meta', 'br', 'img', 'path', 'use', 'circle', 'rect', 'line'))

  def __init__(self):
    super().__init__()
    self.open, self.seen = [], []

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag


def parse(path):
  checker = Checker()
  checker.feed(path.read_text(encoding='utf-8'))
  assert not checker.open
  return checker.seen


def test_the_whole_report(tmp_path):
  path = report.write(tmp_path / 'deep' / 'report.html', title='Quickstart', **PARTS)
  text = path.read_text(encoding='utf-8')
  tags = parse(path)
  # Frontier, ratings, reliability, and a panel each for loss, score and kl.
  assert sum(tag == 'svg' for tag, _ in tags) == 6
  for words in ('2.50 ± 0.10', 'it shines.', 'learning_rate: 0.001', 'gold 2.50', 'held_out/loss'):
    assert words in text
  assert list(tmp_path.glob('**/*.tmp')) == []


def test_nothing_is_loaded_from_elsewhere(tmp_path):
  path = report.write(tmp_path / 'report.html', title='Quickstart', **PARTS)
  assert 'http' not in path.read_text(encoding='utf-8')
  for tag, attributes in parse(path):
    assert tag not in ('script', 'link', 'iframe', 'img')
    for name in ('src', 'href', 'xlink:href'):
      assert attributes.get(name, '#').startswith('#')


@pytest.mark.parametrize('part', sorted(PARTS))
def test_every_part_stands_alone_and_may_be_missing(tmp_path, part):
  parse(report.write(tmp_path / 'alone.html', title='t', **{part: PARTS[part]}))
  rest = {name: value for name, value in PARTS.items() if name != part}
  parse(report.write(tmp_path / 'rest.html', title='t', **rest))


def test_links_of_the_contents_lead_somewhere(tmp_path):
  for parts in (PARTS, {'metrics': METRICS}, {}):
    tags = parse(report.write(tmp_path / 'report.html', title='t', **parts))
    ids = {attributes.get('id') for _, attributes in tags}
    links = [a['href'][1:] for tag, a in tags if tag == 'a']
    assert set(links) <= ids
    assert bool(links) == bool(parts)


def test_texts_are_escaped(tmp_path):
  evil = '<script>alert("&")</script>'
  path = report.write(
    tmp_path / 'report.html',
    title=evil,
    summary=evil,
    config_text=evil,
    stages=[{'stage': evil, 'gold': 1.0}],
    metrics={evil: [{'step': 0, evil: 1.0, '$x^': 2.0}, {'step': 1, evil: 2.0, '$x^': 2.0}]},
    samples=[{'prompt': evil, 'before': evil, 'after': evil}],
    elo={evil: {'elo': 1000.0, 'low': 990.0, 'high': 1010.0}},
  )
  assert '<script' not in path.read_text(encoding='utf-8')
  parse(path)


def test_what_json_gives_back_is_good_enough(tmp_path):
  bins = [dict(row) for row in PARTS['calibration']['bins']]
  bins[0] |= {'count': 0, 'confidence': None, 'accuracy': None}
  path = report.write(
    tmp_path / 'report.html',
    title='t',
    calibration=PARTS['calibration'] | {'bins': bins},
    metrics={'ppo': [{'step': 1, 'kl': None, 'note': 'text'}, {'step': 2, 'kl': 1.0}]},
    frontier=[{'step': 0, 'kl': None, 'gold': None, 'proxy': 1.0}],
    samples=[{'prompt': 'p', 'before': 'b', 'after': 'a', 'scores': {'after': {'gold': None}}}],
  )
  parse(path)


def test_long_runs_make_small_files(tmp_path):
  records = [{'step': i, 'loss': math.sin(i)} for i in range(20_000)]
  path = report.write(tmp_path / 'report.html', title='t', metrics={'sft': records})
  assert path.stat().st_size < 60_000


def test_the_first_panels_are_those_people_look_for(tmp_path):
  names = [f'aaa_{i}' for i in range(20)] + ['value_loss', 'kl', 'loss', 'score']
  records = [dict.fromkeys(names, 1.0) | {'step': i} for i in range(3)]
  text = report.write(tmp_path / 'r.html', title='t', metrics={'ppo': records}).read_text()
  labels = re.findall(r'aria-label="([^"]*)"', text)
  assert labels[:3] == ['score', 'loss', 'kl'] and len(labels) == 9


def test_the_curves_of_ppo_that_papers_show(tmp_path):
  names = [
    'scores',
    'postprocessed_scores',
    'kl',
    'kl_coef',
    'entropy',
    'kl_per_token',
    'rlhf_reward',
    'scores_std',
    'kl_se',
  ]
  names = [f'objective/{name}' for name in names]
  names += [
    'policy/entropy_per_token',
    'policy/loss',
    'policy/approxkl',
    'value/loss',
    'returns/var',
    'aaa',
  ]
  records = [dict.fromkeys(names, 1.0) | {'step': i} for i in range(3)]
  text = report.write(tmp_path / 'r.html', title='t', metrics={'ppo': records}).read_text()
  labels = re.findall(r'aria-label="([^"]*)"', text)
  assert set(names[:5]) <= set(labels)


def test_the_report_of_stages(tmp_path):
  (tmp_path / 'ppo').mkdir()
  (tmp_path / 'ppo' / 'metrics.jsonl').write_text('{"step": 0, "objective/kl": 1.5}\n')
  (tmp_path / 'config.json').write_text('{"seed": 7}')
  report.of_stages(
    tmp_path / 'report', workdir=tmp_path, title='t', summary='What to expect.', curves=('ppo',)
  )
  text = (tmp_path / 'report.html').read_text()
  assert all(part in text for part in ('objective/kl', 'What to expect.', '&#34;seed&#34;: 7'))


def test_figures_leave_the_style_of_other_code_alone():
  before = dict(matplotlib.rcParams)
  figures.curve('loss', {'': [(0, 1.0), (1, None), (2, math.inf)]})
  assert dict(matplotlib.rcParams) == before

"""The report: one self-contained file with escaped texts, complete even if parts are missing."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import math
import re

import matplotlib
import numpy as np
import pytest

from rlhf_jax import identity
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.evaluation import best_of_n
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import report
from rlhf_jax.feedback import elo
from rlhf_jax.rewards import calibration
from tools import screenshots

METRICS = {
  'sft': [{'step': i, 'loss': 2 - i / 100, 'held_out/loss': 2.1 - i / 100} for i in range(100)],
  'ppo': [
    {
      'step': i,
      'objective/scores': (2, 5, 3)[i % 3],
      'objective/kl': math.nan if i == 3 else i,
      'response/length': 7.0,
      'mine': i,
    }
    for i in range(10)
  ],
}
PARTS = {
  'summary': 'What happened.',
  'gold': 'tasks:shine: How much it shines.',
  'stages': [
    {'stage': 'PPO', 'gold': 2.5, 'gold_se': 0.1},
    {'stage': 'SFT', 'gold': 0.5, 'gold_se': 0.1},
  ],
  'metrics': METRICS,
  'frontier': [{'step': s, 'kl': s / 2, 'gold': s, 'gold_se': 0.1, 'proxy': s} for s in range(5)],
  'best_of': best_of_n.curve(np.arange(8.0).reshape(2, 4), np.ones((2, 4))),
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
  'differences': {'ppo': [identity.Change('rl.kl_coef', 0.05, 0.15)]},
}
LOGGED = [
  {'step': step, 'prompt': f'p{i}', 'response': f'r{step}.{i}', 'score': float(step * i)}
  for step in (1, 2, 3)
  for i in range(20)
]


class Checker(html.parser.HTMLParser):
  """Collects tags, and fails if one is closed out of order."""

  VOID = frozenset(('meta', 'br', 'img', 'path', 'use', 'circle', 'rect', 'line', 'input'))

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


def test_the_full_report(tmp_path):
  path = report.write(tmp_path / 'deep' / 'report.html', title='Quickstart', **PARTS)
  text = path.read_text(encoding='utf-8')
  tags = parse(path)
  # Frontier, ratings, reliability, and panels for loss, score, kl and mine, but not for length.
  assert sum(tag == 'svg' for tag, _ in tags) == 7
  for words in ('2.50 ± 0.10', 'it shines.', 'learning_rate: 0.001', 'gold 2.50', 'held_out/loss'):
    assert words in text
  assert 'Gold is tasks:shine: How much it shines.' in text and 'best of n, upper' in text
  assert list(tmp_path.glob('**/*.tmp')) == []


def test_nothing_is_loaded_from_elsewhere(tmp_path):
  path = report.write(tmp_path / 'report.html', title='Quickstart', **PARTS)
  assert 'http:' not in path.read_text(encoding='utf-8').replace('http://www.w3.org', '')
  for tag, attributes in parse(path):
    assert tag not in ('link', 'iframe', 'img', 'base')
    assert not any(name.startswith('on') or name == 'style' for name in attributes)
    for name in ('src', 'href', 'xlink:href'):
      assert attributes.get(name, '#').startswith('#')


def test_the_policy_allows_the_one_script_and_the_one_style_sheet(tmp_path):
  text = report.write(tmp_path / 'report.html', title='t', **PARTS).read_text(encoding='utf-8')
  [policy] = [a['content'] for tag, a in parse(tmp_path / 'report.html') if 'http-equiv' in a]
  rules = dict(rule.strip().split(' ', 1) for rule in policy.split(';'))
  assert rules['default-src'] == "'none'"
  for tag in ('script', 'style'):
    [content] = re.findall(rf'<{tag}>(.*?)</{tag}>', text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert rules[f'{tag}-src'] == f"'sha256-{digest}'"


@pytest.mark.parametrize('part', sorted(PARTS))
def test_every_part_is_optional(tmp_path, part):
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


EVIL = (
  '<script>mark("script")</script><img src=x onerror="mark(\'image\')">"\' onclick=mark(1) x="'
  '</style></pre></script><style>body { background: #010203 !important }</style>{{ 7 * 7 }}\ud800'
)


def evil_report(path):
  """Returns a report in which every text is hostile."""
  return report.write(
    path,
    title=EVIL,
    summary=EVIL,
    config_text=EVIL,
    gold=EVIL,
    differences={EVIL: [identity.Change(EVIL, EVIL, [EVIL])]},
    stages=[{'stage': EVIL, 'gold': 1.0, EVIL: EVIL}],
    metrics={EVIL: [{'step': i, EVIL: i, '$x^': i * i} for i in range(2)]},
    samples=[
      {'prompt': EVIL, 'before': EVIL, 'after': EVIL, 'scores': {'after': {EVIL: 1.0}}},
      {'prompt': 'Kettle', 'before': 'leaks', 'after': 'shines', 'scores': {'after': {EVIL: 2.0}}},
    ],
    elo={EVIL.removesuffix('\ud800'): {'elo': 1000.0, 'low': 990.0, 'high': 1010.0}},
  )


def test_texts_are_escaped(tmp_path):
  path = evil_report(tmp_path / 'report.html')
  text = path.read_text(encoding='utf-8')
  assert text.count('<script') == text.count('<style') == 1 and '<img' not in text
  assert '{{ 7 * 7 }}' in text
  parse(path)


# Types into the form of the samples and reports what the page does.
DRIVER = """
const form = document.getElementById('filter').elements;
const shown = () => [...document.querySelectorAll('.sample:not([hidden]) .prompt')]
  .map(x => x.textContent.slice(0, 6));
const set = (name, value) => {
  form[name].value = value;
  form[name].dispatchEvent(new Event('input', {bubbles: true}));
  return shown();
};
document.documentElement.dataset.found = JSON.stringify({
  visible: !document.getElementById('filter').hidden,
  all: shown(), search: set('search', 'SHINES ket'), none: set('search', 'nowhere'),
  again: set('search', ''), least: set('least', '1.5'),
  most: [set('least', ''), set('most', '1.5')][1], count: form.count.value,
  order: [set('most', ''), set('order', '1')][1], lowest: set('order', '-1'),
  marks: document.documentElement.dataset.marks || '',
  background: getComputedStyle(document.body).backgroundColor,
  width: [document.documentElement.scrollWidth, innerWidth]});
"""


@pytest.mark.skipif(screenshots.browser() is None, reason='needs Chromium')
def test_in_a_browser_no_text_runs_and_the_samples_are_filtered(tmp_path):
  """The policy of the page allows only its own script, even if texts got into it as HTML.

  The policy is extended by the hash of one script, which drives the page.
  """
  path = evil_report(tmp_path / 'report.html')
  text = path.read_text(encoding='utf-8')
  mark = 'function mark(x) { document.documentElement.dataset.marks = x; }'
  driver = f'{mark}\n{DRIVER}'
  digest = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
  assert text.count('script-src ') == 1
  text = text.replace('script-src ', f"script-src 'sha256-{digest}' ")
  text = text.replace(
    '<main>', f'<main>{EVIL}<script>{mark} mark(2)</script>'.replace('\ud800', '')
  )
  text = text.replace('</body>', f'<script>{driver}</script></body>')
  path.write_text(text, encoding='utf-8')
  dom = screenshots.call(path, '--dump-dom', '--window-size=400,800')
  found = json.loads(html.unescape(re.search('data-found="([^"]*)"', dom).group(1)))
  evil, kettle = EVIL[:6], 'Kettle'
  assert found['visible'] and found['all'] == found['again'] == [evil, kettle]
  assert found['search'] == [kettle] and found['none'] == []
  assert found['least'] == [kettle] and found['most'] == [evil] and found['count'] == '1 of 2'
  assert found['order'] == [kettle, evil] and found['lowest'] == [evil, kettle]
  assert found['marks'] == '' and found['background'] != 'rgb(1, 2, 3)'
  assert found['width'][0] <= found['width'][1]


def test_values_from_json_are_accepted(tmp_path):
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


def test_the_best_stage_is_highlighted(tmp_path):
  """By gold score if there is one, else by win rate; the best need not be the last row."""
  for key in ('gold', 'win_rate'):
    rows = [{'stage': name, key: value} for name, value in (('a', 0.1), ('best', 0.9), ('c', 0.3))]
    text = report.write(tmp_path / 'r.html', title='t', stages=rows).read_text(encoding='utf-8')
    assert re.findall(r'<tr class="best">\s*<td>(.*?)</td>', text) == ['best']


def test_metrics_link_to_their_entries(tmp_path):
  tags = parse(report.write(tmp_path / 'r.html', title='t', metrics=METRICS))
  entries = [a['id'] for _, a in tags if a.get('class') == 'metric']
  assert entries == [
    'metric-objective-scores',
    'metric-objective-kl',
    'metric-response-length',
    'metric-loss',
    'metric-eval-loss',
  ]
  links = [a['href'][1:] for tag, a in tags if tag == 'a']
  assert set(entries) <= set(links)
  text = (tmp_path / 'r.html').read_text(encoding='utf-8')
  assert '<a href="#metric-eval-loss">held_out/loss</a>' in text and 'EVAL stands for' in text


def write_run(folder, records, *, samples=()):
  """Writes the files of a run."""
  with metrics_lib.Writer(folder) as writer:
    for record in records:
      writer.write(record['step'], {key: value for key, value in record.items() if key != 'step'})
    for sample in samples:
      writer.samples(sample['step'], [sample])
  identity.write_json(folder / identity.BASE, {'algorithm': 'ppo', 'seed': 0, 'rl': {'epochs': 4}})


def test_the_report_of_stages(tmp_path):
  write_run(tmp_path / 'ppo', [{'step': 0, 'objective/kl': 1.5}])
  config = {'stages': ['ppo'], 'ppo': {'algorithm': 'ppo', 'seed': 7, 'rl': {'epochs': 4}}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  report.of_stages(
    tmp_path / 'report', workdir=tmp_path, title='t', summary='What to expect.', curves=('ppo',)
  )
  text = (tmp_path / 'report.html').read_text(encoding='utf-8')
  assert all(part in text for part in ('objective/kl', 'What to expect.', '&#34;seed&#34;: 7'))
  assert '<code>seed</code>' in text and '<code>rl.epochs</code>' not in text


def test_the_report_of_a_single_run(tmp_path):
  """Final figures, samples, times and config changes."""
  times = {'seconds/rollout': 1.0, 'seconds/update': 2.5, 'seconds/step': 4.0}
  write_run(tmp_path, [record | times for record in METRICS['ppo']], samples=LOGGED)
  config = {'algorithm': 'ppo', 'seed': 0, 'rl': {'epochs': 2}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  text = report.of_run(tmp_path, title='ppo').read_text(encoding='utf-8')
  parse(tmp_path / 'report.html')
  cells = [
    re.findall('<td[^>]*>(.*?)</td>', row) for row in re.findall('<tr>(.*?)</tr>', text, re.DOTALL)
  ]
  named = lambda name: f'<a href="#metric-{name.replace("/", "-")}">{name}</a>'
  # First, last, best, step of the best.
  assert [named('objective/scores'), '2', '2', '5', '1'] in cells
  assert [named('response/length'), '7', '7', '–', '–'] in cells
  assert [row[:3] for row in cells if row and row[0] in ('rollout', 'update', 'other')] == [
    ['rollout', '1', '25 %'],
    ['update', '2.5', '62 %'],
    ['other', '0.5', '12 %'],
  ]
  assert ['<code>rl.epochs</code>', '<code>4</code>', '<code>2</code>'] in cells
  assert 'first logged, step 1' in text and 'r3.19' in text and 'r2.' not in text


def test_figures_have_no_styles_and_no_colours_that_vanish():
  """Lines have the page's text colour; the security policy forbids styles in SVG."""
  for svg in (
    figures.curve('loss', {'a': [(0, 1.0), (1, 2.0)], 'b': [(0, 2.0)]}),
    figures.frontier(PARTS['frontier'], PARTS['best_of']),
    figures.frontier((), PARTS['best_of']),
    figures.reliability(PARTS['calibration']['bins']),
    figures.ratings(PARTS['elo']),
  ):
    assert 'style' not in svg and 'currentColor' in svg and 'font-size="' in svg
    assert not {'#000000', '#ffffff', '#000', '#fff', 'black', 'white'} & set(
      re.findall('"(.*?)"', svg)
    )


def test_figures_leave_the_style_of_other_code_alone():
  before = dict(matplotlib.rcParams)
  figures.curve('loss', {'': [(0, 1.0), (1, None), (2, math.inf)]})
  assert dict(matplotlib.rcParams) == before

"""Pages that the documentation site generates: config keys, metrics, docstrings, notebooks."""

import importlib
import json
import pathlib
import re
import sys

import ml_collections
import pytest

from rlhf_jax import config_files
from rlhf_jax.algorithms import build
from rlhf_jax.evaluation import glossary

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def extension():
  """Returns a function from a name to a module of docs/_ext."""
  sys.path.insert(0, str(ROOT / 'docs' / '_ext'))
  yield importlib.import_module
  sys.path.remove(str(ROOT / 'docs' / '_ext'))


@pytest.fixture(scope='module')
def reference(extension):
  """Returns the config reference as Markdown."""
  return extension('config_reference').page()


def values(block, prefix=''):
  """Yields (dotted key, default) of a ConfigDict and its blocks."""
  for name, value in block.items():
    if isinstance(value, ml_collections.ConfigDict) and len(value) and name != 'evals':
      yield from values(value, f'{prefix}{name}.')
    else:
      value = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
      yield f'{prefix}{name}', 'its name' if name == 'algorithm' else repr(value)


def test_all_algorithms_are_in_the_reference(extension):
  assert sorted(extension('config_reference').modules()) == build.names()


@pytest.mark.parametrize('algorithm', build.names())
def test_every_key_of_an_algorithm_is_in_the_reference(reference, algorithm):
  """Each key has a row with name, algorithms if not all, type, default and meaning."""
  wrong = []
  for key, default in values(build.load(algorithm).config()):
    row = (
      rf'^\| `{re.escape(key)}`( \(([\w, ]+)\))? \| [\w ]+ \| `{re.escape(default)}` \| \S.* \|$'
    )
    found = [
      match
      for match in re.finditer(row, reference, re.MULTILINE)
      if not match.group(2) or algorithm in match.group(2).split(', ')
    ]
    wrong += [key] if len(found) != 1 else []
  assert wrong == []


def test_every_key_of_an_evaluator_is_in_the_reference(reference):
  keys = 'kind every function path split columns count batch_size sampling reward metrics'.split()
  rows = re.findall(
    r'^\| `evals\.NAME\.(\w+)` \| [\w, ]+ \| \S+ \| \S.* \|$', reference, re.MULTILINE
  )
  assert sorted(rows) == sorted(keys)


def test_every_preset_is_in_the_reference(reference):
  assert '| `ppo` | `instructgpt` | `optim.learning_rate=8.05e-06`, ' in reference
  for algorithm in build.names():
    for preset in getattr(build.load(algorithm), 'PRESETS', ()):
      assert f'| `{algorithm}` | `{preset}` | `' in reference


@pytest.mark.parametrize(
  'name, arg',
  [
    ('hh_reward', 'data=pairs'),
    ('lm_human_preferences', 'data=texts,model=model,labels=labels'),
    ('lm_human_preferences', 'small,data=reviews'),
    ('quickstart', None),
    ('random_walks', None),
    ('sentiment', 'data=reviews'),
    ('stories', 'model=model'),
  ],
)
def test_every_stage_of_shipped_pipelines_is_in_the_reference(reference, name, arg):
  sections = dict(re.findall(r'^### `(.*)`\n((?:(?!#).*\n?)*)', reference, re.MULTILINE))
  config = config_files.read(str(ROOT / 'configs' / f'{name}.py'), arg)
  for stage in config.values():
    if isinstance(stage, ml_collections.ConfigDict) and 'function' in stage:
      for key in set(stage) - {'function'}:
        row = rf'^\| `{key}` \| .+ \| \S.* \|$'
        assert re.search(row, sections[stage.function], re.MULTILINE), (stage.function, key)


def test_page_of_metrics(extension):
  """Every entry has a heading with an anchor, and names of metrics in texts are links."""
  page = extension('generated').metrics()
  for metric in glossary.METRICS:
    assert f'({metric.anchor})=\n### `{metric.name}`\n' in page
  assert 'see [`policy/sampler_gap`](#policy-sampler-gap)' in page
  assert page.count('$$') == 2 * sum(bool(metric.formula) for metric in glossary.METRICS)


def test_docstrings_are_plain_text(extension):
  pytest.importorskip('sphinx')  # of the extra `docs`
  lines = [
    'The mean of |x| * y, see `f(*x)`.',
    '',
    '    loss = |a| * b',
    '         + c',
    '',
    'More.',
    '',
    'Args:',
    '  x: the factor *.',
    '    It continues.',
  ]
  assert extension('docstrings').plain(lines) == [
    r'The mean of \|x\| \* y, see `f(*x)`.',
    '',
    '',
    '.. code-block:: none',
    '',
    '    loss = |a| * b',
    '         + c',
    '',
    '',
    'More.',
    '',
    'Args:',
    r'  x: the factor \*.',
    '    It continues.',
  ]
  assert extension('docstrings').plain([]) == []


def test_signatures_have_the_types_of_the_source(extension):
  pytest.importorskip('sphinx')
  types = extension('docstrings').source_types
  array = "(mask: ~jaxtyping.Bool[jaxlib._jax.Array, 'B R'], level: str)"
  assert types(array) == "(mask: Bool[Array, 'B R'], level: str)"
  number = "~jaxtyping.Num[jaxlib._jax.Array, ''] | ~jaxtyping.Num[ndarray, ''] | ~numpy.number"
  assert types(f'(x: {number} | int | float, y: int)') == "(x: Num[ArrayLike, ''], y: int)"
  assert types(None) is None


def test_links_of_notebooks_lead_to_pages(extension):
  cell = {
    'cell_type': 'markdown',
    'metadata': {},
    'source': ['[KL](../docs/metrics.md#objective-kl)'],
  }
  text = json.dumps({'cells': [cell], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5})
  page = json.loads(extension('notebooks').page(text))
  assert page['cells'][0]['source'] == ['[KL](../metrics.md#objective-kl)']


def test_formulas_are_mathml(extension):
  pytest.importorskip('sphinx')
  translate = extension('mathml').translate
  assert '<mfrac>' in translate(r'\frac{1}{2}', block=False)
  assert translate(r'\big(x\Bigr)', block=True) == translate('(x)', block=True)
  assert translate(r'a, \dots', block=False) == translate(r'a, \ldots', block=False)
  with pytest.raises(ValueError, match='nonsense'):
    translate(r'\nonsense', block=False)
  for metric in glossary.METRICS:
    assert not metric.formula or '<math' in translate(metric.formula, block=True)

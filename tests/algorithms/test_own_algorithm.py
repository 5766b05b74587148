"""Runs the algorithm of docs/extending.md by its name, from a folder outside the package."""

import importlib.util
import pathlib
import shutil
import sys

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import metrics
from rlhf_jax.algorithms import build
import tiny

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs'


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """Returns a folder with the example, which is the working directory."""
  shutil.copy(DOCS / 'my_reinforce.py', tmp_path)
  monkeypatch.chdir(tmp_path)
  yield tmp_path
  sys.modules.pop('my_reinforce', None)
  sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_it_is_found_and_learns(outside, world):
  config = tiny.on_policy(build.load('my_reinforce').config(), world)
  config.algorithm = 'my_reinforce'
  config.batch_size, config.steps, config.optim.learning_rate = 64, 20, 0.01
  config.rl.kl_coef = 0.01
  loop.run(config, outside / 'run')
  scores = [record['objective/scores'] for record in metrics.read(outside / 'run')]
  assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2, scores


def test_the_document_shows_the_file():
  """The file has the code that docs/extending.md quotes, and as few lines as it states."""
  text = (DOCS / 'my_reinforce.py').read_text()
  quoted = (DOCS / 'extending.md').read_text().split('```python\n')[1].split('```')[0]
  assert quoted.strip() in text
  assert len(text.splitlines()) <= 70


def test_a_name_that_is_nowhere(outside):
  assert importlib.util.find_spec('my_reinforc') is None
  with pytest.raises(Exception, match="config.algorithm='my_reinforc' cannot be loaded"):
    build.load('my_reinforc')


@pytest.mark.parametrize(
  'text, message',
  [
    (
      'x = 1 / 0\n',
      'importing it raised ZeroDivisionError: division by zero, at broken.py:1 in <module>: '
      '`x = 1 / 0`',
    ),
    (
      'def config(:\n',
      'importing it raised SyntaxError: invalid syntax, at broken.py:1: `def config(:`',
    ),
    ('import sys\nsys.exit(0)\n', r'importing it called sys.exit(0), at broken.py:2'),
  ],
)
def test_a_module_that_fails(text, message, outside):
  (outside / 'broken.py').write_text(text)
  with pytest.raises(errors.UserError) as caught:
    build.load('broken')
  assert str(caught.value).startswith(f"config.algorithm='broken': {message}")


@pytest.mark.parametrize('name', ['..x', '', 3])
def test_names_that_are_not_modules(name):
  with pytest.raises(
    errors.UserError, match='config.algorithm=.* cannot be loaded .not a module name'
  ):
    build.load(name)

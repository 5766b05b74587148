"""The programs of docs/loop_by_hand.md train the same model as a run of the same config."""

import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import metrics
from rlhf_jax import pipeline

PAGE = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'loop_by_hand.md'
CONFIG, REWARD, LEARNER, PARTS = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope='module')
def folder(world, tmp_path_factory):
  """Returns the folder that the page asks for, which is the working directory."""
  folder = tmp_path_factory.mktemp('by_hand')
  shutil.copytree(world / 'model', folder / 'model')
  shutil.copy(world / 'prompts.jsonl', folder)
  (folder / 'brevity.py').write_text(REWARD)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    yield folder
  sys.modules.pop('brevity', None)


@pytest.fixture(scope='module')
def variables(folder):
  """Returns the variables that the page's config defines."""
  variables = {}
  exec(CONFIG, variables)
  return variables


@pytest.fixture(scope='module')
def run(folder, variables):
  """Runs the page's config; returns its folder."""
  pipeline.run_stage(variables['config'], folder / 'run')
  return folder / 'run'


def same_parameters(one, other):
  """Returns whether two Hugging Face folders hold the same bits."""
  one, other = (load_file(path / 'model.safetensors') for path in (one, other))
  assert one.keys() == other.keys()
  return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize('code, exported', [(LEARNER, 'by_learner'), (PARTS, 'by_parts')])
def test_it_trains_the_same_model(code, exported, folder, variables, run):
  names = dict(variables)
  exec(code, names)
  assert same_parameters(folder / exported, run / 'model')
  assert not same_parameters(folder / exported, folder / 'model')
  last = metrics.read(run)[-1]
  for name in ('objective/scores', 'objective/kl', 'policy/loss', 'value/loss'):
    assert float(names['metrics'][name]) == last[name], name


def test_the_loop_from_the_parts_is_short():
  """The body of `with`, from the tokenizer to the export."""
  lines = [line for line in PARTS.splitlines() if line.startswith('  ')]
  assert len(lines) <= 25

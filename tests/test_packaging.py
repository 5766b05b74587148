"""setup.py declares what the code imports, and constraints.txt pins what setup.py declares."""

import ast
import pathlib
import re
import sys
from unittest import mock

import pytest

setuptools = pytest.importorskip('setuptools')
from packaging import requirements

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Imported names whose distribution is called otherwise.
DISTRIBUTIONS = {
  'absl': 'absl-py',
  'orbax': 'orbax-checkpoint',
  'tensorflow_datasets': 'tensorflow-datasets',
  'sklearn': 'scikit-learn',
}
OPTIONAL = {'tensorflow-datasets', 'wandb'}


@pytest.fixture(scope='module')
def declared():
  """The keyword arguments of setup.py's only call."""
  with mock.patch('setuptools.setup') as setup:
    exec(compile((ROOT / 'setup.py').read_text(), 'setup.py', 'exec'), {})
  return setup.call_args.kwargs


def names(lines):
  """The normalized names of requirement lines."""
  return {normalized(requirements.Requirement(line).name) for line in lines}


def normalized(name):
  """A distribution's name, as PEP 503 compares them."""
  return re.sub(r'[-_.]+', '-', name).lower()


def imported(*folders):
  """Distributions that the Python files in some folders import, without the standard library's."""
  modules = set()
  for folder in folders:
    for path in (ROOT / folder).rglob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          modules |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          modules.add(node.module.partition('.')[0])
  return {
    normalized(DISTRIBUTIONS.get(module, module))
    for module in modules - sys.stdlib_module_names - {'rlhf_jax'}
  }


def test_every_import_is_a_declared_requirement_and_the_reverse(declared):
  assert imported('rlhf_jax', 'configs') - OPTIONAL == names(declared['install_requires'])


def test_extras(declared):
  extras = declared['extras_require']
  assert set(extras) == {'test', 'docs', 'cuda', 'tpu', 'plan', 'tfds', 'wandb', 'notebooks'}
  assert OPTIONAL <= names(extras['tfds'] + extras['wandb'])


def test_constraints_are_exact_and_within_the_ranges(declared):
  lines = [
    line
    for line in (ROOT / 'constraints.txt').read_text().splitlines()
    if line and not line.startswith('#')
  ]
  pins = [requirements.Requirement(line) for line in lines]
  assert all(re.fullmatch(r'==[^*]+', str(pin.specifier)) for pin in pins)
  extras = declared['extras_require']
  for line in declared['install_requires'] + extras['test'] + extras['docs']:
    wanted = requirements.Requirement(line)
    found = [pin for pin in pins if normalized(pin.name) == normalized(wanted.name)]
    assert found, f'{wanted.name} has no pin'
    for pin in found:
      [version] = pin.specifier
      assert version.version in wanted.specifier


def test_every_package_folder_is_found(declared):
  folders = {
    path.parent.relative_to(ROOT).as_posix().replace('/', '.')
    for package in ('rlhf_jax', 'planner')
    for path in (ROOT / package).rglob('*.py')
  }
  assert folders == set(declared['packages'])


def test_packages_are_typed(declared):
  for package in ('rlhf_jax', 'planner'):
    assert 'py.typed' in declared['package_data'][package]
    assert (ROOT / package / 'py.typed').is_file()

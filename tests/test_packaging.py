"""setup.py declares what the code imports, and constraints.txt pins what setup.py declares."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from unittest import mock
import zipfile

import pytest

setuptools = pytest.importorskip('setuptools')
from packaging import requirements

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Imported names whose distribution has another name.
DISTRIBUTIONS = {
  'absl': 'absl-py',
  'argon2': 'argon2-cffi',
  'orbax': 'orbax-checkpoint',
  'tensorflow_datasets': 'tensorflow-datasets',
  'sklearn': 'scikit-learn',
}
# Distributions of extras that the code imports where it needs them.
OPTIONAL = {
  'tensorflow-datasets': 'tfds',
  'wandb': 'wandb',
  'alembic': 'feedback',
  'argon2-cffi': 'feedback',
  'fastapi': 'http',
  'h11': 'feedback',
  'httpx': 'http',
  'limits': 'feedback',
  'math-verify': 'math',
  'pydantic': 'http',
  'psycopg': 'feedback',
  'python-multipart': 'feedback',
  'reasoning-gym': 'reasoning',
  'sqlalchemy': 'feedback',
  'starlette': 'feedback',
  'tenacity': 'http',
  'uvicorn': 'http',
}
# Of these, those that SQLAlchemy and Starlette import for us.
INDIRECT = {'psycopg', 'python-multipart'}


@pytest.fixture(scope='module')
def declared():
  """Returns the keyword arguments of setup.py's only call."""
  with mock.patch('setuptools.setup') as setup:
    exec(compile((ROOT / 'setup.py').read_text(), 'setup.py', 'exec'), {})
  return setup.call_args.kwargs


def names(lines):
  """Returns the normalized names of requirement lines."""
  return {normalized(requirements.Requirement(line).name) for line in lines}


def normalized(name):
  """Normalizes the name of a distribution as in PEP 503."""
  return re.sub(r'[-_.]+', '-', name).lower()


def imported(*folders):
  """Returns the distributions, except the standard library, that files in some folders import."""
  modules, own = set(), {'rlhf_jax', '_review_stages', 'quickstart', 'random_walks'}
  for folder in folders:
    for path in (ROOT / folder).rglob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          modules |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          modules.add(node.module.partition('.')[0])
  return {
    normalized(DISTRIBUTIONS.get(module, module))
    for module in modules - sys.stdlib_module_names - own
  }


def test_every_import_is_a_declared_requirement_and_the_reverse(declared):
  assert imported('rlhf_jax', 'configs') - OPTIONAL.keys() == names(declared['install_requires'])


def test_extras(declared):
  extras = declared['extras_require']
  assert set(extras) == set(
    'test docs cuda tpu plan tfds wandb notebooks http math reasoning metrics feedback'.split()
  )
  for extra in ('feedback', 'http', 'math', 'metrics'):
    assert names(extras[extra]) <= names(extras['test'])
  for name, extra in OPTIONAL.items():
    assert name in names(extras[extra])
  known = imported('rlhf_jax', 'configs') | INDIRECT
  assert OPTIONAL.keys() <= known
  assert names(extras['feedback'] + extras['http']) <= known, 'nothing imports some requirements'


def test_constraints_are_exact_and_within_the_ranges(declared):
  lines = [
    line
    for line in (ROOT / 'constraints.txt').read_text().splitlines()
    if line and not line.startswith('#')
  ]
  pins = [requirements.Requirement(line) for line in lines]
  assert all(re.fullmatch(r'==[^*]+', str(pin.specifier)) for pin in pins)
  extras = declared['extras_require']
  for line in declared['install_requires'] + extras['test'] + extras['docs'] + extras['reasoning']:
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
  assert folders | {'rlhf_jax.configs'} == set(declared['packages'])
  assert [path for path in (ROOT / 'configs').iterdir() if path.is_dir()] in (
    [],
    [ROOT / 'configs' / '__pycache__'],
  ), 'setup.py must name folders below configs/'


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """Returns a folder with the contents of the wheel, built from a copy of its sources."""
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  for name in ('setup.py', 'pyproject.toml', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for name in ('rlhf_jax', 'planner', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  build = f'from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})'
  subprocess.run([sys.executable, '-c', build], cwd=source, capture_output=True, check=True)
  [wheel] = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder / 'site')
  return folder / 'site'


def test_the_wheel_has_the_modules_the_configs_and_the_command(installed):
  packed = {path.relative_to(installed) for path in installed.rglob('*.py')}
  expected = {
    path.relative_to(ROOT)
    for package in ('rlhf_jax', 'planner')
    for path in (ROOT / package).rglob('*.py')
  } | {pathlib.Path('rlhf_jax', 'configs', path.name) for path in (ROOT / 'configs').glob('*.py')}
  assert packed == expected
  [points] = installed.glob('*.dist-info/entry_points.txt')
  assert 'rlhf = rlhf_jax.cli:main' in points.read_text()


def test_a_config_is_found_by_name_in_an_empty_folder(installed, tmp_path):
  """Uses only the unpacked wheel, as `rlhf run --config=quickstart:debug` would."""
  code = (
    'import sys; from rlhf_jax import cli; sys.argv[0] = "rlhf"; cli.main(); print(cli.__file__)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, 'run', '--config=quickstart:debug', '--print'],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(installed), 'PYTHONSAFEPATH': '1', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  printed = json.loads(done.stdout)
  assert printed['ppo']['batch_size'] == 16 and printed['stages'][-1] == 'evaluate'


def test_packages_are_typed(declared):
  for package in ('rlhf_jax', 'planner'):
    assert 'py.typed' in declared['package_data'][package]
    assert (ROOT / package / 'py.typed').is_file()

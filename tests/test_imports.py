"""Imports follow the layers of .importlinter, and the library does not import torch."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_imports_go_one_way():
  lint = (
    'import sys; from importlinter import cli; '
    'sys.exit(cli.lint_imports(no_cache=True, no_logo=True))'
  )
  done = subprocess.run(
    [sys.executable, '-c', lint], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_its_layer():
  """A new module at the top of the package must be in the list."""
  named = set(re.findall(r'rlhf_jax\.(\w+)', (ROOT / '.importlinter').read_text()))
  there = {
    path.stem
    for path in (ROOT / 'rlhf_jax').iterdir()
    if not path.name.startswith('__') and path.name != 'py.typed'
  }
  assert named == there


def test_torch_is_for_tests_alone():
  for path in [*(ROOT / 'rlhf_jax').rglob('*.py'), *(ROOT / 'planner').rglob('*.py')]:
    assert not re.search(r'^\s*(import|from) torch', path.read_text(), re.MULTILINE), path

"""Imports go one way, as .importlinter says, and the library does without torch."""

import pathlib
import re

from importlinter import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_imports_go_one_way(capsys):
  broken = cli.lint_imports(str(ROOT / '.importlinter'), no_cache=True, no_logo=True)
  assert not broken, capsys.readouterr().out


def test_every_module_has_its_layer():
  """A new module at the top of the package must be placed."""
  named = set(re.findall(r'rlhf_jax\.(\w+)', (ROOT / '.importlinter').read_text()))
  there = {path.stem for path in (ROOT / 'rlhf_jax').iterdir() if not path.name.startswith('__')}
  assert named == there


def test_torch_is_for_tests_alone():
  for path in [*(ROOT / 'rlhf_jax').rglob('*.py'), *(ROOT / 'planner').rglob('*.py')]:
    assert not re.search(r'^\s*(import|from) torch', path.read_text(), re.MULTILINE), path

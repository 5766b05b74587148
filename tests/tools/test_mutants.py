"""Tests of mutants.py: faults that are killed, that survive, and that change nothing."""

import re
import subprocess

import pytest

from tools import faults
from tools import mutants

MINUS, TIMES = ('add.py', 'a + b', 'a - b'), ('add.py', 'a + b', 'a * b')
SYNTAX, GONE = ('add.py', 'a + b', 'a +'), ('add.py', 'a / b', 'a')


@pytest.fixture
def tree(tmp_path):
  """Creates a repository with a function and a test that detects one of two faults."""
  (tmp_path / 'add.py').write_text('def add(a, b):\n  return a + b\n')
  (tmp_path / 'test_add.py').write_text(
    'import add\n\ndef test_add():\n  assert add.add(2, 2) == 4\n\ndef test_other():\n  assert 0\n'
  )
  subprocess.run(['git', 'init', '-q', tmp_path], check=True)
  return tmp_path


def run(tree, *changes, test='test_add'):
  return mutants.run(
    [
      faults.Fault(f'{old} for {new}', file, old, new, (f'test_add.py::{test}',))
      for file, old, new in changes
    ],
    tree,
  )


def test_results_of_faults(tree, capsys):
  assert not run(tree, TIMES, MINUS, SYNTAX)
  said = re.sub(r' +\d+\.\d s ', '', capsys.readouterr().out)
  for line in (
    'survived a + b for a * b',
    'killed a + b for a - b',
    'broken a + b for a +',
    '1 of 3 faults killed',
    'not killed: a + b for a * b, a + b for a +',
  ):
    assert line in said.splitlines()
  assert (tree / 'add.py').read_text() == 'def add(a, b):\n  return a + b\n'
  assert run(tree, MINUS)


def test_a_text_that_is_not_there_and_a_test_that_fails_anyway(tree, capsys):
  assert not run(tree, MINUS, GONE)
  assert capsys.readouterr().out == (
    'a / b for a: the text to replace must occur once in add.py, but occurs 0 times\n'
  )
  assert not run(tree, MINUS, test='test_other')
  assert capsys.readouterr().out.startswith('the tests must pass without any fault:\n')


def test_names_are_distinguished():
  assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)

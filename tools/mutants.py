"""Puts faults into the code, one at a time, and reports whether the nearest tests fail.

    python -m tools.mutants               all faults of tools/faults.py
    python -m tools.mutants --only NAME   one fault; may be repeated
    python -m tools.mutants --list        names, files and tests of the faults

The faults are put into a copy of the working tree. Exits with 1 if a fault survives, if its text is
not in its file exactly once, or if its tests fail without it.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tools.faults import FAULTS

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds; tests that take longer count as failed, because a fault can make them hang
VERDICTS = {0: 'survived', 1: 'killed'}  # by pytest's exit status


def copy_tree(root, target):
  """Copies tracked files, and untracked files that git does not ignore, with their changes."""
  command = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
  listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
  for name in filter(None, listed.stdout.split('\0')):
    if (root / name).is_file():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(root / name, target / name)


@contextlib.contextmanager
def applied(fault, tree):
  """Applies the fault to the tree while the body runs."""
  path = tree / fault.file
  text = path.read_text()
  path.write_text(text.replace(fault.old, fault.new))
  try:
    yield
  finally:
    path.write_text(text)


def occurrences(fault, tree):
  """Returns how often the fault's text occurs in its file."""
  path = tree / fault.file
  return path.read_text().count(fault.old) if path.is_file() else 0


def run_tests(tests, tree, programs):
  """Runs tests of the tree until one fails.

  Args:
    tests: Node ids.
    tree: Folder of the tree.
    programs: Folder of the compilation cache, shared by all runs.

  Returns:
    pytest's exit status, or 1 if it takes too long, and its output.
  """
  # Python checks bytecode files by time in seconds and size, and a fault may change neither.
  environment = os.environ | {
    'PYTHONPATH': str(tree),
    'PYTHONDONTWRITEBYTECODE': '1',
    'JAX_COMPILATION_CACHE_DIR': str(programs),
  }
  command = [sys.executable, '-m', 'pytest', '-x', '-p', 'no:cacheprovider', *tests]
  try:
    result = subprocess.run(
      command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
  except subprocess.TimeoutExpired:
    return 1, ''
  return result.returncode, result.stdout + result.stderr


def check(faults, tree, programs):
  """Returns the problems before any fault is applied, a list of lines."""
  counts = {fault: occurrences(fault, tree) for fault in faults}
  wrong = [
    f'{fault.name}: the text to replace must occur once in {fault.file}, but occurs {count} times'
    for fault, count in counts.items()
    if count != 1
  ]
  if wrong:
    return wrong
  tests = dict.fromkeys(test for fault in faults for test in fault.tests)
  status, output = run_tests(tests, tree, programs)
  return [f'the tests must pass without any fault:\n{output}'] if status else []


def run(faults, root):
  """Applies the faults to a copy of `root` one after the other, and prints the verdicts.

  Returns:
    Whether all faults were killed.
  """
  with tempfile.TemporaryDirectory(prefix='mutants_') as folder:
    tree, programs = pathlib.Path(folder) / 'tree', pathlib.Path(folder) / 'programs'
    tree.mkdir()
    copy_tree(root, tree)
    wrong = check(faults, tree, programs)
    for line in wrong:
      print(line)
    if wrong:
      return False
    survivors = []
    for fault in faults:
      started = time.perf_counter()
      with applied(fault, tree):
        status, output = run_tests(fault.tests, tree, programs)
      verdict = VERDICTS.get(status, 'broken')
      print(f'{verdict:8}  {time.perf_counter() - started:5.1f} s  {fault.name}', flush=True)
      if verdict == 'broken':
        print(output)
      if verdict != 'killed':
        survivors.append(fault.name)
  print(f'{len(faults) - len(survivors)} of {len(faults)} faults killed')
  if survivors:
    print(f'not killed: {", ".join(survivors)}')
  return not survivors


def main():
  """Parses the command line, and exits with 1 unless all faults are killed."""
  parser = argparse.ArgumentParser(
    prog='python -m tools.mutants', description=__doc__.split('\n', maxsplit=1)[0]
  )
  parser.add_argument(
    '--only',
    action='append',
    metavar='NAME',
    help='fault to apply; may be repeated',
    choices=[fault.name for fault in FAULTS],
  )
  parser.add_argument('--list', action='store_true', help='list the faults and exit')
  options = parser.parse_args()
  faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
  if options.list:
    for fault in faults:
      print(f'{fault.name}\n  {fault.file}\n  {" ".join(fault.tests)}')
    return
  sys.exit(not run(faults, ROOT))


if __name__ == '__main__':
  main()

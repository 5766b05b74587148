"""Puts faults into the code, one at a time, and says whether the nearest tests see each.

    python -m tools.mutants               all of tools/faults.py
    python -m tools.mutants --only NAME   one of them; may be repeated
    python -m tools.mutants --list        their names, files and tests

The faults go into a copy of the working tree. Exits with 1 if one survives, if its text is not
found exactly once, or if its tests fail without it.
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
LIMIT = 300  # seconds; tests that a fault makes hang see it
VERDICTS = {0: 'survived', 1: 'killed'}  # by pytest's exit status


def copy_tree(root, target):
  """Copies the files that git knows, and new ones that it does not ignore, as they are now."""
  command = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
  listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
  for name in filter(None, listed.stdout.split('\0')):
    if (root / name).is_file():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(root / name, target / name)


@contextlib.contextmanager
def applied(fault, tree):
  """Has the fault in the tree while it is open."""
  path = tree / fault.file
  text = path.read_text()
  path.write_text(text.replace(fault.old, fault.new))
  try:
    yield
  finally:
    path.write_text(text)


def occurrences(fault, tree):
  """How often the fault's text is in its file."""
  path = tree / fault.file
  return path.read_text().count(fault.old) if path.is_file() else 0


def run_tests(tests, tree, programs):
  """Runs tests of the tree until one fails.

  Args:
    tests: node ids.
    tree: folder.
    programs: folder of compiled programs, shared by all runs.

  Returns:
    pytest's exit status, 1 where it hangs; and what it printed.
  """
  # Bytecode is told apart by seconds and sizes: a fault may change neither.
  environment = os.environ | {
    'PYTHONPATH': str(tree),
    'PYTHONDONTWRITEBYTECODE': '1',
    'JAX_COMPILATION_CACHE_DIR': str(programs),
  }
  command = [sys.executable, '-m', 'pytest', '-x', '-p', 'no:cacheprovider', *tests]
  try:
    done = subprocess.run(
      command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
  except subprocess.TimeoutExpired:
    return 1, ''
  return done.returncode, done.stdout + done.stderr


def check(faults, tree, programs):
  """What is wrong before any fault is applied, list of lines."""
  counts = {fault: occurrences(fault, tree) for fault in faults}
  wrong = [
    f'{fault.name}: the text to replace must be once in {fault.file}, and is {count} times'
    for fault, count in counts.items()
    if count != 1
  ]
  if wrong:
    return wrong
  tests = dict.fromkeys(test for fault in faults for test in fault.tests)
  status, said = run_tests(tests, tree, programs)
  return [f'without any fault the tests must pass:\n{said}'] if status else []


def run(faults, root):
  """Applies the faults to a copy of `root` one after the other and prints what became of each.

  Returns:
    Whether all were seen.
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
    left = []
    for fault in faults:
      started = time.perf_counter()
      with applied(fault, tree):
        status, said = run_tests(fault.tests, tree, programs)
      verdict = VERDICTS.get(status, 'broken')
      print(f'{verdict:8}  {time.perf_counter() - started:5.1f} s  {fault.name}', flush=True)
      if verdict == 'broken':
        print(said)
      if verdict != 'killed':
        left.append(fault.name)
  print(f'{len(faults) - len(left)} of {len(faults)} faults killed')
  if left:
    print(f'not killed: {", ".join(left)}')
  return not left


def main():
  """Parses the command line; exits with 1 unless all faults are seen."""
  parser = argparse.ArgumentParser(
    prog='python -m tools.mutants', description=__doc__.split('\n', maxsplit=1)[0]
  )
  parser.add_argument(
    '--only',
    action='append',
    metavar='NAME',
    help='may be repeated',
    choices=[fault.name for fault in FAULTS],
  )
  parser.add_argument('--list', action='store_true', help='print them and stop')
  options = parser.parse_args()
  faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
  if options.list:
    for fault in faults:
      print(f'{fault.name}\n  {fault.file}\n  {" ".join(fault.tests)}')
    return
  sys.exit(not run(faults, ROOT))


if __name__ == '__main__':
  main()

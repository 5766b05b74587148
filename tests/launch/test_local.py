"""launch/local.sh with small commands: numbers, output, the end of all where one fails."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LOCAL = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'local.sh'


def start(*arguments, **variables):
  """Starts it as a terminal would: in the background of a script an interrupt is ignored from the start."""
  return subprocess.Popen([LOCAL, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | variables, start_new_session=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def run(*arguments, **variables):
  """The exit status and what was written to stdout and stderr."""
  process = start(*arguments, **variables)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def command(text):
  """A Python command of the processes; `number` is that of the process, `say` writes a line at once."""
  return ['--', sys.executable, '-c', 'import os, sys, time, signal\nnumber = int(os.environ["PROCESS_ID"])\n'
          f'say = lambda text: os.write(1, f"{{text}}\\n".encode())\n{text}']


def alive(session):
  """Processes of a session that are not dead, after a moment to die in."""
  for _ in range(50):
    found = []
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
      try:
        if os.getsid(int(folder.name)) == session and (folder / 'cmdline').read_bytes():
          found.append(folder.name)
      except OSError:
        pass
    if not found:
      break
    time.sleep(0.1)
  return found


def test_each_process_is_told_who_it_is():
  names = ('COORDINATOR_ADDRESS', 'PROCESS_COUNT', 'PROCESS_ID', 'JAX_PLATFORMS', 'XLA_FLAGS')
  code, out, err = run('-n', '3', '-d', '2', *command(
      f'import json\nsay(json.dumps({{n: os.environ[n] for n in {names}}}))'),
      XLA_FLAGS='--xla_cpu_enable_fast_math=false', JAX_PLATFORMS='cpu')
  assert code == 0, err
  found = {}
  for line in out.splitlines():  # Those of process 0 have nothing in front.
    number, _, rest = line.partition('] ') if line.startswith('[') else ('[0', '', line)
    found[number] = json.loads(rest)
  assert sorted(found) == ['[0', '[1', '[2']
  for i in range(3):
    assert found[f'[{i}']['PROCESS_ID'] == str(i)
  one = found['[1']
  assert one['PROCESS_COUNT'] == '3' and one['JAX_PLATFORMS'] == 'cpu'
  assert one['XLA_FLAGS'] == '--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=2'
  addresses = {variables['COORDINATOR_ADDRESS'] for variables in found.values()}
  assert len(addresses) == 1 and 20000 <= int(addresses.pop().removeprefix('127.0.0.1:')) < 32000


def test_gpus_are_shared_out():
  code, out, _ = run('-n', '2', *command('say(os.environ["JAX_LOCAL_DEVICE_IDS"])'),
                     JAX_PLATFORMS='cuda')
  assert code == 0 and sorted(out.splitlines()) == ['0', '[1] 1']


@pytest.mark.parametrize('death, words', [
    ('print("reason", file=sys.stderr, flush=True); sys.exit(3)', 'process 1 (of 0 to 2) ended with status 3'),
    ('os.kill(os.getpid(), signal.SIGKILL)', 'process 1 (of 0 to 2) was killed by signal 9 (KILL)'),
    ('os.killpg(0, signal.SIGKILL)', 'process 1 (of 0 to 2) was killed by signal 9 (KILL)')])
def test_one_that_fails_ends_all(death, words):
  """Even those that do not heed SIGTERM; and its last words are seen."""
  started = time.monotonic()
  process = start('-n', '3', *command(
      f'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif number == 1:\n  time.sleep(0.5)\n  {death}\ntime.sleep(300)'))
  out, err = process.communicate(timeout=60)
  assert process.returncode == 1 and time.monotonic() - started < 30
  assert words in err and 'goes on from the last checkpoint' in err
  assert ('[1] reason' in out) == ('reason' in death)
  assert alive(process.pid) == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_all_end(number):
  process = start('-n', '2', *command('say("up")\ntime.sleep(300)'))
  assert {process.stdout.readline(), process.stdout.readline()} == {'up\n', '[1] up\n'}
  process.send_signal(number)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 130 and 'interrupted' in err
  assert alive(process.pid) == []


@pytest.mark.parametrize('arguments, words', [
    ([], 'launch/local.sh -n 4 -- python'), (['-n', '2'], 'launch/local.sh -n 4 -- python'), (['-x'], '-n N'),
    (['-n', '0', '--', 'true'], "positive whole numbers, not '0'"),
    (['-d', 'two', '--', 'true'], "positive whole numbers, not 'two'")])
def test_bad_arguments_are_explained(arguments, words):
  code, _, err = run(*arguments)
  assert code == 2 and words in err

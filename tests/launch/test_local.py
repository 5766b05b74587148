"""launch/local.sh with small commands: environment, output, failures and signals."""

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
  """Starts the script as a terminal does; background jobs of scripts would ignore SIGINT."""
  return subprocess.Popen(
    [LOCAL, *arguments],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | variables,
    start_new_session=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )


def run(*arguments, **variables):
  """Returns the exit status, stdout and stderr."""
  process = start(*arguments, **variables)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def command(text):
  """Returns a Python command for each process: `number` is its number, `say` writes a line."""
  return [
    '--',
    sys.executable,
    '-c',
    'import os, sys, time, signal\nnumber = int(os.environ["PROCESS_ID"])\n'
    f'say = lambda text: os.write(1, f"{{text}}\\n".encode())\n{text}',
  ]


def alive(session):
  """Returns the processes of a session that are still alive after some seconds."""
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


def test_each_process_gets_its_number():
  names = ('COORDINATOR_ADDRESS', 'PROCESS_COUNT', 'PROCESS_ID', 'JAX_PLATFORMS', 'XLA_FLAGS')
  code, out, err = run(
    '-n',
    '3',
    '-d',
    '2',
    *command(f'import json\nsay(json.dumps({{n: os.environ[n] for n in {names}}}))'),
    XLA_FLAGS='--xla_cpu_enable_fast_math=false',
    JAX_PLATFORMS='cpu',
  )
  assert code == 0, err
  found = {}
  for line in out.splitlines():  # lines of process 0 have no prefix
    number, _, rest = line.partition('] ') if line.startswith('[') else ('[0', '', line)
    found[number] = json.loads(rest)
  assert sorted(found) == ['[0', '[1', '[2']
  for i in range(3):
    assert found[f'[{i}']['PROCESS_ID'] == str(i)
  one = found['[1']
  assert one['PROCESS_COUNT'] == '3' and one['JAX_PLATFORMS'] == 'cpu'
  assert (
    one['XLA_FLAGS'] == '--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=2'
  )
  addresses = {variables['COORDINATOR_ADDRESS'] for variables in found.values()}
  assert len(addresses) == 1 and 20000 <= int(addresses.pop().removeprefix('127.0.0.1:')) < 32000


def test_each_process_gets_one_gpu():
  code, out, _ = run(
    '-n', '2', *command('say(os.environ["JAX_LOCAL_DEVICE_IDS"])'), JAX_PLATFORMS='cuda'
  )
  assert code == 0 and sorted(out.splitlines()) == ['0', '[1] 1']


@pytest.mark.parametrize(
  'death, words',
  [
    (
      'print("reason", file=sys.stderr, flush=True); sys.exit(3)',
      'process 1 (of 0 to 2) ended with status 3',
    ),
    ('os.kill(os.getpid(), signal.SIGKILL)', 'process 1 (of 0 to 2) was killed by signal 9 (KILL)'),
    ('os.killpg(0, signal.SIGKILL)', 'process 1 (of 0 to 2) was killed by signal 9 (KILL)'),
  ],
)
def test_a_failing_process_ends_all(death, words):
  """Stops even processes that ignore SIGTERM, and shows the output of the one that failed."""
  started = time.monotonic()
  process = start(
    '-n',
    '3',
    *command(
      'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
      f'if number == 1:\n  time.sleep(0.5)\n  {death}\ntime.sleep(300)'
    ),
  )
  out, err = process.communicate(timeout=60)
  assert process.returncode == 1 and time.monotonic() - started < 30
  assert words in err and 'the same command resumes from the last checkpoint' in err
  assert ('[1] reason' in out) == ('reason' in death)
  assert alive(process.pid) == []


# Writes "up"; after SIGTERM it saves for a while, process 0 longest.
SAVES = """
told = 0
def save(*_):
  global told
  told += 1
  time.sleep(0.5 - 0.4 * number)
  say(f"saved {told}")
  os._exit(143)
signal.signal(signal.SIGTERM, save)
say("up")
time.sleep(300)"""


def up(process, lines):
  """Waits until the processes have written these lines."""
  assert {process.stdout.readline() for _ in lines} == {f'{line}\n' for line in lines}


@pytest.mark.parametrize(
  'number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_lets_all_save(number, code):
  """Each process gets one signal, and none is killed."""
  process = start('-n', '2', *command(SAVES))
  up(process, ['up', '[1] up'])
  process.send_signal(number)
  out, err = process.communicate(timeout=30)
  assert process.returncode == code and sorted(out.splitlines()) == ['[1] saved 1', 'saved 1']
  assert err.endswith('launch/local.sh: stopped; the same command resumes.\n')
  assert alive(process.pid) == []


def test_a_preempted_process_lets_the_others_save():
  """The other processes save before they exit."""
  process = start('-n', '2', *command('if number:\n  time.sleep(0.5)\n  os._exit(143)\n' + SAVES))
  out, err = process.communicate(timeout=30)
  assert process.returncode == 143 and out.splitlines() == ['up', 'saved 1']
  assert 'process 1 (of 0 to 1) was stopped' in err and err.endswith(
    'stopped; the same command resumes.\n'
  )


def test_a_run_that_finishes_when_it_is_stopped_has_finished():
  process = start('-n', '2', *command(SAVES.replace('143', '0')))
  up(process, ['up', '[1] up'])
  process.terminate()
  assert process.communicate(timeout=30) and process.returncode == 0


@pytest.mark.parametrize('grace, signals', [('1', 1), ('100', 2)])
def test_those_that_do_not_save_are_killed(grace, signals):
  """After GRACE_SECONDS, or at the second signal."""
  started = time.monotonic()
  process = start(
    '-n',
    '2',
    *command(
      'signal.signal(signal.SIGTERM, lambda *_: say("told"))\nsay("up")\nwhile True: time.sleep(1)'
    ),
    GRACE_SECONDS=grace,
  )
  up(process, ['up', '[1] up'])
  process.terminate()
  up(process, ['told', '[1] told'])
  if signals == 2:
    process.terminate()
  _, err = process.communicate(timeout=30)
  assert process.returncode == 143 and time.monotonic() - started < 20
  assert 'killed 2 of 2 processes before they had saved' in err and alive(process.pid) == []


@pytest.mark.parametrize('victim', ['launcher', 'wrapper'])
def test_a_kill_of_the_launcher_leaves_no_process(victim):
  """Also ends processes that ignore SIGTERM; the same if a wrapper is killed."""
  process = start(
    '-n',
    '2',
    *command(
      'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
      'say(os.getppid() if number else "up")\ntime.sleep(300)'
    ),
  )
  lines = {process.stdout.readline(), process.stdout.readline()}
  [wrapper] = [int(line.removeprefix('[1] ')) for line in lines if line != 'up\n']
  os.kill(process.pid if victim == 'launcher' else wrapper, signal.SIGKILL)
  try:
    _, err = process.communicate(timeout=30)  # until their output ends
  finally:
    process.kill()
  assert alive(process.pid) == []
  assert (
    victim == 'launcher'
    or process.returncode == 1
    and 'process 1 (of 0 to 1) was killed by signal 9' in err
  )


def test_a_process_that_exits_early_with_status_0_ends_all():
  """For example, if a reward function calls os._exit(0)."""
  process = start('-n', '3', *command('time.sleep(0 if number == 1 else 300)'), ALONE_SECONDS='1')
  _, err = process.communicate(timeout=30)
  assert process.returncode == 1 and alive(process.pid) == []
  assert (
    'process 1 (of 0 to 2) ended with status 0, and 2 still ran 1 s later; '
    'the other processes were stopped.' in err
  )


def test_a_missing_command_fails():
  code, out, err = run('-n', '2', '--', 'no-such-command')
  assert code == 1 and 'ended with status 127' in err and 'no-such-command' in out + err


@pytest.mark.parametrize(
  'arguments, words',
  [
    ([], 'launch/local.sh -n 4 -- python'),
    (['-n', '2'], 'launch/local.sh -n 4 -- python'),
    (['-x'], '-n N'),
    (['-n', '0', '--', 'true'], "positive whole numbers, not '0'"),
    (['-d', 'two', '--', 'true'], "positive whole numbers, not 'two'"),
    (['--', 'true'], "must be whole numbers, not 'long'"),
  ],
)
def test_bad_arguments_are_explained(arguments, words):
  code, _, err = run(*arguments, **({'GRACE_SECONDS': 'long'} if arguments[:1] == ['--'] else {}))
  assert code == 2 and words in err

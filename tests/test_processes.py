"""Several processes on this machine train like one process with all of their devices."""

import ctypes
import functools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import quick

from rlhf_jax import checkpoint
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.models import hf
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / 'launch' / 'local.sh'
CLOCKS = ('seconds/', 'tokens_per_second/', 'memory/')
LIMIT = 900
# 8 divides every axis.
WIDE = tiny.LLAMA | {'num_attention_heads': 8, 'num_key_value_heads': 8, 'hidden_size': 32}
# With two devices per process, only 'tensor': 2 stays within a process.
MESHES = [
  {'data': 8},
  {'fsdp': 8},
  {'tensor': 8},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'fsdp': 2, 'tensor': 4},
]


@pytest.fixture(scope='session')
def wide(tmp_path_factory):
  """Returns a tiny world whose models eight devices can split along any axis."""
  folder = tiny.write(tmp_path_factory.mktemp('wide'))
  tiny.write_model(folder / 'model', WIDE)
  tiny.write_model(folder / 'reward', WIDE, reward=True)
  return folder


def environment(devices=1):
  """Returns the environment of a process with some CPU devices."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}',
    'PYTHONUNBUFFERED': '1',
    'XLA_FLAGS': f'{quick.FLAGS} --xla_force_host_platform_device_count={devices}',
  }


def command(world, workdir, mesh, *options, stage='ppo'):
  """Returns the same command for one process and for several."""
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 1} | mesh
  return [
    sys.executable,
    '-m',
    'rlhf_jax.main',
    f'--config=tests/tiny.py:stage={stage},world={world}',
    f'--workdir={workdir}',
    *(f'--config.mesh.{axis}={size}' for axis, size in sizes.items()),
    *options,
  ]


def start(arguments, workdir, *, processes=1, devices=1):
  """Starts one process, or several by launch/local.sh; the output goes to WORKDIR.log."""
  if processes > 1:
    arguments = [LAUNCH, '-n', str(processes), '-d', str(devices), '--', *arguments]
  with open(f'{workdir}.log', 'ab') as log:
    return subprocess.Popen(
      arguments, cwd=ROOT, env=environment(devices), stdout=log, stderr=log, start_new_session=True
    )


def run(arguments, workdir, **sizes):
  """Runs a command to its end."""
  code = start(arguments, workdir, **sizes).wait(LIMIT)
  assert code == 0, log(workdir)


def log(workdir):
  return pathlib.Path(f'{workdir}.log').read_text()


def metrics(workdir):
  """Returns the metrics of every step, without times."""
  return [
    {name: value for name, value in record.items() if not name.startswith(CLOCKS)}
    for record in metrics_lib.read(workdir)
  ]


def assert_same_metrics(found, expected, steps):
  """Compares metrics to 1e-5, because reductions add up in another order."""
  found, expected = metrics(found), metrics(expected)
  assert [record['step'] for record in found] == [record['step'] for record in expected]
  assert {record['step'] for record in found} == set(steps)
  for a, b in zip(found, expected):
    assert a.keys() == b.keys()
    for name in a:
      assert abs(a[name] - b[name]) < 1e-5 * max(1.0, abs(b[name])), (
        a['step'],
        name,
        a[name],
        b[name],
      )


def assert_same_model(found, expected):
  """Compares the parameters in the exported folders to 1e-5."""
  (_, a), (_, b) = hf.load(found / 'model'), hf.load(expected / 'model')
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def kill_when(process, workdir, lines, kill):
  """Calls `kill` when the run has written some lines of metrics."""
  path, end = workdir / 'metrics.jsonl', time.monotonic() + LIMIT
  while not path.exists() or path.read_bytes().count(b'\n') < lines:
    assert process.poll() is None and time.monotonic() < end, log(workdir)
    time.sleep(0.02)
  kill()


def process_of(launcher, number):
  """Returns the Linux process id of process `number` of a launcher."""
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      variables = (folder / 'environ').read_bytes().split(b'\0')
      arguments = (folder / 'cmdline').read_bytes()
      ours = os.getsid(int(folder.name)) == launcher.pid
    except (OSError, ValueError):
      continue
    if ours and f'PROCESS_ID={number}'.encode() in variables and b'rlhf_jax.main' in arguments:
      if not arguments.startswith(b'bash'):
        return int(folder.name)
  raise AssertionError(f'process {number} is not there')


def out_of_order(hlo):
  """Returns pairs of a loop of collectives and a later independent collective."""
  collective = re.compile(
    r' (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\('
  )
  computations = dict(
    re.findall(r'^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}', hlo, re.MULTILINE | re.DOTALL)
  )
  called = lambda line: re.findall(r'(?:body|condition|to_apply)=%?([\w.-]+)', line)
  around = functools.cache(
    lambda name: any(
      collective.search(line) or any(around(inner) for inner in called(line))
      for line in computations.get(name, '').splitlines()
    )
  )
  pairs = []
  for lines in computations.values():
    needed, loops = {}, []
    for line in lines.splitlines():
      name, *operands = re.findall(r'%([\w.-]+)', line.split(', metadata=')[0])
      needed[name] = {name}.union(*(needed.get(operand, ()) for operand in operands))
      loop = any(around(inner) for inner in called(line))
      if loop or collective.search(line):
        pairs += [(before, name) for before in loops if before not in needed[name]]
        loops += [name] * loop
  return pairs


@pytest.mark.parametrize('minibatches, microbatch', [(2, 4), (1, 0)])
def test_an_update_has_no_loop_of_collectives_before_other_collectives(
  minibatches, microbatch, wide, monkeypatch
):
  """XLA would not wait for such a loop, see `processes.must_unroll`."""
  monkeypatch.setattr(processes, 'must_unroll', lambda: True)
  config = tiny.get_config(f'stage=ppo,world={wide}')
  config.rl.minibatches, config.microbatch_size = minibatches, microbatch
  mesh = sharding.make_mesh({'fsdp': 2}, devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    learner, state = ppo.create(config, mesh)
    batch, _ = learner.next_batch(state, timed=False)
    hlo = learner.train_step.lower(state, *batch).compile().as_text()
  assert 'while(' in hlo and 'all-gather(' in hlo and not out_of_order(hlo)


def test_two_processes_train_like_one_with_two_devices(world, tmp_path):
  """PPO with a Python reward and ptx: parameters are split over both, each scores its part.

  SIGTERM to one process makes both save the same step, and the same command resumes.
  """
  options = [
    '--config.steps=5',
    '--config.checkpoint_every=2',
    '--config.samples_every=1',
    '--config.reward.model=',
    '--config.reward.function=tiny:good_words',
  ]
  one, two = tmp_path / 'one', tmp_path / 'two'
  mesh = {'fsdp': 2}
  alone = start(command(world, one, mesh, *options), one, devices=2)
  launcher = start(command(world, two, mesh, *options), two, processes=2)
  kill_when(launcher, two, 2, lambda: os.kill(process_of(launcher, 1), signal.SIGTERM))
  assert launcher.wait(60) == 143, log(two)
  stopped = metrics(two)[-1]['step'] + 1
  assert (
    f'stopped by SIGTERM after step {stopped}, which is saved in {two}: the same command'
    in log(two)
  )
  run(command(world, two, mesh, *options), two, processes=2)
  assert alone.wait(LIMIT) == 0, log(one)
  starts = [json.loads(line)['step'] for line in (two / 'runs.jsonl').read_text().splitlines()]
  assert starts == [0, stopped]
  assert_same_metrics(two, one, range(5))
  assert_same_model(two, one)
  assert (two / 'samples.jsonl').read_text() == (one / 'samples.jsonl').read_text()
  assert len(metrics_lib.read_samples(two)) == 5 * 16
  assert len(list((two / 'tensorboard').iterdir())) == 2  # only the first process writes
  assert not list(two.glob('.model.*')) and (two / 'report.html').exists()
  assert log(two).count('100%') == log(one).count('100%')


@pytest.mark.slow
def test_ten_stops_of_four_processes(wide, tmp_path):
  """SIGTERM at any moment to any process repeats at most the step in progress."""
  options = ['--config.steps=150', '--config.checkpoint_every=None']
  mesh, draw, stopped = {'data': 2, 'fsdp': 2}, random.Random(4), []
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  run(command(wide, whole, mesh, *options, stage='sft'), whole, processes=4)
  arguments = command(wide, resumed, mesh, *options, stage='sft')
  for _ in range(10):
    launcher, number = start(arguments, resumed, processes=4), draw.randrange(4)
    before = len((resumed / 'runs.jsonl').read_text().splitlines()) if stopped else 0
    while (
      not (resumed / 'runs.jsonl').exists()
      or len((resumed / 'runs.jsonl').read_text().splitlines()) == before
    ):
      assert launcher.poll() is None, log(resumed)
      time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 6.0))  # during compilation or training
    os.kill(process_of(launcher, number), signal.SIGTERM)
    assert launcher.wait(LIMIT) == 143, log(resumed)
    stopped.append(metrics(resumed)[-1]['step'] + 1 if metrics(resumed) else 0)
  run(arguments, resumed, processes=4)
  starts = [json.loads(line)['step'] for line in (resumed / 'runs.jsonl').read_text().splitlines()]
  assert starts == [0, *stopped] and stopped[-1] > 10
  assert metrics(resumed) == metrics(whole)
  assert (resumed / 'model/model.safetensors').read_bytes() == (
    whole / 'model/model.safetensors'
  ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh, rows', [*((mesh, 0) for mesh in MESHES), ({'data': 4, 'fsdp': 2}, 8)], ids=str
)
def test_four_processes_with_two_devices_train_like_one_with_eight(mesh, rows, wide, tmp_path):
  """Continuous batching gives the same as decoding all responses together."""
  options = ['--config.steps=5', '--config.checkpoint_every=0', '--config.samples_every=1']
  run(command(wide, tmp_path / 'one', mesh, *options), tmp_path / 'one', devices=8)
  run(
    command(wide, tmp_path / 'four', mesh, *options, f'--config.sampling.max_concurrent={rows}'),
    tmp_path / 'four',
    processes=4,
    devices=2,
  )
  assert_same_metrics(tmp_path / 'four', tmp_path / 'one', range(5))
  assert_same_model(tmp_path / 'four', tmp_path / 'one')
  assert (tmp_path / 'four' / 'samples.jsonl').read_text().count('\n') == 5 * 16


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['ppo', 'reward_model'])
def test_one_process_resumes_a_run_of_four(stage, wide, tmp_path):
  options = ['--config.steps=8', '--config.checkpoint_every=2', '--config.samples_every=1']
  mesh = {'fsdp': 4, 'tensor': 2}
  whole, moved = tmp_path / 'whole', tmp_path / 'moved'
  run(command(wide, whole, mesh, *options, stage=stage), whole, devices=8)
  arguments = command(wide, moved, mesh, *options, stage=stage)
  four = start(arguments, moved, processes=4, devices=2)
  kill_when(four, moved, 4, lambda: four.send_signal(signal.SIGTERM))
  assert four.wait(60) == 143 and 'the same command resumes' in log(moved)
  steps = sorted(
    int(path.name) for path in (moved / 'checkpoints').iterdir() if path.name.isdigit()
  )
  assert steps and 0 < steps[-1] < 8, steps
  name = 'policy' if stage == 'ppo' else 'reward'
  restored = checkpoint.load_newest(moved, name)[1]  # on one device of this process
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(restored))
  run(arguments, moved, devices=8)
  assert_same_metrics(moved, whole, range(8))


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 2])
def test_a_killed_process_ends_the_job_and_the_restart_equals_an_uninterrupted_run(
  number, wide, tmp_path
):
  options = ['--config.steps=8', '--config.checkpoint_every=2', '--config.samples_every=3']
  mesh, sizes = {'data': 2, 'fsdp': 4}, {'processes': 4, 'devices': 2}
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  run(command(wide, whole, mesh, *options), whole, **sizes)
  arguments = command(wide, killed, mesh, *options)
  four = start(arguments, killed, **sizes)
  kill_when(four, killed, 4, lambda: os.kill(process_of(four, number), signal.SIGKILL))
  assert four.wait(60) == 1
  assert re.search(rf'process {number} \(of 0 to 3\) was killed by signal 9 \(KILL\)', log(killed))
  assert not (killed / 'model').exists()
  run(arguments, killed, **sizes)
  assert metrics(killed) == metrics(whole)
  for name in ('samples.jsonl', 'model/model.safetensors'):
    assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def fails(prompts, responses, *, response_tokens, metadata):
  """A reward function that fails only on process 1, as the environment variable says."""
  del prompts, response_tokens, metadata
  way = os.environ['WAY_TO_FAIL'] if os.environ['PROCESS_ID'] == '1' else ''
  if way == 'raises':
    raise ValueError('no reward today')
  if way == 'sys.exit':
    sys.exit(0)
  if way == 'os._exit':
    os._exit(0)
  if way == 'C exit':
    ctypes.CDLL(None)._exit(0)
  if way == 'hangs':
    time.sleep(600)
  return [float(len(response)) for response in responses]


def wild(prompts, responses, **_):
  """A reward function that prints a megabyte, changes the folder and forks a child that returns."""
  print('x' * 2**20)
  os.chdir('/')
  if not os.fork():
    return []
  os.wait()
  return [float(len(response)) for response in responses]


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_survives_side_effects_of_its_reward_function(processes, wide, tmp_path):
  folder = tmp_path / 'run'
  run(
    command(
      wide,
      folder,
      {'data': 2},
      '--config.steps=3',
      '--config.reward.model=None',
      '--config.reward.function=test_processes:wild',
    ),
    folder,
    processes=processes,
    devices=2 // processes,
  )
  assert (folder / 'model' / 'model.safetensors').exists() and metrics(folder)[-1]['step'] == 2
  assert log(folder).count('forked a process that returned') == 3 * processes


def is_told(number):
  """Sends a signal to the launcher, as a terminal or a scheduler does."""
  return lambda launcher: launcher.send_signal(number)


def loses(number, kill):
  """Sends a signal to one process."""
  return lambda launcher: os.kill(process_of(launcher, number), kill)


@pytest.mark.slow
@pytest.mark.parametrize(
  'way, status, said',
  [
    ('raises', 1, r'\[1\] error: the reward function .*fails raised ValueError: no reward today'),
    ('sys.exit', 1, r'\[1\] error: the reward function .*fails .*exit'),
    ('os._exit', 1, r'\[1\] error: the reward function .*fails .*exit'),
    ('C exit', 1, 'process 1 .of 0 to 1. ended with status 0|process 0 .of 0 to 1. '),
    (
      'hangs',
      1,
      r'\[1\] error: the reward function .*fails did not return within 5 seconds, at .*'
      r'`time.sleep\(600\)`, called with \d+ prompts, the first .* with the response '
      r'.*config.reward.timeout',
    ),
    (loses(0, signal.SIGKILL), 1, r'process 0 \(of 0 to 1\) was killed by signal 9'),
    (loses(1, signal.SIGKILL), 1, r'process 1 \(of 0 to 1\) was killed by signal 9'),
    (loses(1, signal.SIGTERM), 143, 'stopped by SIGTERM after step .*: the same command resumes'),
    (is_told(signal.SIGTERM), 143, 'stopped by SIGTERM after step .*: the same command resumes'),
    (is_told(signal.SIGINT), 130, 'stopped by SIGTERM after step .*: the same command resumes'),
    (is_told(signal.SIGKILL), -9, ''),
  ],
  ids=[
    'raises',
    'sys.exit',
    'os._exit',
    'C exit',
    'hangs',
    'kill 0',
    'kill 1',
    'term 1',
    'term',
    'ctrl-c',
    'kill',
  ],
)
def test_whatever_ends_one_process_ends_all_within_a_minute(
  way, status, said, wide, tmp_path, monkeypatch
):
  run = tmp_path / 'run'
  monkeypatch.setenv('WAY_TO_FAIL', way if isinstance(way, str) else '')
  launcher = start(
    command(
      wide,
      run,
      {'data': 2},
      '--config.reward.model=None',
      '--config.reward.function=test_processes:fails',
      '--config.reward.timeout=5.0',
    ),
    run,
    processes=2,
  )
  if isinstance(way, str):
    wait_until(launcher, run, lambda: (run / 'metrics.jsonl').exists())
    wait_until(launcher, run, lambda: '0/150' in log(run))
  else:
    kill_when(launcher, run, 3, lambda: way(launcher))
  began = time.monotonic()
  assert launcher.wait(180) == status, log(run)
  if not isinstance(way, str):
    assert time.monotonic() - began < 60
  while members(launcher):  # the launcher itself was killed, which the processes notice
    assert time.monotonic() - began < 60
    time.sleep(0.1)
  assert re.search(said, log(run)), log(run)
  assert not (run / 'model').exists()


def members(launcher):
  """Returns the process ids of a launcher's session, without zombies."""
  return [
    process.pid
    for process in psutil.process_iter()
    if process.status() != psutil.STATUS_ZOMBIE
    and _session(process.pid) == launcher.pid
    and process.pid != launcher.pid
  ]


def _session(pid):
  try:
    return os.getsid(pid)
  except ProcessLookupError:
    return None


def wait_until(process, workdir, condition):
  """Waits until a condition holds; the run must not end before."""
  end = time.monotonic() + LIMIT
  while not condition():
    assert process.poll() is None and time.monotonic() < end, log(workdir)
    time.sleep(0.05)


@pytest.mark.slow
def test_all_pass_over_a_checkpoint_that_one_cannot_read(wide, tmp_path):
  options = ['--config.steps=6', '--config.checkpoint_every=2', '--config.samples_every=2']
  workdir, mesh = tmp_path / 'run', {'fsdp': 2}
  arguments = command(wide, workdir, mesh, *options)
  run(arguments, workdir, processes=2)
  expected = metrics(workdir), (workdir / 'model' / 'model.safetensors').read_bytes()
  (workdir / 'model').rename(tmp_path / 'before')
  # Files that only process 1 reads and writes, so the other processes see no error.
  files = (workdir / 'checkpoints' / '6' / 'state' / 'ocdbt.process_1' / 'd').iterdir()
  damaged = max(files, key=lambda path: path.stat().st_size)
  damaged.write_bytes(damaged.read_bytes()[:100])
  run(arguments, workdir, processes=2)
  assert 'checkpoint 6 in' in log(workdir) and (workdir / 'checkpoints' / 'unreadable-6').exists()
  assert (metrics(workdir), (workdir / 'model' / 'model.safetensors').read_bytes()) == expected


@pytest.mark.slow
def test_the_quickstart_runs_on_two_processes(tmp_path):
  """Training runs on both processes, functions on the first; results equal those of one process."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  arguments = lambda workdir: [
    sys.executable,
    '-m',
    'rlhf_jax.main',
    '--config=configs/quickstart.py:debug',
    f'--workdir={workdir}',
  ]
  run(arguments(one), one, devices=2)
  run(arguments(two), two, processes=2)
  for stage in ('pretrain', 'sft', 'reward_model', 'ppo'):
    assert (two / stage / 'done.json').exists()
    last = json.loads((one / stage / 'config.json').read_text())['steps'] - 1
    assert_same_metrics(two / stage, one / stage, {0, last})
  a, b = (json.loads((folder / 'evaluate' / 'results.json').read_text()) for folder in (one, two))
  assert [row['stage'] for row in a['stages']] == [row['stage'] for row in b['stages']]
  np.testing.assert_allclose(
    [row['gold'] for row in a['stages']], [row['gold'] for row in b['stages']], atol=1e-5
  )
  assert log(two).count('[1/7] world') == 1 and (two / 'report.html').exists()


@pytest.mark.slow
def test_two_processes_resume_large_texts_where_four_were_killed(world, tmp_path):
  """Texts packed during training: the batches equal those of one uninterrupted process."""
  data = tmp_path / 'large.jsonl'
  with open(data, 'w') as stream:  # 40 MB, more tokens than are kept in memory
    for number in range(64_000):
      stream.write(json.dumps({'text': tiny.text(number, 130 + number % 60)}) + '\n')
  options = [
    f'--config.data.path={data}',
    '--config.data.held_out=0.0002',
    '--config.steps=12',
    '--config.checkpoint_every=2',
  ]
  mesh, whole, moved = {'data': 4}, tmp_path / 'whole', tmp_path / 'moved'
  run(command(world, whole, mesh, *options, stage='sft'), whole, devices=4)
  arguments = command(world, moved, mesh, *options, stage='sft')
  four = start(arguments, moved, processes=4)
  kill_when(four, moved, 5, lambda: os.killpg(four.pid, signal.SIGKILL))
  four.wait(60)
  run(arguments, moved, processes=2, devices=2)
  starts = [json.loads(line)['step'] for line in (moved / 'runs.jsonl').read_text().splitlines()]
  assert starts[0] == 0 and 0 < starts[1] < 12
  assert_same_metrics(moved, whole, range(12))
  assert_same_model(moved, whole)

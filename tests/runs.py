"""Functions that tests of runs share: starting, killing and comparing them."""

import json
import os
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLOCKS = ('seconds/', 'tokens_per_second/', 'memory/')


def metrics(workdir):
  """Returns every line of metrics.jsonl without times."""
  with open(workdir / 'metrics.jsonl', encoding='utf-8') as lines:
    records = [json.loads(line) for line in lines]
  return [
    {name: value for name, value in record.items() if not name.startswith(CLOCKS)}
    for record in records
  ]


def assert_same_run(found, expected):
  """Compares metrics to the last bit, sampled texts, and the bytes of the exported model."""
  a, b = metrics(found), metrics(expected)
  assert [r['step'] for r in a] == [r['step'] for r in b]
  for x, y in zip(a, b):
    assert x == y
  assert (found / 'samples.jsonl').read_bytes() == (expected / 'samples.jsonl').read_bytes()
  for name in ('model.safetensors', 'config.json', 'tokenizer.json'):
    assert (found / 'model' / name).read_bytes() == (expected / 'model' / name).read_bytes(), name


def start(config, workdir, *options):
  """Starts `python -m rlhf_jax.main` on one device; its output goes to `workdir`.log."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'PYTHONPATH': f'{ROOT}/tests',
  }
  log = open(f'{workdir}.log', 'ab')
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'rlhf_jax.main',
      f'--config={config}',
      f'--workdir={workdir}',
      *options,
    ],
    cwd=ROOT,
    env=environment,
    stdout=log,
    stderr=log,
  )


def lines(workdir):
  """Returns the number of lines in metrics.jsonl."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def kill_after(process, workdir, new_lines, delay, number=signal.SIGKILL):
  """Sends a signal `delay` seconds after a run has written some more lines."""
  least = lines(workdir)
  while process.poll() is None and lines(workdir) < least + new_lines:
    least = min(least, lines(workdir))  # resuming first drops lines
    time.sleep(0.002)
  time.sleep(delay)
  process.send_signal(number)
  return process.wait()

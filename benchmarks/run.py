"""Compares the speed and memory of PPO implementations, which take turns on the same work.

python -m benchmarks.run --workload xs|s|m --peers ours,trl,tunix,easydel,hf

Peers: ours (the work that all peers do, with a separate critic), ours-trunk (the value head on the
policy's trunk), ours-hydra (the same, and only the upper half of the layers is trained), ours-lora
(the value head on the trunk, and only adapters are trained), trl, tunix, easydel, hf (only
transformers: generation, and a forward and backward pass). The others are compared with the first.

Each peer is a process in its own virtual environment, which `benchmarks/install.sh PEER` creates.
VENVS/PEER/bin/python may also be a script that calls another Python with the peer's packages. All
peers are started, and then run one iteration each in turn. The first turn, which includes
compilation, is reported separately. Between turns, large matmuls and copies measure the limits of
the machine. `--runs` repeats all of this with new processes. If the peers do not fit into memory
together, `--apart` runs one peer at a time, so that they take turns only from run to run.

Prints a table, and writes OUT/WORKLOAD-DEVICE.json, .txt and .png.

On a CPU all peers are restricted to `--threads` cores and compute in float32. On a GPU (`--device
gpu`) they compute in bfloat16.
"""

import json
import os
import pathlib
import platform
import time

from absl import app
from absl import flags

from benchmarks import options
from benchmarks import processes
from benchmarks import results
from benchmarks import workloads

FLAGS = options.FLAGS


def start(peer, w, log):
  """Starts the process of a Peer."""
  return processes.Process(
    processes.python(peer.venv, FLAGS.venvs),
    peer.module,
    w,
    device=FLAGS.device,
    threads=FLAGS.threads,
    log=log,
    options=['--variant', peer.variant] if peer.variant != 'separate' else [],
  )


def start_limits(names, w, out):
  """Starts processes that measure the machine, one for each library that the peers use."""
  venvs = {'jax': ''}
  if any(processes.PEERS[name].venv == 'trl' for name in names):
    venvs['torch'] = 'trl'
  return [
    processes.Process(
      processes.python(venv, FLAGS.venvs),
      'limits',
      w,
      device=FLAGS.device,
      threads=FLAGS.threads,
      log=out / f'limits-{library}.log',
      options=['--library', library],
    )
    for library, venv in venvs.items()
  ]


def take_turns(running, limits, rounds):
  """Runs `rounds` iterations of each peer after the first, in turn.

  Args:
    running: {name: Process}.
    limits: Processes that measure the machine.
    rounds: Number of iterations.

  Returns:
    {name: run as in results.py}, and the measurements of the machine.
  """
  runs, measured = {}, []
  for name, peer in running.items():
    runs[name] = {'about': peer.about, 'first': peer.turn(), 'iterations': [], 'splits': []}
    seconds = sum(runs[name]['first']['parts'].values())
    print(
      f'{name}: set up in {peer.about["setup"]:.0f} s, first iteration in {seconds:.0f} s',
      flush=True,
    )
  for _ in range(rounds):
    measured += [limit.turn() for limit in limits]
    for name, peer in running.items():
      runs[name]['iterations'].append(peer.turn())
      print('.', end='', flush=True)
  for name, peer in running.items():
    if processes.PEERS[name].module == 'ours':
      runs[name]['splits'] = [peer.turn('split') for _ in range(4)][1:]
  return runs, measured


def one_run(names, w, limits, out):
  """Runs all peers once, and returns {name: run} and the measurements of the machine."""
  runs, measured = {}, []
  for group in [[name] for name in names] if FLAGS.apart else [names]:
    running = {}
    try:
      for name in group:
        running[name] = start(processes.PEERS[name], w, out / f'{name}.log')
      more, machine = take_turns(running, limits, FLAGS.iterations)
    finally:
      for process in running.values():
        process.end()
    runs |= more
    measured += machine
  return runs, measured


def machine():
  """Returns a description of the machine and the software, a dict."""
  with open('/proc/cpuinfo', encoding='utf-8') as lines:
    model = next(
      (line.partition(':')[2].strip() for line in lines if line.startswith('model name')), ''
    )
  return {
    'cpu': model or platform.machine(),
    'cores': len(os.sched_getaffinity(0)),
    'device': FLAGS.device,
    'threads': FLAGS.threads,
    'kernel': platform.release(),
    'python': platform.python_version(),
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
  }


def measure(names, w, out):
  """Runs all peers and returns the results as a dict for JSON."""
  limits = start_limits(names, w, out)
  try:
    all_runs = [one_run(names, w, limits, out) for _ in range(FLAGS.runs)]
  finally:
    for limit in limits:
      limit.end()
  measured = [report for _, reports in all_runs for report in reports]
  limit = {key: max(report[key] for report in measured) for key in ('matmul', 'copy')}
  runs = {name: [run[name] for run, _ in all_runs] for name in names}
  rows = {
    name: results.summarize(
      runs[name],
      runs[name][0]['about'],
      w,
      limit,
      variant=processes.PEERS[name].variant,
      device=FLAGS.device,
    )
    for name in names
  }
  return {
    'workload': json.loads(w.to_json()),
    'machine': machine() | {'card': limits[0].about['note']},
    'limits': limit,
    'flops': workloads.flops(w),
    'summary': rows,
    'ratios': results.ratios(rows, names[0]),
    'runs': runs,
    'measured_limits': measured,
  }


def notes(result):
  """Returns the lines below the table: limits of the machine, versions, and the peers' notes."""
  limit, about = result['limits'], result['machine']
  chip = (
    f'{about["cpu"]}, {about["threads"]} threads' if about['device'] == 'cpu' else about['card']
  )
  runs = next(iter(result['runs'].values()))
  lines = [
    f'{chip}: matmul {limit["matmul"] / 1e9:.0f} GFLOP/s, copy {limit["copy"] / 1e9:.1f} GB/s. '
    f'Medians of {len(runs)} x {len(runs[0]["iterations"])} iterations.'
  ]
  for name, runs in result['runs'].items():
    about = runs[0]['about']
    versions = ', '.join(f'{package} {version}' for package, version in about['versions'].items())
    others = ''.join(
      f'; {part} {value:.2f} s' for part, value in result['summary'][name]['others'].items()
    )
    lines.append(f'{name}: {versions}{"; " if about["note"] else ""}{about["note"]}{others}')
  return lines


def main(_):
  names = FLAGS.peers
  unknown = [name for name in names if name not in processes.PEERS]
  if unknown:
    raise app.UsageError(f'--peers={",".join(unknown)}: choose from {", ".join(processes.PEERS)}')
  options.hold_to_cores()
  w = workloads.WORKLOADS[FLAGS.workload]
  out = pathlib.Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  try:
    result = measure(names, w, out)
  except processes.PeerError as error:
    raise SystemExit(f'error: {error}') from None
  title = (
    f'{w.name}: {w.layers} x {w.width}, vocabulary {w.vocab}, '
    f'{w.batch} x ({w.prompt} + {w.response}) tokens'
  )
  text = results.table(result['summary'], names[0], title=title, notes=notes(result))
  print(f'\n{text}')
  stem = out / f'{w.name}-{FLAGS.device}'
  stem.with_suffix('.json').write_text(json.dumps(result, indent=1), encoding='utf-8')
  stem.with_suffix('.txt').write_text(text + '\n', encoding='utf-8')
  bound = workloads.bound(w, **result['limits'], item_size=4 if FLAGS.device == 'cpu' else 2)
  results.chart(stem.with_suffix('.png'), result['summary'], bound, title)
  print(f'wrote {stem}.json, .txt and .png')


if __name__ == '__main__':
  flags.DEFINE_list('peers', ['ours', 'trl'], f'Peers, from {", ".join(processes.PEERS)}.')
  flags.DEFINE_integer('iterations', 5, 'Iterations of each peer after the first, in each run.')
  flags.DEFINE_integer('runs', 1, 'Number of runs, each with new processes.')
  flags.DEFINE_bool('apart', False, 'Run one peer at a time.')
  flags.DEFINE_string(
    'venvs', os.environ.get('VENVS', '.venv-peers'), 'Folder of the virtual environments.'
  )
  app.run(main)

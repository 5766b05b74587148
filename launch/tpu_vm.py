"""A Cloud TPU slice: made, set up, trained on by all of its workers, deleted.

  launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENTS]

  create               asks for the TPU and waits until it is ready
  setup                puts this checkout on all workers and installs it: tracked files as they are
                       now, and untracked files that git does not ignore, up to 50 MB
  run ARGUMENTS        python -m rlhf_jax.main ARGUMENTS on all workers, until it ends
  resume ARGUMENTS     the same; waits for the TPU in the queue, makes a new one whenever there is
                       none or it was preempted, sets it up where it holds other files than this
                       checkout did at the start of `resume`, and resumes
  fetch FROM TO        copies a file or folder of the TPU to this machine
  delete               deletes the TPU and its place in the queue

--dry-run prints the gcloud commands in place of running them. Settings, from the environment:

  TPU_NAME             of the TPU and of its place in the queue
  ZONE                 us-central1-a
  ACCELERATOR          v5litepod-16, v6e-64, v5p-128 and so on
  RUNTIME              the VM's software: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p,
                       v2-alpha-tpuv6e for v6e
  PROJECT              the Google Cloud project; left out, gcloud's own
  SPOT=1               cheap, and can be preempted at any time
  SHARED=IP:/EXPORT    an NFS export (Filestore) that all workers mount at /mnt/shared; --workdir,
                       data and models belong there: it outlives the TPU
  POLL_SECONDS         between two looks at the state (30); all other waits are multiples of it

Every exit names what is left and bills, with the command that deletes it.

  launch/tpu_vm.sh resume --config=configs/X.py --workdir=/mnt/shared/runs/X
  launch/tpu_vm.sh fetch /mnt/shared/runs/X runs/X
  launch/tpu_vm.sh delete
"""

from __future__ import annotations

import os
import pathlib
import shlex
import signal
import sys
import tempfile
import time

import shipping
import tpu_node
from tpu_node import Failure
from tpu_node import say

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRIES = 8  # of `resume` in a row, without a long run
SETUP_TRIES = 3  # of one TPU, which bills meanwhile
LONG_RUN_POLLS = 40  # a run of as long (20 minutes) was no failure of its start
RESUMABLE = (143, 255)  # stopped after it saved, and a lost connection


def pack(folder, arguments=()):
  """Packs this checkout into a folder; says what it leaves out.

  Raises:
    shipping.Error: where an argument names a file that is left out.
  """
  shipment = shipping.pack(ROOT, os.path.join(folder, 'rlhf_jax.tar.gz'))
  shipping.check_arguments(ROOT, shipment, arguments)
  for argument in arguments:
    name, _, path = argument.partition('=')
    if name == '--workdir' and '://' not in path and not os.path.isabs(path):
      say(
        f'{argument} is on the disks of the workers, and lost with them: '
        f'mount SHARED, and give --workdir=/mnt/shared/{path}'
      )
  if shipment.left_out:
    names = sorted(shipment.left_out, key=shipment.left_out.get, reverse=True)
    shown = ', '.join(f'{name} ({shipment.left_out[name] / 1e6:.1f} MB)' for name in names[:5])
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    limit = shipping.MAX_UNTRACKED_BYTES / 1e6
    say(
      f'does not ship {shown}{more}: untracked files above {limit:.0f} MB in all; '
      'put them on SHARED'
    )
  return shipment


def create(tpu, folder):
  """Asks for the TPU and waits until it is ready."""
  del folder
  tpu.request()
  if tpu.dry_run:
    tpu.node_state()
    return
  now = tpu.settle()
  if now != 'READY':
    raise Failure(
      f'the request for {tpu.name} is {now}: '
      f'`{shlex.join(tpu.command("queued-resources", "describe", tpu.name))}` says why'
    )


def setup(tpu, folder):
  """Sends and installs this checkout."""
  if not tpu.setup(pack(folder)):
    raise Failure(f'the setup of {tpu.name} failed: its own error stands above')


def delete(tpu, folder):
  """Deletes the TPU and its request."""
  del folder
  tpu.remove()


def run(tpu, folder, *arguments):
  """Trains; returns the exit status."""
  del folder
  return tpu.run(arguments)


def fetch(tpu, folder, source, target):
  """Copies from the first worker; returns the exit status."""
  del folder
  return tpu.stream('tpu-vm', 'scp', '--recurse', f'{tpu.name}:{source}', target, '--worker=0')


def replace(tpu, now):
  """Makes a new request where the last one came to nothing.

  Returns:
    The state it has come to.
  """
  say(f'{tpu.name} is {now}: makes a new one')
  if now != 'NONE':
    if tpu.node_state() == 'READY':  # never to be deleted by mistake
      return 'READY'
    tpu.remove()
  tpu.request()
  return tpu.settle()


def prepare(tpu, shipment):
  """Sets up the workers where one of them holds other files.

  Tries it SETUP_TRIES times only, as the TPU bills meanwhile.

  Returns:
    Whether a run can start; else the TPU must be looked at again.

  Raises:
    Failure: where the TPU is there, and cannot be set up.
  """
  for attempt in range(1, SETUP_TRIES + 1):
    status = tpu.holds(shipment)
    if status == 0 or status == tpu_node.NOT_SET_UP and tpu.setup(shipment):
      return True
    if tpu.node_state() != 'READY':
      return False
    if attempt < SETUP_TRIES:
      wait = tpu_node.back_off(attempt, tpu.poll, 20 * tpu.poll)
      say(f'the setup failed, try {attempt} of {SETUP_TRIES}, again in {wait:.0f} s')
      time.sleep(wait)
  raise Failure(f'the setup of {tpu.name} failed {SETUP_TRIES} times: its own error stands above')


def resume(tpu, folder, *arguments):
  """Runs until the run has finished, on as many TPUs as it takes.

  The files are packed once: one that is edited meanwhile does not change a run in its middle.

  Raises:
    Failure: where the run itself fails, or TRIES in a row came to nothing.
  """
  shipment = pack(folder, arguments)
  if tpu.dry_run:
    dry_resume(tpu, shipment, arguments)
    return
  tries = 0
  while tries < TRIES:
    if tries:
      wait = tpu_node.back_off(tries, tpu.poll, 20 * tpu.poll)
      say(f'try {tries + 1} of {TRIES} in {wait:.0f} s')
      time.sleep(wait)
    tries += 1
    now = tpu.settle()
    if now != 'READY':
      now = replace(tpu, now)
    if now != 'READY' or not prepare(tpu, shipment):
      continue
    started = time.monotonic()
    status = tpu.run(arguments)
    if status == 0:
      return
    node, queue = tpu.node_state(), tpu.queue_state()
    there = node == 'READY' and queue not in ('SUSPENDING', 'SUSPENDED')
    if there and status not in RESUMABLE:
      raise Failure(
        f'the run ended with status {status}, and {tpu.name} is READY: its own error stands above'
      )
    say(f'the run ended with status {status}, and {tpu.name} is {node or "gone"}: resumes')
    if time.monotonic() - started > LONG_RUN_POLLS * tpu.poll:
      tries = 0
  raise Failure(f'{TRIES} tries in a row came to nothing')


def dry_resume(tpu, shipment, arguments):
  """Prints what `resume` asks where the TPU was preempted."""
  tpu.node_state()
  tpu.remove()
  tpu.request()
  tpu.node_state()
  tpu.holds(shipment)
  tpu.setup(shipment)
  tpu.run(arguments)


def report(tpu, interrupted):
  """Names what is left and bills, with the command that deletes it."""
  delete_request = shlex.join(
    tpu.command('queued-resources', 'delete', tpu.name, '--force', '--quiet')
  )
  delete_node = shlex.join(tpu.command('tpu-vm', 'delete', tpu.name, '--quiet'))
  try:
    node, queue = tpu.node_state(tries=2), tpu.queue_state(tries=2)
  except (Failure, KeyboardInterrupt) as error:
    say(
      f'cannot tell what is left of {tpu.name}, which may be there and bill: '
      f'`launch/tpu_vm.sh delete`, or `{delete_request}`; {error}'
    )
    return
  ways = (
    f'`launch/tpu_vm.sh delete`, or `{delete_node if queue is None and node else delete_request}`'
  )
  if node is None and queue is None:
    if tpu.asking:
      say(f'the request for {tpu.name} was cut short, and may still be granted and bill: {ways}')
    else:
      say(f'nothing is left of {tpu.name}')
    return
  if node in tpu_node.LOST or node is None and queue in tpu_node.OVER:
    bills = 'does not bill, but keeps its name until it is deleted'
  elif node is None:
    bills = 'bills as soon as it is granted'
  else:
    bills = 'bills until it is deleted'
  going = '; a run on its workers may still be going' if interrupted and node == 'READY' else ''
  what = f'{tpu.name} is left, {node},' if node else f'the request for {tpu.name} is left, {queue},'
  say(f'{what} and {bills}: {ways}{going}')


def stop(number, frame):
  """Ends on a signal as on an error, so that what is left is named."""
  del frame
  raise SystemExit(128 + number)


VERBS = {  # with the least and the largest number of their arguments
  'create': (create, 0, 0),
  'setup': (setup, 0, 0),
  'delete': (delete, 0, 0),
  'fetch': (fetch, 2, 2),
  'run': (run, 1, 10**6),
  'resume': (resume, 1, 10**6),
}


def start(arguments):
  """Reads command and settings, runs the command, and names what it leaves.

  Returns:
    The exit status.
  """
  dry_run = arguments[:1] == ['--dry-run']
  verb, *rest = arguments[dry_run:] or ['']
  function, least, most = VERBS.get(verb, (None, 1, 0))
  if not least <= len(rest) <= most:
    print(__doc__, file=sys.stderr)
    return 2
  needed = ['TPU_NAME', 'ZONE'] + (
    ['ACCELERATOR', 'RUNTIME'] if verb in ('create', 'resume') else []
  )
  for name in needed:
    if not os.environ.get(name):
      say(f'set {name}; `launch/tpu_vm.sh` alone says what it is')
      return 1
  try:
    tpu = tpu_node.Tpu(os.environ, dry_run)
  except ValueError:
    say(f'POLL_SECONDS must be a number, not {os.environ["POLL_SECONDS"]!r}')
    return 1
  os.chdir(ROOT)
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
  status = 1
  try:
    with tempfile.TemporaryDirectory() as folder:
      status = function(tpu, folder, *rest) or 0
  except (Failure, shipping.Error) as error:
    say(str(error))
  except KeyboardInterrupt:
    status = 130
  except SystemExit as error:
    status = error.code
  finally:
    if not dry_run:
      report(tpu, interrupted=status > 128)
  return status


if __name__ == '__main__':
  sys.exit(start(sys.argv[1:]))

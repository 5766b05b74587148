"""Creates a Cloud TPU slice, sets it up, runs on all of its workers, and deletes it.

  launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENTS]

  create               requests the TPU and waits until it is ready
  setup                copies this checkout to all workers and installs it: tracked files with their
                       changes, and untracked files that git does not ignore, up to 50 MB
  run ARGUMENTS        runs python -m rlhf_jax.main ARGUMENTS on all workers
  resume ARGUMENTS     does the same, but also waits for the TPU, creates a new one if there is none
                       or it was preempted, sets it up if its files are not those of this checkout
                       at the start of `resume`, and resumes the run
  fetch FROM TO        copies a file or folder from the TPU to this machine
  delete               deletes the TPU and its queued request

--dry-run prints the gcloud commands and does not run them. Environment variables:

  TPU_NAME             name of the TPU and of its queued request
  ZONE                 such as us-central1-a
  ACCELERATOR          such as v5litepod-16, v6e-64 or v5p-128
  RUNTIME              software of the VM: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p,
                       v2-alpha-tpuv6e for v6e
  PROJECT              Google Cloud project; by default that of gcloud
  SPOT=1               request a Spot TPU, which is cheaper and can be preempted at any time
  SHARED=IP:/EXPORT    NFS export (Filestore) that all workers mount at /mnt/shared; it outlives the
                       TPU, so --workdir, data and models should be there
  POLL_SECONDS         seconds between two checks of the state (default 30), which scale all waits

On exit, each command reports which resources are left and billed, and how to delete them.

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
TRIES = 8  # consecutive tries of `resume` without a long run
SETUP_TRIES = 3  # few, because the TPU is billed during the setup
LONG_RUN_POLLS = 40  # polls (20 minutes) after which a run counts as long, and tries start at 0
RESUMABLE = (143, 255)  # exit statuses of a run that saved and stopped, and of a lost connection


def pack(folder, arguments=()):
  """Packs this checkout into a folder, and reports which files it leaves out.

  Raises:
    shipping.Error: If an argument names a file that is left out.
  """
  shipment = shipping.pack(ROOT, os.path.join(folder, 'rlhf_jax.tar.gz'))
  shipping.check_arguments(ROOT, shipment, arguments)
  for argument in arguments:
    name, _, path = argument.partition('=')
    if name == '--workdir' and '://' not in path and not os.path.isabs(path):
      say(
        f'{argument} is on the disks of the workers, which are deleted with the TPU: '
        f'set SHARED, and use --workdir=/mnt/shared/{path}'
      )
  if shipment.left_out:
    names = sorted(shipment.left_out, key=shipment.left_out.get, reverse=True)
    shown = ', '.join(f'{name} ({shipment.left_out[name] / 1e6:.1f} MB)' for name in names[:5])
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    limit = shipping.MAX_UNTRACKED_BYTES / 1e6
    say(
      f'does not send {shown}{more}: the untracked files exceed {limit:.0f} MB in total; '
      'put large files on SHARED'
    )
  return shipment


def create(tpu, folder):
  """Requests the TPU and waits until it is ready."""
  del folder
  tpu.request()
  if tpu.dry_run:
    tpu.node_state()
    return
  now = tpu.settle()
  if now != 'READY':
    raise Failure(
      f'the request for {tpu.name} is {now}: '
      f'`{shlex.join(tpu.command("queued-resources", "describe", tpu.name))}` shows why'
    )


def setup(tpu, folder):
  """Sends and installs this checkout."""
  if not tpu.setup(pack(folder)):
    raise Failure(f'the setup of {tpu.name} failed: see its error above')


def delete(tpu, folder):
  """Deletes the TPU and its request."""
  del folder
  tpu.remove()


def run(tpu, folder, *arguments):
  """Trains, and returns the exit status."""
  del folder
  return tpu.run(arguments)


def fetch(tpu, folder, source, target):
  """Copies files from the first worker, and returns the exit status."""
  del folder
  return tpu.stream('tpu-vm', 'scp', '--recurse', f'{tpu.name}:{source}', target, '--worker=0')


def replace(tpu, now):
  """Replaces a TPU that was lost or a request that failed by a new request.

  Returns:
    The state after waiting; see tpu_node.Tpu.settle.
  """
  say(f'{tpu.name} is {now}: requesting a new one')
  if now != 'NONE':
    if tpu.node_state() == 'READY':  # a TPU in use must not be deleted
      return 'READY'
    tpu.remove()
  tpu.request()
  return tpu.settle()


def prepare(tpu, shipment):
  """Sets up the workers if one of them has other files, in at most SETUP_TRIES tries.

  Returns:
    True if a run can start, False if the TPU is no longer ready.

  Raises:
    Failure: If the TPU is ready but cannot be set up.
  """
  for attempt in range(1, SETUP_TRIES + 1):
    status = tpu.check_setup(shipment)
    if status == 0 or status == tpu_node.NOT_SET_UP and tpu.setup(shipment):
      return True
    if tpu.node_state() != 'READY':
      return False
    if attempt < SETUP_TRIES:
      wait = tpu_node.back_off(attempt, tpu.poll, 20 * tpu.poll)
      say(f'the setup failed (try {attempt} of {SETUP_TRIES}); retrying in {wait:.0f} s')
      time.sleep(wait)
  raise Failure(f'the setup of {tpu.name} failed {SETUP_TRIES} times: see its error above')


def resume(tpu, folder, *arguments):
  """Runs and resumes until the run has finished, on as many TPUs as it takes.

  The files are packed once, so later edits do not change the run.

  Raises:
    Failure: If the run itself fails, or after TRIES consecutive tries without a long run.
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
    is_ready = node == 'READY' and queue not in ('SUSPENDING', 'SUSPENDED')
    if is_ready and status not in RESUMABLE:
      raise Failure(
        f'the run ended with status {status}, and {tpu.name} is READY: see its error above'
      )
    say(f'the run ended with status {status}, and {tpu.name} is {node or "gone"}: resuming')
    if time.monotonic() - started > LONG_RUN_POLLS * tpu.poll:
      tries = 0
  raise Failure(f'{TRIES} consecutive tries failed')


def dry_resume(tpu, shipment, arguments):
  """Prints the gcloud commands of `resume` for a TPU that was preempted."""
  tpu.node_state()
  tpu.remove()
  tpu.request()
  tpu.node_state()
  tpu.check_setup(shipment)
  tpu.setup(shipment)
  tpu.run(arguments)


def report(tpu, interrupted):
  """Reports which resources are left and billed, and the command that deletes them."""
  delete_request = shlex.join(
    tpu.command('queued-resources', 'delete', tpu.name, '--force', '--quiet')
  )
  delete_node = shlex.join(tpu.command('tpu-vm', 'delete', tpu.name, '--quiet'))
  try:
    node, queue = tpu.node_state(tries=2), tpu.queue_state(tries=2)
  except (Failure, KeyboardInterrupt) as error:
    say(
      f'{tpu.name} may still exist and be billed: delete it with '
      f'`launch/tpu_vm.sh delete`, or `{delete_request}`; {error}'
    )
    return
  delete_command = delete_node if queue is None and node else delete_request
  remedy = f'delete it with `launch/tpu_vm.sh delete`, or `{delete_command}`'
  if node is None and queue is None:
    if tpu.is_requesting:
      say(
        f'the request for {tpu.name} was interrupted, and may still be granted and billed: {remedy}'
      )
    else:
      say(f'nothing is left of {tpu.name}')
    return
  if node in tpu_node.LOST or node is None and queue in tpu_node.FINAL:
    cost = 'is not billed, but keeps its name until it is deleted'
  elif node is None:
    cost = 'is billed as soon as it is granted'
  else:
    cost = 'is billed until it is deleted'
  running = '; a run on its workers may not have stopped' if interrupted and node == 'READY' else ''
  status = f'{tpu.name} is {node}' if node else f'the request for {tpu.name} is {queue}'
  say(f'{status} and {cost}: {remedy}{running}')


def stop(number, frame):
  """Exits on a signal as on an error, so that `report` runs."""
  del frame
  raise SystemExit(128 + number)


VERBS = {  # {command: (function, minimum number of arguments, maximum)}
  'create': (create, 0, 0),
  'setup': (setup, 0, 0),
  'delete': (delete, 0, 0),
  'fetch': (fetch, 2, 2),
  'run': (run, 1, 10**6),
  'resume': (resume, 1, 10**6),
}


def start(arguments):
  """Reads and runs the command, and reports which resources are left.

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
      say(f'set the variable {name}; `launch/tpu_vm.sh` without arguments describes it')
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

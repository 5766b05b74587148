"""Calls gcloud for launch/tpu_vm.sh: states of a TPU and its request, and commands on workers."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time

# States of a node, from
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State.
# The launcher waits while the state is in CHANGING, starts a STOPPED node (only a user stops nodes,
# and only single hosts can be stopped), and replaces a node whose state is in LOST. All other
# states, such as HIDDEN and UNKNOWN, are errors.
CHANGING = (
  'CREATING',
  'STARTING',
  'RESTARTING',
  'REIMAGING',
  'REPAIRING',
  'UNHIDING',
  'STOPPING',
  'DELETING',
)
LOST = ('PREEMPTED', 'TERMINATED')
# States of a request that do not change: https://cloud.google.com/tpu/docs/queued-resources.
FINAL = (None, 'FAILED', 'SUSPENDED')
CALL_TRIES = 8  # tries of one gcloud call
# Polls (10 minutes) after which a missing node of an ACTIVE request counts as deleted.
LOST_POLLS = 20
NODE_POLLS = 240  # polls (2 hours) after which a node that stays in a state of CHANGING is an error
CALL_SECONDS, CHANGE_SECONDS = 120, 1800  # time limits of a query, and of a creation or deletion
MISSING = ('NOT_FOUND', 'was not found')
PERMANENT = (
  *MISSING,
  'PERMISSION_DENIED',
  'UNAUTHENTICATED',
  'INVALID_ARGUMENT',
  'auth login',
  'unrecognized arguments',
)
NOT_SET_UP = 3

# Stops the process of an earlier run, which would hold the chips, after time to save. A reboot
# deletes the file with the process id.
STOP = """
pid=$(cat /dev/shm/rlhf_jax.pid 2>/dev/null || true)
if [ -n "$pid" ] && grep -qs rlhf_jax.main "/proc/$pid/cmdline"; then
  kill -TERM "$pid" 2>/dev/null || true
  for second in $(seq 60); do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
  kill -KILL "$pid" 2>/dev/null && sleep 2 || true
fi"""
MOUNT = """
command -v mount.nfs >/dev/null ||
  { sudo apt-get -q update && sudo apt-get -q install -y nfs-common; }
sudo mkdir -p /mnt/shared
mountpoint -q /mnt/shared || sudo mount -t nfs -o hard,vers=3 %s /mnt/shared"""
# The Python of the images is too old. The digest is written last, so an interrupted setup is
# repeated.
SETUP = """
mkdir -p rlhf_jax && cd rlhf_jax
rm -f .shipped_digest
[ ! -f .shipped ] || xargs -0 rm -f -- < .shipped
tar -xzf ../rlhf_jax.tar.gz
python3 -m pip install --user --quiet uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv -c constraints.txt -e ".[tpu]"
echo %s > .shipped_digest"""
# A worker that was rebooted has lost its mount, and a run would write to the worker's disk.
CHECK = f'\n[ "$(cat rlhf_jax/.shipped_digest 2>/dev/null)" = %s ] || exit {NOT_SET_UP}'
RUN = """
cd rlhf_jax
echo $$ > /dev/shm/rlhf_jax.pid
export COORDINATOR_ADDRESS=auto JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1
exec .venv/bin/python -m rlhf_jax.main %s"""


class Failure(Exception):
  """An error that ends the command with status 1 and a message of one line."""


def say(text):
  """Prints a message to standard error, apart from the run's output."""
  print(f'launch/tpu_vm.sh: {text}', file=sys.stderr, flush=True)


def back_off(attempt, base, longest):
  """Returns the seconds before the next attempt: exponential backoff with random jitter.

  Args:
    attempt: Number of failed attempts, from 1.
    base: Maximum seconds after the first attempt.
    longest: Maximum seconds after any attempt.
  """
  return min(longest, base * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1)


def state(answer):
  """Reads the state in gcloud's JSON: {state: READY} of a node, {state: {state: ...}} of a request.

  Raises:
    ValueError: If there is no state.
  """
  found = json.loads(answer)
  found = found.get('state') if isinstance(found, dict) else None
  found = found.get('state') if isinstance(found, dict) else found
  if not isinstance(found, str):
    raise ValueError('no state')
  return found


class Tpu:
  """A TPU and its queued request, which have the same name.

  Attributes:
    name: Name of both.
    is_requesting: Whether a request was sent that gcloud has not answered yet.
  """

  def __init__(self, settings, dry_run):
    self.name = settings['TPU_NAME']
    self.zone = settings['ZONE']
    self.accelerator = settings.get('ACCELERATOR')
    self.runtime = settings.get('RUNTIME')
    self.project = settings.get('PROJECT')
    self.spot = bool(settings.get('SPOT'))
    self.shared = settings.get('SHARED')
    self.poll = float(settings.get('POLL_SECONDS') or 30)
    self.dry_run = dry_run
    self.is_requesting = False

  def command(self, *words):
    """Returns a gcloud command line with our zone and project."""
    place = [f'--zone={self.zone}'] + ([f'--project={self.project}'] if self.project else [])
    return ['gcloud', 'compute', 'tpus', *words, *place]

  def stream(self, *words):
    """Runs gcloud on the user's terminal, and returns its exit status."""
    command = self.command(*words)
    if self.dry_run:
      print(shlex.join(command))
      return 0
    return subprocess.run(command).returncode

  def call(self, *words, seconds=CALL_SECONDS, tries=CALL_TRIES, accept=(), check=json.loads):
    """Runs gcloud without the terminal, and repeats it after a transient error.

    Args:
      *words: Arguments of `gcloud compute tpus`.
      seconds: Time limit of one try.
      tries: Number of tries.
      accept: Texts of expected errors.
      check: Function of stdout. A ValueError that it raises counts as a transient error.

    Returns:
      The value of `check`; None after an expected error, and in a dry run.

    Raises:
      Failure: After a permanent error or the last try, with gcloud's error message.
    """
    command = self.command(*words, '--format=json')
    if self.dry_run:
      print(shlex.join(command))
      return None
    for attempt in range(1, tries + 1):
      try:
        answer = subprocess.run(
          command, text=True, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
        error = ' '.join(answer.stderr.split())
        if answer.returncode == 0:
          return check(answer.stdout)
        if any(word in error for word in accept):
          return None
      except FileNotFoundError as missing:
        raise Failure('gcloud is not installed: see https://cloud.google.com/sdk') from missing
      except subprocess.TimeoutExpired:
        error = f'no answer in {seconds} s'
      except ValueError as wrong:
        error = f'{wrong} in the answer {answer.stdout[:200]!r}; {error}'
      what = f'gcloud {words[0]} {words[1]} failed'
      if attempt == tries or any(word in error for word in PERMANENT):
        raise Failure(f'{what}: {error}')
      wait = back_off(attempt, self.poll / 6, 10 * self.poll)
      say(f'{what} (try {attempt} of {tries}); retrying in {wait:.0f} s: {error[-300:]}')
      time.sleep(wait)

  def change(self, *words, accept=()):
    """Runs a gcloud command that changes something; see `call`."""
    self.call(*words, seconds=CHANGE_SECONDS, accept=accept, check=len)

  def node_state(self, tries=CALL_TRIES):
    """Returns the state of the node; None if there is no node."""
    return self.call('tpu-vm', 'describe', self.name, tries=tries, accept=MISSING, check=state)

  def queue_state(self, tries=CALL_TRIES):
    """Returns the state of the request; None if there is no request."""
    return self.call(
      'queued-resources', 'describe', self.name, tries=tries, accept=MISSING, check=state
    )

  def request(self):
    """Requests the TPU. An existing request of this name keeps its place in the queue."""
    spot = ['--spot'] if self.spot else []
    self.is_requesting = True
    self.change(
      'queued-resources',
      'create',
      self.name,
      f'--node-id={self.name}',
      f'--accelerator-type={self.accelerator}',
      f'--runtime-version={self.runtime}',
      *spot,
      accept=('ALREADY_EXISTS', 'already exists'),
    )
    self.is_requesting = False

  def remove(self):
    """Deletes the request and its node, or a node without a request, and waits until both are gone.

    Raises:
      Failure: If they are not gone after NODE_POLLS polls.
    """
    for poll in range(NODE_POLLS):
      if poll:
        time.sleep(self.poll)
      again = poll % 20 == 0  # a deletion that is sent during the creation may have no effect
      if again:
        self.change('queued-resources', 'delete', self.name, '--force', '--quiet', accept=MISSING)
      if self.dry_run:
        return
      if self.queue_state() is None:
        if self.node_state() is None:
          return
        if again:
          self.change('tpu-vm', 'delete', self.name, '--quiet', accept=MISSING)
    raise Failure(f'{self.name} was deleted but still exists')

  def settle(self):
    """Waits until the TPU is ready or must be requested again.

    Returns:
      'READY', or the state that requires a new request; 'NONE' if there is no TPU and no request.

    Raises:
      Failure: If the state is an error.
    """
    last, polls = None, 0
    while True:
      node = self.node_state()
      queue = self.queue_state()
      # A preempted request is SUSPENDING before its node changes its state.
      if node in LOST or node == 'READY' and queue != 'SUSPENDING':
        return node
      if node is None and queue in FINAL or node in CHANGING and queue in ('FAILED', 'SUSPENDED'):
        return queue or 'NONE'
      if node not in (None, 'READY', 'STOPPED', *CHANGING):
        raise Failure(f'{self.name} is {node}: the launcher cannot handle this state; check it')
      polls = polls + 1 if (node, queue) == last else 0
      if not polls:
        last = node, queue
        say(f'waiting: {self.name} is {node or "not created"}, its request is {queue or "missing"}')
      if queue == 'ACTIVE' and node is None and polls >= LOST_POLLS:
        return 'ACTIVE, but its TPU is gone'
      if node is not None and polls >= NODE_POLLS:  # a place in the queue may take days
        raise Failure(f'{self.name} has been {node} for {polls * self.poll / 60:.0f} minutes')
      if node == 'STOPPED':
        say(f'restarting {self.name}')
        self.change('tpu-vm', 'start', self.name)
      time.sleep(self.poll)

  def on_workers(self, text):
    """Runs a shell command on all workers, and ends it if a connection is dead for 2 minutes.

    Returns:
      The first exit status of a worker that is not 0, else 0; 255 if ssh failed.
    """
    return self.stream(
      'tpu-vm',
      'ssh',
      self.name,
      '--worker=all',
      '--ssh-flag=-o ServerAliveInterval=30',
      '--ssh-flag=-o ServerAliveCountMax=4',
      f'--command=set -e{text}',
    )

  def mount(self):
    """Returns the shell commands that mount SHARED."""
    return MOUNT % shlex.quote(self.shared) if self.shared else ''

  def check_setup(self, shipment):
    """Returns 0 if all workers have the files of the shipment, and NOT_SET_UP if one does not."""
    return self.on_workers(CHECK % shipment.digest + self.mount())

  def setup(self, shipment):
    """Sends and installs the files, and returns whether all workers are set up."""
    say(f'sending {shipment.summary}')
    sent = self.stream(
      'tpu-vm', 'scp', str(shipment.archive), f'{self.name}:rlhf_jax.tar.gz', '--worker=all'
    )
    return sent == 0 and self.on_workers(STOP + self.mount() + SETUP % shipment.digest) == 0

  def run(self, arguments):
    """Trains on all workers, and returns the exit status."""
    return self.on_workers(STOP + RUN % shlex.join(arguments))

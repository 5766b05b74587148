#!/usr/bin/env bash
# A Cloud TPU slice: made, set up, trained on by all of its workers, deleted.
#
#   launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENTS]
#
#   create               asks for the TPU and waits until it is there
#   setup                puts this checkout's last commit on all workers and installs it
#   run ARGUMENTS        python -m rlhf_jax.main ARGUMENTS on all workers, until it ends
#   resume ARGUMENTS     the same; makes a new TPU whenever there is none or it was preempted, and goes on
#   fetch FROM TO        copies a file or folder of the TPU to this machine
#   delete               gives the TPU back
#
# --dry-run prints the gcloud commands in place of running them. Settings, from the environment:
#
#   TPU_NAME             of the TPU and of its place in the queue
#   ZONE                 us-central1-a
#   ACCELERATOR          v5litepod-16, v6e-64, v5p-128 and so on
#   RUNTIME              the VM's software: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p,
#                        v2-alpha-tpuv6e for v6e
#   PROJECT              the Google Cloud project; left out, gcloud's own
#   SPOT=1               cheap, and can be preempted at any time
#   SHARED=IP:/EXPORT    an NFS export (Filestore) that all workers mount at /mnt/shared; --workdir,
#                        data and models belong there: it outlives the TPU
#
#   launch/tpu_vm.sh resume --config=configs/X.py --workdir=/mnt/shared/runs/X
#   launch/tpu_vm.sh fetch /mnt/shared/runs/X runs/X
#   launch/tpu_vm.sh delete
set -euo pipefail
cd "$(dirname "$0")/.."

POLL_SECONDS=${POLL_SECONDS:-30}
dry_run=

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' launch/tpu_vm.sh >&2
  exit 2
}

fail() {
  echo "launch/tpu_vm.sh: $*" >&2
  exit 1
}

say() {
  echo "launch/tpu_vm.sh: $*" >&2
}

tpus() { # runs or prints gcloud compute tpus, on our project and zone
  local command=(gcloud compute tpus "$@" "--zone=$ZONE")
  [[ -z ${PROJECT-} ]] || command+=("--project=$PROJECT")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

on_workers() { # which, shell command
  tpus tpu-vm ssh "$TPU_NAME" "--worker=$1" "--command=$2"
}

state() { # of what; NONE where there is no such thing
  local answer
  if answer=$(tpus "$@" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"was not found"* ]]; then
    echo NONE
  else
    fail "gcloud cannot tell the state of $TPU_NAME: $answer"
  fi
}

queue_state() {
  state queued-resources describe "$TPU_NAME" '--format=value(state.state)'
}

node_state() {
  state tpu-vm describe "$TPU_NAME" '--format=value(state)'
}

create() {
  local spot=() now
  [[ -z ${SPOT-} ]] || spot=(--spot)
  tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR" \
    "--runtime-version=$RUNTIME" "${spot[@]}"
  if [[ $dry_run ]]; then
    queue_state
    return
  fi
  while :; do
    now=$(queue_state)
    case $now in
      ACTIVE) break ;;
      FAILED | SUSPENDED | SUSPENDING | NONE)
        fail "the request for $TPU_NAME is $now: \`launch/tpu_vm.sh delete\` removes it; see" \
          "gcloud compute tpus queued-resources describe $TPU_NAME --zone=$ZONE"
        ;;
    esac
    say "$TPU_NAME: $now"
    sleep "$POLL_SECONDS"
  done
}

delete() {
  tpus queued-resources delete "$TPU_NAME" --force --quiet
}

setup() {
  local archive
  archive=$(mktemp -d)/rlhf_jax.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$TPU_NAME:rlhf_jax.tar.gz" --worker=all
  rm -r "$(dirname "$archive")"
  # The images' own Python is too old.
  on_workers all 'set -e
    mkdir -p rlhf_jax && tar -xzf rlhf_jax.tar.gz -C rlhf_jax && cd rlhf_jax
    python3 -m pip install --user --quiet uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv -c constraints.txt -e ".[tpu]"'
  if [[ ${SHARED-} ]]; then
    on_workers all "set -e
      command -v mount.nfs >/dev/null || { sudo apt-get -q update && sudo apt-get -q install -y nfs-common; }
      sudo mkdir -p /mnt/shared
      mountpoint -q /mnt/shared || sudo mount -t nfs -o hard,vers=3 $(printf %q "$SHARED") /mnt/shared"
  fi
}

run() {
  local arguments
  printf -v arguments '%q ' "$@"
  # What a run before has left behind would keep the chips. Its number is forgotten by a reboot.
  on_workers all "cd rlhf_jax
    pid=/dev/shm/rlhf_jax.pid
    if [ -f \$pid ]; then kill -9 \$(cat \$pid) 2>/dev/null; sleep 2; fi
    echo \$\$ > \$pid
    export COORDINATOR_ADDRESS=auto JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1
    exec .venv/bin/python -m rlhf_jax.main $arguments"
}

resume() {
  local status now
  if [[ $dry_run ]]; then
    node_state
    delete
    create
    setup
    run "$@"
    return
  fi
  while :; do
    now=$(node_state)
    if [[ $now != READY ]]; then
      say "$TPU_NAME is not there or was preempted: making a new one"
      now=$(queue_state)
      [[ $now == NONE ]] || delete
      create
      setup
    fi
    status=0
    run "$@" || status=$?
    ((status)) || return 0
    now=$(node_state)
    if [[ $now == READY ]]; then
      fail "the run ended with status $status, and $TPU_NAME is there: its own error stands above"
    fi
  done
}

if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
verb=${1-}
(($#)) && shift
case $verb in
  create | setup | delete) (($# == 0)) || usage ;;
  run | resume) (($#)) || usage ;;
  fetch) (($# == 2)) || usage ;;
  *) usage ;;
esac
needed=(TPU_NAME ZONE)
[[ $verb != create && $verb != resume ]] || needed+=(ACCELERATOR RUNTIME)
for name in "${needed[@]}"; do
  [[ ${!name-} ]] || fail "set $name; \`launch/tpu_vm.sh\` alone says what it is"
done
case $verb in
  fetch) tpus tpu-vm scp --recurse "$TPU_NAME:$1" "$2" --worker=0 ;;
  *) "$verb" "$@" ;;
esac

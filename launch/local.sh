#!/usr/bin/env bash
# Several processes on this machine, as they would run on several machines.
#
#   launch/local.sh -n 4 -- python -m rlhf_jax.main --config=configs/X.py --workdir=runs/X
#
#   -n N   processes (2)
#   -d D   CPU devices of each process (1)
#
# The output of process 0 comes as it is, that of the others with their number in front. Where one
# of them fails the others are ended at once, and the same command goes on from the last checkpoint.
# Runs on CPU devices; with JAX_PLATFORMS=cuda each process takes one GPU.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}

fail() {
  echo "launch/local.sh: $*" >&2
  exit 2
}

count=2 devices=1
while getopts 'n:d:' option; do
  case $option in
    n) count=$OPTARG ;;
    d) devices=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ ${1-} == -- ]] && shift
(($#)) || usage
for number in "$count" "$devices"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "-n and -d take positive whole numbers, not '$number'"
done

free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000)) # below the ports that connections are given
    (exec 4<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

port=$(free_port)
export COORDINATOR_ADDRESS=127.0.0.1:$port PROCESS_COUNT=$count
export JAX_COORDINATOR_BIND_ADDRESS=$COORDINATOR_ADDRESS
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"

# Every process says here that it has ended, and how; so the first that failed is known.
folder=$(mktemp -d)
mkfifo "$folder/ended"
exec 3<>"$folder/ended"
rm -r "$folder"

wrappers=()
end_all() { # each is a process group of its own
  local wrapper signal
  for signal in TERM KILL; do
    for wrapper in "${wrappers[@]}"; do
      kill -"$signal" -- "-$wrapper" 2>/dev/null || true
    done
    [[ $signal == KILL ]] || sleep 1
  done
  wait 2>/dev/null || true
}
trap 'trap "" INT TERM; end_all; echo "launch/local.sh: interrupted, all processes were ended" >&2; exit 130' INT TERM HUP

run() { # number of the process, command
  local number=$1 status=0
  shift
  export PROCESS_ID=$number
  case $JAX_PLATFORMS in
    *cuda*) export JAX_LOCAL_DEVICE_IDS=$number ;;
  esac
  (exec "$@" 3>&-) || status=$?
  echo "$number $status" >&3
}

prefixed() { # number of the process
  local line
  trap '' TERM # the last words of a process that fails are to be seen
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%d] %s\n' "$1" "$line"
  done
}

set -m
for ((number = 0; number < count; number++)); do
  if ((number)); then
    { run "$number" "$@" 2>&1 | prefixed "$number"; } </dev/null &
  else
    run 0 "$@" </dev/null &
  fi
  wrappers+=($!)
done
set +m

ended=()
while ((${#ended[@]} < count)); do
  if ! read -r -t 5 number status <&3; then
    number=
    for candidate in "${!wrappers[@]}"; do # one that was killed with its wrapper has said nothing
      if [[ -z ${ended[candidate]-} ]] && ! kill -0 -- "-${wrappers[candidate]}" 2>/dev/null; then
        read -r -t 1 number status <&3 || number=$candidate status=137
        break
      fi
    done
    [[ -n $number ]] || continue
  fi
  if ((status)); then
    how="ended with status $status"
    ((status <= 128)) || how="was killed by signal $((status - 128)) ($(kill -l $((status - 128))))"
    end_all
    echo "launch/local.sh: process $number (of 0 to $((count - 1))) $how; the others were ended." >&2
    echo "launch/local.sh: the same command goes on from the last checkpoint." >&2
    exit 1
  fi
  ended[number]=yes
done

#!/usr/bin/env bash
# Runs several processes on this machine, as they would run on several machines.
#
#   launch/local.sh -n 4 -- python -m rlhf_jax.main --config=configs/X.py --workdir=runs/X
#
#   -n N   number of processes (default 2)
#   -d D   number of CPU devices of each process (default 1)
#
# Lines of output of process i > 0 begin with [i]. Processes use CPU devices; with
# JAX_PLATFORMS=cuda each process uses one GPU.
#
# On Ctrl-C or SIGTERM, or if a process exits with status 143 or 130, all processes save and exit; a
# second signal kills them. If a process fails, the others are stopped at once. In both cases the
# same command resumes. The exit status is 0, 130 after Ctrl-C, 143 after SIGTERM, or 1 after a
# failure. Environment variables:
#
#   GRACE_SECONDS   time to save before processes are killed (default 120)
#   ALONE_SECONDS   time for processes to exit after another has exited with status 0 (default 60)
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
grace=${GRACE_SECONDS:-120} alone=${ALONE_SECONDS:-60}
for number in "$grace" "$alone"; do
  [[ $number =~ ^[0-9]+$ ]] ||
    fail "GRACE_SECONDS and ALONE_SECONDS must be whole numbers, not '$number'"
done

free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000)) # below the range of ephemeral ports
    (exec 4<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

port=$(free_port)
export COORDINATOR_ADDRESS=127.0.0.1:$port PROCESS_COUNT=$count
export JAX_COORDINATOR_BIND_ADDRESS=$COORDINATOR_ADDRESS
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"

# Each process writes its exit status to a pipe (3), so that the first failure is known. Only this
# script has the write end of a second pipe (6). If the script is killed, the processes read end of
# file.
folder=$(mktemp -d)
mkfifo "$folder/ended" "$folder/alive"
exec 3<>"$folder/ended"
exec 4<>"$folder/alive" # without it, each of the next two lines would wait for the other
exec 5<"$folder/alive"
exec 6>"$folder/alive" 4>&-
rm -r "$folder"

say() { # the terminal may be closed
  echo "launch/local.sh: $*" >&2 || true
}

prefixed() { # number of the process
  local line
  trap '' TERM # so that the last output of a process that fails is shown
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%d] %s\n' "$1" "$line"
  done
}

watch() { # pid of a wrapper; kills its process group if the wrapper or this script has exited
  local code=129
  while ((code > 128)) && kill -0 "$1" 2>/dev/null; do # above 128: the read timed out
    code=0
    read -r -t 5 <&5 || code=$?
  done
  kill -KILL 0
}

run() { # number of the process, command; runs in its own process group
  local number=$1 wrapper=$BASHPID status=127 signals=0 child='' before code watcher
  shift
  exec 6>&-
  trap 'signals=$((signals + 1)); [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  ((number == 0)) || exec > >(exec 3>&- 5<&-; prefixed "$number") 2>&1
  export PROCESS_ID=$number
  case $JAX_PLATFORMS in
    *cuda*) export JAX_LOCAL_DEVICE_IDS=$number ;;
  esac
  watch "$wrapper" 3>&- >/dev/null 2>&1 &
  watcher=$!
  "$@" 3>&- 5<&- &
  child=$!
  ((signals == 0)) || kill -TERM "$child" 2>/dev/null || true
  while :; do # a signal interrupts `wait` before the process exits
    before=$signals code=0
    wait "$child" || code=$?
    ((code == 127)) || status=$code # 127: an earlier `wait` returned the status, or not found
    ((signals != before)) || break
  done
  kill "$watcher" 2>/dev/null || true
  echo "$number $status" >&3
}

wrappers=()
set -m
for ((number = 0; number < count; number++)); do
  run "$number" "$@" </dev/null &
  wrappers+=($!)
done
set +m

ended=() # exit statuses, by number of the process
signal_all() { # signal; sends it to the running processes and their children
  local number
  for number in "${!wrappers[@]}"; do
    [[ ${ended[number]-} ]] || kill -"$1" -- "-${wrappers[number]}" 2>/dev/null || true
  done
}

end_all() { # stops all processes without time to save
  signal_all TERM
  sleep 1
  signal_all KILL
  wait 2>/dev/null || true
}

stopping='' deadline=''
stop() { # exit status, reason; the first call asks all processes to save, the second kills them
  local number
  if [[ $stopping ]]; then
    deadline=$SECONDS
    return
  fi
  stopping=$1 deadline=$((SECONDS + grace))
  say "$2: processes have $grace s to save; a second signal kills them"
  for number in "${!wrappers[@]}"; do # not their children, which a save may need
    [[ ${ended[number]-} ]] || kill -TERM "${wrappers[number]}" 2>/dev/null || true
  done
}
trap 'stop 130 interrupted' INT
trap 'stop 143 terminated' TERM
trap 'stop 129 "the terminal is closed"' HUP

has_line() { # whether a line can be read; a `read` with a timeout may end in the middle of a line
  read -r -t 0 -u 3
}

next_exit() { # sets number and status of a process that has exited, if one exits within 0.2 s
  local candidate
  has_line || sleep 0.2
  for candidate in "${!wrappers[@]}"; do # a process that is killed with its wrapper writes nothing
    if ! has_line && [[ -z ${ended[candidate]-} ]] &&
      ! kill -0 -- "-${wrappers[candidate]}" 2>/dev/null; then
      has_line || { number=$candidate status=137 && return; }
    fi
  done
  has_line && read -r -u 3 number status
}

failed() { # message; stops the other processes
  end_all
  say "$1; the other processes were stopped."
  say "the same command resumes from the last checkpoint."
  exit 1
}

of="of 0 to $((count - 1))" finished=''
while ((${#ended[@]} < count)); do
  if next_exit; then
    ended[number]=$status
    how="ended with status $status"
    ((status <= 128)) || how="was killed by signal $((status - 128)) ($(kill -l $((status - 128))))"
    how="process $number ($of) $how"
    case $status in
      0) finished=${finished:-$SECONDS} first=${first:-$number} ;;
      130 | 143) [[ $stopping ]] || stop "$status" "process $number ($of) was stopped" ;;
      *) if [[ $stopping ]]; then say "$how before it had saved"; else failed "$how"; fi ;;
    esac
  fi
  if [[ $stopping ]]; then
    if ((SECONDS >= deadline && ${#ended[@]} < count)); then
      signal_all KILL
      wait 2>/dev/null || true
      say "killed $((count - ${#ended[@]})) of $count processes before they had saved"
      break
    fi
  elif [[ $finished ]] && ((SECONDS - finished >= alone && ${#ended[@]} < count)); then
    running=$((count - ${#ended[@]}))
    failed "process $first ($of) ended with status 0, and $running still ran $alone s later"
  fi
done
if [[ $stopping && "${ended[*]-}" == *[1-9]* || ${#ended[@]} -lt $count ]]; then
  say "stopped; the same command resumes."
  exit "$stopping"
fi

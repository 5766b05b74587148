#!/usr/bin/env bash
# Creates a Cloud TPU slice, sets it up, runs on all of its workers, and deletes it. Without
# arguments it prints its usage. launch/tpu_vm.py is the program.
exec python3 -S "$(dirname "$0")/tpu_vm.py" "$@"

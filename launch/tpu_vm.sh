#!/usr/bin/env bash
# A Cloud TPU slice: made, set up, trained on by all of its workers, deleted. Without arguments it
# says how it is used; that is the head of launch/tpu_vm.py, which does the work.
exec python3 -S "$(dirname "$0")/tpu_vm.py" "$@"

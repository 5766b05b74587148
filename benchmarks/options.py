"""Flags that the commands of this folder share."""

import os

from absl import flags

from benchmarks import workloads

FLAGS = flags.FLAGS
flags.DEFINE_enum('workload', 's', list(workloads.WORKLOADS), 'Workload.')
flags.DEFINE_enum(
  'variant', 'separate', list(workloads.VARIANTS), 'Trained parameters; see workloads.VARIANTS.'
)
flags.DEFINE_enum('device', 'cpu', ['cpu', 'gpu', 'tpu'], 'Kind of device.')
flags.DEFINE_integer('threads', 2, 'Number of cores on a CPU.')
flags.DEFINE_integer('timed', 3, 'Number of timed updates, in benchmarks of the update alone.')
flags.DEFINE_string('out', 'runs/benchmarks', 'Folder of the results.')


def hold_to_cores():
  """On a CPU, restricts this process and those it starts to `--threads` cores."""
  if FLAGS.device == 'cpu':
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: FLAGS.threads])

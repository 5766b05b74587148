"""Options that the commands of this folder share."""

import os

from absl import flags

from benchmarks import workloads

FLAGS = flags.FLAGS
flags.DEFINE_enum('workload', 's', list(workloads.WORKLOADS), 'Which work.')
flags.DEFINE_enum('way', 'separate', list(workloads.WAYS), 'What is trained, where one thing is.')
flags.DEFINE_enum('device', 'cpu', ['cpu', 'gpu', 'tpu'], 'What computes.')
flags.DEFINE_integer('threads', 2, 'Cores, on a CPU.')
flags.DEFINE_integer('timed', 3, 'Updates to take the time of, where an update is taken by itself.')
flags.DEFINE_string('out', 'runs/benchmarks', 'Folder of the results.')


def hold_to_cores():
  """Restricts this process, and those it starts, to `--threads` cores where the CPU computes."""
  if FLAGS.device == 'cpu':
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: FLAGS.threads])

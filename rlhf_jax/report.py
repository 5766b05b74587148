"""rlhf report --workdir=RUN

Rewrites report.html from the files in the folder of a run, a pipeline or a comparison of policies,
for example after an update of the package. It does not train or sample.

python -m rlhf_jax.report does the same.
"""

import pathlib

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation import report


def write(workdir):
  """Writes the report of a run, a pipeline or a comparison.

  Args:
    workdir: Folder of the run, pipeline or comparison.

  Returns:
    The path of the report.

  Raises:
    UserError: If the folder holds none of them.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / policies.REPORT).exists():
    return policies.write_report(workdir)
  config = identity.read(workdir) or {}
  if 'algorithm' in config:
    return report.of_run(workdir, title=config['algorithm'])
  errors.need(
    'stages' in config,
    f'--workdir={workdir} is not the folder of a run: its config.json is missing, or not of a run',
  )
  # The pipeline has not evaluated its policies yet, so the report has only learning curves.
  stages = {name: value for name, value in config.items() if isinstance(value, dict)}
  report.of_stages(
    workdir,
    workdir=workdir,
    title=next((stage['title'] for stage in stages.values() if 'title' in stage), workdir.name),
    summary='',
    curves=[name for name, stage in stages.items() if 'algorithm' in stage],
  )
  return workdir / 'report.html'


def start():
  """Reads the command line and writes the report."""
  parser = command_line.Arguments('rlhf report', __doc__)
  parser.add_argument('--workdir', required=True, help='folder of the run')
  options = parser.parse_args()
  with command_line.exit_on_error():
    print(f'report: {write(options.workdir)}')


if __name__ == '__main__':
  start()

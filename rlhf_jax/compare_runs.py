"""rlhf compare --runs NAME=FOLDER,NAME=FOLDER ... --workdir OUT [--metric METRIC]
rlhf compare --sweep DIR

Compares training runs at equal budgets and writes comparison.html and comparison.json to OUT:
learning curves with bootstrap bands, interquartile means of the final scores, probabilities of
improvement, the frontier of reward and KL, and a table of final figures, seconds, memory and seeds
that collapsed. Runs with the same NAME are seeds of a group. FOLDER is the folder of a run or of a
pipeline, whose last stage that trains is compared, or a pattern such as 'runs/ppo_*'.

The second form compares the runs of `rlhf sweep`; runs that differ only in the seed form a group.

python -m rlhf_jax.compare_runs does the same.
"""

import glob
import json
import pathlib

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import hyper
from rlhf_jax import identity
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.evaluation import runs as runs_lib
from rlhf_jax.evaluation import runs_page
from rlhf_jax.evaluation import tables

SWEEP = 'sweep.json'  # the config and the runs of a sweep
RESULTS, PAGE = 'comparison.json', 'comparison.html'


def named_runs(texts):
  """Parses lists 'NAME=FOLDER,NAME=FOLDER' into pairs (name, folder), with patterns expanded.

  Raises:
    UserError: A text has another form, or there is no such folder.
  """
  pairs = []
  for pair in ','.join(texts).split(','):
    name, _, pattern = pair.partition('=')
    errors.need(name and pattern, f'--runs={pair!r} must be NAME=FOLDER,NAME=FOLDER')
    folders = sorted(glob.glob(pattern))
    errors.need(folders, f'--runs={pair!r}: there is no folder {pattern}')
    pairs += [(name, folder) for folder in folders]
  return pairs


def of_sweep(workdir, metric='', stage=''):
  """Compares the runs of a sweep that have metrics; see `write` for the other arguments.

  Args:
    workdir: Folder of the sweep.

  Returns:
    The path of the page.

  Raises:
    UserError: It is not the folder of a sweep, or no run has metrics.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / SWEEP
  errors.need(path.exists(), f'--sweep={workdir} is not the folder of a sweep: no {SWEEP}')
  settings = json.loads(path.read_text(encoding='utf-8'))['runs']
  listed = list(settings.values())
  pairs = [
    (hyper.group(run, listed), workdir / name)
    for name, run in settings.items()
    if runs_lib.has_metrics(workdir / name, stage)
  ]
  errors.need(pairs, f'--sweep={workdir}: no run has metrics yet')
  return write(workdir, pairs, metric=metric, stage=stage, title=workdir.name)


def write(workdir, pairs, *, metric='', stage='', title='Comparison of runs'):
  """Compares runs, prints the table, and writes the page.

  Args:
    workdir: Folder for the results.
    pairs: Pairs (group, folder of a run or a pipeline).
    metric: See runs.compare.
    stage: Stage of pipelines; '' for the last one that trains.
    title: Title of the page.

  Returns:
    The path of the page.
  """
  workdir = pathlib.Path(workdir)
  result = runs_lib.compare([runs_lib.read(*pair, stage) for pair in pairs], metric)
  workdir.mkdir(parents=True, exist_ok=True)
  identity.write_json(workdir / RESULTS, result)
  print(tables.stages_table(runs_page.rows(result), title=title, width=140))
  return runs_page.write(workdir / PAGE, result, title=title)


def start():
  """Reads the command line and compares the runs."""
  arguments = command_line.Arguments('rlhf compare', __doc__)
  add = arguments.add_argument
  add('--runs', nargs='+', default=[], help='names and folders of the runs')
  add('--sweep', default='', help='folder of a sweep')
  add('--workdir', default='', help='folder for the results; by default that of the sweep')
  add('--metric', default='', help=f'metric to compare; by default {runs_lib.SCORE}')
  add('--stage', default='', help='stage of pipelines; by default the last one that trains')
  options = arguments.parse_args()
  with command_line.exit_on_error():
    errors.need(bool(options.runs) != bool(options.sweep), 'set exactly one of --runs and --sweep')
    if options.sweep:
      errors.need(not options.workdir, '--workdir has no effect with --sweep')
      page = of_sweep(options.sweep, options.metric, options.stage)
    else:
      errors.need(options.workdir, '--workdir is missing: name a folder for the results')
      holds_run = any(
        (pathlib.Path(options.workdir) / name).exists() for name in workdir_lib.RUN_FILES
      )
      errors.need(not holds_run, f'--workdir={options.workdir} holds a run: name another folder')
      page = write(
        options.workdir, named_runs(options.runs), metric=options.metric, stage=options.stage
      )
    print(f'comparison: {page}')


if __name__ == '__main__':
  start()

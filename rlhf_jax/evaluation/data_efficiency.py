"""A stage that shows a metric of finished runs over the amounts of data that they learned from."""

import pathlib

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import sections
from rlhf_jax.evaluation import tables


def run(folder, *, workdir, title, summary, series, metric, low, high, x, page):
  """Prints the table, and writes results.json and a page with the table and its figure.

  Args:
    folder: pathlib.Path for results.json.
    workdir: Folder of the pipeline, for the page.
    title: Title of the page.
    summary: One or two sentences below the title.
    series: Pairs (label, sequence of (amount of data, stage)).
    metric: Metric whose last logged value is shown.
    low: Metric of the lower end of its interval.
    high: Metric of the upper end of its interval.
    x: Name of the amount of data.
    page: File name of the page in the workdir.
  """
  workdir = pathlib.Path(workdir)
  results = {
    label: {
      amount: {name: last_value(workdir / stage, name) for name in (metric, low, high)}
      for amount, stage in runs
    }
    for label, runs in series
  }
  identity.write_json(folder / 'results.json', results)
  amounts = sorted({amount for values in results.values() for amount in values})
  titles = [x.capitalize(), *results]
  cell = lambda value: f'{value[metric]:.3f} [{value[low]:.3f}, {value[high]:.3f}]' if value else ''
  rows = [
    [str(amount), *(cell(values.get(amount)) for values in results.values())] for amount in amounts
  ]
  print(tables.text(titles, rows, title=title))
  lines = [
    {'label': label, 'points': [(amount, value[metric]) for amount, value in values.items()]}
    for label, values in results.items()
  ]
  figure = figures.points_and_curves(lines, x=x, y=metric, title=title, log_x=True)
  section = sections.Section(
    metric, 'Last values, with 95 % intervals.', [(figure, '')], titles=titles, rows=rows
  )
  sections.write(workdir / page, title=title, summary=summary, sections=[section])
  print(f'page: {workdir / page}')


def last_value(run_folder, name):
  """Returns the last logged value of a metric of a run.

  Raises:
    UserError: The run logged no such metric.
  """
  values = [record[name] for record in metrics_lib.read(run_folder) if name in record]
  errors.need(values, f'{run_folder}: the run logged no metric {name}')
  return values[-1]

"""A table and a figure of how reliable a reward model found its annotators; see annotators.py."""

from rlhf_jax.evaluation import annotators
from rlhf_jax.evaluation import figures

MAX_DRAWN = 40  # annotators in a figure
TITLES = ('Annotator', 'Comparisons', 'Reliability')


def table(rows: annotators.Rows) -> list[list[str]]:
  """Returns the rows of a table with TITLES, the most reliable first; [] before the run's end."""
  rows = [row for row in rows if row['reliability'] is not None]
  return [
    [row['annotator'], str(row['comparisons']), f'{row["reliability"]:.2f}']
    for row in sorted(rows, key=lambda row: -row['reliability'])
  ]


def figure(rows: annotators.Rows) -> str:
  """Returns a figure of the reliabilities as SVG; '' before the run's end or if they are many."""
  rows = sorted(
    (row for row in rows if row['reliability'] is not None), key=lambda row: -row['reliability']
  )
  if not 0 < len(rows) <= MAX_DRAWN:
    return ''
  values = {f'annotator {row["annotator"]}': row['reliability'] for row in rows}
  return figures.reliabilities(values)

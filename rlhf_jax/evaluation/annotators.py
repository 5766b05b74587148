"""annotators.json of a reward model's run: how reliable it found each annotator of its data."""

from collections.abc import Sequence
import json
import pathlib

from rlhf_jax import identity
from rlhf_jax.evaluation import figures

FILE = 'annotators.json'
MAX_DRAWN = 40  # annotators in a figure

Rows = Sequence[dict]  # of {"annotator", "comparisons", "reliability": number or None}
TITLES = ('Annotator', 'Comparisons', 'Reliability')


def write(folder: str | pathlib.Path, rows: Rows) -> None:
  """Writes the annotators of a run."""
  identity.write_json(pathlib.Path(folder) / FILE, {'annotators': list(rows)})


def read(folder: str | pathlib.Path) -> list[dict]:
  """Returns the annotators of a run; [] if it does not tell them apart."""
  path = pathlib.Path(folder) / FILE
  return json.loads(path.read_text(encoding='utf-8'))['annotators'] if path.exists() else []


def learned(folder: str | pathlib.Path) -> dict[str, float]:
  """Returns the reliability of each annotator of a finished run, the most reliable first."""
  values = {row['annotator']: row['reliability'] for row in read(folder)}
  values = {name: value for name, value in values.items() if value is not None}
  return dict(sorted(values.items(), key=lambda item: -item[1]))


def table(rows: Rows) -> list[list[str]]:
  """Returns the rows of a table with TITLES, the most reliable first; [] before the run's end."""
  rows = [row for row in rows if row['reliability'] is not None]
  return [
    [row['annotator'], str(row['comparisons']), f'{row["reliability"]:.2f}']
    for row in sorted(rows, key=lambda row: -row['reliability'])
  ]


def figure(rows: Rows) -> str:
  """Returns a figure of the reliabilities as SVG; '' before the run's end or if they are many."""
  rows = sorted(
    (row for row in rows if row['reliability'] is not None), key=lambda row: -row['reliability']
  )
  if not 0 < len(rows) <= MAX_DRAWN:
    return ''
  values = {f'annotator {row["annotator"]}': row['reliability'] for row in rows}
  return figures.reliabilities(values)

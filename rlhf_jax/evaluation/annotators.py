"""annotators.json of a reward model's run: how reliable it found each annotator of its data."""

from collections.abc import Sequence
import json
import pathlib

from rlhf_jax import identity

FILE = 'annotators.json'

Rows = Sequence[dict]  # of {"annotator", "comparisons", "reliability": number or None}


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

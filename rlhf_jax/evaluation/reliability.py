"""Tables and figures of how reliable a reward model found its annotators; see annotators.py.

`run` compares what was learned with the truth, which is known if the annotators are simulated.
"""

from collections.abc import Sequence
import pathlib

from scipy import stats

from rlhf_jax import errors
from rlhf_jax import identity
from rlhf_jax.evaluation import annotators
from rlhf_jax.evaluation import data_efficiency
from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import sections
from rlhf_jax.evaluation import tables

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


def compare(noise: Sequence[float], values: dict[str, float]) -> dict:
  """Compares learned reliabilities with the noise of simulated annotators.

  Args:
    noise: Probability of a flipped label of annotators '0', '1' and so on; 0.5 is random.
    values: {annotator: learned reliability}.

  Returns:
    'spearman', the rank correlation of reliability and -noise; 'random_lowest', whether those with
    a noise of 0.5 are the least reliable ones, None if there are none; and the 'annotators', dicts.

  Raises:
    UserError: An annotator has no reliability.
  """
  names = [str(number) for number in range(len(noise))]
  errors.need(
    set(names) == set(values),
    f'the reward model knows annotators {sorted(values)}, but noise has {len(noise)} values',
  )
  lowest = sorted(names, key=values.get)[: sum(value == 0.5 for value in noise)]
  learned = [values[name] for name in names]
  return {
    'spearman': float(stats.spearmanr(learned, [-value for value in noise]).statistic),
    'random_lowest': all(noise[int(name)] == 0.5 for name in lowest) if lowest else None,
    'annotators': [
      {'annotator': name, 'noise': float(flipped), 'reliability': value}
      for name, flipped, value in zip(names, noise, learned, strict=True)
    ],
  }


def run(
  folder: pathlib.Path,
  *,
  workdir: str,
  title: str,
  summary: str,
  noise: Sequence[float],
  reliability: str,
  models: Sequence[str],
  page: str,
) -> None:
  """Compares reward models with and without reliabilities, as a stage of a pipeline.

  Prints the results, and writes results.json and a page with tables and a figure.

  Args:
    folder: Folder for results.json.
    workdir: Folder of the pipeline, for the page.
    title: Title of the page.
    summary: One or two sentences below the title.
    noise: See `compare`.
    reliability: Stage of the reward model that learned reliabilities.
    models: Stages of reward models whose held-out accuracy is shown.
    page: File name of the page in the workdir.
  """
  root, metrics = pathlib.Path(workdir), ('accuracy', 'accuracy_low', 'accuracy_high')
  results = compare(noise, annotators.learned(root / reliability))
  results['accuracy'] = {
    stage: [data_efficiency.last_value(root / stage, f'held_out/{name}') for name in metrics]
    for stage in models
  }
  identity.write_json(folder / 'results.json', results)
  cells = [
    [stage, f'{value:.3f}', f'[{low:.3f}, {high:.3f}]']
    for stage, (value, low, high) in results['accuracy'].items()
  ]
  titles = ['Reward model', 'Held-out accuracy', '95 % interval']
  print(tables.text(titles, cells, title=title))
  text = f'Rank correlation with the truth: {results["spearman"]:.2f}.'
  print(text)
  found = results['annotators']
  points = [(row['noise'], row['reliability']) for row in found]
  figure = figures.points_and_curves(
    [{'label': 'annotators', 'points': points}],
    x='probability of a flipped label; 0.5 is random',
    y='learned reliability',
    title='Reliability of the annotators',
  )
  rows = [[row['annotator'], f'{row["noise"]:g}', f'{row["reliability"]:.2f}'] for row in found]
  parts = [
    sections.Section('Accuracy', titles=titles, rows=cells),
    sections.Section('Annotators', text, [(figure, '')], ('Annotator', 'Noise', TITLES[-1]), rows),
  ]
  sections.write(root / page, title=title, summary=summary, sections=parts)
  print(f'page: {root / page}')
